"""The networks. flax.linen is used only in this file: agents use `network.init(key, *example)`,
which returns parameters, and `apply(network, params, *inputs)`.

An observation is an array [..., O] or a dict of arrays: vectors [..., n] and images [..., H, W, C] of dtype uint8. Only
`joined` depends on the form of observations.

Initialization, the positions of LayerNorm and the time features are those of the official code of FMQ, FQL, QC, DQC,
QGF and of the offline regularizers, so that recorded values can be replayed.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrl.types import Observation, PyTree

TIME_FEATURES = 64
ENCODER = "encoder_"  # prefix of the parameter names of image encoders; the suffix is the name of the image

Activation: TypeAlias = Literal["gelu", "mish", "relu"]
Norm: TypeAlias = Literal["none", "after", "before", "before_but_last"]
"""Position of LayerNorm: after the activations (FQL, QC, DQC), before them (QGF's critics), or before all but the
last hidden one (QGF's policy)."""
Init: TypeAlias = Literal["glorot", "torch"]
"""Initialization: weights uniform within sqrt(6 / (inputs + outputs)) and biases 0 (the flow methods), or both
uniform within 1 / sqrt(inputs), as in PyTorch's linear layers (the offline regularizers)."""
TimeFeatures: TypeAlias = Literal["fourier", "sinusoidal", "raw"]
"""Encoding of the time: low frequencies (QC), high frequencies (QGF), or the number itself (FQL, DQC)."""


class MLP(nn.Module):
    """Dense layers of the given widths with activations between them; the last layer is linear."""

    widths: Sequence[int]
    norm: Norm = "none"
    activation: Activation = "gelu"
    last_scale: float = 1.0  # of the last layer's initial weights, if they are glorot
    initial: Init = "glorot"
    epsilon: float = 1e-6  # of LayerNorm

    @nn.compact
    def __call__(self, obs: Observation) -> jax.Array:
        """Returns [..., widths[-1]] for observations, or vectors [..., n]."""
        x, (*hidden, last) = joined(obs), self.widths
        for i, width in enumerate(hidden):
            x = _dense(width, x.shape[-1], self.initial)(x)
            if self.norm == "before" or (self.norm == "before_but_last" and i + 1 < len(hidden)):
                x = nn.LayerNorm(self.epsilon)(x)
            x = {"gelu": nn.gelu, "mish": jax.nn.mish, "relu": nn.relu}[self.activation](x)
            if self.norm == "after":
                x = nn.LayerNorm(self.epsilon)(x)
        return _dense(last, x.shape[-1], self.initial, self.last_scale)(x)


def _dense(width: int, inputs: int, initial: Init, scale: float = 1.0) -> nn.Dense:
    if initial == "glorot":
        return nn.Dense(width, kernel_init=nn.initializers.variance_scaling(scale, "fan_avg", "uniform"))
    bound = inputs**-0.5

    def uniform(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nn.Dense(width, kernel_init=uniform, bias_init=uniform)


class ImageEncoder(nn.Module):
    """A small residual image encoder: OGBench's "impala_small" (IMPALA, arXiv 1802.01561, figure 3)."""

    stacks: Sequence[int] = (16, 32, 32)  # channels; each stack halves height and width
    blocks: int = 1  # residual blocks per stack
    features: int = 512

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns [..., features] for images [..., H, W, C] of dtype uint8, whose values are scaled to [0, 1]."""
        glorot = nn.initializers.xavier_uniform()
        x = images.reshape(-1, *images.shape[-3:]).astype(jnp.float32) / 255
        for channels in self.stacks:
            x = nn.Conv(channels, (3, 3), kernel_init=glorot)(x)
            x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
            for _ in range(self.blocks):
                change = nn.Conv(channels, (3, 3), kernel_init=glorot)(nn.relu(x))
                x = x + nn.Conv(channels, (3, 3), kernel_init=glorot)(nn.relu(change))
        x = nn.relu(x).reshape(*images.shape[:-3], -1)
        return nn.gelu(_dense(self.features, x.shape[-1], "glorot")(x))


def joined(obs: Observation, *others: jax.Array) -> jax.Array:
    """Returns observations and other inputs [..., n] concatenated to one vector per observation: [..., sum of n].

    For a dict, the arrays are concatenated in the order of their names, with images replaced by the features of one
    encoder each, a submodule of the calling module. Features are broadcast where other inputs have more entries along
    an axis, see `repeat_for`.
    """
    if not isinstance(obs, Mapping):
        return jnp.concatenate([obs, *others], axis=-1) if others else obs
    parts = [ImageEncoder(name=f"{ENCODER}{name}")(x) if x.dtype == jnp.uint8 else x for name, x in sorted(obs.items())]
    parts += others
    lead = jnp.broadcast_shapes(*(x.shape[:-1] for x in parts))
    return jnp.concatenate([jnp.broadcast_to(x, (*lead, x.shape[-1])) for x in parts], axis=-1)


def time_features(t: jax.Array, kind: TimeFeatures = "fourier", size: int = TIME_FEATURES) -> jax.Array:
    """Returns features [cos(f_i t), sin(f_i t)] [..., size] of times [..., 1], or the times themselves ("raw").

    The frequencies f_i decrease from 1 to 1e-4 ("fourier"), or from 1e4 toward 1 ("sinusoidal", whose derivatives in t
    are too large for flow maps).
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
    """A network over flat chunks: v(s, x, t) with one time, u(s, x, r, t) with two, a map of noise with none."""

    size: int
    hidden: Sequence[int]
    norm: Norm = "none"
    activation: Activation = "gelu"
    time: TimeFeatures = "fourier"
    time_size: int = TIME_FEATURES
    initial: Init = "glorot"

    @nn.compact
    def __call__(self, obs: Observation, x: jax.Array, *times: jax.Array) -> jax.Array:
        """Returns [..., size] for observations [..., O], noisy chunks [..., size] and times [..., 1] each."""
        features = [time_features(t, self.time, self.time_size) for t in times]
        layers = MLP((*self.hidden, self.size), self.norm, self.activation, initial=self.initial)
        return layers(joined(obs, x, *features))


class Critic(nn.Module):
    """An ensemble of independent critics Q_j(s, a)."""

    heads: int
    hidden: Sequence[int]
    norm: Norm = "after"
    activation: Activation = "gelu"
    initial: Init = "glorot"
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, obs: Observation, *action: jax.Array) -> jax.Array:
        """Returns [heads, ...] for observations [..., O] and flat chunks [..., D]; state values without chunks."""
        ensemble = nn.vmap(
            MLP,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            out_axes=0,
            axis_size=self.heads,
        )
        layers = ensemble((*self.hidden, 1), self.norm, self.activation, 1.0, self.initial, self.epsilon)
        return layers(joined(obs, *action))[..., 0]


class QuantileCritic(nn.Module):
    """An ensemble of independent quantile critics Z_j(s, a, level) of the return (IQN, 1806.06923)."""

    heads: int
    hidden: Sequence[int]
    initial: Init = "torch"

    @nn.compact
    def __call__(self, obs: Observation, action: jax.Array, level: jax.Array) -> jax.Array:
        """Returns [heads, ..., N] for observations [..., O], flat chunks [..., D] and levels [..., N] in [0, 1]."""
        ensemble = nn.vmap(
            _Quantiles,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            out_axes=0,
            axis_size=self.heads,
        )
        return ensemble(self.hidden, self.initial)(joined(obs, action), level)


class _Quantiles(nn.Module):
    """One quantile critic: features of the input times features of the level, cosines of 64 frequencies."""

    hidden: Sequence[int]
    initial: Init

    @nn.compact
    def __call__(self, x: jax.Array, level: jax.Array) -> jax.Array:
        for width in self.hidden:
            x = nn.relu(self.normed(width, x))
        frequency = jnp.arange(1, TIME_FEATURES + 1).reshape((1,) * level.ndim + (TIME_FEATURES,))
        waves = jnp.cos(jnp.pi * frequency * level[..., None])
        x = x[..., None, :] * nn.sigmoid(self.normed(self.hidden[-1], waves))
        x = nn.relu(self.normed(self.hidden[-1], x))
        return _dense(1, x.shape[-1], self.initial)(x)[..., 0]

    def normed(self, width: int, x: jax.Array) -> jax.Array:
        """Returns a dense layer's normalized outputs [..., width]."""
        return nn.LayerNorm(1e-5)(_dense(width, x.shape[-1], self.initial)(x))


class Value(nn.Module):
    """A state value V(s)."""

    hidden: Sequence[int]
    norm: Norm = "after"
    activation: Activation = "gelu"
    initial: Init = "glorot"

    @nn.compact
    def __call__(self, obs: Observation) -> jax.Array:
        """Returns [...] for observations [..., O]."""
        return MLP((*self.hidden, 1), self.norm, self.activation, 1.0, self.initial)(joined(obs))[..., 0]


class Deterministic(nn.Module):
    """A deterministic policy pi(s), squashed to [-1, 1] by tanh."""

    size: int
    hidden: Sequence[int]
    norm: Norm = "none"
    activation: Activation = "relu"
    last_scale: float = 1.0
    initial: Init = "torch"

    @nn.compact
    def __call__(self, obs: Observation, *others: jax.Array) -> jax.Array:
        """Returns [..., size] in [-1, 1] for observations [..., O], and further inputs."""
        layers = MLP((*self.hidden, self.size), self.norm, self.activation, self.last_scale, self.initial)
        return jnp.tanh(layers(joined(obs, *others)))


class Encoder(nn.Module):
    """The latent Gaussian q(z | s, a) of a variational autoencoder."""

    size: int
    hidden: Sequence[int]

    @nn.compact
    def __call__(self, obs: Observation, action: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns mean and log standard deviation, [..., size] each, the latter within [-4, 15]."""
        layers = MLP((*self.hidden, 2 * self.size), "none", "relu", 1.0, "torch")
        mean_and_log_std = layers(joined(obs, action))
        mean, log_std = jnp.split(mean_and_log_std, 2, axis=-1)
        return mean, jnp.clip(log_std, -4, 15)


class Gaussian(nn.Module):
    """A diagonal Gaussian over flat action chunks with a state-dependent mean and a state-independent width."""

    size: int
    hidden: Sequence[int]
    norm: Norm = "none"
    activation: Activation = "gelu"
    unit_width: bool = True  # standard deviation 1, not learned
    initial: Init = "glorot"

    @nn.compact
    def __call__(self, obs: Observation, *more: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns mean and log standard deviation, [..., size] each.

        For observations [..., O], and further inputs of the mean.
        """
        layers = MLP((*self.hidden, self.size), self.norm, self.activation, 1e-2, self.initial)
        mean = layers(joined(obs, *more))
        if self.unit_width:
            return mean, jnp.zeros_like(mean)
        log_std = jnp.clip(self.param("log_std", nn.initializers.zeros, (self.size,)), -5, 2)
        return mean, jnp.broadcast_to(log_std, mean.shape)


class TemporalUNet(nn.Module):
    """A U-Net over trajectories: convolutions over time with down- and upsampling (policy-guided diffusion's).

    Trajectories may have any number of steps from 2^(levels - 1) on.
    """

    widths: Sequence[int]  # of the levels, multiples of 8; the first is also the size of the time features

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        """Returns [B, H, F] for noisy trajectories [B, H, F] and times [B, 1]."""
        first, size = self.widths[0], x.shape[-1]
        t = nn.Dense(first)(time_features(t, size=first // 4))
        t = nn.silu(nn.Dense(first)(nn.silu(t)))
        skips = []
        for width in self.widths:
            if skips:
                x = nn.max_pool(skips[-1], (2,), (2,))
            skips.append(_convolve(_convolve(x, width, 3, t), width, 3))
        x = skips.pop()
        for skip in reversed(skips):
            x = jax.image.resize(x, (*skip.shape[:-1], x.shape[-1]), "nearest")
            x = jnp.concatenate([_convolve(x, skip.shape[-1], 2, t), skip], axis=-1)
            x = _convolve(_convolve(x, skip.shape[-1], 3), skip.shape[-1], 3)
        return nn.Dense(size)(x)


def neighbours(x: jax.Array, reach: int) -> jax.Array:
    """Returns [B, H, reach * F]: each step of x [B, H, F] with its neighbors, zero-padded.

    An even reach takes one more step after than before, as XLA's convolutions do.
    """
    before = (reach - 1) // 2
    padded = jnp.pad(x, ((0, 0), (before, reach - 1 - before), (0, 0)))
    return jnp.concatenate([padded[:, i : i + x.shape[1]] for i in range(reach)], axis=-1)


def _convolve(x: jax.Array, width: int, reach: int, t: jax.Array | None = None) -> jax.Array:
    """Returns a convolution over time, shifted by features [B, T] of the noise level, with GroupNorm and ReLU.

    It is a dense layer over each step's neighbors, whose gradient is much faster on CPUs than a convolution's.
    """
    x = nn.Dense(width)(neighbours(x, reach))
    if t is not None:
        x = x + nn.Dense(width)(t)[:, None]
    return nn.relu(nn.GroupNorm(8)(x))


class Squashed(nn.Module):
    """A diagonal Gaussian with state-dependent mean and width, to be squashed by tanh."""

    size: int
    hidden: Sequence[int]
    norm: Norm = "none"
    activation: Activation = "relu"
    initial: Init = "torch"

    @nn.compact
    def __call__(self, obs: Observation) -> tuple[jax.Array, jax.Array]:
        """Returns mean and log standard deviation before tanh, [..., size] each, the latter in [-20, 2].

        The initial standard deviation is near exp(-1), so that actions do not saturate at the bounds.
        """
        layers = MLP((*self.hidden, 2 * self.size), self.norm, self.activation, initial=self.initial)
        mean, log_std = jnp.split(layers(joined(obs)), 2, axis=-1)
        return mean, jnp.clip(log_std - 1, -20, 2)


def apply(network: nn.Module, params: PyTree, *inputs: jax.Array) -> jax.Array:
    """Returns the output of a network with parameters from its `init(key, *example)`."""
    return network.apply(params, *inputs)  # ty: ignore[invalid-explicit-return]


def outputs_of(params: PyTree) -> int:
    """Returns the number of outputs of a network of dense layers, given its parameters: the width of its last layer."""
    layers = params
    while not any(name.startswith("Dense_") for name in layers):
        layers = layers["params"] if "params" in layers else layers["MLP_0"]
    last = max(int(name.removeprefix("Dense_")) for name in layers if name.startswith("Dense_"))
    return layers[f"Dense_{last}"]["bias"].shape[-1]


def first_of(params: PyTree) -> PyTree:
    """Returns the parameters of the first network of an ensemble, as an ensemble of one.

    Image encoders are shared by all.
    """

    def own(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        return x if f"'{ENCODER}" in jax.tree_util.keystr(path) else x[:1]

    return jax.tree_util.tree_map_with_path(own, params)


def repeat_for(candidates: jax.Array, obs: Observation) -> Observation:
    """Returns observations [B, N, ...]: each of `obs` [B, ...] once per candidate of [B, N, ...].

    Images become [B, 1, H, W, C], so that each is encoded once and its features are broadcast.
    """

    def repeated(x: jax.Array) -> jax.Array:
        return x[:, None] if x.dtype == jnp.uint8 else jnp.repeat(x[:, None], candidates.shape[1], axis=1)

    return jax.tree.map(repeated, obs)
