"""Synthetic datasets on the host's side: the model is trained and kept in a folder, sampled, and held against the data.

A model's folder holds generator.json, what it was asked to be and the digest of its data, and checkpoints/.
"""

import dataclasses
import functools
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
    GuidingPolicy,
    jitted_epoch,
    jitted_init,
    jitted_mean_log_density,
    jitted_trajectories,
)
from jaxrl.synthesis.segments import Segments
from jaxrl.training import loop
from jaxrl.types import PyTree

AT_ONCE = 256  # trajectories in one program
SAVES = 10  # times that a model is saved while it is trained
JUDGED = 4096  # actions whose log density is averaged, spread evenly over a dataset


def policy_for(dataset: Dataset, config: Config, env: Any, path: Path) -> GuidingPolicy:
    """Returns a run's agent and newest state. Raises UserError where their sizes are not the dataset's."""
    sizes = (dataset.observations.shape[1], dataset.actions.shape[1])
    if sizes != (env.spec.observation, env.spec.action):
        raise UserError(
            f"--policy {path}: it sees observations of {env.spec.observation} entries and acts with {env.spec.action}, "
            f"dataset {dataset.path} has {sizes[0]} and {sizes[1]}"
        )
    agent = loop.on_device(config.agent)
    return agent, newest_state(config, agent, env, path)


def settings_in(path: Path) -> Generator | None:
    """Returns what the model in a folder was asked to be; None where there is none."""
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
    """Returns the sub-trajectories to learn from and to be judged on; makes a model's folder where there is none.

    Raises UserError where the folder holds another model, or one of other data.
    """
    asked = {"generator": dataclasses.asdict(generator), "dataset_digest": dataset.digest}
    found = settings_in(path)
    if found is not None:
        for field in dataclasses.fields(Generator):
            was, now = getattr(found, field.name), getattr(generator, field.name)
            if was != now:
                raise UserError(
                    f"{field.name} = {now}: the model in {path} has {was}; leave it out, or name another folder "
                    "with --model"
                )
        if _description(path)["dataset_digest"] != dataset.digest:
            raise UserError(f"the model in {path} was trained on other data or rewards: name another with --model")
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists, but holds no diffusion model: name another folder with --model")
    parts = segments.segments(dataset, generator.length, generator.stride)
    if found is None:
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / "generator.json", asked)
    return parts


def fitted(
    generator: Generator, parts: tuple[Segments, Segments], path: Path, key: jax.Array, stop: StopRequests
) -> tuple[PyTree, str]:
    """Returns the parameters to sample from, trained on from the folder's newest checkpoint, and their errors in words.

    Raises StopRequested, having saved, where asked to stop.
    """
    learn, judge = parts
    generator = loop.on_device(generator)
    begin = functools.partial(jitted_init, generator, key, features=len(learn.scale.mean))
    count, updates = generator.epochs
    loaded = checkpoint.load(path / "checkpoints", lambda _: jax.eval_shape(begin))
    done, state = (0, jax.device_put(begin(), jax.devices()[0])) if loaded is None else loaded
    said = "trained before"
    with tqdm(desc="diffusion", total=count * updates, initial=done * updates, unit="update", disable=None) as bar:
        for index in range(done, count):
            state, metrics = jitted_epoch(generator, state, learn, judge)
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
    policy: GuidingPolicy | None = None,
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


def comparison(data: Dataset, generated: Dataset, scale: Scale, policy: GuidingPolicy | None) -> list[str]:
    """Returns lines that hold generated trajectories against the data: how far steps go, how likely actions are.

    A step's length is that of the change of the observation, in standard deviations of the data.
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
            rows = rows[np.linspace(0, len(rows) - 1, JUDGED).astype(int)]
            likely.append(jitted_mean_log_density(policy, dataset.observations[rows], dataset.actions[rows]))
        lines.append(f"{'log pi(a | s), mean':<24}" + "".join(f"{value:>12.4f}" for value in likely))
    return lines
