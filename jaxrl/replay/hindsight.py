"""Goals in hindsight: any state that an episode reached may be the goal of its earlier states, or of another episode.

A window starts where all its steps stay in their episode, draws a goal by the law `Goals`, and ends where it reaches
that goal: after k steps, with success, where the goal is k < H rows ahead, else after all H steps, with bootstrap. A
goal exactly H steps ahead is left to the bootstrap, which then evaluates a state that is its own goal.

The law is that of DQC (Li, Park, Levine, arXiv 2512.10926, and its official code); the geometric law of the future is
that of OGBench (Park et al., arXiv 2410.20092). Rows are indices into one lane of whole episodes, see
`jaxrl.replay.ring`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.errors import UserError
from jaxrl.ops.masks import beside
from jaxrl.ranges import Fraction
from jaxrl.types import Batch, History, Observation, pytree


@pytree
class Goals:
    """Which goals windows are relabeled with: their own first state, a later state of their episode, or any other."""

    current: Fraction = 0.2  # probability of the window's first state
    future: Fraction = 0.5  # probability of a later state of the episode; the rest are starts of any episode
    future_law: Literal["uniform", "geometric"] = "uniform"  # over the rest of the episode, or the nearer the likelier
    geometric_discount: Fraction = 0.99  # probability, per step, that a geometric goal lies further ahead
    negative: bool = False  # rewards -1 before the goal and 0 there, in place of 0 before and 1 there

    def check(self) -> None:
        """Raises UserError where the probabilities do not fit each other."""
        if (np.asarray(self.geometric_discount) == 1).any():
            raise UserError("Goals.geometric_discount = 1: must be below 1, else no goal is ever reached")
        if (np.asarray(self.current) + np.asarray(self.future) > 1 + 1e-6).any():
            raise UserError(
                f"Goals.current = {self.current} and Goals.future = {self.future}: must add up to at most 1, "
                "the rest are goals from any episode"
            )

    def check_head(self, head: str) -> None:
        """Raises UserError where the rewards do not fit what values are: probabilities need rewards of 0 and 1."""
        if head == "bce" and self.negative:
            raise UserError("Goals.negative = True: values are probabilities, rewards must be 0 and 1")


DEFAULT = Goals()


@pytree
class Hindsight:
    """The goals and episodes of T rows that hold E whole episodes. Episodes of no steps are never drawn."""

    goals: jax.Array | None  # [T, ...], each row as a goal; None: its observation, which is one array, not stored twice
    first: jax.Array  # [E] int32, the row of each episode's first state
    steps: jax.Array  # [E] int32, its transitions: its last state is in row first + steps


def draw(hindsight: Hindsight, key: jax.Array, batch: int, length: int, law: Goals) -> tuple[jax.Array, jax.Array]:
    """Returns the rows (start, goal) [batch] of windows; a goal from any episode is a row where a window may start."""
    key_start, key_other, key_kind, key_future = jax.random.split(key, 4)
    start, last = starts(hindsight, key_start, batch, length)
    other, _ = starts(hindsight, key_other, batch, length)
    kind = jax.random.uniform(key_kind, (batch,))
    elsewhere = jnp.where(kind < law.current + law.future, start + ahead(key_future, last - start, law), other)
    return start, jnp.where(kind < law.current, start, elsewhere)


def starts(hindsight: Hindsight, key: jax.Array, batch: int, length: int) -> tuple[jax.Array, jax.Array]:
    """Returns rows [batch], uniform over those whose next `length` steps stay in the episode, and its last rows."""
    count = jnp.maximum(hindsight.steps - length + 1, 0)  # per episode
    ends = jnp.cumsum(count)
    draw = jax.random.randint(key, (batch,), 0, jnp.maximum(ends[-1], 1))
    episode = jnp.searchsorted(ends, draw, side="right")
    start = hindsight.first[episode] + draw - (ends - count)[episode]
    return start, (hindsight.first + hindsight.steps)[episode]


def ahead(key: jax.Array, left: jax.Array, law: Goals) -> jax.Array:
    """Returns how many rows ahead a goal of the same episode is, where `left` [B] >= 1 rows are left.

    The uniform law rounds a uniform number in [1, left], as the official code of DQC does: the nearest and the
    furthest row have half the probability of the others.
    """
    if law.future_law == "geometric":
        return jnp.minimum(jax.random.geometric(key, 1 - law.geometric_discount, left.shape), left)
    share = jax.random.uniform(key, left.shape)
    return jnp.round(share + left * (1 - share)).astype(left.dtype)


def window_at(
    obs: Observation,
    actions: jax.Array,
    hindsight: Hindsight,
    start: jax.Array,
    goal: jax.Array,
    length: int,
    law: Goals,
) -> Batch:
    """Returns the windows from rows `start` [B] towards the rows `goal` [B], in lanes `obs` [T, ...], `actions` [T, A].

    Observations include the goal, see `with_goals`. All actions of a window were taken, also those after its goal.
    """
    distance = goal - start
    reached = (distance >= 0) & (distance < length)
    k = jnp.where(reached, distance, length)
    step = jnp.arange(length)[None]
    goals = goals_of(obs, hindsight)[goal]
    rewards = jnp.where(step < k[:, None], -1, 0) if law.negative else reached[:, None] & (step == k[:, None])
    ends = jax.lax.cummax(hindsight.first + hindsight.steps)  # the closing rows; episodes without steps come last
    closes = ends[jnp.searchsorted(ends, start + k)] == start + k
    return Batch(
        obs=with_goals(jax.tree.map(lambda x: x[start], obs), goals),
        actions=actions[start[:, None] + step],
        rewards=rewards.astype(actions.dtype),
        valid=jnp.ones((len(start), length), actions.dtype),
        terminated=reached,
        next_obs=with_goals(jax.tree.map(lambda x: x[start + k], obs), goals),
        steps=k,
        next_action=actions[start + k],
        followed=(~closes).astype(actions.dtype),
    )


def history_towards(
    history: History, obs: Observation, hindsight: Hindsight, start: jax.Array, goal: jax.Array, law: Goals
) -> History:
    """Returns the steps before rows `start` [B] with the rows `goal` [B] as their goals, and the rewards for those."""
    count = history.valid.shape[1]
    met = start[:, None] + jnp.arange(-count, 0)[None] == goal[:, None]
    rewards = jnp.where(met, 0, -1) if law.negative else met
    goals = jnp.repeat(goals_of(obs, hindsight)[goal][:, None], count, axis=1)
    there = beside(history.valid, goals)
    return dataclasses.replace(
        history,
        obs=with_goals(history.obs, jnp.where(there > 0, goals, jnp.zeros((), goals.dtype))),
        rewards=rewards * history.valid,
    )


def goals_of(obs: Observation, hindsight: Hindsight) -> jax.Array:
    """Returns what stands for each row of `obs` [T, ...] as a goal: what is stored, or the observation itself."""
    if hindsight.goals is not None:
        return hindsight.goals
    (whole,) = jax.tree.leaves(obs)
    return whole


def with_goals(obs: Observation, goals: jax.Array) -> Observation:
    """Returns observations with their goals: the last entries of an array, the key "goal" of a dict."""
    if isinstance(obs, Mapping):
        return {**obs, "goal": goals}
    return jnp.concatenate([obs, goals], axis=-1)
