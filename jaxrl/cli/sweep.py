"""The command `jaxrl sweep`: flags with several values are sweep axes, everything else is as in `jaxrl train`."""

import contextlib
import dataclasses
import functools
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Generic

from jaxrl.agents import AGENTS
from jaxrl.cli import flags as fl
from jaxrl.errors import UserError
from jaxrl.runs import directory
from jaxrl.runs.config import A, Config
from jaxrl.runs.presets import Preset, preset
from jaxrl.runs.signals import SAVED, StopRequested, StopRequests
from jaxrl.sweeps import processes as machines
from jaxrl.sweeps import space as members
from jaxrl.sweeps.processes import Machine
from jaxrl.sweeps.space import Draw, Settings, Space


@dataclasses.dataclass(frozen=True)
class Slurm:
    """Resources requested by the batch script."""

    nodes: int = 1
    """Number of nodes, one process on each."""
    gpus: int = 1
    """GPUs per node."""
    hours: float = 24.0
    """Time limit; two minutes before it, the sweep saves and is requeued."""


@dataclasses.dataclass(frozen=True)
class SweepOptions(Generic[A]):
    """Train many settings and seeds as one program. Any flag of `jaxrl train` may have several values.

        jaxrl sweep fmq maze-medium --agent.eta 0.3 1 3 --agent.adam.lr 1e-4 3e-4 --seeds 16  96 runs, grid
        jaxrl sweep bc --agent.adam.lr log:1e-5:1e-2 --draws 32                               random search
        jaxrl sweep fmq --agent.eta 0.3 1 --agent.beta 0 1 --paired agent.eta agent.beta      paired values
        jaxrl sweep qc --agent.windows.chunk 1 2 5 --env maze-medium maze-large               six programs, one by one
        jaxrl sweep --resume runs/NAME                                                        resume exactly

    Fields that change the program (integers, strings, lists, everything outside the agent) need one program per value.
    Lists are comma-separated: --agent.critic.net.hidden 256,256 512,512. Distributions are uniform:LOW:HIGH or
    log:LOW:HIGH.
    Members share the dataset. A member whose parameters become non-finite is stopped and reported. Every member is
    equivalent to a run of `jaxrl train`; `jaxrl eval` and `render` accept its folder, runs/NAME/members/007.

    Members are distributed over the devices of this machine, and over several machines if SLURM, MPI or Kubernetes
    starts this command on each, with --out in a shared folder. Repeating the command resumes the sweep in its folder.

        exit code 0    done; the last line is `result: {...}` in JSON, the report is in runs/NAME/report
                  2    usage error, explained in one line
                  75   stopped and saved, here or in another process: repeat the command, or use --resume
                  130  stopped immediately; the last checkpoint is intact
    """

    config: Annotated[Config[A], fl.Flat]
    settings: Annotated[Settings, fl.Flat]
    slurm: Slurm = dataclasses.field(default_factory=Slurm)
    preset: Preset = "quick"
    """Source of the defaults: `quick` takes minutes on two CPU cores, `paper` has the published sizes."""
    variant: str | None = None
    """Named agent configuration, see `jaxrl list`."""
    seeds: int = 1
    """Number of seeds per setting, starting at --seed."""
    draws: int = 0
    """Number of random settings per combination of the listed values."""
    draw_seed: int = 0
    """Seed of the random settings."""
    paired: tuple[str, ...] = ()
    """Fields whose values are paired instead of crossed."""
    out: Path | None = None
    """Folder of the sweep; by default a new one under runs/, named after the job under a scheduler."""
    resume: Path | None = None
    """Folder of the sweep to resume."""
    plan: bool = False
    """Print the programs, their members, memory and time, and exit."""
    print_slurm: bool = False
    """Print a SLURM batch script for this sweep, and exit."""
    wandb: bool = False
    """At the end, also send the members' metrics to Weights & Biases, as a group with the sweep's name."""
    wandb_project: str | None = None
    """Project there; by default that of the environment variable WANDB_PROJECT, or jaxrl. Implies --wandb."""
    coordinator: str | None = None
    """Address of process 0, HOST:PORT, if no scheduler provides it."""
    processes: int | None = None
    """Number of processes."""
    process: int | None = None
    """Index of this process, from 0."""


def sweep(args: list[str]) -> int:
    """Returns the exit code of `jaxrl sweep`."""
    names, flags = fl.positionals(args, 2)
    agent = names[0] if names else "fmq"
    defaults = preset(fl.peek(flags, "--preset") or "quick", agent, fl.peek(flags, "--variant"))
    if len(names) == 2:
        defaults = dataclasses.replace(defaults, env=names[1])
    default = SweepOptions(defaults, Settings())
    kind = fl.of_agent(SweepOptions, AGENTS[agent])
    parse = functools.partial(fl.parse, "jaxrl sweep [AGENT] [ENVIRONMENT]", kind, default)
    if fl.wants_help(flags):
        parse(["--help"])
    rest, words = split(flags, dict(members.fields(defaults)))
    options = parse(rest)
    if options.print_slurm:
        print(batch_script(names, flags, options))
        return 0
    options.settings.check()
    for flag, value in (("--coordinator", options.coordinator), ("--process", options.process)):
        if value is not None and options.processes is None:
            raise UserError(f"{flag} {value}: applies to several processes only: name their number with --processes")
    if options.resume is not None:
        if other := names + sorted(words) + [flag for flag in rest if flag.startswith("--") and not stays(flag)]:
            raise UserError(f"--resume: a sweep resumes with its own configuration, {other[0]} does not apply")
        return _sweep(None, options, options.resume)
    space = space_of(options, words, lambda flags: parse(flags).config)
    space.members()
    return _sweep(space, options, options.out or default_path(agent, options))


STAYS = (
    "resume",
    "devices",
    "wandb",
    "no-wandb",
    "wandb-project",
    "checkpoint-seconds",
    "patience",
    "coordinator",
    "processes",
    "process",
)


def stays(flag: str) -> bool:
    """Returns whether a flag sets how a sweep is executed, not what it computes."""
    return flag.removeprefix("--").partition("=")[0] in STAYS


def default_path(agent: str, options: SweepOptions) -> Path:
    """Returns the folder of a new sweep. Raises UserError if several processes could not agree on it."""
    if (job := machines.job()) is not None and machines.asked_by_environment():
        return Path("runs") / f"sweep-{agent}-{directory.plain(options.config.env)}-job{job}"
    if options.processes is not None or machines.asked_by_environment():
        raise UserError("--out: required with several processes, a folder shared by all")
    return directory.default_path(f"sweep-{agent}", options.config.env, options.config.seed)


# Parsing of sweep axes


def split(flags: list[str], known: dict[str, Any]) -> tuple[list[str], dict[str, list[str]]]:
    """Returns the flags with one value, unchanged, and the values of axes by dotted field.

    Raises UserError if a flag with several values is not a field.
    """
    rest, axes = [], {}
    for flag, words in grouped(flags):
        path = flag.removeprefix("--").replace("-", "_")
        many = len(words) > 1 and not (isinstance(known.get(path), tuple) and not any("," in word for word in words))
        if path in known and (many or any(is_draw(word) or "," in word for word in words)):
            if path in axes:
                raise UserError(f"{flag}: given twice")
            axes[path] = words
        elif len(words) > 1 and path not in ("rungs", "paired") and not isinstance(known.get(path), tuple):
            raise UserError(f"{flag} {' '.join(words)}: not a sweepable field{fl.nearest(flag, flags_of(known))}")
        else:
            rest += [flag, *words]
    return rest, axes


def flags_of(known: dict[str, Any]) -> list[str]:
    """Returns the flags for dotted field names."""
    return [f"--{path.replace('_', '-')}" for path in known]


def grouped(flags: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yields each flag with its values; negative numbers are values."""
    flag, words = "", []
    for word in [*flags, "--"]:
        if not word.startswith("--"):
            words.append(word)
            continue
        if flag or words:
            if not flag:
                raise UserError(f"unexpected argument {words[0]!r}: names must come before flags")
            yield flag, words
        flag, equals, value = word.partition("=")
        words = [value] if equals else []


def is_draw(word: str) -> bool:
    """Returns whether a value is a distribution."""
    return word.startswith(("uniform:", "log:"))


def space_of(options: SweepOptions, words: dict[str, list[str]], parse: Any) -> Space:
    """Returns the sweep's space; `parse` maps flags to a configuration."""
    grid, drawn = {}, {}
    for path, each in words.items():
        members.check_axis(options.config, path)
        if any(is_draw(word) for word in each):
            drawn[path] = draw_of(path, each)
        else:
            grid[path] = tuple(value_of(path, word, parse, options.config) for word in each)
    paired = tuple(path.replace("-", "_") for path in options.paired)
    return Space(options.config, grid, paired, drawn, options.draws, options.draw_seed, options.seeds)


def draw_of(path: str, words: list[str]) -> Draw:
    """Returns the distribution that the values denote. Raises UserError if they are not one."""
    kind, *bounds = words[0].split(":")
    with contextlib.suppress(ValueError):
        low, high = map(float, bounds)
        if len(words) == 1:
            return Draw(kind, low, high)  # ty: ignore[invalid-argument-type]
    raise UserError(f"{path} = {' '.join(words)}: a distribution is a single value, {kind}:LOW:HIGH with two numbers")


def value_of(path: str, word: str, parse: Any, config: Config) -> Any:
    """Returns one value of a field, parsed as in `jaxrl train`."""
    flag, before = f"--{path.replace('_', '-')}", dict(members.fields(config))[path]
    if isinstance(before, bool):
        if word.lower() not in ("true", "false"):
            raise UserError(f"{path} = {word}: must be true or false")
        return word.lower() == "true"
    words = [part for part in word.split(",") if part] if isinstance(before, tuple) else [word]
    return dict(members.fields(parse([flag, *words])))[path]


# Execution


def _sweep(space: Space | None, options: SweepOptions, path: Path) -> int:
    from jaxrl.runs import boards
    from jaxrl.sweeps import estimate
    from jaxrl.sweeps import sweep as sweeps

    make, settings = functools.cache(fl.make), options.settings
    if options.plan:
        if space is None:
            raise UserError("--plan: applies to new sweeps only")
        print(estimate.forecast(space, settings, make))
        return 0
    asked = sweeps.asked_for(space, settings) if space is not None else {"resume": str(path)}
    machine = Machine()
    if options.processes is not None or machines.asked_by_environment():
        machine = machines.rendezvous(options.coordinator, options.processes, options.process, asked)
    settings.local()
    wandb = options.wandb_project or options.wandb
    if wandb:
        boards.check_wandb()
    with StopRequests() as stop:
        try:
            if space is None:
                done = sweeps.resume(path, settings, make, stop, machine)
            else:
                done = sweeps.start(space, settings, path, make, stop, machine)
        except StopRequested:
            print(f"stopped and saved; go on with: jaxrl sweep --resume {shlex.quote(str(path))}", file=sys.stderr)
            return SAVED
    if machine.process == 0:
        for member in done.everyone if wandb else ():
            boards.publish(done.path / "members" / member.name, wandb, group=done.path.resolve().name)
        print(f"result: {json.dumps(sweeps.finish(done))}")
    return 0


def batch_script(names: list[str], flags: list[str], options: SweepOptions) -> str:
    """Returns a SLURM script that runs the sweep and requeues itself when it stops early with a checkpoint."""
    asked = [(flag, words) for flag, words in grouped(flags) if not flag.startswith(("--print-slurm", "--slurm."))]
    words = [word for flag, words in asked for word in (flag, *words)]
    minutes, slurm = max(round(60 * options.slurm.hours), 1), options.slurm
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name={options.out.name if options.out else 'jaxrl-sweep'}",
        f"#SBATCH --nodes={slurm.nodes}",
        "#SBATCH --ntasks-per-node=1",
        f"#SBATCH --gpus-per-node={slurm.gpus}",
        f"#SBATCH --time={minutes // 60}:{minutes % 60:02d}:00",
        "#SBATCH --signal=TERM@120",
        "#SBATCH --requeue",
        "",
        f"srun {shlex.join(['jaxrl', 'sweep', *names, *words])}",
        "code=$?",
        f'if [ "$code" -eq {SAVED} ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
        'exit "$code"',
    ]
    return "\n".join(lines)
