"""Synthetic datasets on the host: training a model in a folder, sampling it, and comparing samples with the data.

A model's folder contains generator.json (its settings and the digest of its data) and checkpoints/.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxrl.data.files import Dataset
from jaxrl.errors import UserError
from jaxrl.ops.diffusion import Sampler, Scale
from jaxrl.runs import checkpoint
from jaxrl.runs.config import Config
from jaxrl.runs.evaluation import newest_state
from jaxrl.runs.jsonlines import read_json, write_json
from jaxrl.runs.signals import StopRequested, StopRequests
from jaxrl.synthesis import segments
from jaxrl.synthesis.model import (
    Generator,
    TrainedAgent,
    jitted_epoch,
    jitted_init,
    jitted_mean_log_density,
    jitted_trajectories,
)
from jaxrl.synthesis.segments import Segments
from jaxrl.training import loop
from jaxrl.types import Env, HostEnv, PyTree, Spec

AT_ONCE = 256  # trajectories per program
SAVES = 10  # number of checkpoints during training
COMPARED = 4096  # actions whose log density is averaged, evenly spaced over a dataset


def check(dataset: Dataset) -> None:
    """Raises UserError for a dataset that a model cannot learn: without rewards, or with non-vector observations."""
    if isinstance(dataset.observations, Mapping):
        names = ", ".join(dataset.observations)
        raise UserError(f"dataset {dataset.path}: observations are a dict ({names}); only vectors can be generated")
    if dataset.observations.ndim > 2:
        raise UserError(f"dataset {dataset.path}: observations are images; only vectors can be generated")
    if dataset.rewards is None:
        raise UserError(f"dataset {dataset.path}: has no rewards: name the environment that defines them with --env")


def policy_for(dataset: Dataset, config: Config, env: Env | HostEnv, path: Path) -> TrainedAgent:
    """Returns a run's agent and latest state. Raises UserError if their sizes are not the dataset's."""
    sizes = (dataset.observations.shape[1], dataset.actions.shape[1])
    if sizes != (env.spec.observation, env.spec.action):
        raise UserError(
            f"--policy {path}: its observations have {env.spec.observation} entries and its actions {env.spec.action}; "
            f"those of dataset {dataset.path} have {sizes[0]} and {sizes[1]}"
        )
    agent = loop.on_device(config.agent)
    return agent, newest_state(config, agent, env, path)


def settings_in(path: Path) -> Generator | None:
    """Returns the settings of the model in a folder, or None if there is none."""
    if not (path / "generator.json").exists():
        return None
    fields = _description(path)["generator"]
    names = {field.name for field in dataclasses.fields(Generator)}
    if not isinstance(fields, dict) or fields.keys() != names or not isinstance(fields["widths"], list):
        raise UserError(f"{path / 'generator.json'} is damaged: its fields are not {', '.join(sorted(names))}")
    return Generator(**fields | {"widths": tuple(fields["widths"])})


def _description(path: Path) -> dict[str, Any]:
    description = read_json(path / "generator.json", f"{path} holds no diffusion model")
    if not {"generator", "dataset_digest"} <= description.keys():
        raise UserError(f"{path / 'generator.json'} is damaged: 'generator' or 'dataset_digest' is missing")
    return description


def prepare(generator: Generator, dataset: Dataset, path: Path) -> tuple[Segments, Segments]:
    """Returns the sub-trajectories for training and those held out; creates the model's folder if there is none.

    Raises UserError if the folder contains another model, or a model of other data.
    """
    found = settings_in(path)
    if found is not None:
        _check_same(found, generator, dataset, path)
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists, but holds no diffusion model: name another folder with --model")
    parts = segments.segments(dataset, generator.length, generator.stride)
    if found is None:
        path.mkdir(parents=True, exist_ok=True)
        asked = {"generator": dataclasses.asdict(generator), "dataset_digest": dataset.digest}
        write_json(path / "generator.json", asked)
    return parts


def _check_same(found: Generator, generator: Generator, dataset: Dataset, path: Path) -> None:
    """Raises UserError unless the model in a folder has these settings and was trained on this dataset."""
    was = dataclasses.asdict(found)
    for name, value in dataclasses.asdict(generator).items():
        if was[name] != value:
            raise UserError(
                f"{name} = {value}: the model in {path} has {was[name]}; omit it, or name another folder with --model"
            )
    if _description(path)["dataset_digest"] != dataset.digest:
        raise UserError(f"the model in {path} was trained on other data or rewards: name another with --model")


def fitted(
    generator: Generator, parts: tuple[Segments, Segments], path: Path, key: jax.Array, stop: StopRequests
) -> tuple[PyTree, str]:
    """Trains from the latest checkpoint on; returns the parameters for sampling, and the last errors as text.

    Raises StopRequested, after saving a checkpoint, on a stop request.
    """
    learn, held_out = parts
    generator, spec = loop.on_device(generator), Spec(learn.scale.observation, learn.scale.action)
    begin = functools.partial(jitted_init, generator, key, spec=spec)
    count, updates = generator.epochs
    loaded = checkpoint.load(path / "checkpoints", lambda _: jax.eval_shape(begin))
    done, state = (0, jax.device_put(begin(), jax.devices()[0])) if loaded is None else loaded
    said = "trained before"
    with tqdm(desc="diffusion", total=count * updates, initial=done * updates, unit="update", disable=None) as bar:
        for index in range(done, count):
            state, metrics = jitted_epoch(generator, state, learn, held_out)
            said = ", ".join(f"{name} {value:.4f}" for name, value in jax.device_get(metrics).items())
            bar.update(updates)
            bar.set_postfix_str(said)
            stopping = stop.requested and index + 1 < count
            if stopping or index + 1 == count or (index + 1) % max(count // SAVES, 1) == 0:
                checkpoint.save(path / "checkpoints", index + 1, state)
            if stopping:
                raise StopRequested
    return state.ema, said


def generate(
    generator: Generator,
    sampler: Sampler,
    params: PyTree,
    scale: Scale,
    key: jax.Array,
    count: int,
    policy: TrainedAgent | None = None,
) -> Dataset:
    """Returns a dataset of `count` generated trajectories, drawn 256 at a time."""
    at_once = min(count, AT_ONCE)
    generator, sampler = loop.on_device((generator, sampler))
    parts = []
    for i in tqdm(range(-(-count // at_once)), desc="sampling", unit=f"{at_once} trajectories", disable=None):
        own = jax.random.fold_in(key, i)
        parts.append(jax.device_get(jitted_trajectories(generator, sampler, params, scale, own, at_once, policy)))
    obs, actions, rewards, ended = (np.concatenate(column)[:count] for column in zip(*parts, strict=True))
    return segments.to_dataset(obs, actions, rewards, ended)


def comparison(data: Dataset, generated: Dataset, scale: Scale, policy: TrainedAgent | None) -> list[str]:
    """Returns lines that compare generated trajectories with the data: step lengths, likelihood of actions.

    A step's length is the norm of the observation change, in standard deviations of the data.
    """
    std = np.asarray(scale.std)[: scale.observation]
    lines = [f"{'':<24}{'data':>12}{'generated':>12}"]
    steps = [np.flatnonzero(~dataset.terminals) for dataset in (data, generated)]
    lengths = [
        np.linalg.norm((dataset.observations[rows + 1] - dataset.observations[rows]) / std, axis=-1)
        for dataset, rows in zip((data, generated), steps, strict=True)
    ]
    for name, share in (("step length, median", 50), ("step length, 99 %", 99)):
        lines.append(f"{name:<24}" + "".join(f"{np.percentile(length, share):>12.4g}" for length in lengths))
    if policy is not None:
        likely = []
        for dataset, rows in zip((data, generated), steps, strict=True):
            rows = rows[np.linspace(0, len(rows) - 1, COMPARED).astype(int)]
            likely.append(jitted_mean_log_density(policy, dataset.observations[rows], dataset.actions[rows]))
        lines.append(f"{'log pi(a | s), mean':<24}" + "".join(f"{value:>12.4f}" for value in likely))
    return lines
