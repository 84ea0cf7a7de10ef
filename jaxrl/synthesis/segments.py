"""Datasets as sub-trajectories for a generative model, and what it generates as a dataset again.

A step is one row of features: state, action, reward, and whether the step ended the task. Actions stand as atanh, so
that no generated one leaves [-1, 1]; every feature is standardised (Jackson et al., arXiv 2404.06356).
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.data import files
from jaxrl.data.files import Dataset
from jaxrl.errors import UserError
from jaxrl.ops.diffusion import Scale
from jaxrl.types import pytree

NEAR_BOUND = 0.999  # actions are clipped to it before atanh
HELD_OUT = 0.05  # share of the episodes that the model is judged on and does not learn from


@pytree
class Segments:
    """S sub-trajectories of H steps, which overlap, so that only their first rows are kept."""

    length: int  # H
    rows: jax.Array  # [N, O + A + 2], all rows of the dataset, standardised
    starts: jax.Array  # [S] int32
    scale: Scale

    def draw(self, key: jax.Array, batch: int) -> jax.Array:
        """Returns [batch, H, O + A + 2], drawn uniformly."""
        start = jax.random.choice(key, self.starts, (batch,))
        return self.rows[start[:, None] + jnp.arange(self.length)[None]]


def features(dataset: Dataset) -> np.ndarray:
    """Returns a row [O + A + 2] per row of a dataset with rewards, not standardised yet; float64."""
    actions = np.arctanh(np.clip(dataset.actions.astype(np.float64), -NEAR_BOUND, NEAR_BOUND))
    columns = (dataset.observations, actions, _column(dataset.rewards), _column(_ended(dataset)))
    return np.concatenate(columns, axis=1, dtype=np.float64)


def _column(values: np.ndarray | None) -> np.ndarray:
    assert values is not None
    return values[:, None]


def _ended(dataset: Dataset) -> np.ndarray:
    """Returns, for each row, whether the task ended in the step that leaves it, [N] bool."""
    if dataset.masks is None:
        return np.zeros(len(dataset.terminals), bool)
    return (dataset.masks == 0) & ~dataset.terminals


def starts_of(dataset: Dataset, length: int, stride: int) -> np.ndarray:
    """Returns the first rows of all sub-trajectories of `length` steps, ascending, [S].

    They begin at every `stride`-th step, counted from where an episode begins, or the task anew; one more ends where
    the task ends. None goes on after an end, and none has the step after which the clock ran out.
    """
    ended = _ended(dataset)
    last_step = np.append(dataset.terminals[1:], False)  # the row after it closes the episode
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
    """Returns the sub-trajectories to learn from, and those of 5 % of the episodes, to be judged on (perhaps none).

    Raises UserError where no episode is long enough.
    """
    starts = starts_of(dataset, length, stride)
    _, closing = files.episodes(dataset)
    held_out = np.random.default_rng(0).permutation(len(closing))[: int(HELD_OUT * len(closing))]
    aside = np.isin(np.searchsorted(closing, starts), held_out)
    if aside.all():  # nothing to learn from: then nothing is held out
        aside = np.zeros_like(aside)
    if not len(starts):
        raise UserError(
            f"dataset {dataset.path}: no episode has {length} steps in a row in which neither the task ends early nor "
            "the clock runs out: lower length"
        )
    raw = features(dataset)
    mean, std = moments(raw, starts[~aside], length)
    scale = Scale(dataset.observations.shape[1], dataset.actions.shape[1], jnp.float32(mean), jnp.float32(std))
    rows = jnp.asarray((raw - mean) / std, jnp.float32)
    learn, judge = (jnp.asarray(part, jnp.int32) for part in (starts[~aside], starts[aside]))
    return Segments(length, rows, learn, scale), Segments(length, rows, judge, scale)


def moments(rows: np.ndarray, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation [F] over all sub-trajectories; 1 for the latter where nothing varies."""
    change = np.bincount(starts, minlength=len(rows) + 1) - np.bincount(starts + length, minlength=len(rows) + 1)
    times = np.cumsum(change)[:-1]  # how many sub-trajectories each row is in
    seen = rows[times > 0]
    mean = np.average(rows, axis=0, weights=times)
    std = np.sqrt(np.average(np.square(rows - mean), axis=0, weights=times))
    return mean, np.where(np.ptp(seen, axis=0) == 0, 1.0, std)


def to_dataset(obs: np.ndarray, actions: np.ndarray, rewards: np.ndarray, ended: np.ndarray) -> Dataset:
    """Returns generated trajectories of H steps [N, H, ...] as episodes of H - 1 transitions, cut by the clock.

    Where the task ended, an episode ends, and what was generated after it is dropped. If that was in the last step, it
    is kept: the state that it led to was not generated, but counts for nothing, and the one before stands for it.

    Raises UserError for values that are not finite.
    """
    length = ended.shape[1]
    if not all(np.isfinite(part).all() for part in (obs, actions, rewards)):
        raise UserError("the model generated values that are not finite: lower guidance, or train it for longer")
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
