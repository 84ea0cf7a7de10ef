"""Conversion of datasets to sub-trajectories for a generative model, and of its output to a dataset.

A step is one row of features: state, action, reward, and whether the step ended the task. Actions are stored as their
atanh, so that generated actions stay in [-1, 1]; every feature is standardized (Jackson et al., arXiv 2404.06356).
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.data import files
from jaxrl.data.files import Dataset
from jaxrl.errors import UserError
from jaxrl.ops import normalizer
from jaxrl.ops.closed_form import NEAR_BOUND
from jaxrl.ops.diffusion import Scale
from jaxrl.types import pytree

HELD_OUT = 0.05  # fraction of episodes held out to measure the model's error


@pytree
class Segments:
    """S sub-trajectories of H steps. They overlap, so only the indices of their first rows are stored."""

    length: int  # H
    rows: jax.Array  # [N, O + A + 2], all rows of the dataset, standardized
    starts: jax.Array  # [S] int32
    scale: Scale

    def draw(self, key: jax.Array, batch: int) -> jax.Array:
        """Returns [batch, H, O + A + 2], drawn uniformly."""
        start = jax.random.choice(key, self.starts, (batch,))
        return self.rows[start[:, None] + jnp.arange(self.length)[None]]


def features(dataset: Dataset) -> np.ndarray:
    """Returns features [N, O + A + 2] of a dataset with rewards, not yet standardized, in float64."""
    actions = np.arctanh(np.clip(dataset.actions.astype(np.float64), -NEAR_BOUND, NEAR_BOUND))
    columns = (dataset.observations, actions, _column(dataset.rewards), _column(_ended(dataset)))
    return np.concatenate(columns, axis=1, dtype=np.float64)


def _column(values: np.ndarray | None) -> np.ndarray:
    assert values is not None
    return values[:, None]


def _ended(dataset: Dataset) -> np.ndarray:
    """Returns for each row whether its step ended the task, [N] bool."""
    if dataset.masks is None:
        return np.zeros(len(dataset.terminals), bool)
    return (dataset.masks == 0) & ~dataset.terminals


def starts_of(dataset: Dataset, length: int, stride: int) -> np.ndarray:
    """Returns the first rows of all sub-trajectories of `length` steps, ascending, [S].

    They begin at every `stride`-th step from the start of an episode, or from a restart of the task; one more ends
    where the task ends. None continues after an end, and none includes the step that was truncated.
    """
    ended = _ended(dataset)
    last_step = np.append(dataset.terminals[1:], False)  # the next row ends the episode
    last = np.flatnonzero((ended | last_step) & ~dataset.terminals)
    begins = np.append(True, dataset.terminals[:-1] | ended[:-1]) & ~dataset.terminals
    first = np.flatnonzero(begins)
    usable = last - ~ended[last]
    room = usable - first + 1 - length
    first, usable, room, terminal = (x[room >= 0] for x in (first, usable, room, ended[last]))
    count = room // stride + 1
    before = np.repeat(np.cumsum(count) - count, count)
    regular = np.repeat(first, count) + stride * (np.arange(len(before)) - before)
    return np.union1d(regular, usable[terminal] + 1 - length)


def segments(dataset: Dataset, length: int, stride: int) -> tuple[Segments, Segments]:
    """Returns the sub-trajectories for training, and those of 5 % of the episodes, held out (possibly none).

    Raises UserError if no episode is long enough.
    """
    starts = starts_of(dataset, length, stride)
    _, closing = files.episodes(dataset)
    held_out = np.random.default_rng(0).permutation(len(closing))[: int(HELD_OUT * len(closing))]
    aside = np.isin(np.searchsorted(closing, starts), held_out)
    if aside.all():  # if nothing would be left for training, nothing is held out
        aside = np.zeros_like(aside)
    if not len(starts):
        raise UserError(
            f"dataset {dataset.path}: no episode has {length} consecutive steps without truncation or an earlier "
            "termination: lower length"
        )
    raw = features(dataset)
    mean, std = moments(raw, starts[~aside], length)
    scale = Scale(dataset.observations.shape[1], dataset.actions.shape[1], jnp.float32(mean), jnp.float32(std))
    rows = jnp.asarray((raw - mean) / std, jnp.float32)
    learn, judge = (jnp.asarray(part, jnp.int32) for part in (starts[~aside], starts[aside]))
    return Segments(length, rows, learn, scale), Segments(length, rows, judge, scale)


def moments(rows: np.ndarray, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation [F] over all sub-trajectories; the latter is 1 for constant features."""
    change = np.bincount(starts, minlength=len(rows) + 1) - np.bincount(starts + length, minlength=len(rows) + 1)
    times = np.cumsum(change)[:-1]  # how many sub-trajectories each row is in
    mean, variance = normalizer.weighted(rows, times)
    return mean, np.where(np.ptp(rows[times > 0], axis=0) == 0, 1.0, np.sqrt(variance))


def to_dataset(obs: np.ndarray, actions: np.ndarray, rewards: np.ndarray, ended: np.ndarray) -> Dataset:
    """Returns generated trajectories of H steps [N, H, ...] as truncated episodes of H - 1 transitions.

    An episode ends where the task ended; later steps are dropped. If the task ended in the last step, that step is
    kept: its next state was not generated, but is not bootstrapped from, and is filled with the previous state.

    Raises UserError for values that are not finite.
    """
    length = ended.shape[1]
    if not all(np.isfinite(part).all() for part in (obs, actions, rewards)):
        raise UserError("the model generated values that are not finite: lower guidance, or train for longer")
    closing = np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, length - 1)[:, None]
    row = np.arange(length + 1)[None]
    kept, last = row <= closing, row == closing
    obs, actions, rewards, ended = (
        np.pad(part, [(0, 0), (0, 1)] + [(0, 0)] * (part.ndim - 2), mode="edge")
        for part in (obs, actions, rewards, ended)
    )
    return files.from_columns(
        {
            "observations": obs[kept],
            "actions": np.where(last[..., None], 0, actions)[kept],
            "rewards": np.where(last, 0, rewards)[kept],
            "masks": np.where(ended & ~last, 0.0, 1.0)[kept],
            "terminals": last[kept],
        }
    )
