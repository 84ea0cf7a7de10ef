"""Losses as functions of arrays: no network, no configuration, no agent."""

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxrl.types import PyTree, Scalar

Aggregate: TypeAlias = Literal["mean", "min"]


def masked_mean(x: Float[Array, "*n"], mask: Float[Array, "*n"]) -> Float[Array, ""]:
    """Returns mean(x * mask) over all elements, masked ones counted as zeros.

    The divisor is the full count, as in the official Q-chunking code: rows do not gain weight when others are cut.
    """
    return jnp.mean(x * mask)


def aggregate(heads: Float[Array, "k *n"], how: Aggregate) -> Float[Array, "*n"]:
    """Returns one value per sample from an ensemble: the mean or the minimum over heads."""
    return heads.min(axis=0) if how == "min" else heads.mean(axis=0)


def chunk_return(
    rewards: Float[Array, "b h"], steps: Int[Array, " b"], discount: Scalar
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """Returns (sum_i gamma^i r_i, gamma^k) of windows that reach k steps far; rewards that do not count are 0."""
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


def bce_logit(logit: Float[Array, "*n"], target: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Returns the cross entropy of sigmoid(logit) against targets in [0, 1], stable for large logits."""
    return optax.sigmoid_binary_cross_entropy(logit, target)


def polyak(online: PyTree, target: PyTree, tau: Scalar) -> PyTree:
    """Returns tau * online + (1 - tau) * target, leaf by leaf.

    Callers pass the online parameters from BEFORE the gradient step: the official code of QC, FQL and FMQ mixes
    them with that lag of one step.
    """
    return optax.incremental_update(online, target, tau)
