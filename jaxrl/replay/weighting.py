"""Trajectory weighting: which episodes of a dataset are learned from more often, for any agent.

Paper: Hong, Agrawal, Tachet des Combes, Laroche, "Harnessing Mixed Offline Reinforcement Learning Datasets via
Trajectory Weighting", arXiv 2306.13085. Offline methods stay near the behaviour of the data; drawing the better
trajectories more often improves that behaviour. With stochastic dynamics a high return may be luck.

A transition of trajectory i has the probability u_i / sum_j T_j u_j. It is drawn in two steps: first the trajectory,
with probability proportional to T_i u_i, then one of its T_i transitions, uniformly. That avoids the rounding of a
float32 cumulative sum over all transitions. Losses are not corrected for it.

Deliberate differences from the official code: scores that differ by rounding alone count as equal (there 0/0), and
Top-K% keeps at least one trajectory (there none).
"""

import dataclasses
import math
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.errors import UserError, unknown
from jaxrl.types import pytree

Kind: TypeAlias = Literal["uniform", "return", "advantage", "top"]

ROUNDING = 1e-6  # relative to the largest: sums of float32 rewards that differ by less count as equal
FULL = 2**32  # a probability of 1, in units of one random word


@dataclasses.dataclass(frozen=True)
class Weighting:
    """Which trajectories of the dataset are learned from more often; the replay stays uniform.

    Returns are sums of the dataset's rewards, or of the environment's own, before reward_scale and reward_shift. In a
    folder of files, trajectories are weighted within each file.
    """

    kind: Kind = "uniform"
    """Uniform; by a trajectory's return; by its advantage over the return expected from its start; or the top."""
    temperature: float = 0.1
    """For return and advantage: the best trajectory's transitions are e^(1/temperature) as likely as the worst's."""
    fraction: float = 0.1
    """For top: the share of trajectories that are kept, at least one."""

    def check(self) -> None:
        """Raises UserError where a value is out of range."""
        if self.kind not in get_args(Kind):
            raise unknown("weighting.kind", str(self.kind), get_args(Kind))
        if not 0 < self.temperature < math.inf:
            raise UserError(f"weighting.temperature = {self.temperature}: must be above 0, and finite")
        if not 0 < self.fraction <= 1:
            raise UserError(f"weighting.fraction = {self.fraction}: must be above 0 and at most 1")


UNIFORM = Weighting()


@pytree
class Weights:
    """An alias table (Walker 1977) of E trajectories: draw a uniform entry, then take itself or its alternative."""

    first: jax.Array  # [E] int32, the row of each trajectory's first transition
    steps: jax.Array  # [E] int32, its transitions
    share: jax.Array  # [E] uint32, the probability in units of 2^-32 that an entry gives its own trajectory
    other: jax.Array  # [E] int32, the trajectory that it gives otherwise


def trajectory_weights(
    returns: np.ndarray,
    lengths: np.ndarray,
    initial_obs: np.ndarray,
    kind: Kind,
    temperature: float = 0.1,
    fraction: float = 0.1,
) -> np.ndarray:
    """Returns log u_i [E] float64, from undiscounted returns [E], steps [E] and first observations [E, O].

    "return": y_i / temperature, y the returns shifted and scaled to [0, 1]. "advantage": the same for the residuals of
    a linear regression of the returns on the first observations. "top": 0 for the floor(fraction E) largest returns,
    the earlier of equal ones, and -inf for the rest. Where all scores are equal, trajectories are too.
    """
    returns, lengths = np.asarray(returns, np.float64), np.asarray(lengths)
    if returns.ndim != 1 or not len(returns) == len(lengths) == len(initial_obs) > 0:
        raise UserError(
            f"weighting: returns {returns.shape}, lengths {lengths.shape} and initial observations "
            f"{np.shape(initial_obs)} must be of the same trajectories, at least one"
        )
    if not np.isfinite(returns).all():
        raise UserError(f"weighting: the return of trajectory {np.flatnonzero(~np.isfinite(returns))[0]} is not finite")
    if kind == "uniform":
        return np.zeros(len(returns))
    if kind == "top":
        kept = max(math.floor(fraction * len(returns) + ROUNDING), 1)
        return np.where(np.argsort(np.argsort(-returns, kind="stable")) < kept, 0.0, -np.inf)
    if kind == "advantage" and not np.shape(initial_obs)[1]:
        raise UserError("weighting.kind = 'advantage': regresses returns on observations, which are images alone here")
    score = returns if kind == "return" else returns - regressed(returns, initial_obs)
    low, high = np.min(score), np.max(score)
    if high - low <= ROUNDING * np.max(np.abs(returns)):
        return np.zeros(len(returns))
    return (score - low) / (high - low) / temperature


def regressed(returns: np.ndarray, initial_obs: np.ndarray) -> np.ndarray:
    """Returns the least-squares fit [E] of the returns by an affine function of the first observations."""
    obs = np.asarray(initial_obs, np.float64)
    spread, mean = np.ptp(obs, axis=0), returns.mean()
    varies = spread > ROUNDING * np.abs(obs).max(axis=0)
    obs = (obs - obs.mean(axis=0))[:, varies] / spread[varies]
    return mean + obs @ np.linalg.lstsq(obs, returns - mean, rcond=None)[0]


def probabilities(log_weights: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns p_i [E] float64, the probability of each transition of trajectory i.

    Raises UserError where all weights are zero, or one is not a number.
    """
    log_weights, lengths = np.asarray(log_weights, np.float64), np.asarray(lengths)
    if (np.isnan(log_weights) | (log_weights == np.inf)).any():
        raise UserError("weighting: a weight is not a finite number")
    drawn = (lengths > 0) & (log_weights > -np.inf)
    if not drawn.any():
        raise UserError("weighting: the weights of all trajectories are zero, so there is nothing to draw")
    weights = np.where(drawn, np.exp(log_weights - np.max(log_weights[drawn])), 0)
    return weights / np.sum(weights * lengths)


def weights_of(log_weights: np.ndarray, first: np.ndarray, lengths: np.ndarray, room: int = 0) -> Weights:
    """Returns the alias table of trajectories that begin in rows `first` [E], with at least `room` entries.

    Raises UserError where all weights are zero, or one is not a number.
    """
    none = max(room - len(lengths), 0)  # trajectories without steps are never drawn
    share, other = alias_table(np.pad(probabilities(log_weights, lengths) * lengths, (0, none)))
    first, lengths = (np.pad(x, (0, none)).astype(np.int32) for x in (first, lengths))
    return Weights(*(jnp.asarray(x) for x in (first, lengths, share, other)))


def alias_table(q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (share uint32, other int32) [E] of the probabilities q [E]: a uniform entry gives itself with probability
    share / 2^32, else the other (Vose 1991). An entry of probability 0 is never given.
    """
    left = (q * len(q) / q.sum()).tolist()
    share, other = np.full(len(q), FULL - 1, np.uint32), np.arange(len(q), dtype=np.int32)
    low, high = ([i for i, x in enumerate(left) if (x < 1) is below] for below in (True, False))
    while low and high:
        poor, rich = low.pop(), high[-1]
        share[poor], other[poor] = min(round(left[poor] * FULL), FULL - 1), rich
        left[rich] -= 1 - left[poor]
        if left[rich] < 1:
            low.append(high.pop())
    return share, other


def draw_rows(weights: Weights, key: jax.Array, batch: int) -> jax.Array:
    """Returns the rows [batch] of transitions, drawn independently: a trajectory by its weight, a step uniformly."""
    key_place, key_own, key_step = jax.random.split(key, 3)
    place = jax.random.randint(key_place, (batch,), 0, len(weights.steps))
    own = jax.random.bits(key_own, (batch,), jnp.uint32) < weights.share[place]
    trajectory = jnp.where(own, place, weights.other[place])
    return weights.first[trajectory] + jax.random.randint(key_step, (batch,), 0, weights.steps[trajectory])
