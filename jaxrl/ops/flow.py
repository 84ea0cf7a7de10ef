"""Flows and flow maps as functions of arrays: errors to minimize, and samplers.

Time runs from noise (0) to data (1) along x_t = (1 - t) x0 + t x1. All functions use one network, the
average velocity u(x, r, t) over [r, t], so that X_{r,t}(x) = x + (t - r) u(x, r, t) is the flow map and
u(x, t, t) is the instantaneous velocity (Boffi, Albergo, Vanden-Eijnden, arXiv 2505.18825, section 2).

Every error below is a squared residual [B, D] that the caller averages under its own mask; noise and times are
arguments. `stop_gradient` is applied only to teachers.
"""

from collections.abc import Callable
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

AverageVelocity: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""u(x [..., D], r [..., 1], t [..., 1]) -> [..., D]; conditioning inputs are closed over."""

Points: TypeAlias = Float[Array, "*b d"]
Times: TypeAlias = Float[Array, "*b 1"]


def interpolate(x0: Points, x1: Points, t: Times) -> Points:
    """Returns the point at time t on the straight line from noise x0 to data x1."""
    return (1 - t) * x0 + t * x1


def map_to(u: AverageVelocity, x: Points, r: Times, t: Times) -> Points:
    """Returns X_{r,t}(x), the flow map's jump from time r to time t."""
    return x + (t - r) * u(x, r, t)


# Errors


def matching_error(u: AverageVelocity, x0: Points, x1: Points, t: Times) -> Points:
    """Returns || u_{t,t}(x_t) - (x1 - x0) ||^2 per element: conditional flow matching on the diagonal."""
    return jnp.square(u(interpolate(x0, x1, t), t, t) - (x1 - x0))


def esd_error(
    u: AverageVelocity,
    x0: Points,
    x1: Points,
    r: Times,
    t: Times,
    velocity: Literal["sample", "diagonal"] = "sample",
) -> Points:
    """Returns the Eulerian self-distillation error || u_{r,t} - sg(b_r + (t-r) du/dr) ||^2 per element.

    The total derivative is taken along b_r, which is the sample's x1 - x0 (MeanFlow; FMQ's and MVP's loss) or the
    network's diagonal u_{r,r} (Boffi et al.).
    """
    x_r = interpolate(x0, x1, r)
    b_r = x1 - x0 if velocity == "sample" else u(x_r, r, r)
    average, derivative = jax.jvp(u, (x_r, r, t), (b_r, jnp.ones_like(r), jnp.zeros_like(t)))
    return jnp.square(average - lax.stop_gradient(b_r + (t - r) * derivative))


def lsd_error(u: AverageVelocity, x0: Points, x1: Points, r: Times, t: Times, reverse: bool = False) -> Points:
    """Returns the Lagrangian self-distillation error || dX_{r,t}/dt - u_{t,t}(X_{r,t}) ||^2 per element.

    The two-time map learns from the instantaneous field (Boffi et al.); with `reverse` the diagonal learns from the
    map instead, as in the official FMQ code.
    """
    x_r = interpolate(x0, x1, r)
    end, speed = jax.jvp(lambda time: map_to(u, x_r, r, time), (t,), (jnp.ones_like(t),))
    if reverse:
        return jnp.square(u(lax.stop_gradient(end), t, t) - lax.stop_gradient(speed))
    return jnp.square(speed - lax.stop_gradient(u(end, t, t)))


def psd_error(u: AverageVelocity, x0: Points, x1: Points, r: Times, t: Times, split: Times) -> Points:
    """Returns the progressive self-distillation error per element: one jump against two that meet at w.

    `split` in [0, 1] sets w = r + split (t - r). The velocity form weights all step sizes equally.
    """
    x_r = interpolate(x0, x1, r)
    w = r + split * (t - r)
    first = u(x_r, r, w)
    second = u(x_r + (w - r) * first, w, t)
    return jnp.square(u(x_r, r, t) - lax.stop_gradient(split * first + (1 - split) * second))


# Distributions of times


def uniform_times(key: Key[Array, ""], batch: int) -> tuple[Times, Times]:
    """Returns r <= t: two sorted uniform samples."""
    draws = jnp.sort(jax.random.uniform(key, (batch, 2)), axis=-1)
    return draws[:, :1], draws[:, 1:]


def widen(r: Times, t: Times, progress: Float[Array, ""]) -> tuple[Times, Times]:
    """Returns the interval [r, t] shrunk around its center: a point at progress 0, unchanged at progress 1."""
    middle, reach = (r + t) / 2, progress * (t - r) / 2
    return middle - reach, middle + reach


# Samplers


def jump(u: AverageVelocity, x: Points, steps: int = 1) -> Points:
    """Returns samples at time 1 from noise x in `steps` jumps of the flow map."""
    return _through(lambda y, r, t: map_to(u, y, r, t), x, steps)


def euler(u: AverageVelocity, x: Points, steps: int = 10) -> Points:
    """Returns samples at time 1 from noise x in `steps` Euler steps along the diagonal velocity."""
    return _through(euler_step(u), x, steps)


def euler_step(u: AverageVelocity) -> AverageVelocity:
    """Returns the function (x, r, t) -> x + (t - r) u_{r,r}(x)."""
    return lambda x, r, t: x + (t - r) * u(x, r, r)


def euler_from(u: AverageVelocity, x: Points, start: Times, steps: int = 10) -> Points:
    """Returns samples at time 1 from points x at times `start`, multiples of 1 / steps (the remaining Euler steps)."""

    def ahead(y: jax.Array, r: jax.Array, t: jax.Array) -> jax.Array:
        return jnp.where(r >= start, euler_step(u)(y, r, t), y)

    return _through(ahead, x, steps)


def _through(step: AverageVelocity, x: jax.Array, steps: int) -> jax.Array:
    def body(y: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        r = jnp.full((*y.shape[:-1], 1), i / steps)
        return step(y, r, jnp.full_like(r, (i + 1) / steps)), None

    return lax.scan(body, x, jnp.arange(steps))[0]
