"""The discounted return from each row of a ring to the end of its episode."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxrl.replay.ring import Ring
from jaxrl.types import PyTree, Scalar

STRETCH = 128  # consecutive rows that one loop visits, in all stretches of a ring at once


@jax.jit
def returns_to_go(ring: Ring, discount: Scalar) -> jax.Array:
    """Returns the discounted return [L, T] from each row on; NaN where it is not known.

    It is known for episodes that are over, by termination or truncation, and unknown for those that are under way or
    that a broken simulator ended. Where an episode was truncated and all its rewards are equal, that reward is taken to
    go on forever. What follows a terminal step is an episode of its own; an episode whose first rows have been
    overwritten consists of the rest.
    """
    rows, back = ring.valid.shape[1], ring.head + 1
    missing = -rows % STRETCH

    def in_order(column: jax.Array) -> jax.Array:  # by time, after some empty rows; the head comes last
        return jnp.pad(jax.vmap(jnp.roll)(column, -back), ((0, 0), (missing, 0)))

    columns = (ring.rewards, ring.valid, ring.terminated, ring.truncated)
    rewards, valid, terminated, truncated = map(in_order, columns)
    place = jnp.broadcast_to(jnp.arange(rows + missing), valid.shape)
    live = valid & (place < rows + missing - 1)
    ends = live & (terminated | truncated)

    goes_on, before = (jnp.pad(x[:, :-1], ((0, 0), (1, 0))) for x in (live & ~ends, rewards))
    first, changed = live & ~goes_on, goes_on & (rewards != before)
    alike = scanned(jnp.maximum, jnp.where(first | changed, 2 * place + changed, 0)) % 2 == 0  # by the latest of both

    def joined(later: tuple[jax.Array, ...], earlier: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        (weight, total, stop), (own_weight, own_total, own_stop) = later, earlier
        return own_weight * weight, own_total + own_weight * total, jnp.minimum(own_stop, stop)

    forever = ends & ~terminated & alike & (jnp.asarray(discount) < 1)
    earned = jnp.where(forever, rewards / (1 - discount), jnp.where(live, rewards, 0.0))
    stop = jnp.where(ends | ~live, 2 * place + ~live, 2 * place.shape[1])
    _, returns, stop = scanned(joined, (jnp.where(live & ~ends, discount, 0.0), earned, stop), reverse=True)
    known = jnp.where(stop % 2 == 0, returns, jnp.nan)  # an end comes before anything that is not live
    return jax.vmap(jnp.roll)(known[:, missing:], back)


def scanned(joined: Callable[[Any, Any], Any], columns: PyTree, reverse: bool = False) -> PyTree:
    """Returns the scan of columns [L, n * STRETCH] by an associative function.

    `jax.lax.associative_scan` gives the same, but takes a hundred times as long to compile for long lanes.
    """

    def step(before: PyTree, row: PyTree) -> tuple[PyTree, PyTree]:
        both = joined(before, row)
        return both, both

    time = slice(None, None, -1 if reverse else 1)
    stretches = jax.tree.map(lambda x: jnp.moveaxis(x[:, time].reshape(len(x), -1, STRETCH), -1, 0), columns)
    first = jax.tree.map(lambda x: x[0], stretches)
    _, rest = lax.scan(step, first, jax.tree.map(lambda x: x[1:], stretches))
    within = jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), first, rest)
    before = lax.associative_scan(joined, jax.tree.map(lambda x: x[-1, :, :-1], within), axis=1)
    after_first = joined(jax.tree.map(lambda x: x[None], before), jax.tree.map(lambda x: x[:, :, 1:], within))
    whole = jax.tree.map(lambda x, y: jnp.concatenate([x[:, :, :1], y], axis=2), within, after_first)
    return jax.tree.map(lambda x, y: jnp.moveaxis(x, 0, -1).reshape(y.shape)[:, time], whole, columns)
