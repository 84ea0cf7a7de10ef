"""The dataset of a run: found or recorded, checked against the environment, and placed in device memory."""

import dataclasses
import functools
import sys
from pathlib import Path

import jax

from jaxrl.data import files
from jaxrl.data.files import Dataset
from jaxrl.errors import UserError
from jaxrl.replay import loading, streaming
from jaxrl.replay.ring import Ring
from jaxrl.replay.streaming import Shards, Stream
from jaxrl.rollout import record
from jaxrl.runs import directory
from jaxrl.runs.config import Config, has_dataset, records
from jaxrl.runs.jsonlines import read_json
from jaxrl.runs.progress import announced
from jaxrl.types import Agent, ChecksData, Env, HostEnv, NamesDataset, requirements


def load_data(config: Config, env: Env | HostEnv) -> Dataset | Shards | None:
    """Returns the run's dataset: the file given by `data`, or the recorded behavior, which is stored under datasets/.

    None for a run that does not learn from a dataset. For a folder or a pattern of files, only the headers are read.
    """
    if not has_dataset(config):
        return None
    config = with_data(config, env)
    if config.data is None:
        path = recorded(config, env)
    elif (shards := streaming.find(config.data)) is not None:
        loading.check_fits(shards.sizes, env)
        return shards
    else:
        path = Path(config.data)
    with announced(f"reading {path}"):
        dataset = files.load(path)
    loading.check_fits(loading.sizes_of(dataset), env)
    return dataset


def recorded(config: Config, env: Env | HostEnv) -> Path:
    """Returns the file of the scripted behavior, recorded now if it does not exist yet."""
    assert not isinstance(env, HostEnv), "with_data names a file for these"
    path = data_path(config.env, config.behaviour, config.data_steps)
    if not path.exists():
        record.behaviour_of(env, config.behaviour)  # raises for an unknown level
        print(f"recording {config.data_steps} steps of the behaviour {config.behaviour!r} as {path}", file=sys.stderr)
        with announced("recording"):
            dataset = record.record(env, config.behaviour, config.data_steps, seed=0)
        path.parent.mkdir(exist_ok=True)
        files.save(path, dataset)
    return path


def with_data(config: Config, env: Env | HostEnv) -> Config:
    """Returns the configuration, with `data` set to an existing dataset file for simulators on the CPU.

    Raises UserError, with instructions, if there is no such file.
    """
    if not records(config) or not isinstance(env, HostEnv):
        return config
    if not isinstance(env, NamesDataset):
        raise UserError(f"environment {config.env!r} has no behaviour to record: name a dataset file with --data")
    name = env.dataset
    places = [folder / f"{name}.npz" for folder in (Path("datasets"), Path.home() / ".ogbench" / "data")]
    for path in places:
        if path.exists():
            return dataclasses.replace(config, data=str(path))
    raise UserError(
        f"no dataset for {config.env}, neither {places[0]} nor {places[1]}: make one, `jaxrl collect ogbench/{name}`, "
        f"or get the official one, `python -c \"import ogbench; ogbench.download_datasets(['{name}'])\"`"
    )


def data_path(env: str, behaviour: str, steps: int, seed: int = 0) -> Path:
    """Returns the path of a recorded behavior."""
    return Path("datasets") / f"{directory.plain(env)}-{behaviour}-{steps}-s{seed}.npz"


def asks_trees(config: Config) -> bool:
    """Returns whether the agent searches the whole dataset with KD-trees on the host, used if the device is a CPU.

    Not for datasets of several files: a program is compiled for its trees, so each file would need its own program.
    """
    return requirements(config.agent).kdtree and jax.default_backend() == "cpu"


def in_memory(
    config: Config, env: Env | HostEnv, dataset: Dataset | Shards | None, epochs: int
) -> Ring | Stream | None:
    """Returns the dataset in device memory, or a stream that loads it file by file; None without a dataset."""
    if dataset is None:
        return None
    place = functools.partial(
        loading.to_ring,
        env=env,
        scale=config.reward_scale,
        shift=config.reward_shift,
        probabilities=requirements(config.agent).unit_rewards,
        weighting=config.weighting,
        columns=requirements(config.agent).columns,
    )
    if isinstance(dataset, Dataset):
        check_sizes(config.agent, loading.sizes_of(dataset))
        return place(dataset, searched=asks_trees(config))
    for shard in dataset.shards:
        check_sizes(config.agent, shard.sizes)
    room = (dataset.sizes.rows, dataset.sizes.episodes)
    return Stream(dataset, functools.partial(place, room=room), config.order_seed, epochs)


def check_sizes(agent: Agent, sizes: loading.Sizes) -> None:
    """Raises UserError if a dataset is too small for an agent."""
    loading.check_window(sizes, requirements(agent).window)
    if isinstance(agent, ChecksData):
        agent.check_data(sizes.rows - sizes.episodes)


def check_same_data(path: Path, dataset: Dataset | Shards | None, known: str | None) -> None:
    """Raises UserError if the dataset is not the one that a run or a sweep began with, whose digest is `known`."""
    if digest_of(dataset) == known:
        return
    if dataset is None:
        raise UserError(f"{path} began with a dataset, whose sha256 was {known}, but has none now")
    raise UserError(f"dataset {dataset.path} has changed since {path} began: its sha256 was {known}")


def known_digest(path: Path) -> str | None:
    """Returns the digest of the dataset that a run began with."""
    return read_json(path / "manifest.json", f"{path} is not a run directory").get("dataset_digest")


def digest_of(dataset: Dataset | Shards | None) -> str | None:
    """Returns the sha256 of a dataset; None without one."""
    return None if dataset is None else dataset.digest
