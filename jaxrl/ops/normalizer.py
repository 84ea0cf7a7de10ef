"""Observations in units of their spread: mean and standard deviation, of a dataset or running."""

import jax
import jax.numpy as jnp

from jaxrl.types import Observation, pytree


@pytree
class Normalizer:
    """What observations are measured in. Images are left alone."""

    mean: Observation  # [O]
    std: Observation  # [O]

    def __call__(self, obs: Observation) -> Observation:
        """Returns observations [..., O] less their mean, in standard deviations."""
        return jax.tree.map(_standardised, obs, self.mean, self.std)


def _standardised(x: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    if x.dtype == jnp.uint8:
        return x
    lead = (1,) * (x.ndim - mean.ndim)
    return (x - mean.reshape(*lead, *mean.shape)) / std.reshape(*lead, *std.shape)


def identity(example: Observation) -> Normalizer:
    """Returns the normaliser that changes nothing, for observations like an example [O]."""
    return Normalizer(jax.tree.map(jnp.zeros_like, example), jax.tree.map(jnp.ones_like, example))


def of_rows(obs: Observation, valid: jax.Array, epsilon: float = 1e-3) -> Normalizer:
    """Returns the normaliser of the valid rows [L, T] of observations [L, T, O]; epsilon is added to the deviations.

    A column that never changes is left in its own units: divided by epsilon, the least deviation from it would drown
    all others.
    """
    leaves, tree = jax.tree.flatten(obs)
    mean, std = zip(*(_moments(leaf, valid, epsilon) for leaf in leaves), strict=True)
    return Normalizer(jax.tree.unflatten(tree, mean), jax.tree.unflatten(tree, std))


def _moments(obs: jax.Array, valid: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    if obs.dtype == jnp.uint8:
        return jnp.zeros_like(obs[0, 0]), jnp.ones_like(obs[0, 0])
    counts = valid.reshape(*valid.shape, *(1,) * (obs.ndim - 2))
    rows = jnp.maximum(valid.sum(), 1)
    mean = jnp.sum(obs * counts, axis=(0, 1)) / rows
    spread = (obs - mean[None, None]) * counts
    mean = mean + spread.sum(axis=(0, 1)) / rows  # float32 sums of a million rows err: a second pass mends the first
    std = jnp.sqrt(jnp.sum(jnp.square(obs - mean[None, None]) * counts, axis=(0, 1)) / rows)
    constant = std <= 1e-6 * jnp.maximum(1, jnp.abs(mean))
    return mean, jnp.where(constant, 1.0, std + epsilon)
