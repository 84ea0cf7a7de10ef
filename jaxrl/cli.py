"""The command line, `jaxrl COMMAND ...`. Flags are fields of dataclasses; a mistake is one line and exit code 2.

What takes long to import is imported by the command that needs it, so that help and mistakes answer soon.
"""

import contextlib
import dataclasses
import difflib
import inspect
import io
import itertools
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Generic

import jax
import tyro

from jaxrl import rundir
from jaxrl.agents import AGENTS
from jaxrl.config import PRESETS, VARIANTS, A, Config, Preset, preset
from jaxrl.diffusion import Sampler
from jaxrl.errors import UserError, unknown
from jaxrl.generator import Generator
from jaxrl.signals import ABORTED, SAVED, StopRequests
from jaxrl.types import on_host

Flat = tyro.conf.arg(name="")  # a dataclass whose fields are flags of their own
FLAT_FIELDS = ("config", "generator", "sampler")  # which are those
SETTINGS = (tyro.conf.DisallowNone,)  # a flag that is not given is None, the word "None" is not


@dataclasses.dataclass(frozen=True)
class TrainOptions(Generic[A]):
    """Train an agent on a dataset, then, if it learns online, in the environment. Or go on with a run.

        jaxrl train                                 the default agent in the default maze: minutes on two CPU cores
        jaxrl train bc push --seed 1                another agent, another environment
        jaxrl train fmq maze-large --preset paper   the published sizes, for an accelerator
        jaxrl train --resume runs/NAME              on from the newest checkpoint, exactly as if it had never stopped
                                                    (but that simulators on the CPU, ogbench/NAME, begin new episodes)

        AGENT        {agents}
        ENVIRONMENT  a name of `jaxrl list`, with options after a question mark ("push?horizon=50"),
                     or a function of your own that makes one (my_package.my_module:make)

    Ctrl-C or SIGTERM saves at the end of the epoch and stops; a second one stops at once.

        exit code 0    trained; the last line is `result: {...}` in JSON
                  2    a mistake, which one line names
                  75   stopped and saved: go on with --resume
                  130  stopped at once; the last checkpoint is whole
    """

    config: Annotated[Config[A], Flat]
    preset: Preset = "quick"
    """Where the defaults come from: minutes on two CPU cores, or the published sizes."""
    variant: str | None = None
    """Named setting of the agent's fields, see `jaxrl list`: of dqc for example qc, qc-ns, ns and os."""
    out: Path | None = None
    """Run directory; by default a new one under runs/."""
    resume: Path | None = None
    """Go on with the run in this directory; no other flag but --wandb applies."""
    plan: bool = False
    """Print what the run would take in memory, and stop."""
    wandb: bool = False
    """Log to Weights & Biases as well."""


@dataclasses.dataclass(frozen=True)
class EvalOptions(Generic[A]):
    """Evaluate a run's newest checkpoint. The agent is the run's but for the flags that are given.

    jaxrl eval runs/NAME --episodes 500
    jaxrl eval runs/NAME --agent.test-sampler beam_search
    """

    agent: A
    env: str
    """Environment, of the same sizes as the run's."""
    episodes: int = 100
    """How many episodes."""
    seed: int = 12345
    """Seed of the episodes; runs are comparable at equal seeds."""


@dataclasses.dataclass(frozen=True)
class CollectOptions:
    """Record a scripted behaviour of an environment as a dataset.

    jaxrl collect maze-medium --behaviour good --steps 100000
    jaxrl collect ogbench/cube-single-play-v0 --behaviour 'play?noise=0.2'
    """

    behaviour: str | None = None
    """Level of the behaviour, see `jaxrl list`; by default medium, and for OGBench the kind that its name holds."""
    steps: int = 1_000_000
    """Steps to record, at least."""
    seed: int = 0
    """Seed."""
    out: Path | None = None
    """File to write (.npz); by default datasets/ENVIRONMENT-BEHAVIOUR-STEPS-sSEED.npz, or OGBench's own name."""


@dataclasses.dataclass(frozen=True)
class RenderOptions:
    """Draw an episode of a run's newest checkpoint as an animation."""

    out: Path | None = None
    """File to write (.gif); by default RUN/rollout.gif."""
    seed: int = 12345
    """Seed of the episode."""


@dataclasses.dataclass(frozen=True)
class ReplayOptions:
    """Repeat a run's first epochs and compare their metrics bit for bit. Exit code 1: they differ, one line says where.

    Equal numbers need the same kind of machine and the same versions, which the run's manifest.json names.
    """

    epochs: int = 3
    """How many epochs."""


@dataclasses.dataclass(frozen=True)
class DescribeOptions:
    """Describe, convert and mix dataset files: .npz of OGBench's format, or .hdf5 of D4RL's, Minari's or robomimic's.

        jaxrl data describe FILE                                    what it holds, and which methods may suit it
        jaxrl data describe FOLDER                                  its files
        jaxrl data convert FILE.hdf5 OUT.npz                        the same data in OGBench's format
        jaxrl data mix GOOD BAD --ratio 0.1 --steps N --out OUT.npz   one tenth of good episodes, the rest of bad ones
        jaxrl data top FILE --fraction 0.1 --out OUT.npz            the tenth of its episodes with the largest returns

    The flags here are those of describe; `jaxrl data mix --help` explains those of another.
    """

    env: str | None = None
    """Environment whose task gives the rewards."""
    reference: Path | None = None
    """Dataset that coverage (SACo) is compared with: of the same task, best the replay of an online run."""
    random_return: float | None = None
    """Return of a random policy: 0 on the scale of trajectory quality (TQ)."""
    best_return: float | None = None
    """Return of the best known policy: 1 on that scale."""
    figure: Path | None = None
    """Picture to write (.png, .pdf or .svg): histograms of returns, lengths, distances and variances of actions."""
    queries: int = 10_000
    """Steps whose neighbours are looked for, drawn at random."""
    neighbours: int = 10
    """Neighbours of each."""


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """Write a dataset file of any format that can be read as .npz, in OGBench's format."""

    keys: tuple[str, ...] = ()
    """Of observations that are named arrays (Minari, robomimic), those to keep, in this order; by default all."""


@dataclasses.dataclass(frozen=True)
class MixOptions:
    """Write a mixture of two datasets: whole episodes of each, drawn with replacement."""

    ratio: float = 0.1
    """Share of the steps that comes from the first."""
    steps: int = 1_000_000
    """Steps to write, at least."""
    seed: int = 0
    """Seed of the draws."""
    env: str | None = None
    """Environment whose task gives the rewards of both."""
    out: Path | None = None
    """File to write (.npz)."""


@dataclasses.dataclass(frozen=True)
class TopOptions:
    """Write the episodes of a dataset that have the largest returns."""

    fraction: float = 0.1
    """Share of the episodes to keep."""
    env: str | None = None
    """Environment whose task gives the rewards."""
    out: Path | None = None
    """File to write (.npz)."""


@dataclasses.dataclass(frozen=True)
class SynthesizeOptions:
    """Write a synthetic dataset: a diffusion model learns the trajectories of a dataset and generates new ones.

        jaxrl synthesize DATA.npz --out new.npz                      trajectories like those of the data
        jaxrl synthesize DATA.npz --out new.npz --policy runs/NAME   ... with actions that a trained policy would take

    The model is kept in the folder that --model names, and used again where that holds one already. So one model gives
    datasets with guidance and without:

        jaxrl synthesize DATA.npz --out on.npz --model pgd --policy runs/NAME
        jaxrl synthesize DATA.npz --out off.npz --model pgd --policy runs/NAME --guidance 0

    Each trajectory is an episode of --length states, which the clock cuts short unless the task ends in it. Columns
    other than states, actions, rewards and ends are not generated. A table at the end holds the trajectories against
    the data: how far steps go, and how likely the policy would act so. Guidance raises the latter; where it is too
    strong, trajectories are no longer like the data. Try several.

        exit code 0    written
                  2    a mistake, which one line names
                  75   stopped while the model was trained, and saved: the same command goes on
                  130  stopped at once
    """

    generator: Annotated[Generator, Flat]
    sampler: Annotated[Sampler, Flat]
    out: Path | None = None
    """File to write (.npz)."""
    model: Path | None = None
    """Folder of the diffusion model; by default NAME-model beside the file NAME.npz that is written."""
    policy: Path | None = None
    """Run directory whose newest checkpoint guides the actions."""
    env: str | None = None
    """Environment whose task gives the rewards; by default those of the file are kept."""
    trajectories: int = 1024
    """How many trajectories to generate."""
    seed: int = 0
    """Seed."""


@dataclasses.dataclass(frozen=True)
class DoctorOptions:
    """Check this installation, or an environment of yours. Exit code 1: a line that begins with FAIL needs mending.

    jaxrl doctor --env my_package.my_module:make
    """

    env: str | None = None
    """Environment to check, a name of `jaxrl list` or my_package.my_module:make."""


@dataclasses.dataclass(frozen=True)
class ListOptions:
    """Name the agents, environments, behaviours and presets that there are."""


def train(args: list[str]) -> int:
    """Returns the exit code of `jaxrl train`."""
    names, flags = _positionals(args, 2)
    agent = names[0] if names else "fmq"
    defaults = preset(_peek(flags, "--preset") or "quick", agent, _peek(flags, "--variant"))
    if len(names) == 2:
        defaults = dataclasses.replace(defaults, env=names[1])
    usage = "jaxrl train [AGENT] [ENVIRONMENT]"
    options = _parse(usage, _of_agent(TrainOptions, AGENTS[agent]), TrainOptions(defaults), flags)
    if options.resume is not None:
        others = {flag.partition("=")[0] for flag in flags if flag.startswith("--")}
        if not_for_it := names + sorted(others - {"--resume", "--wandb", "--no-wandb"}):
            raise UserError(f"--resume: a run goes on as it began, {not_for_it[0]} does not apply")
    config = options.config if options.resume is None else rundir.read_config(options.resume)
    config.check()
    path = options.resume or options.out or rundir.default_path(agent, config.env, config.seed)
    return _train(config, _make(config.env), path, options)


def _train(config: Config, environment: Any, path: Path, options: TrainOptions) -> int:
    from jaxrl import log, plan, session

    config = session.with_data(config, environment)
    if options.plan:
        # A first run compiles, which takes most of a process's memory: count that, whatever is kept on disk.
        jax.config.update("jax_enable_compilation_cache", False)
        print(plan.plan(config, environment))
        return 0
    if options.wandb:
        log.check_wandb()
    plan.check(config, environment)
    drive = session.start if options.resume is None else session.resume
    with StopRequests() as stop:
        try:
            result = drive(config, environment, path, stop, options.wandb)
        except session.StopRequested:
            print(f"stopped and saved; go on with: jaxrl train --resume {shlex.quote(str(path))}", file=sys.stderr)
            return SAVED
    print(session.table(result))
    print(f"result: {json.dumps(result)}")
    return 0


def evaluate(args: list[str]) -> int:
    """Returns the exit code of `jaxrl eval`."""
    path, flags = _run_directory("eval", args)
    config = preset("quick", "fmq") if path is None else rundir.read_config(path)
    defaults = EvalOptions(config.agent, config.env, seed=config.schedule.eval_seed)
    options = _parse("jaxrl eval RUN", _of_agent(EvalOptions, type(config.agent)), defaults, flags)
    schedule = dataclasses.replace(config.schedule, eval_episodes=options.episodes, eval_seed=options.seed)
    config = dataclasses.replace(config, agent=options.agent, env=options.env, schedule=schedule)
    config.check()
    from jaxrl import session

    row = session.evaluate(config, _make(config.env), path)
    about = {"run": str(path), "env": config.env, "episodes": options.episodes, "seed": options.seed}
    print(f"result: {json.dumps(about | rundir.as_json(row))}")
    return 0


def collect(args: list[str]) -> int:
    """Returns the exit code of `jaxrl collect`."""
    names, flags = _positionals(args, 1)
    options = _parse("jaxrl collect ENVIRONMENT", CollectOptions, CollectOptions(), flags)
    if not names:
        raise UserError("collect: name an environment, for example `jaxrl collect maze-medium`")
    if options.steps < 1:
        raise UserError(f"steps = {options.steps}: must be at least 1")
    from jaxrl import host, session
    from jaxrl.data import files, record

    environment, behaviour = _make(names[0]), options.behaviour or "medium"
    if on_host(environment):
        script, episodes = host.script_of(environment, options.behaviour, options.steps)
        path = options.out or Path("datasets") / f"{script.dataset}.npz"
    else:
        path = options.out or session.data_path(names[0], behaviour, options.steps, options.seed)
    if path.suffix != ".npz":
        raise UserError(f"--out {path}: the name of a dataset file ends in .npz")
    if path.exists():
        raise UserError(f"{path} exists: name another file with --out")
    if on_host(environment):
        dataset = host.record(script, episodes, options.seed)
    else:
        dataset = record.record(environment, behaviour, options.steps, options.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.save(path, dataset)
    print(files.format_report(files.describe(files.load(path), getattr(environment, "relabel", None))))
    return 0


def render(args: list[str]) -> int:
    """Returns the exit code of `jaxrl render`."""
    path, flags = _run_directory("render", args)
    options = _parse("jaxrl render RUN", RenderOptions, RenderOptions(), flags)
    config = rundir.read_config(path)
    environment = _make(config.env)
    if not (on_host(environment) or hasattr(environment, "draw")):
        raise UserError(f"environment {config.env!r} has no draw(obs, size), so there is nothing to see")
    out = options.out or path / "rollout.gif"
    if out.suffix != ".gif":
        raise UserError(f"--out {out}: the name of an animation ends in .gif")
    from jaxrl import session

    schedule = dataclasses.replace(config.schedule, eval_seed=options.seed, eval_episodes=1)
    session.render(dataclasses.replace(config, schedule=schedule), environment, path, out)
    print(out)
    return 0


def replay(args: list[str]) -> int:
    """Returns the exit code of `jaxrl replay`: 0 where the repetition is identical, 1 where it is not."""
    path, flags = _run_directory("replay", args)
    options = _parse("jaxrl replay RUN", ReplayOptions, ReplayOptions(), flags)
    if options.epochs < 1:
        raise UserError(f"epochs = {options.epochs}: must be at least 1")
    config = rundir.read_config(path)
    from jaxrl import session

    difference = session.replay(config, _make(config.env), path, options.epochs)
    print("identical" if difference is None else f"different: {difference}")
    return 0 if difference is None else 1


def data(args: list[str]) -> int:
    """Returns the exit code of `jaxrl data`."""
    if not args or (args[0].startswith("-") and not _wants_help(args)):
        raise UserError("data: say what to do with which file, `jaxrl data describe FILE`")
    verb, rest = ("describe", args) if args[0].startswith("-") else (args[0], args[1:])
    if verb not in DATA:
        raise unknown("data command", verb, DATA)
    run, default, usage = DATA[verb]
    names, flags = _positionals(rest, len(usage.split()))
    options = _parse(f"jaxrl data {verb} {usage}", type(default), default, flags)
    if len(names) < len(usage.split()):
        raise UserError(f"data {verb}: name the files, `jaxrl data {verb} {usage}`")
    run(*names, options)
    return 0


def _describe(name: str, options: DescribeOptions) -> None:
    from jaxrl.data import files, measures, stream

    if (shards := stream.find(name)) is not None:
        given = [field.name for field in dataclasses.fields(options) if getattr(options, field.name) != field.default]
        if given:
            raise UserError(f"--{given[0].replace('_', '-')}: returns are of one file, name it")
        print(stream.format_report(shards))
        return
    random, best = options.random_return, options.best_return
    if (random is None) != (best is None):
        raise UserError("--random-return and --best-return: trajectory quality needs both")
    if options.figure is not None and options.figure.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--figure {options.figure}: the name of a picture ends in .png, .pdf or .svg")
    if options.figure is not None and not options.figure.parent.is_dir():
        raise UserError(f"--figure {options.figure}: no folder {options.figure.parent}")
    dataset = files.load(name)
    relabel = _relabel(options.env, dataset)
    found = measures.measure(
        dataset if relabel is None else files.relabelled(dataset, relabel),
        reference=None if options.reference is None else files.load(options.reference),
        scores=None if random is None or best is None else (random, best),
        neighbours=options.neighbours,
        queries=options.queries,
    )
    print(files.format_report(files.describe(dataset, relabel)), measures.format_report(found), sep="\n\n")
    if options.figure is not None:
        from jaxrl import pictures

        pictures.dataset(found, options.figure)


def _convert(name: str, out: str, options: ConvertOptions) -> None:
    from jaxrl.data import files

    _write(_new_file(Path(out)), files.load(name, options.keys))


def _mix(good: str, bad: str, options: MixOptions) -> None:
    from jaxrl.data import builders

    out = _new_file(options.out)
    pair = [_judged(name, options.env) for name in (good, bad)]
    _write(out, builders.mix(*pair, options.ratio, options.steps, options.seed))


def _top(name: str, options: TopOptions) -> None:
    from jaxrl.data import builders

    out = _new_file(options.out)
    _write(out, builders.top(_judged(name, options.env), options.fraction))


def _relabel(env: str | None, dataset: Any) -> Any:
    """Returns the function that judges a dataset's steps by an environment's task, None without an environment."""
    if env is None:
        return None
    environment = _make(env)
    if not hasattr(environment, "relabel"):
        raise UserError(f"--env {env}: this environment cannot relabel a dataset")
    asked = (environment.spec.observation, environment.spec.action)
    if (found := (dataset.observations.shape[1], dataset.actions.shape[1])) != asked:
        raise UserError(
            f"--env {env}: judges observations of {asked[0]} and actions of {asked[1]} entries, in {dataset.path} they "
            f"have {found[0]} and {found[1]}"
        )
    return environment.relabel


def _judged(name: str, env: str | None) -> Any:
    """Returns the dataset in a file, with the rewards of an environment's task where one is named."""
    from jaxrl.data import files

    dataset = files.load(name)
    relabel = _relabel(env, dataset)
    return dataset if relabel is None else files.relabelled(dataset, relabel)


def _new_file(path: Path | None) -> Path:
    """Returns the path of a dataset that is to be written. Raises UserError where that cannot be."""
    if path is None:
        raise UserError("--out: name the file to write")
    if path.suffix != ".npz":
        raise UserError(f"{path}: the name of a dataset file ends in .npz")
    if path.exists():
        raise UserError(f"{path} exists: name another file")
    return path


def _write(path: Path, dataset: Any) -> None:
    """Writes a dataset, and prints what it holds."""
    from jaxrl.data import files

    files.save(path, dataset)
    print(files.format_report(files.describe(files.load(path))))


DATA: dict[str, tuple[Any, Any, str]] = {  # what does it, its flags, the files that it is about
    "describe": (_describe, DescribeOptions(), "FILE"),
    "convert": (_convert, ConvertOptions(), "FILE OUT.npz"),
    "mix": (_mix, MixOptions(), "GOOD BAD"),
    "top": (_top, TopOptions(), "FILE"),
}


def synthesize(args: list[str]) -> int:
    """Returns the exit code of `jaxrl synthesize`."""
    from jaxrl import synthesis

    names, flags = _positionals(args, 1)
    model = _model_folder(flags)
    generator = None if model is None else synthesis.settings_in(model)
    defaults = SynthesizeOptions(generator or Generator(), Sampler())
    options = _parse("jaxrl synthesize DATA", SynthesizeOptions, defaults, flags)
    if not names:
        raise UserError("synthesize: name a dataset, for example `jaxrl synthesize DATA.npz --out new.npz`")
    out = _new_file(options.out)
    for name, low in (("trajectories", 1), ("seed", 0)):
        if not low <= getattr(options, name) < 2**63:
            raise UserError(f"{name} = {getattr(options, name)}: must be at least {low} and below 2^63")
    options.generator.check()
    options.sampler.check()
    dataset = _judged(names[0], options.env)
    if dataset.rewards is None:
        raise UserError(f"dataset {dataset.path}: has no rewards: name the environment that gives them with --env")
    policy = None
    if options.policy is not None:
        config = rundir.read_config(options.policy)
        policy = synthesis.policy_for(dataset, config, _make(config.env), options.policy)
    return _synthesize(options, dataset, model or Path(), out, policy)


def _synthesize(options: SynthesizeOptions, dataset: Any, model: Path, out: Path, policy: Any) -> int:
    from jaxrl import session, synthesis

    key_model, key_sample = jax.random.split(jax.random.key(options.seed))
    parts = synthesis.prepare(options.generator, dataset, model)
    with StopRequests() as stop:
        try:
            params, error = synthesis.fitted(options.generator, parts, model, key_model, stop)
        except session.StopRequested:
            print(f"stopped and saved in {model}; the same command goes on", file=sys.stderr)
            return SAVED
    guide, scale = policy if options.sampler.guidance else None, parts[0].scale
    new = synthesis.generate(options.generator, options.sampler, params, scale, key_sample, options.trajectories, guide)
    out.parent.mkdir(parents=True, exist_ok=True)
    _write(out, new)
    print("", *synthesis.comparison(dataset, new, scale, policy), f"model in {model}: {error}", sep="\n")
    return 0


def _model_folder(flags: list[str]) -> Path | None:
    """Returns the folder of the diffusion model, named or beside the file to write; None where neither is named."""
    model, out = _peek(flags, "--model"), _peek(flags, "--out")
    if model is None and out is not None:
        return Path(out).parent / f"{Path(out).stem}-model"
    return None if model is None else Path(model)


def examine(args: list[str]) -> int:
    """Returns the exit code of `jaxrl doctor`: 1 where something is wrong."""
    options = _parse("jaxrl doctor", DoctorOptions, DoctorOptions(), args)
    if options.env is None:
        from jaxrl import doctor

        lines = doctor.installation()
    else:
        from envs.checker import check

        lines = [str(finding) for finding in check(_make(options.env))]
    print("\n".join(lines))
    return int(any(line.startswith("FAIL") for line in lines))


def catalogue(args: list[str]) -> int:
    """Returns the exit code of `jaxrl list`."""
    import envs

    _parse("jaxrl list", ListOptions, ListOptions(), args)
    print("agents")
    for name, kind in AGENTS.items():
        print(f"  {name:<20} {(kind.__doc__ or '').splitlines()[0]}")
        if name in VARIANTS:
            print(f"  {'':<20} variants: {', '.join(VARIANTS[name])}")
    print("environments")
    for name, line in envs.names():
        print(f"  {name:<20} {line}")
    print(f"behaviours\n  good, medium, bad, random, mixed\npresets\n  {', '.join(PRESETS)}")
    return 0


COMMANDS = {
    "train": (train, "train an agent, or go on with a run"),
    "eval": (evaluate, "evaluate a run's newest checkpoint"),
    "collect": (collect, "record a scripted behaviour as a dataset"),
    "render": (render, "draw an episode of a run"),
    "replay": (replay, "repeat a run's first epochs and compare bit for bit"),
    "data": (data, "describe, convert and mix dataset files"),
    "synthesize": (synthesize, "write a dataset that a diffusion model generates, guided by a policy or not"),
    "doctor": (examine, "check the installation, or an environment of yours"),
    "list": (catalogue, "name agents, environments, behaviours and presets"),
}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 a check failed, 2 a mistake, 75 stopped and saved, 130 stopped by Ctrl-C."""
    args = sys.argv[1:] if argv is None else argv
    try:
        code = _command(args)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"jaxrl: {error}", file=sys.stderr)
    except BrokenPipeError:  # whoever read our output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # the file system refuses: full, read-only, not ours
        print(f"jaxrl: {': '.join(str(part) for part in (error.filename, error.strerror) if part)}", file=sys.stderr)
    except KeyboardInterrupt:
        return ABORTED
    return 2


def _command(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print("jaxrl: reinforcement learning with generative policies, as one XLA program\n")
        print("usage: jaxrl COMMAND ...\n")
        for name, (_, line) in COMMANDS.items():
            print(f"  {name:<10} {line}")
        print("\n`jaxrl COMMAND --help` explains a command. Start with: jaxrl train")
        return 0 if args else 2
    if args[0] not in COMMANDS:
        raise unknown("command", args[0], COMMANDS)
    use_compilation_cache()
    with contextlib.suppress(SystemExit):  # of --help, once it is printed
        return COMMANDS[args[0]][0](args[1:])
    return 0


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk between processes, unless JAX was already told where or not to."""
    if rundir.jax_setting("compilation_cache_dir") is None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(base) / "jaxrl" / "xla"))


def _make(name: str) -> Any:
    import envs

    return envs.make(name)


def _positionals(args: list[str], most: int) -> tuple[list[str], list[str]]:
    """Returns the leading arguments that are no flags, at most so many, and the rest."""
    leading = list(itertools.takewhile(lambda arg: not arg.startswith("-"), args))
    if len(leading) > most:
        raise UserError(f"unexpected argument {args[most]!r}")
    return leading, args[len(leading) :]


def _of_agent(options: Any, agent: type) -> Any:
    """Returns the options of a command with the fields of one kind of agent among them."""
    return options[agent]


def _run_directory(command: str, args: list[str]) -> tuple[Any, list[str]]:
    """Returns the run that a command is about, and its flags; None for help without a run."""
    names, flags = _positionals(args, 1)
    if not names and not _wants_help(flags):
        raise UserError(f"{command}: name a run directory, for example `jaxrl {command} runs/NAME`")
    return Path(names[0]) if names else None, flags


def _peek(args: list[str], flag: str) -> str | None:
    """Returns a flag's value, if it is given, before the rest can be parsed, which it decides about."""
    for i, arg in enumerate(args):
        if arg == flag and i + 1 < len(args):
            return args[i + 1]
        if arg.startswith(f"{flag}="):
            return arg.split("=", 1)[1]
    return None


def _wants_help(flags: list[str]) -> bool:
    return bool({"-h", "--help"} & set(flags))


def _parse(usage: str, kind: Any, default: Any, args: list[str]) -> Any:
    """Returns the options that flags ask for. Raises UserError, one line, for a flag or a value that does not exist."""
    if _wants_help(args):
        print(inspect.cleandoc(type(default).__doc__ or "").replace("{agents}", ", ".join(AGENTS)) + "\n")
        tyro.cli(kind, default=default, args=["--help"], prog=usage, description="", config=SETTINGS)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(complaint):
            options, left = tyro.cli(kind, default=default, args=args, return_unknown_args=True, config=SETTINGS)
    except SystemExit as error:
        raise UserError(_complaint(complaint.getvalue())) from error
    if left and not left[0].startswith("-"):
        raise UserError(f"unexpected argument {left[0]!r}: names come first, and a switch takes no value")
    if left:
        flag = left[0].split("=")[0]
        near = difflib.get_close_matches(flag, _flags(default), n=1, cutoff=0.5)
        raise UserError(f"unknown flag {flag}: " + (f"did you mean {near[0]}? " if near else "") + "--help lists all")
    return options


def _complaint(text: str) -> str:
    """Returns the message in tyro's box: what follows its title, up to the next rule, in one line."""
    lines = [line.strip("│╭╮╰╯─- ") for line in text.splitlines()]
    message = itertools.takewhile(bool, itertools.dropwhile(lambda line: not line, lines[1:]))
    return " ".join(message) or "cannot read the flags"


def _flags(options: Any, prefix: str = "--") -> list[str]:
    """Returns the flags of a dataclass's fields."""
    result = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        name = "" if field.name in FLAT_FIELDS else field.name.replace("_", "-")
        nested = prefix + (f"{name}." if name else "")
        result += _flags(value, nested) if dataclasses.is_dataclass(value) else [prefix + name]
    return result


if __name__ == "__main__":
    sys.exit(main())
