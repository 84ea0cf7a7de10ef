"""Offline data and replay as one ring in device memory, laid out (lane, time), each observation stored once.

A lane is the history of one environment. Its rows follow each other in time:

    row      t       t+1      t+2      t+3        t+4
    obs      s0      s1       s2       end        s0'      <- first observation of the next episode
    action   a0      a1       a2       -          a0'
    valid    1       1        1        0          1
    flags    .       .        end      .          .

A row holds an observation and the transition that leaves it, so the observation that a transition leads to is the
next row's. When an episode ends, one more row keeps its last observation, from before the reset; no transition leaves
it, so it is not valid. The row at a lane's `head` holds the newest observation and is written again, with its action,
by the next `add`: every transition in the ring is complete at all times, and no window can cross the head.

An observation is an array or a dict of arrays, and each array keeps its shape and dtype: images stay uint8. Further
columns are in `extra`, such as log-probabilities that an agent left behind or columns of a dataset file; what they hold
at the last observation of an episode has no meaning.

A dataset whose goals are drawn in hindsight is one lane that also knows its episodes (`jaxrl.replay.hindsight`).
"""

import dataclasses
from collections.abc import Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp

from jaxrl.errors import UserError
from jaxrl.ops.masks import beside
from jaxrl.replay import hindsight as goal_drawing
from jaxrl.replay.hindsight import DEFAULT, Goals, Hindsight
from jaxrl.replay.kdtree import Forest
from jaxrl.replay.weighting import Weights, draw_rows
from jaxrl.types import Batch, History, Observation, Scalar, Spec, pytree

REDRAWS = 4  # candidates per window start, of which the first valid one is taken


@pytree
class Steps:
    """What a rollout of H steps hands over: N environments, each with n <= H steps that happened."""

    obs: Observation  # [N, H + 1, ...]: before each step, then after the last one, always from before a reset
    actions: jax.Array  # [N, H, A]
    rewards: jax.Array  # [N, H]
    terminated: jax.Array  # [N, H] bool
    truncated: jax.Array  # [N, H] bool
    valid: jax.Array  # [N, H] bool: the simulator's answer was finite
    taken: jax.Array  # [N, H] bool: happened at all (false while waiting for the chunk's end)
    ended: jax.Array  # [N] bool: the episode is over
    extra: dict[str, jax.Array] = dataclasses.field(
        default_factory=dict
    )  # [N, H, ...], what the agent left behind at each step


@pytree
class Ring:
    """L lanes of T rows."""

    obs: Observation  # [L, T, ...]
    actions: jax.Array  # [L, T, A]
    rewards: jax.Array  # [L, T]
    terminated: jax.Array  # [L, T] bool
    truncated: jax.Array  # [L, T] bool
    valid: jax.Array  # [L, T] bool
    head: jax.Array  # [L] int32, the row of the newest observation
    count: jax.Array  # [L] int32, rows behind the head that hold history
    hindsight: Hindsight | None = None  # where goals are drawn in hindsight; then L = 1 and rewards mean nothing
    forest: Forest | None = None  # where neighbors are searched on the host, in KD-trees of these very rows
    extra: dict[str, jax.Array] = dataclasses.field(default_factory=dict)  # [L, T, ...], further columns by name
    weights: Weights | None = None  # where trajectories are not drawn alike; then L = 1 and none was added


Rings: TypeAlias = tuple[Ring, ...]
"""What an agent samples from, uniformly over all their rows: the offline data, the replay, or both."""


def empty(lanes: int, rows: int, spec: Spec, extra: Mapping[str, jax.ShapeDtypeStruct] | None = None) -> Ring:
    """Returns a ring without history, for the observations and actions of a spec.

    `extra` are its further columns by name, with the shape and dtype of one row each.
    """

    def column(row: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.zeros((lanes, rows, *row.shape), row.dtype)

    flag = jnp.zeros((lanes, rows), bool)
    return Ring(
        obs=jax.tree.map(column, spec.example()),
        actions=jnp.zeros((lanes, rows, spec.action)),
        rewards=jnp.zeros((lanes, rows)),
        terminated=flag,
        truncated=flag,
        valid=flag,
        head=jnp.zeros(lanes, jnp.int32),
        count=jnp.zeros(lanes, jnp.int32),
        extra={name: column(row) for name, row in (extra or {}).items()},
    )


def add(ring: Ring, steps: Steps) -> Ring:
    """Returns the ring with N = L environments' steps appended, each to its own lane; the oldest rows give way.

    A lane advances by the steps that its environment took, and by one more where the episode ended, to keep the
    last observation. Rows of a chunk that did not happen are not written. What a ring knows besides its columns
    (`hindsight`, `forest`, `weights`) stays as it is: it describes the rows from before.

    Raises UserError where the ring's extra columns are not those of the steps.
    """
    if ring.extra.keys() != steps.extra.keys():
        kept, brought = (", ".join(sorted(columns)) or "none" for columns in (ring.extra, steps.extra))
        raise UserError(f"extra columns: the ring keeps {kept}, the steps bring {brought}: name these in ring.empty")
    lanes, rows = ring.valid.shape
    length = steps.actions.shape[1]
    taken = steps.taken.sum(axis=1)
    offset = jnp.arange(length + 1)[None, :]
    row = jnp.where(offset <= taken[:, None], (ring.head[:, None] + offset) % rows, rows)  # rows = out of range
    lane = jnp.arange(lanes)[:, None]

    def put(field: jax.Array, values: jax.Array) -> jax.Array:
        missing = length + 1 - values.shape[1]  # per-step fields lack an entry for the last observation
        padded = jnp.pad(values, [(0, 0), (0, missing)] + [(0, 0)] * (values.ndim - 2))
        return field.at[lane, row].set(padded.astype(field.dtype), mode="drop")

    advance = taken + steps.ended
    return dataclasses.replace(
        ring,
        obs=jax.tree.map(put, ring.obs, steps.obs),
        actions=put(ring.actions, steps.actions),
        rewards=put(ring.rewards, steps.rewards),
        terminated=put(ring.terminated, steps.terminated & steps.taken),
        truncated=put(ring.truncated, steps.truncated & steps.taken),
        valid=put(ring.valid, steps.valid & steps.taken),
        head=(ring.head + advance) % rows,
        count=jnp.minimum(ring.count + advance, rows - 1),
        extra={name: put(column, steps.extra[name]) for name, column in ring.extra.items()},
    )


def windows(
    rings: Rings,
    key: jax.Array,
    batch: int,
    length: int,
    goals: Goals = DEFAULT,
    share: Scalar | None = None,
    history: int = 0,
) -> Batch:
    """Returns `batch` windows of `length` steps, started uniformly over the history of all rings together.

    A ring is chosen in proportion to its rows, so data and replay act as one buffer without being copied into one. Or
    the first of two has a `share` of every batch, to the nearest window, and the other the rest.
    `goals` is the law of the goals that are drawn in hindsight, in rings that know their episodes; a replay keeps the
    goals that were pursued.

    `Batch.extra` holds the columns that all rings have, and `Batch.history` the `history` steps before each window.
    """
    key_ring, *keys = jax.random.split(key, len(rings) + 1)
    parts = [_windows(ring, k, batch, length, goals, history) for ring, k in zip(rings, keys, strict=True)]
    shared = set.intersection(*(set(ring.extra) for ring in rings))
    parts = [dataclasses.replace(part, extra={name: part.extra[name] for name in sorted(shared)}) for part in parts]
    if share is None or len(rings) == 1:
        rows = jnp.stack([ring.count.sum() for ring in rings])
        source = jax.random.categorical(key_ring, jnp.log(rows), shape=(batch,))
    else:
        source = (jnp.arange(batch) >= jnp.round(batch * share)).astype(jnp.int32)
    chosen = parts[0]
    for i, part in enumerate(parts[1:], start=1):
        chosen = jax.tree.map(lambda a, b, here=source == i: jnp.where(beside(here, a), b, a), chosen, part)
    return chosen


def _windows(ring: Ring, key: jax.Array, batch: int, length: int, goals: Goals, history: int) -> Batch:
    """Returns windows of one ring: starts are uniform over valid rows, by drawing again where a row is not.

    After REDRAWS misses a window without any valid step is returned, which has no weight in any loss. Where
    trajectories have weights, starts follow these, and every draw is valid.
    """
    only = jnp.zeros(batch, jnp.int32)
    if ring.hindsight is not None:
        start, goal = goal_drawing.draw(ring.hindsight, key, batch, length, goals)
        return _towards(ring, only, start, goal, length, goals, history)
    if ring.weights is not None:
        return window_at(ring, only, draw_rows(ring.weights, key, batch), length, history)
    ends = jnp.cumsum(ring.count)
    draw = jax.random.randint(key, (REDRAWS, batch), 0, jnp.maximum(ends[-1], 1))
    lane = jnp.minimum(jnp.searchsorted(ends, draw, side="right"), len(ends) - 1)
    start = draw - (ends - ring.count)[lane]
    hit = ring.valid[lane, _row(ring, lane, start)] & (start < ring.count[lane])
    pick = jnp.argmax(hit, axis=0)[None]
    lane, start = (jnp.take_along_axis(x, pick, axis=0)[0] for x in (lane, start))
    return window_at(ring, lane, start, length, history)


def window_at(ring: Ring, lane: jax.Array, start: jax.Array, length: int, history: int = 0) -> Batch:
    """Returns the windows that begin `start` [B] rows after the oldest row of `lane` [B].

    A window keeps its steps up to and including the first that ends the episode, and none from an invalid row on.
    """
    lane, steps = lane[:, None], jnp.arange(length)[None, :]
    row = _row(ring, lane, start[:, None] + steps)
    ends = ring.terminated[lane, row] | ring.truncated[lane, row]
    exists = ring.valid[lane, row] & (start[:, None] + steps < ring.count[lane])
    earlier_end = jnp.cumsum(ends, axis=1) - ends > 0
    valid = jnp.cumprod(exists & ~earlier_end, axis=1).astype(bool)
    taken = valid.sum(axis=1, keepdims=True)
    last = _row(ring, lane, start[:, None] + jnp.minimum(steps, jnp.maximum(taken - 1, 0)))
    following = _row(ring, lane, start[:, None] + taken)
    return Batch(
        obs=jax.tree.map(lambda x: x[lane[:, 0], row[:, 0]], ring.obs),
        actions=ring.actions[lane, last],
        rewards=jnp.where(valid, ring.rewards[lane, row], 0),
        valid=valid.astype(ring.rewards.dtype),
        terminated=(ring.terminated[lane, row] & valid).any(axis=1),
        next_obs=jax.tree.map(lambda x: x[lane, following][:, 0], ring.obs),
        steps=taken[:, 0],
        next_action=ring.actions[lane, following][:, 0],
        followed=_followed(ring, lane, following, start[:, None] + taken),
        extra={name: column[lane[:, 0], row[:, 0]] for name, column in ring.extra.items()},
        history=history_at(ring, lane[:, 0], start, history) if history else None,
    )


def _towards(
    ring: Ring, lane: jax.Array, start: jax.Array, goal: jax.Array, length: int, law: Goals, history: int
) -> Batch:
    """Returns the windows of a ring that knows its episodes, from rows `start` [B] towards the rows `goal` [B]."""
    assert ring.hindsight is not None
    obs = jax.tree.map(lambda x: x[0], ring.obs)
    found = goal_drawing.window_at(obs, ring.actions[0], ring.hindsight, start, goal, length, law)
    before = history_at(ring, lane, start, history) if history else None
    return dataclasses.replace(
        found,
        extra={name: column[0, start] for name, column in ring.extra.items()},
        history=before and goal_drawing.history_towards(before, obs, ring.hindsight, start, goal, law),
    )


def history_at(ring: Ring, lane: jax.Array, start: jax.Array, length: int) -> History:
    """Returns the `length` steps before the windows that begin `start` [B] rows after the oldest row of `lane` [B].

    They end before the episode's first step, and where a row is no longer stored or is not valid. There all is 0.
    """
    lane, age = lane[:, None], start[:, None] + jnp.arange(-length, 0)[None, :]
    row = _row(ring, lane, age)
    ends = ring.terminated[lane, row] | ring.truncated[lane, row]
    goes_on = ring.valid[lane, row] & ~ends & (age >= 0) & (age < ring.count[lane])
    valid = jnp.flip(jnp.cumprod(jnp.flip(goes_on, axis=1), axis=1), axis=1).astype(bool)

    def stored(column: jax.Array) -> jax.Array:
        values = column[lane, row]
        return jnp.where(beside(valid, values), values, jnp.zeros((), column.dtype))

    return History(
        obs=jax.tree.map(stored, ring.obs),
        actions=stored(ring.actions),
        rewards=stored(ring.rewards),
        valid=valid.astype(ring.rewards.dtype),
    )


def _followed(ring: Ring, lane: jax.Array, row: jax.Array, age: jax.Array) -> jax.Array:
    """Returns 1 where a transition leaves rows [B, 1] of the same episode that is in the ring, else 0, as [B]."""
    return (ring.valid[lane, row] & (age < ring.count[lane])).astype(ring.rewards.dtype)[:, 0]


def _row(ring: Ring, lane: jax.Array, age: jax.Array) -> jax.Array:
    """Returns the row that lies `age` rows after the oldest of its lane, never beyond the head."""
    return (ring.head[lane] - ring.count[lane] + jnp.minimum(age, ring.count[lane])) % ring.valid.shape[1]
