"""CFPI: the best action near a behavior policy in closed form, for a locally linearized critic.

Paper: Li, Zhang, Yin, Bai, Wang, Wang, "Offline Reinforcement Learning with Closed-Form Policy Improvement Operators",
arXiv 2211.15956. Formulas and constants follow its official code.

All means, variances and gradients are of u, the action before tanh. For any agent with a critic:

    heads = lambda obs, actions: agent.critic.values(state.params["critic"], repeat_for(actions, obs), actions)
    behaviour = lambda obs, key: closed_form.around(closed_form.flat(agent.act(state, obs, key, greedy=True)), std=0.3)
    act = closed_form.improved(behaviour, heads, ClosedForm(), action=env.spec.action)
    episodes = rollout.evaluate(env, rollout.from_function(act, agent.chunk), key, 100)

The agent `cfpi` learns a mixture and quantile critics for it, as published.
"""

from collections.abc import Callable
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from jaxrl.ops import losses
from jaxrl.ops.guidance import Value, best_of
from jaxrl.ranges import Count, Fraction, NonNegative, check_at_least
from jaxrl.types import Scalar, pytree

NEAR_BOUND = 0.999  # actions are clipped to it before atanh
KAPPA = 1e-7  # makes the step vanish with the critic's gradient
VARIANCE = 1e-6  # added to variances in Jensen's bound

Act: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
"""A policy: chunks [B, H, A] for observations [B, O] and a key."""


@pytree
class Mixture:
    """A density of flat action chunks per row: tanh of a mixture of M diagonal Gaussians over u."""

    log_weight: jax.Array  # [B, M], whose exponentials sum to 1
    mean: jax.Array  # [B, M, D]
    std: jax.Array  # [B, M, D]

    def log_density(self, actions: Float[Array, "b d"]) -> Float[Array, " b"]:
        """Returns log p(a) of actions in [-1, 1]."""
        u = before_tanh(actions)
        each = jnp.broadcast_to(u[:, None], self.mean.shape)
        parts = losses.gaussian_log_density(each, self.mean, jnp.log(self.std))
        change = 2 * (jnp.log(2.0) - u - jax.nn.softplus(-2 * u)).sum(axis=-1)  # log of 1 - tanh(u)^2
        return jax.nn.logsumexp(self.log_weight + parts, axis=-1) - change


@pytree
class ClosedForm:
    """The operator: selects the best candidate by the critic on the boundary of the behavior's level sets."""

    bound: Literal["lse", "jensen", "both"] = "both"  # on the mixture's log density: LogSumExp, Jensen, or both
    delta: NonNegative = 0.5  # allowed decrease of the log density; lower end of the sampling range
    delta_high: NonNegative = 0.5  # upper end of the sampling range
    draws: Count = 1  # number of uniform samples of delta per action
    stretch: NonNegative = 2**0.5  # factor of LogSumExp's radius: sqrt(2) in the official code, 1 in the derivation
    threshold: Fraction = 0.05  # components with lower weight are ignored, except the heaviest

    def check(self) -> None:
        """Raises UserError if the highest delta is below the lowest."""
        check_at_least(self, delta_high=self.delta)

    def improve(self, key: Key[Array, ""], behaviour: Mixture, value: Value) -> Float[Array, "b d"]:
        """Returns the candidate with the highest value; `value` maps actions [B, N, D] to values [B, N].

        If `delta` equals `delta_high`, the result is deterministic. Without a candidate, which can happen with only
        Jensen's bound, the mean of the heaviest component is returned.
        """
        deltas = jax.random.uniform(key, (len(behaviour.mean), self.draws), minval=self.delta, maxval=self.delta_high)
        center, precision = middle(behaviour)
        points = jnp.concatenate([behaviour.mean, center[:, None]], axis=1)
        gradient = jax.grad(lambda u: value(jnp.tanh(u)).sum())(points)
        found = []
        if self.bound != "jensen":
            radius = self.stretch * jnp.sqrt(squared_radii(behaviour, deltas))
            u = step(behaviour.mean[:, None], jnp.square(behaviour.std)[:, None], gradient[:, None, :-1], radius)
            found.append((u, jnp.broadcast_to(heavy(behaviour.log_weight, self.threshold)[:, None], radius.shape)))
        if self.bound != "lse":
            squared = jensen_squared_radius(behaviour, deltas)
            radius = jnp.sqrt(jnp.maximum(squared, 0))
            u = step(center[:, None], 1 / precision[:, None], gradient[:, -1:], radius)
            found.append((u, squared >= 0))
        batch, size = center.shape
        candidates = jnp.tanh(jnp.concatenate([u.reshape(batch, -1, size) for u, _ in found], axis=1))
        exists = jnp.concatenate([exists.reshape(batch, -1) for _, exists in found], axis=1)
        best = best_of(candidates, jnp.where(exists, value(candidates), -jnp.inf))
        fallback = jnp.tanh(best_of(behaviour.mean, behaviour.log_weight))
        return jnp.where(exists.any(axis=1)[:, None], best, fallback)


def step(
    mean: Float[Array, "*#n d"],
    variance: Float[Array, "*#n d"],
    gradient: Float[Array, "*#n d"],
    radius: Float[Array, "*n"],
) -> Float[Array, "*n d"]:
    """Returns argmax g.u s.t. (u - mean)^T Sigma^-1 (u - mean) <= radius^2; the mean if the gradient vanishes."""
    norm = jnp.sqrt(jnp.sum(variance * jnp.square(gradient), axis=-1, keepdims=True))
    return mean + radius[..., None] * variance * gradient / (norm + KAPPA)


def squared_radii(behaviour: Mixture, deltas: Float[Array, "b k"]) -> Float[Array, "b k m"]:
    """Returns R_i = 2 max(delta + log lambda_i + log p_i(mu_i) - max_j (...), 0) of every component (LogSumExp)."""
    peak = losses.gaussian_log_density(behaviour.mean, behaviour.mean, jnp.log(behaviour.std))
    height = behaviour.log_weight + peak
    height = height - height.max(axis=-1, keepdims=True)
    return 2 * jnp.maximum(deltas[:, :, None] + height[:, None], 0)


def middle(behaviour: Mixture) -> tuple[Float[Array, "b d"], Float[Array, "b d"]]:
    """Returns mu_bar, the components' mean weighted by precision, and A, the mean precision (Jensen)."""
    precision = weighted_precision(behaviour)
    total = precision.sum(axis=1)
    return (precision * behaviour.mean).sum(axis=1) / total, total


def jensen_squared_radius(behaviour: Mixture, deltas: Float[Array, "b k"]) -> Float[Array, "b k"]:
    """Returns R = 2 delta - sum_i lambda_i ||mu_i - mu_bar||^2, in units of Sigma_i; if negative, no candidate exists.

    Equals 2 delta - sum_i lambda_i mu_i^T Sigma_i^-1 mu_i + mu_bar^T A mu_bar, without numerical cancellation.
    """
    center, _ = middle(behaviour)
    spread = weighted_precision(behaviour) * jnp.square(behaviour.mean - center[:, None])
    return 2 * deltas - spread.sum(axis=(1, 2))[:, None]


def weighted_precision(behaviour: Mixture) -> Float[Array, "b m d"]:
    """Returns lambda_i Sigma_i^-1."""
    return jnp.exp(behaviour.log_weight)[..., None] / (jnp.square(behaviour.std) + VARIANCE)


def heavy(log_weight: Float[Array, "b m"], threshold: Scalar) -> Bool[Array, "b m"]:
    """Returns which components are used: those with at least this weight, and always the heaviest."""
    return (jnp.exp(log_weight) >= threshold) | (log_weight == log_weight.max(axis=-1, keepdims=True))


def lower_bound(heads: Float[Array, "k *n"], pessimism: Scalar) -> Float[Array, "*n"]:
    """Returns Q_LB = mean - pessimism * std over two or more heads, with unbiased std (two: |Q_1 - Q_2| / sqrt(2))."""
    return heads.mean(axis=0) - pessimism * heads.std(axis=0, ddof=1)


def before_tanh(actions: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Returns u of actions, after clipping them to `NEAR_BOUND`."""
    return jnp.arctanh(jnp.clip(actions, -NEAR_BOUND, NEAR_BOUND))


def around(actions: Float[Array, "b d"], std: Scalar = 1.0) -> Mixture:
    """Returns a one-component density around actions, with standard deviation `std` before tanh."""
    u = before_tanh(actions)[:, None]
    return Mixture(jnp.zeros(u.shape[:2]), u, jnp.full_like(u, std))


def flat(chunks: Float[Array, "b h a"]) -> Float[Array, "b d"]:
    """Returns flattened chunks."""
    return chunks.reshape(len(chunks), -1)


def improved(
    behaviour: Callable[[jax.Array, jax.Array], Mixture],
    heads: Callable[[jax.Array, jax.Array], jax.Array],
    operator: ClosedForm,
    action: int,
    pessimism: Scalar = 1.0,
) -> Act:
    """Returns the improved policy of a behavior, given as a density for (observations [B, O], key).

    `heads` maps observations [B, O] and flat chunks [B, N, D] to values [K, B, N]; `action` is the size of one action.
    """

    def act(obs: jax.Array, key: jax.Array) -> jax.Array:
        key_behaviour, key_delta = jax.random.split(key)
        value = lambda actions: lower_bound(heads(obs, actions), pessimism)  # noqa: E731
        best = operator.improve(key_delta, behaviour(obs, key_behaviour), value)
        return best.reshape(len(obs), -1, action)

    return act
