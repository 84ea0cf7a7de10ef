"""Mean and variance of rows: of a dataset, on device or host, or running; and normalization of observations.

The moments of two sets of rows can be merged into those of their union (Chan, Golub, LeVeque, "Updating formulae and a
pairwise algorithm for computing sample variances", 1979), in any order. So a running normalizer is `updated` with each
batch, and the moments of several devices or members are combined by `merge`.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.ops.masks import beside
from jaxrl.types import Observation, Scalar, pytree

Array = TypeVar("Array", jax.Array, np.ndarray)

LIMIT = 2**32 - 1  # maximum row count
PIECE = 1 << 16  # rows that the host sums at a time


@pytree
class Normalizer:
    """Mean and standard deviation for normalizing observations. Images are not changed."""

    mean: Observation  # [O]
    std: Observation  # [O]
    clip: Scalar | None = None  # bound of normalized entries

    def __call__(self, obs: Observation) -> Observation:
        """Returns (obs - mean) / std of observations [..., O], clipped to [-clip, clip] if `clip` is set."""
        return jax.tree.map(self._leaf, obs, self.mean, self.std)

    def _leaf(self, x: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
        if x.dtype == jnp.uint8:
            return x
        lead = (1,) * (x.ndim - mean.ndim)
        x = (x - mean.reshape(*lead, *mean.shape)) / std.reshape(*lead, *std.shape)
        return x if self.clip is None else jnp.clip(x, -self.clip, self.clip)


@pytree
class Moments:
    """The number of rows, and the mean and population variance of each entry.

    The variance is stored instead of the sum of squares m2 = count * variance: in float32, m2 stops growing once a
    batch adds less than 2^-24 of it, and the variance, divided by a growing count, would tend to 0. `count` saturates
    at 2^32 - 1 rows; from then on later rows replace earlier ones, as in a moving average over that many rows.
    """

    count: jax.Array  # [] uint32
    mean: Observation  # [O]; of images [], and 0
    variance: Observation  # as `mean`

    def normalizer(self, epsilon: float = 1e-3, clip: Scalar | None = None) -> Normalizer:
        """Returns the normalizer (x - mean) / (std + epsilon), clipped to [-clip, clip] if that is given.

        Constant entries are not scaled: divided by epsilon, the smallest deviation would dominate all other entries.
        """

        def units(mean: jax.Array, variance: jax.Array) -> jax.Array:
            std = jnp.sqrt(variance)
            constant = std <= 1e-6 * jnp.maximum(1, jnp.abs(mean))
            return jnp.where(constant, 1.0, std + epsilon)

        return Normalizer(self.mean, jax.tree.map(units, self.mean, self.variance), clip)


def empty(example: Observation) -> Moments:
    """Returns the moments of zero rows, for observations like an example [O]. Their normalizer is the identity."""
    zeros = jax.tree.map(lambda x: jnp.zeros(() if x.dtype == jnp.uint8 else x.shape), example)
    return Moments(jnp.zeros((), jnp.uint32), zeros, zeros)


def identity(example: Observation) -> Normalizer:
    """Returns the identity normalizer, for observations like an example [O]."""
    return empty(example).normalizer()


def of_rows(rows: Observation, mask: jax.Array) -> Moments:
    """Returns the moments of each leaf of rows [..., O] where the mask [...] is true; all rows must be finite."""
    leaves, tree = jax.tree.flatten(rows)
    nothing = jnp.zeros(()), jnp.zeros(())  # for images
    means, variances = zip(*(nothing if x.dtype == jnp.uint8 else weighted(x, mask) for x in leaves), strict=True)
    return Moments(mask.sum(dtype=jnp.uint32), tree.unflatten(means), tree.unflatten(variances))


def updated(moments: Moments, batch: Observation, mask: jax.Array) -> Moments:
    """Returns the moments of the previous rows and a batch [..., O], where its mask [...] is true, or 1.

    Leading axes are arbitrary, such as time and environment. Masked rows may contain anything, including NaN.
    """
    mask = mask.astype(bool)
    batch = jax.tree.map(lambda x: jnp.where(beside(mask, x), x, 0), batch)
    return merge(moments, of_rows(batch, mask))


def merge(a: Moments, b: Moments) -> Moments:
    """Returns the moments of both sets of rows together."""
    counted = a.count + b.count
    share = b.count / jnp.maximum(a.count.astype(jnp.float32) + b.count.astype(jnp.float32), 1)
    away = jax.tree.map(jnp.subtract, b.mean, a.mean)

    def spread(here: jax.Array, there: jax.Array, away: jax.Array) -> jax.Array:
        return here + share * (there - here + (1 - share) * jnp.square(away))

    return Moments(
        count=jnp.where(counted < a.count, jnp.uint32(LIMIT), counted),  # if the sum has wrapped around
        mean=jax.tree.map(lambda mean, away: mean + share * away, a.mean, away),
        variance=jax.tree.map(spread, a.variance, b.variance, away),
    )


# Moments of complete arrays


def weighted(x: Array, weight: Array) -> tuple[Array, Array]:
    """Returns mean and variance [O] of rows x [..., O] with weights `weight` [...]; for JAX or NumPy arrays."""
    xp, axes, each = x.__array_namespace__(), tuple(range(weight.ndim)), beside(weight, x)
    count = xp.maximum(weight.sum(), 1)
    mean = (x * each).sum(axis=axes) / count
    if x.dtype != np.float64:  # float32 sums of a million rows are inaccurate: a second pass corrects the first
        mean = mean + ((x - xp.expand_dims(mean, axes)) * each).sum(axis=axes) / count
    return mean, (xp.square(x - xp.expand_dims(mean, axes)) * each).sum(axis=axes) / count


def of_columns(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and variance [O] of values [N, O] on the host, in float64, without a full float64 copy."""
    count, mean, squares = 0, np.zeros(values.shape[1]), np.zeros(values.shape[1])
    for start in range(0, len(values), PIECE):
        piece = values[start : start + PIECE].astype(np.float64)
        middle = piece.mean(axis=0)
        total, away = count + len(piece), middle - mean
        squares += ((piece - middle) ** 2).sum(axis=0) + away**2 * count * len(piece) / total
        mean, count = mean + away * len(piece) / total, total
    return mean, squares / count
