"""The run commands: train, eval, collect, render, replay."""

import dataclasses
import functools
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Generic

import jax

from jaxrl import ranges
from jaxrl.agents import AGENTS
from jaxrl.cli import flags as fl
from jaxrl.errors import UserError
from jaxrl.rollout.executors import Execution
from jaxrl.runs import directory
from jaxrl.runs.config import A, Config
from jaxrl.runs.jsonlines import as_json, read_json
from jaxrl.runs.presets import Preset, preset
from jaxrl.runs.signals import NOT_FINITE, SAVED, StopRequested, StopRequests
from jaxrl.types import Drawable, Env, HostEnv, Relabels


@dataclasses.dataclass(frozen=True)
class TrainOptions(Generic[A]):
    """Train an agent on a dataset, then online in the environment if configured. Or resume a run.

        jaxrl train                                 the default agent in the default maze: minutes on two CPU cores
        jaxrl train bc push --seed 1                another agent, another environment
        jaxrl train fmq maze-large --preset paper   the published sizes, for an accelerator
        jaxrl train --resume runs/NAME              resume from the latest checkpoint, identical to an uninterrupted run
                                                    (except that CPU simulators, ogbench/NAME, start new episodes)

        AGENT        {agents}
        ENVIRONMENT  a name from `jaxrl list`, with options after a question mark ("push?horizon=50"),
                     or your own factory function (my_package.my_module:make)

    Ctrl-C or SIGTERM saves at the end of the epoch and stops; a second one stops immediately.

        exit code 0    trained; the last line is `result: {...}` in JSON
                  2    usage error, explained in one line
                  3    parameters became NaN or infinite; the last checkpoint is finite
                  70   an error that nobody foresaw; --debug shows its trace
                  75   stopped and saved: resume with --resume
                  130  stopped immediately; the last checkpoint is intact
    """

    config: Annotated[Config[A], fl.Flat]
    preset: Preset = "quick"
    """Source of the defaults: `quick` takes minutes on two CPU cores, `paper` has the published sizes."""
    variant: str | None = None
    """Named agent configuration, see `jaxrl list`; for dqc, for example, qc, qc-ns, ns and os."""
    out: Path | None = None
    """Run directory; by default a new one under runs/."""
    resume: Path | None = None
    """Run directory to resume; no flags other than --restart, --devices and those of --wandb apply."""
    restart: bool = False
    """With --resume, begin again; checkpoints and metrics that are there are moved aside."""
    devices: int | None = None
    """Number of devices to shard environments, replay and batches over; by default 1, or that of the resumed run."""
    plan: bool = False
    """Print the run's memory requirements and exit."""
    wandb: bool = False
    """Also log to Weights & Biases. Its axis is updates plus environment steps, as that of TensorBoard."""
    wandb_project: str | None = None
    """Project there; by default that of the environment variable WANDB_PROJECT, or jaxrl. Implies --wandb."""


@dataclasses.dataclass(frozen=True)
class EvalOptions(Generic[A]):
    """Evaluate a run's latest checkpoint. Flags override the run's agent configuration.

    jaxrl eval runs/NAME --episodes 500
    jaxrl eval runs/NAME --agent.test-sampler beam_search
    jaxrl eval runs/NAME --execution.kind ensemble --execution.execute 1
    """

    agent: A
    execution: Execution
    env: str
    """Environment, with the same observation and action sizes as the run's."""
    episodes: int = 100
    """Number of episodes."""
    seed: int = 12345
    """Seed of the episodes; compare runs with equal seeds."""


@dataclasses.dataclass(frozen=True)
class CollectOptions:
    """Record a scripted behavior of an environment as a dataset.

    jaxrl collect maze-medium --behaviour good --steps 100000
    jaxrl collect ogbench/cube-single-play-v0 --behaviour 'play?noise=0.2'
    """

    behaviour: str | None = None
    """Behavior level, see `jaxrl list`; by default medium, and for OGBench the type in the environment's name."""
    steps: int = 1_000_000
    """Minimum number of steps to record."""
    seed: int = 0
    """Random seed."""
    out: Path | None = None
    """File to write (.npz); by default datasets/ENVIRONMENT-BEHAVIOUR-STEPS-sSEED.npz, or OGBench's own name."""


@dataclasses.dataclass(frozen=True)
class RenderOptions:
    """Render an episode of a run's latest checkpoint as an animation."""

    out: Path | None = None
    """File to write (.gif); by default RUN/rollout.gif."""
    seed: int = 12345
    """Seed of the episode."""


@dataclasses.dataclass(frozen=True)
class ReplayOptions:
    """Repeat a run's first epochs and compare their metrics bit for bit. Exit code 1: they differ, printed in one line.

    Equality requires the same type of machine and the same package versions, listed in the run's manifest.json.
    """

    epochs: int = 3
    """Number of epochs."""


def train(args: list[str]) -> int:
    """Returns the exit code of `jaxrl train`."""
    names, flags = fl.positionals(args, 2)
    agent = names[0] if names else "fmq"
    defaults = preset(fl.peek(flags, "--preset") or "quick", agent, fl.peek(flags, "--variant"))
    if len(names) == 2:
        defaults = dataclasses.replace(defaults, env=names[1])
    usage = "jaxrl train [AGENT] [ENVIRONMENT]"
    options = fl.parse(usage, fl.of_agent(TrainOptions, AGENTS[agent]), TrainOptions(defaults), flags)
    if options.resume is not None:
        others = {flag.partition("=")[0] for flag in flags if flag.startswith("--")}
        if not_for_it := names + sorted(
            others - {"--resume", "--restart", "--no-restart", "--wandb-project", "--wandb", "--no-wandb", "--devices"}
        ):
            raise UserError(f"--resume: a run resumes with its own configuration, {not_for_it[0]} does not apply")
    if options.resume is not None and (options.resume.parent.parent / "sweep.json").exists():
        raise UserError(f"--resume {options.resume}: is a member of a sweep, use jaxrl sweep --resume on the sweep")
    if options.restart and options.resume is None:
        raise UserError("--restart: applies to --resume only; a new run begins by itself")
    config = options.config if options.resume is None else directory.read_config(options.resume)
    config.check()
    path = options.resume or options.out or directory.default_path(agent, config.env, config.seed)
    return _train(config, fl.make(config.env), path, options)


def _train(config: Config, environment: Env | HostEnv, path: Path, options: TrainOptions) -> int:
    from jaxrl import sharding
    from jaxrl.runs import boards, driver, memory
    from jaxrl.runs.datasets import with_data

    config = with_data(config, environment)
    if options.plan:
        # Compilation dominates peak process memory: include it even if the program is in the cache.
        jax.config.update("jax_enable_compilation_cache", False)
        print(memory.plan(config, environment))
        return 0
    wandb = options.wandb_project or options.wandb
    if wandb:
        boards.check_wandb()
    memory.check(config, environment)
    known = {} if options.resume is None else read_json(path / "manifest.json", f"{path} is not a run directory")
    count = options.devices or known.get("devices", 1)
    sharding.check(config.agent, environment, config.schedule.envs, count)
    drive = driver.start if options.resume is None else functools.partial(driver.resume, restart=options.restart)
    with StopRequests() as stop, sharding.across(count):
        try:
            result = drive(config, environment, path, stop, wandb)
        except StopRequested:
            print(f"stopped and saved; go on with: jaxrl train --resume {shlex.quote(str(path))}", file=sys.stderr)
            return SAVED
    if result.get("status") != driver.DIVERGED:
        print(driver.table(result))
    print(f"result: {json.dumps(result)}")
    return NOT_FINITE if result.get("status") == driver.DIVERGED else 0


def evaluate(args: list[str]) -> int:
    """Returns the exit code of `jaxrl eval`."""
    path, flags = fl.run_directory("eval", args)
    config = preset("quick", "fmq") if path is None else directory.read_config(path)
    execution = config.execution if fl.peek(flags, "--execution.kind") is None else Execution()
    defaults = EvalOptions(config.agent, execution, config.env, seed=config.schedule.eval_seed)
    options = fl.parse("jaxrl eval RUN", fl.of_agent(EvalOptions, type(config.agent)), defaults, flags)
    schedule = dataclasses.replace(config.schedule, eval_episodes=options.episodes, eval_seed=options.seed)
    given = {"agent": options.agent, "execution": options.execution, "env": options.env}
    config = dataclasses.replace(config, schedule=schedule, **given)
    config.check()

    from jaxrl.runs import evaluation

    row = evaluation.evaluate(config, fl.make(config.env), path)
    about = {"run": str(path), "env": config.env, "episodes": options.episodes, "seed": options.seed}
    print(f"result: {json.dumps(about | as_json(row))}")
    return 0


def collect(args: list[str]) -> int:
    """Returns the exit code of `jaxrl collect`."""
    names, flags = fl.positionals(args, 1)
    options = fl.parse("jaxrl collect ENVIRONMENT", CollectOptions, CollectOptions(), flags)
    if not names:
        raise UserError("collect: name an environment, for example `jaxrl collect maze-medium`")
    if options.steps < 1:
        raise UserError(f"steps = {options.steps}: must be at least 1")
    ranges.check_seed("seed", options.seed)
    from jaxrl.data import files
    from jaxrl.rollout import host, record
    from jaxrl.runs.datasets import data_path

    environment, behaviour = fl.make(names[0]), options.behaviour or "medium"
    if isinstance(environment, HostEnv):
        script, episodes = host.script_of(environment, options.behaviour, options.steps)
        path = options.out or Path("datasets") / f"{script.dataset}.npz"
    else:
        path = options.out or data_path(names[0], behaviour, options.steps, options.seed)
    if path.suffix != ".npz":
        raise UserError(f"--out {path}: the name of a dataset file ends in .npz")
    if path.exists():
        raise UserError(f"{path} exists: name another file with --out")
    if isinstance(environment, HostEnv):
        dataset = host.record(script, episodes, options.seed)
    else:
        dataset = record.record(environment, behaviour, options.steps, options.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.save(path, dataset)
    relabel = environment.relabel if isinstance(environment, Relabels) else None
    print(files.format_report(files.describe(files.load(path), relabel)))
    return 0


def render(args: list[str]) -> int:
    """Returns the exit code of `jaxrl render`."""
    path, flags = fl.run_directory("render", args)
    options = fl.parse("jaxrl render RUN", RenderOptions, RenderOptions(), flags)
    config = directory.read_config(path)
    environment = fl.make(config.env)
    if not isinstance(environment, HostEnv | Drawable):
        raise UserError(f"environment {config.env!r} has no draw(obs, size) and cannot be rendered")
    out = options.out or path / "rollout.gif"
    if out.suffix != ".gif":
        raise UserError(f"--out {out}: the name of an animation ends in .gif")

    ranges.check_seed("seed", options.seed)
    schedule = dataclasses.replace(config.schedule, eval_seed=options.seed, eval_episodes=1)
    from jaxrl.runs import evaluation

    evaluation.render(dataclasses.replace(config, schedule=schedule), environment, path, out)
    print(out)
    return 0


def replay(args: list[str]) -> int:
    """Returns the exit code of `jaxrl replay`: 0 if the repetition is identical, else 1."""
    path, flags = fl.run_directory("replay", args)
    options = fl.parse("jaxrl replay RUN", ReplayOptions, ReplayOptions(), flags)
    if options.epochs < 1:
        raise UserError(f"epochs = {options.epochs}: must be at least 1")
    config = directory.read_config(path)
    from jaxrl.runs import driver

    difference = driver.replay(config, fl.make(config.env), path, options.epochs)
    print("identical" if difference is None else f"different: {difference}")
    return 0 if difference is None else 1
