"""The command `jaxrl sweep`: flags with several values are axes, all else is as in `jaxrl train`."""

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
    """What a batch script asks for."""

    nodes: int = 1
    """Nodes, with a process on each."""
    gpus: int = 1
    """GPUs per node."""
    hours: float = 24.0
    """Time limit; two minutes before it the sweep saves, and is queued again."""


@dataclasses.dataclass(frozen=True)
class SweepOptions(Generic[A]):
    """Train many settings and seeds as one program. Any flag of `jaxrl train` may have several values.

        jaxrl sweep fmq maze-medium --agent.eta 0.3 1.0 3.0 --agent.lr 1e-4 3e-4 --seeds 16      96 runs, crossed
        jaxrl sweep bc --agent.lr log:1e-5:1e-2 --draws 32                                    drawn at random
        jaxrl sweep fmq --agent.eta 0.3 1 --agent.lr 1e-4 3e-4 --paired agent.eta agent.lr    side by side
        jaxrl sweep qc --agent.chunk 1 5 10 --env maze-medium maze-large                      six programs, in a row
        jaxrl sweep --resume runs/NAME                                                        on, as if it never stopped

    What shapes the program (whole numbers, words, lists, all that is not the agent's) makes a program for each value.
    Lists are written with commas: --agent.actor-hidden 256,256 512,512. Draws are uniform:LOW:HIGH or log:LOW:HIGH.
    Members share the data. One whose parameters are no longer finite leaves, and is reported. Every member is the run
    that `jaxrl train` would have made; `jaxrl eval` and `render` take its folder, runs/NAME/members/007.

    Members are spread over the devices of this machine, and over several machines where SLURM, MPI or Kubernetes
    started this command on each of them, with --out in a folder that all see. The same command goes on in its folder.

        exit code 0    done; the last line is `result: {...}` in JSON, the report is in runs/NAME/report
                  2    a mistake, which one line names
                  75   stopped and saved, here or in another process: the same command goes on, or --resume
                  130  stopped at once; the last checkpoint is whole
    """

    config: Annotated[Config[A], fl.Flat]
    settings: Annotated[Settings, fl.Flat]
    slurm: Slurm = dataclasses.field(default_factory=Slurm)
    preset: Preset = "quick"
    """Where the defaults come from: minutes on two CPU cores, or the published sizes."""
    variant: str | None = None
    """Named setting of the agent's fields, see `jaxrl list`."""
    seeds: int = 1
    """Seeds of every setting, from --seed on."""
    draws: int = 0
    """Settings that are drawn, for every combination of the values that are named."""
    draw_seed: int = 0
    """Seed of the draws."""
    paired: tuple[str, ...] = ()
    """Fields whose values go side by side instead of being crossed."""
    out: Path | None = None
    """Folder of the sweep; by default a new one under runs/, and the job's own under a scheduler."""
    resume: Path | None = None
    """Go on with the sweep in this folder."""
    plan: bool = False
    """Print the programs, their members, memory and time, and stop."""
    print_slurm: bool = False
    """Print a batch script that makes this sweep, and stop."""
    coordinator: str | None = None
    """Address of the first of several processes, HOST:PORT, where no scheduler says it."""
    processes: int | None = None
    """How many there are."""
    process: int | None = None
    """Which of them this is, from 0."""


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
    if options.resume is not None:
        if other := names + sorted(words) + [flag for flag in rest if flag.startswith("--") and not stays(flag)]:
            raise UserError(f"--resume: a sweep goes on as it began, {other[0]} does not apply")
        return _sweep(None, options, options.resume)
    space = space_of(options, words, lambda flags: parse(flags).config)
    space.members()
    return _sweep(space, options, options.out or default_path(agent, options))


STAYS = ("resume", "devices", "checkpoint-seconds", "patience", "coordinator", "processes", "process")


def stays(flag: str) -> bool:
    """Whether a flag says how a sweep is carried out rather than which one it is."""
    return flag.removeprefix("--").partition("=")[0] in STAYS


def default_path(agent: str, options: SweepOptions) -> Path:
    """Returns the folder of a new sweep. Raises UserError where several processes could not know it."""
    if (job := machines.job()) is not None and machines.asked_by_environment():
        return Path("runs") / f"sweep-{agent}-{directory.plain(options.config.env)}-job{job}"
    if options.processes is not None or machines.asked_by_environment():
        raise UserError("--out: name the folder, which all processes see")
    return directory.default_path(f"sweep-{agent}", options.config.env, options.config.seed)


# From words to axes


def split(flags: list[str], known: dict[str, Any]) -> tuple[list[str], dict[str, list[str]]]:
    """Returns the flags with one value, as they are, and the words of those that are axes, by dotted field.

    Raises UserError where a flag of several values is no field.
    """
    rest, axes = [], {}
    for flag, words in grouped(flags):
        path = flag.removeprefix("--").replace("-", "_")
        many = len(words) > 1 and not (isinstance(known.get(path), tuple) and not any("," in word for word in words))
        if path in known and (many or any(is_draw(word) or "," in word for word in words)):
            if path in axes:
                raise UserError(f"{flag}: is given twice")
            axes[path] = words
        elif len(words) > 1 and path not in ("rungs", "paired") and not isinstance(known.get(path), tuple):
            raise UserError(f"{flag} {' '.join(words)}: no field that can be swept{fl.nearest(flag, flags_of(known))}")
        else:
            rest += [flag, *words]
    return rest, axes


def flags_of(known: dict[str, Any]) -> list[str]:
    """Returns the flags of dotted fields."""
    return [f"--{path.replace('_', '-')}" for path in known]


def grouped(flags: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yields each flag with the words that follow it; numbers below zero are words."""
    flag, words = "", []
    for word in [*flags, "--"]:
        if not word.startswith("--"):
            words.append(word)
            continue
        if flag or words:
            if not flag:
                raise UserError(f"unexpected argument {words[0]!r}: names come first")
            yield flag, words
        flag, equals, value = word.partition("=")
        words = [value] if equals else []


def is_draw(word: str) -> bool:
    """Whether a word is a distribution."""
    return word.startswith(("uniform:", "log:"))


def space_of(options: SweepOptions, words: dict[str, list[str]], parse: Any) -> Space:
    """Returns what is swept; `parse` gives the configuration that flags make of the defaults."""
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
    """Returns a distribution from its word. Raises UserError where it is not one."""
    kind, *bounds = words[0].split(":")
    with contextlib.suppress(ValueError):
        low, high = map(float, bounds)
        if len(words) == 1:
            return Draw(kind, low, high)  # ty: ignore[invalid-argument-type]
    raise UserError(f"{path} = {' '.join(words)}: a distribution is one word, {kind}:LOW:HIGH with two numbers")


def value_of(path: str, word: str, parse: Any, config: Config) -> Any:
    """Returns one value of a field from its word, read as `jaxrl train` reads it."""
    flag, before = f"--{path.replace('_', '-')}", dict(members.fields(config))[path]
    if isinstance(before, bool):
        if word.lower() not in ("true", "false"):
            raise UserError(f"{path} = {word}: must be true or false")
        return word.lower() == "true"
    words = [part for part in word.split(",") if part] if isinstance(before, tuple) else [word]
    return dict(members.fields(parse([flag, *words])))[path]


# Carrying it out


def _sweep(space: Space | None, options: SweepOptions, path: Path) -> int:
    from jaxrl.sweeps import estimate
    from jaxrl.sweeps import sweep as sweeps

    make, settings = functools.cache(fl.make), options.settings
    if options.plan:
        if space is None:
            raise UserError("--plan: is for a new sweep")
        print(estimate.forecast(space, settings, make))
        return 0
    asked = sweeps.asked_for(space, settings) if space is not None else {"resume": str(path)}
    machine = Machine()
    if options.processes is not None or machines.asked_by_environment():
        machine = machines.rendezvous(options.coordinator, options.processes, options.process, asked)
    settings.local()
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
        print(f"result: {json.dumps(sweeps.finish(done))}")
    return 0


def batch_script(names: list[str], flags: list[str], options: SweepOptions) -> str:
    """Returns a SLURM script that makes the sweep, and queues itself again where it was saved before its end."""
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
