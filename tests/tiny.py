"""A run that takes seconds, most of them to compile: four epochs offline and three online of FMQ on `point`."""

import contextlib
import functools
import json
import logging
from pathlib import Path
from unittest import mock

import jax
import jaxtyping
import numpy as np

import envs
from jaxrl import cli
from jaxrl.cli import flags as parsing
from jaxrl.data import files
from jaxrl.runs import checkpoint, directory, driver
from jaxrl.runs.config import timeline_of
from jaxrl.runs.logging import Log
from jaxrl.training import loop

ENV = "point?horizon=20"
AGENT = (
    "--agent.windows.chunk=2 --agent.windows.backup=2 --agent.windows.batch=16 --agent.num-samples=2 "
    "--agent.target-samples=2 --agent.distillation.warmup=5 --agent.distillation.curriculum=20 "
    "--agent.actor.net.hidden 8 --agent.critic.net.hidden 8"
).split()
SCHEDULE = (
    "--schedule.offline-updates=40 --schedule.updates-per-epoch=10 --schedule.eval-every=2 --schedule.eval-episodes=4 "
    "--schedule.online-steps=48 --schedule.steps-per-epoch=16 --schedule.envs=4 --schedule.utd=0.25"
).split()
EPOCHS, OFFLINE = 7, 4

# An environment is a static argument, told apart by identity: one object for all runs, and each program compiles once.
make = functools.cache(envs.make)


@contextlib.contextmanager
def quick():
    """A context in which runs share their programs, and these compile in half the time.

    Annotations are not checked there: a run holds its Scalars as arrays, which are annotated as floats.
    """
    before, parsing.make = parsing.make, make
    jax.config.update("jax_disable_most_optimizations", True)
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        parsing.make = before
        jax.config.update("jax_disable_most_optimizations", False)
        jaxtyping.config.update("jaxtyping_disable", False)


def flags(data: Path) -> list[str]:
    """Returns the arguments of the run on a dataset that `write_data` made."""
    return ["train", "fmq", ENV, f"--data={data}", *AGENT, *SCHEDULE]


def write_data(path: Path) -> Path:
    """Writes 20 episodes of 20 random steps of `point`."""
    random = np.random.default_rng(0)
    actions = random.uniform(-1, 1, (20, 21, 2)).astype(np.float32)
    position = random.uniform(-1, 1, (20, 2)).astype(np.float32)
    observations = []
    for t in range(21):
        observations.append(position)
        position = np.clip(position + 0.1 * actions[:, t], -1, 1)
    columns = {
        "observations": np.stack(observations, axis=1).reshape(-1, 2),
        "actions": actions.reshape(-1, 2),
        "terminals": np.tile(np.arange(21) == 20, 20),
    }
    files.save(path, files.from_columns(columns))
    return path


@contextlib.contextmanager
def compiled():
    """A context that gives the names of the programs compiled in it, in order, as a list that grows."""
    names: list[str] = []
    seen = logging.Handler()
    seen.emit = lambda record: names.append(record.getMessage().split()[1])
    seen.addFilter(lambda record: record.getMessage().startswith("Compiling"))
    logging.getLogger("jax").addHandler(seen)
    try:
        with jax.log_compiles():
            yield names
    finally:
        logging.getLogger("jax").removeHandler(seen)


@contextlib.contextmanager
def compilations():
    """A context that gives the names of the programs compiled in it: before each row of metrics, and after the last."""
    parts: list[list[str]] = [[]]
    row = Log.row

    def counted(log: Log, new: dict, *stages: dict) -> None:
        parts[-1] += names[sum(map(len, parts)) :]
        parts.append([])
        row(log, new, *stages)

    with compiled() as names, mock.patch.object(Log, "row", counted):
        yield parts
    parts[-1] += names[sum(map(len, parts)) :]


@functools.cache
def finished(temporary: Path) -> Path:
    """Returns the directory of the run, driven to its end without a break; its data.npz and a compiled.json beside it.

    The latter holds the names of the programs that were compiled before each row of metrics was written, and after.
    """
    folder = temporary / "tiny"
    folder.mkdir()
    with quick(), compilations() as programs:
        assert cli.main([*flags(write_data(folder / "data.npz")), f"--out={folder / 'whole'}"]) == 0
    (folder / "compiled.json").write_text(json.dumps(programs))
    return folder / "whole"


def carry(path: Path, epoch: int = EPOCHS) -> dict[str, np.ndarray]:
    """Returns every leaf of a run's checkpoint by its path, random keys as numbers."""
    config = directory.read_config(path)
    agent = loop.on_device(config.agent)
    given = (agent, make(config.env), config.schedule, timeline_of(config))
    loaded = checkpoint.load(path / "checkpoints", lambda done: driver.abstract_carry(*given, done, config.execution))
    assert loaded is not None and loaded[0] == epoch
    numbers = jax.tree.map(
        lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x, loaded[1]
    )
    return {jax.tree_util.keystr(name): np.asarray(leaf) for name, leaf in jax.tree.leaves_with_path(numbers)}


def assert_same_run(a: Path, b: Path) -> None:
    """Asserts that two finished runs have the same metrics and the same carry, bit for bit."""
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    one, other = carry(a), carry(b)
    assert one.keys() == other.keys()
    different = [name for name in one if one[name].tobytes() != other[name].tobytes()]
    assert different == []


def rows(path: Path) -> list[dict]:
    """Returns the rows of a run's metrics."""
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def tree(folder: Path) -> list[str]:
    """Returns everything below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
