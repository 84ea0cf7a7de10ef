"""The networks. flax.linen lives in this file and nowhere else: agents see `network.init(key, *example)`,
which returns parameters, and `apply(network, params, *inputs)`.

Initialisation, the places of LayerNorm and the time features are those of the official code of FMQ, FQL, QC, DQC and
QGF, so that recorded values can be replayed.
"""

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrl.types import PyTree

TIME_FEATURES = 64

Activation: TypeAlias = Literal["gelu", "mish", "relu"]
Norm: TypeAlias = Literal["none", "after", "before", "before_but_last"]
"""Where LayerNorm stands: after the activations (FQL, QC, DQC), before them (QGF's critics), or before all but the
last hidden one (QGF's policy)."""
TimeFeatures: TypeAlias = Literal["fourier", "sinusoidal", "raw"]
"""How a network sees the time: slow waves (QC), fast ones (QGF), or the number itself (FQL, DQC)."""


class MLP(nn.Module):
    """Dense layers of the given widths with activations between them; the last layer is linear."""

    widths: Sequence[int]
    norm: Norm = "none"
    activation: Activation = "gelu"
    last_scale: float = 1.0  # of the last layer's initial weights

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns [..., widths[-1]]."""
        *hidden, last = self.widths
        for i, width in enumerate(hidden):
            x = nn.Dense(width, kernel_init=_initializer())(x)
            if self.norm == "before" or (self.norm == "before_but_last" and i + 1 < len(hidden)):
                x = nn.LayerNorm()(x)
            x = {"gelu": nn.gelu, "mish": jax.nn.mish, "relu": nn.relu}[self.activation](x)
            if self.norm == "after":
                x = nn.LayerNorm()(x)
        return nn.Dense(last, kernel_init=_initializer(self.last_scale))(x)


def _initializer(scale: float = 1.0) -> nn.initializers.Initializer:
    return nn.initializers.variance_scaling(scale, "fan_avg", "uniform")


def time_features(t: jax.Array, kind: TimeFeatures = "fourier", size: int = TIME_FEATURES) -> jax.Array:
    """Returns features [..., size] of times [..., 1], or the times themselves: [cos(f_i t), sin(f_i t)].

    The frequencies f_i fall from 1 to 1e-4 ("fourier"), or from 1e4 towards 1 ("sinusoidal", whose derivatives in t
    are too steep for flow maps).
    """
    if kind == "raw":
        return t
    half = size // 2
    if kind == "sinusoidal":
        t = t * 10000.0
    steps = half if kind == "sinusoidal" else half - 1
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half) / steps)
    angles = t * frequencies.reshape((1,) * (t.ndim - 1) + (half,))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Velocity(nn.Module):
    """A field over flat chunks: v(s, x, t) with one time, average u(s, x, r, t) with two, a map of noise with none."""

    size: int
    hidden: Sequence[int]
    norm: Norm = "none"
    activation: Activation = "gelu"
    time: TimeFeatures = "fourier"
    time_size: int = TIME_FEATURES

    @nn.compact
    def __call__(self, obs: jax.Array, x: jax.Array, *times: jax.Array) -> jax.Array:
        """Returns [..., size] for observations [..., O], noisy chunks [..., size] and times [..., 1] each."""
        features = [time_features(t, self.time, self.time_size) for t in times]
        layers = MLP((*self.hidden, self.size), self.norm, self.activation)
        return layers(jnp.concatenate([obs, x, *features], axis=-1))


class Critic(nn.Module):
    """An ensemble of independent critics Q_j(s, a)."""

    heads: int
    hidden: Sequence[int]
    norm: Norm = "after"
    activation: Activation = "gelu"

    @nn.compact
    def __call__(self, obs: jax.Array, action: jax.Array) -> jax.Array:
        """Returns [heads, ...] for observations [..., O] and flat chunks [..., D]."""
        ensemble = nn.vmap(
            MLP,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            out_axes=0,
            axis_size=self.heads,
        )
        values = ensemble((*self.hidden, 1), self.norm, self.activation)(jnp.concatenate([obs, action], axis=-1))
        return values[..., 0]


class Value(nn.Module):
    """A state value V(s)."""

    hidden: Sequence[int]
    norm: Norm = "after"
    activation: Activation = "gelu"

    @nn.compact
    def __call__(self, obs: jax.Array) -> jax.Array:
        """Returns [...] for observations [..., O]."""
        return MLP((*self.hidden, 1), self.norm, self.activation)(obs)[..., 0]


class Gaussian(nn.Module):
    """A diagonal Gaussian over flat action chunks: its mean depends on the state, its width does not."""

    size: int
    hidden: Sequence[int]
    norm: Norm = "none"
    activation: Activation = "gelu"
    unit_width: bool = True  # standard deviation 1, not learned

    @nn.compact
    def __call__(self, obs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns mean and logarithm of the standard deviation, [..., size] each, for observations [..., O]."""
        mean = MLP((*self.hidden, self.size), self.norm, self.activation, last_scale=1e-2)(obs)
        if self.unit_width:
            return mean, jnp.zeros_like(mean)
        log_std = jnp.clip(self.param("log_std", nn.initializers.zeros, (self.size,)), -5, 2)
        return mean, jnp.broadcast_to(log_std, mean.shape)


def apply(network: nn.Module, params: PyTree, *inputs: jax.Array) -> jax.Array:
    """Returns the output of a network with parameters from its `init(key, *example)`."""
    return network.apply(params, *inputs)  # ty: ignore[invalid-explicit-return]


def repeat_for(candidates: jax.Array, obs: jax.Array) -> jax.Array:
    """Returns observations [B, N, O]: each of `obs` [B, O] once per candidate of [B, N, ...]."""
    return jnp.repeat(obs[:, None], candidates.shape[1], axis=1)
