"""The dataset commands: data describe, convert, mix and top; synthesize."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import jax

from jaxrl import ranges
from jaxrl.cli import flags as fl
from jaxrl.errors import UserError, unknown
from jaxrl.ops.diffusion import Sampler
from jaxrl.runs import directory
from jaxrl.runs.signals import SAVED, StopRequested, StopRequests
from jaxrl.synthesis.model import Generator
from jaxrl.types import Relabels

if TYPE_CHECKING:
    from jaxrl.data.files import Dataset, Relabel


@dataclasses.dataclass(frozen=True)
class DescribeOptions:
    """Describe, convert and mix dataset files: .npz in OGBench's format, or .hdf5 of D4RL, Minari or robomimic.

        jaxrl data describe FILE                                    contents and quality measures
        jaxrl data describe FOLDER                                  the dataset files in a folder
        jaxrl data convert FILE.hdf5 OUT.npz                        the same data in OGBench's format
        jaxrl data mix GOOD BAD --ratio 0.1 --steps N --out OUT.npz   10 % of steps from GOOD, the rest from BAD
        jaxrl data top FILE --fraction 0.1 --out OUT.npz            the 10 % of episodes with the highest returns

    The flags below are those of `describe`; see `jaxrl data mix --help` etc. for the other commands.
    """

    env: str | None = None
    """Environment whose task defines the rewards."""
    reference: Path | None = None
    """Reference dataset for coverage (SACo): same task, ideally the replay buffer of an online run."""
    random_return: float | None = None
    """Return of a random policy, which maps to trajectory quality (TQ) 0."""
    best_return: float | None = None
    """Return of the best known policy, which maps to TQ 1."""
    figure: Path | None = None
    """Figure to write (.png, .pdf or .svg): histograms of returns, lengths, distances and action variances."""
    queries: int = 10_000
    """Number of random steps for the nearest-neighbor search."""
    neighbours: int = 10
    """Neighbors per step."""


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """Convert a dataset file of any supported format to .npz in OGBench's format."""

    keys: tuple[str, ...] = ()
    """For dict observations (Minari, robomimic): the keys to keep, in this order; by default all."""


@dataclasses.dataclass(frozen=True)
class MixOptions:
    """Write a mixture of two datasets: whole episodes, sampled with replacement."""

    ratio: float = 0.1
    """Fraction of steps from the first dataset."""
    steps: int = 1_000_000
    """Minimum number of steps to write."""
    seed: int = 0
    """Random seed."""
    env: str | None = None
    """Environment whose task defines the rewards of both datasets."""
    out: Path | None = None
    """File to write (.npz)."""


@dataclasses.dataclass(frozen=True)
class TopOptions:
    """Write the episodes of a dataset with the highest returns."""

    fraction: float = 0.1
    """Fraction of episodes to keep."""
    env: str | None = None
    """Environment whose task defines the rewards."""
    out: Path | None = None
    """File to write (.npz)."""


@dataclasses.dataclass(frozen=True)
class SynthesizeOptions:
    """Write a synthetic dataset: train a diffusion model on the trajectories of a dataset and sample new ones.

        jaxrl synthesize DATA.npz --out new.npz                      unguided trajectories
        jaxrl synthesize DATA.npz --out new.npz --policy runs/NAME   ... guided toward the actions of a trained policy

    The model is saved in the --model folder, and reused if the folder already contains one. One model can therefore
    generate datasets with and without guidance:

        jaxrl synthesize DATA.npz --out on.npz --model pgd --policy runs/NAME
        jaxrl synthesize DATA.npz --out off.npz --model pgd --policy runs/NAME --guidance 0

    Each trajectory is an episode of --length states, truncated unless it terminates. Columns other than states,
    actions, rewards and terminations are not generated. A table at the end compares the trajectories with the data:
    step lengths, and the likelihood of the actions under the policy. Guidance raises the likelihood; if it is too
    strong, trajectories leave the data distribution. Try several values.

        exit code 0    written
                  2    usage error, explained in one line
                  75   stopped during model training and saved: repeat the command to resume
                  130  stopped immediately
    """

    generator: Annotated[Generator, fl.Flat]
    sampler: Annotated[Sampler, fl.Flat]
    out: Path | None = None
    """File to write (.npz)."""
    model: Path | None = None
    """Folder of the diffusion model; by default NAME-model next to the output file NAME.npz."""
    policy: Path | None = None
    """Run directory whose latest checkpoint guides the actions."""
    env: str | None = None
    """Environment whose task defines the rewards; by default the rewards in the file."""
    trajectories: int = 1024
    """Number of trajectories to generate."""
    seed: int = 0
    """Random seed."""


def data(args: list[str]) -> int:
    """Returns the exit code of `jaxrl data`."""
    if not args or (args[0].startswith("-") and not fl.wants_help(args)):
        raise UserError("data: name a command and a file, for example `jaxrl data describe FILE`")
    verb, rest = ("describe", args) if args[0].startswith("-") else (args[0], args[1:])
    if verb not in DATA:
        raise unknown("data command", verb, DATA)
    run, default, usage = DATA[verb]
    names, flags = fl.positionals(rest, len(usage.split()))
    options = fl.parse(f"jaxrl data {verb} {usage}", type(default), default, flags)
    if len(names) < len(usage.split()):
        raise UserError(f"data {verb}: name the files, `jaxrl data {verb} {usage}`")
    run(*names, options)
    return 0


def _describe(name: str, options: DescribeOptions) -> None:
    from jaxrl.data import files, quality
    from jaxrl.replay import streaming

    if (shards := streaming.find(name)) is not None:
        given = [field.name for field in dataclasses.fields(options) if getattr(options, field.name) != field.default]
        if given:
            raise UserError(f"--{given[0].replace('_', '-')}: applies to a single file, not to a folder")
        print(streaming.format_report(shards))
        return
    random, best = options.random_return, options.best_return
    if (random is None) != (best is None):
        raise UserError("--random-return and --best-return: trajectory quality requires both")
    if options.figure is not None and options.figure.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--figure {options.figure}: must end in .png, .pdf or .svg")
    if options.figure is not None and not options.figure.parent.is_dir():
        raise UserError(f"--figure {options.figure}: no folder {options.figure.parent}")
    dataset = files.load(name)
    relabel = _relabel(options.env, dataset)
    report = files.format_report(files.describe(dataset, relabel))
    images = not files.vectors(dataset.observations).shape[1]
    if images and options.figure is None:
        print(report, "not measured: coverage and neighbors require vectors, observations are images only", sep="\n\n")
        return
    if images:
        raise UserError(f"--figure {options.figure}: measures require vectors, observations are images only")
    found = quality.measure(
        dataset if relabel is None else files.relabelled(dataset, relabel),
        reference=None if options.reference is None else files.load(options.reference),
        scores=None if random is None or best is None else (random, best),
        neighbours=options.neighbours,
        queries=options.queries,
    )
    print(report, quality.format_report(found), sep="\n\n")
    if options.figure is not None:
        from jaxrl.runs import plots

        plots.dataset(found, options.figure)


def _convert(name: str, out: str, options: ConvertOptions) -> None:
    from jaxrl.data import files

    _write(_new_file(Path(out)), files.load(name, options.keys))


def _mix(good: str, bad: str, options: MixOptions) -> None:
    from jaxrl.data import mixing

    out = _new_file(options.out)
    ranges.check_seed("seed", options.seed)
    pair = [_judged(name, options.env) for name in (good, bad)]
    _write(out, mixing.mix(*pair, options.ratio, options.steps, options.seed))


def _top(name: str, options: TopOptions) -> None:
    from jaxrl.data import mixing

    out = _new_file(options.out)
    _write(out, mixing.top(_judged(name, options.env), options.fraction))


def _relabel(env: str | None, dataset: "Dataset") -> "Relabel | None":
    """Returns an environment's relabeling function for a dataset, None without an environment."""
    if env is None:
        return None
    environment = fl.make(env)
    if not isinstance(environment, Relabels):
        raise UserError(f"--env {env}: this environment cannot relabel a dataset")
    asked = (environment.spec.observation, environment.spec.action)
    if not isinstance(asked[0], int) or isinstance(dataset.observations, Mapping) or dataset.observations.ndim > 2:
        from jaxrl.replay import loading

        loading.check_fits(loading.sizes_of(dataset), environment)
    elif (found := (dataset.observations.shape[1], dataset.actions.shape[1])) != asked:
        raise UserError(
            f"--env {env}: expects observations of size {asked[0]} and actions of size {asked[1]}, in {dataset.path} "
            f"they have {found[0]} and {found[1]}"
        )
    return environment.relabel


def _judged(name: str, env: str | None) -> "Dataset":
    """Returns the dataset in a file, relabeled with an environment's rewards if one is named."""
    from jaxrl.data import files

    dataset = files.load(name)
    relabel = _relabel(env, dataset)
    return dataset if relabel is None else files.relabelled(dataset, relabel)


def _new_file(path: Path | None) -> Path:
    """Returns the validated path of a dataset to write. Raises UserError if it is missing, not .npz or exists."""
    if path is None:
        raise UserError("--out: name the file to write")
    if path.suffix != ".npz":
        raise UserError(f"{path}: the name of a dataset file ends in .npz")
    if path.exists():
        raise UserError(f"{path} exists: name another file")
    return path


def _write(path: Path, dataset: Any) -> None:
    """Writes a dataset and prints its description."""
    from jaxrl.data import files

    files.save(path, dataset)
    print(files.format_report(files.describe(files.load(path))))


DATA: dict[str, tuple[Any, Any, str]] = {  # function, default options, file arguments
    "describe": (_describe, DescribeOptions(), "FILE"),
    "convert": (_convert, ConvertOptions(), "FILE OUT.npz"),
    "mix": (_mix, MixOptions(), "GOOD BAD"),
    "top": (_top, TopOptions(), "FILE"),
}


def synthesize(args: list[str]) -> int:
    """Returns the exit code of `jaxrl synthesize`."""
    from jaxrl.synthesis import generate

    names, flags = fl.positionals(args, 1)
    model = _model_folder(flags)
    generator = None if model is None else generate.settings_in(model)
    defaults = SynthesizeOptions(generator or Generator(), Sampler())
    options = fl.parse("jaxrl synthesize DATA", SynthesizeOptions, defaults, flags)
    if not names:
        raise UserError("synthesize: name a dataset, for example `jaxrl synthesize DATA.npz --out new.npz`")
    out = _new_file(options.out)
    ranges.check_seed("seed", options.seed)
    if not 1 <= options.trajectories < 2**63:
        raise UserError(f"trajectories = {options.trajectories}: must be at least 1 and below 2^63")
    ranges.check(options.generator)
    ranges.check(options.sampler)
    dataset = _judged(names[0], options.env)
    generate.check(dataset)
    policy = None
    if options.policy is not None:
        config = directory.read_config(options.policy)
        policy = generate.policy_for(dataset, config, fl.make(config.env), options.policy)
    return _synthesize(options, dataset, model or Path(), out, policy)


def _synthesize(options: SynthesizeOptions, dataset: Any, model: Path, out: Path, policy: Any) -> int:
    from jaxrl.synthesis import generate

    key_model, key_sample = jax.random.split(jax.random.key(options.seed))
    parts = generate.prepare(options.generator, dataset, model)
    with StopRequests() as stop:
        try:
            params, error = generate.fitted(options.generator, parts, model, key_model, stop)
        except StopRequested:
            print(f"stopped and saved in {model}; repeat the command to resume", file=sys.stderr)
            return SAVED
    guide, scale = policy if options.sampler.guidance else None, parts[0].scale
    new = generate.generate(options.generator, options.sampler, params, scale, key_sample, options.trajectories, guide)
    out.parent.mkdir(parents=True, exist_ok=True)
    _write(out, new)
    print("", *generate.comparison(dataset, new, scale, policy), f"model in {model}: {error}", sep="\n")
    return 0


def _model_folder(flags: list[str]) -> Path | None:
    """Returns the folder of the diffusion model: --model, or next to --out; None if neither is given."""
    model, out = fl.peek(flags, "--model"), fl.peek(flags, "--out")
    if model is None and out is not None:
        return Path(out).parent / f"{Path(out).stem}-model"
    return None if model is None else Path(model)
