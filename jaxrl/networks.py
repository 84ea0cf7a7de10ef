"""The networks. flax.linen lives in this file and nowhere else: agents see `network.init(key, *example)`,
which returns parameters, and `apply(network, params, *inputs)`.

Initialisation, the place of LayerNorm (after the activation) and the time features are those of the official
code of Q-chunking, FQL and FMQ, so that recorded values can be replayed.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrl.types import PyTree

TIME_FEATURES = 64


class MLP(nn.Module):
    """Dense layers of the given widths with GELU between them; the last layer is linear."""

    widths: Sequence[int]
    layer_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns [..., widths[-1]]."""
        for i, width in enumerate(self.widths):
            x = nn.Dense(width, kernel_init=nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"))(x)
            if i + 1 < len(self.widths):
                x = nn.gelu(x)
                if self.layer_norm:
                    x = nn.LayerNorm()(x)
        return x


def time_features(t: jax.Array, size: int = TIME_FEATURES) -> jax.Array:
    """Returns [cos(f_i t), sin(f_i t)] of shape [..., size] for times [..., 1]; f_i falls from 1 to 1e-4."""
    half = size // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half) / (half - 1))
    angles = t * frequencies.reshape((1,) * (t.ndim - 1) + (half,))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Velocity(nn.Module):
    """A velocity field over flat action chunks: v(s, x, t) with one time, average u(s, x, r, t) with two."""

    size: int
    hidden: Sequence[int]
    layer_norm: bool = False
    fourier: bool = True

    @nn.compact
    def __call__(self, obs: jax.Array, x: jax.Array, *times: jax.Array) -> jax.Array:
        """Returns [..., size] for observations [..., O], noisy chunks [..., size] and times [..., 1] each."""
        features = [time_features(t) if self.fourier else t for t in times]
        return MLP((*self.hidden, self.size), self.layer_norm)(jnp.concatenate([obs, x, *features], axis=-1))


class Critic(nn.Module):
    """An ensemble of independent critics Q_j(s, a)."""

    heads: int
    hidden: Sequence[int]
    layer_norm: bool = True

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
        values = ensemble((*self.hidden, 1), self.layer_norm)(jnp.concatenate([obs, action], axis=-1))
        return values[..., 0]


def apply(network: nn.Module, params: PyTree, *inputs: jax.Array) -> jax.Array:
    """Returns the output of a network with parameters from its `init(key, *example)`."""
    return network.apply(params, *inputs)  # ty: ignore[invalid-explicit-return]


def repeat_for(candidates: jax.Array, obs: jax.Array) -> jax.Array:
    """Returns observations [B, N, O]: each of `obs` [B, O] once per candidate of [B, N, ...]."""
    return jnp.repeat(obs[:, None], candidates.shape[1], axis=1)
