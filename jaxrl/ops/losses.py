"""Losses as functions of arrays: no network, no configuration, no agent."""

import math
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxrl.types import PyTree, Scalar

Aggregate: TypeAlias = Literal["mean", "min"]
Head: TypeAlias = Literal["mse", "bce"]
"""Output of a value network: the value, or the logit of a success probability."""


def masked_mean(x: Float[Array, "*n"], mask: Float[Array, "*n"]) -> Float[Array, ""]:
    """Returns mean(x * mask) over all elements, with masked ones counted as zeros.

    The divisor is the full count, as in the official Q-chunking code: masking rows does not increase others' weight.
    """
    return jnp.mean(x * mask)


def aggregate(heads: Float[Array, "k *n"], how: Aggregate) -> Float[Array, "*n"]:
    """Returns one value per sample from an ensemble: the mean or the minimum over heads."""
    return heads.min(axis=0) if how == "min" else heads.mean(axis=0)


def chunk_return(
    rewards: Float[Array, "b h"], steps: Int[Array, " b"], discount: Scalar
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """Returns (sum_i gamma^i r_i, gamma^k) of windows of k steps; rewards that do not count are 0."""
    powers = discount ** jnp.arange(rewards.shape[-1])
    return jnp.sum(rewards * powers[None], axis=-1), discount**steps


def td_target(
    rewards: Float[Array, "b h"],
    steps: Int[Array, " b"],
    terminated: Bool[Array, " b"],
    next_value: Float[Array, " b"],
    discount: Scalar,
) -> Float[Array, " b"]:
    """Returns the chunked TD target, without gradient: sum_i gamma^i r_i + gamma^k V(s_{t+k}).

    Termination drops the bootstrap; truncation keeps it (Li, Zhou, Levine, arXiv 2507.07969, equation 7).
    """
    returns, factor = chunk_return(rewards, steps, discount)
    return jax.lax.stop_gradient(returns + factor * (1 - terminated) * next_value)


def expectile(error: Float[Array, "*n"], level: Scalar) -> Float[Array, "*n"]:
    """Returns |level - 1(error < 0)| error^2 for error = target - prediction."""
    return jnp.where(error < 0, 1 - level, level) * jnp.square(error)


def quantile(error: Float[Array, "*n"], level: Scalar) -> Float[Array, "*n"]:
    """Returns |level - 1(error < 0)| |error| for error = target - prediction (the pinball loss)."""
    return jnp.where(error < 0, 1 - level, level) * jnp.abs(error)


def quantile_huber(
    z: Float[Array, "b n"], target: Float[Array, "b m"], level: Float[Array, "b n"], share: Float[Array, "b m"]
) -> Float[Array, " b"]:
    """Returns mean_i sum_j share_j |level_i - 1(z_i > y_j)| H(y_j - z_i), H the Huber loss with threshold 1.

    Fits quantiles z at their levels to the distribution with weights `share` on targets y (Dabney et al., arXiv
    1806.06923). Targets have no gradient.
    """
    error = jax.lax.stop_gradient(target)[:, None] - z[..., None]
    tilt = jnp.abs(level[..., None] - (error < 0))
    return (share[:, None] * tilt * optax.huber_loss(error)).sum(axis=-1).mean(axis=-1)


def value_of(output: Float[Array, "*n"], head: Head) -> Float[Array, "*n"]:
    """Returns the value of a network's output: the output itself, or the sigmoid of a logit."""
    return jax.nn.sigmoid(output) if head == "bce" else output


def bounded(target: Float[Array, "*n"], head: Head) -> Float[Array, "*n"]:
    """Returns a target within the head's range: probabilities are clipped to [0, 1]."""
    return jnp.clip(target, 0, 1) if head == "bce" else target


def regression(output: Float[Array, "*n"], target: Float[Array, "*#n"], head: Head) -> Float[Array, "*n"]:
    """Returns the error of a head: squared, or cross entropy of its logit."""
    return bce_logit(output, target) if head == "bce" else jnp.square(target - output)


def tilted(
    output: Float[Array, "*n"],
    target: Float[Array, "*n"],
    level: Scalar,
    head: Head,
    tilt: Literal["expectile", "quantile"] = "expectile",
    margin: float = 1e-6,
) -> Float[Array, "*n"]:
    """Returns the error of a head, weighted by `level` where the target is not below its value, else by 1 - level.

    "expectile" weights its regression (Kostrikov et al., arXiv 2110.06169), "quantile" the distance to the target, for
    a probability in logits and at least `margin` away from 0 and 1 (Li, Park, Levine, arXiv 2512.10926). Levels above
    0.5 make the minimizer optimistic. Targets have no gradient.
    """
    target = jax.lax.stop_gradient(target)
    weight = tilt_weight(output, target, level, head)
    if tilt == "expectile":
        return weight * regression(output, target, head)
    goal = jax.scipy.special.logit(jnp.clip(target, margin, 1 - margin)) if head == "bce" else target
    return weight * jnp.abs(goal - output)


def tilt_weight(
    output: Float[Array, "*n"], target: Float[Array, "*n"], level: Scalar, head: Head
) -> Float[Array, "*n"]:
    """Returns `level` where the target is not below the head's value and 1 - level elsewhere, without gradient."""
    return jnp.where(target >= jax.lax.stop_gradient(value_of(output, head)), level, 1 - level)


def gaussian_log_density(x: Float[Array, "*n d"], mean: Float[Array, "*n d"], log_std: Float[Array, "*n d"]):
    """Returns log N(x; mean, std) summed over the last axis."""
    return jax.scipy.stats.norm.logpdf(x, mean, jnp.exp(log_std)).sum(axis=-1)


def tanh_log_density(u: Float[Array, "*n d"], mean: Float[Array, "*n d"], log_std: Float[Array, "*n d"]):
    """Returns the log density of tanh(u), summed over the last axis, where u ~ N(mean, std)."""
    change = 2 * (math.log(2) - u - jax.nn.softplus(-2 * u))  # log(1 - tanh(u)^2), stable
    return gaussian_log_density(u, mean, log_std) - change.sum(axis=-1)


def bce_logit(logit: Float[Array, "*n"], target: Float[Array, "*#n"]) -> Float[Array, "*n"]:
    """Returns the cross entropy of sigmoid(logit) against targets in [0, 1], stable for large logits."""
    return optax.sigmoid_binary_cross_entropy(logit, target)


def polyak(online: PyTree, target: PyTree, tau: Scalar) -> PyTree:
    """Returns tau * online + (1 - tau) * target, leaf by leaf.

    Callers choose whether `online` is from before the gradient step, the lag of one step in the official code of QC,
    FQL and FMQ, or from after it, as in TD3.
    """
    return optax.incremental_update(online, target, tau)
