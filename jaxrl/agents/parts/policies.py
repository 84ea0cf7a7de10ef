"""Deterministic and Gaussian policies, and an autoencoder of actions."""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxrl import networks
from jaxrl.agents.parts.settings import Net
from jaxrl.networks import apply
from jaxrl.ops import losses
from jaxrl.ops.closed_form import Mixture
from jaxrl.ranges import Count, Widths
from jaxrl.types import Observation, PyTree, pytree


@pytree
class DeterministicPolicy:
    """A deterministic policy pi(s) of one action, squashed to [-1, 1] by tanh."""

    net: Net = Net((256, 256), "relu", "none", "torch")

    def network(self, size: int) -> networks.Deterministic:
        """Returns the network of actions of `size` numbers."""
        return networks.Deterministic(size, *self.net.layers, initial=self.net.initial)

    def init(self, key: jax.Array, obs: Observation, action: jax.Array) -> PyTree:
        """Returns parameters, for an example [O] and [A]."""
        return self.network(action.shape[-1]).init(key, obs)

    def action(self, params: PyTree, obs: Observation) -> jax.Array:
        """Returns actions [..., A] in [-1, 1]."""
        return apply(self.network(networks.outputs_of(params)), params, obs)


@pytree
class GaussianPolicy:
    """A diagonal Gaussian over flat action chunks with state-dependent mean."""

    net: Net = Net()
    std: Literal["unit", "learned"] = "unit"  # standard deviation 1, or one learned number per entry

    def network(self, size: int) -> networks.Gaussian:
        """Returns the network of chunks of `size` numbers."""
        return networks.Gaussian(size, *self.net.layers, self.std == "unit", self.net.initial)

    def init(self, key: jax.Array, obs: Observation, chunk: jax.Array, *more: jax.Array) -> PyTree:
        """Returns parameters, for examples [O] and [D], and of further inputs of the mean."""
        return self.network(chunk.shape[-1]).init(key, obs, *more)

    def moments(self, params: PyTree, obs: Observation, *more: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns mean and log standard deviation, [..., D] each."""
        return apply(self.network(networks.outputs_of(params)), params, obs, *more)  # ty: ignore[invalid-explicit-return]

    def log_density(self, params: PyTree, obs: Observation, chunk: jax.Array) -> jax.Array:
        """Returns the log density [...] of chunks [..., D]."""
        return losses.gaussian_log_density(chunk, *self.moments(params, obs))

    def sample(self, params: PyTree, obs: Observation, noise: jax.Array) -> jax.Array:
        """Returns mean + std * noise, clipped to [-1, 1], [..., D]."""
        mean, log_std = self.moments(params, obs)
        return jnp.clip(mean + jnp.exp(log_std) * noise, -1, 1)

    def squashed(self, params: PyTree, obs: Observation, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns tanh(mean + std * noise) [..., D] and its log density [...]."""
        return _squashed(*self.moments(params, obs), noise)


@pytree
class SquashedGaussianPolicy:
    """The tanh of a diagonal Gaussian with state-dependent mean and width."""

    net: Net = Net((256, 256), "relu", "none", "torch")

    def network(self, size: int) -> networks.Squashed:
        """Returns the network of actions of `size` numbers."""
        return networks.Squashed(size, *self.net.layers, self.net.initial)

    def init(self, key: jax.Array, obs: Observation, action: jax.Array) -> PyTree:
        """Returns parameters, for an example [O] and [A]."""
        return self.network(action.shape[-1]).init(key, obs)

    def moments(self, params: PyTree, obs: Observation) -> tuple[jax.Array, jax.Array]:
        """Returns mean and log standard deviation before tanh, [..., A] each."""
        network = self.network(networks.outputs_of(params) // 2)
        return apply(network, params, obs)  # ty: ignore[invalid-explicit-return]

    def sample(self, params: PyTree, obs: Observation, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns actions [..., A] in [-1, 1] and their log density [...]."""
        return _squashed(*self.moments(params, obs), noise)


@pytree
class Autoencoder:
    """A variational autoencoder of actions, G(s, a), with latents of twice the action size."""

    hidden: Widths = (750, 750)  # widths of the hidden layers of its encoder, and of its decoder

    def init(self, key_encoder: jax.Array, key_decoder: jax.Array, obs: Observation, action: jax.Array) -> PyTree:
        """Returns parameters, for an example [O] and [A]."""
        size, latent = action.shape[-1], jnp.zeros(2 * action.shape[-1])
        return {
            "encoder": networks.Encoder(2 * size, self.hidden).init(key_encoder, obs, action),
            "decoder": networks.Deterministic(size, self.hidden).init(key_decoder, obs, latent),
        }

    def rebuild(
        self, params: PyTree, obs: Observation, action: jax.Array, noise: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns G(s, a) [..., A] from noise [..., 2 A]; mean and log standard deviation of q(z | s, a)."""
        size = action.shape[-1]
        mean, log_std = apply(networks.Encoder(2 * size, self.hidden), params["encoder"], obs, action)
        latent = mean + jnp.exp(log_std) * noise
        return apply(networks.Deterministic(size, self.hidden), params["decoder"], obs, latent), mean, log_std


@pytree
class MixturePolicy:
    """The tanh of a mixture of diagonal Gaussians with state-dependent weights, means and widths."""

    net: Net = Net((256, 256, 256), "relu", "none", "torch")
    components: Count = 4  # M: number of Gaussians

    def network(self, outputs: int) -> networks.MLP:
        """Returns the network with `outputs` outputs."""
        return networks.MLP((*self.net.hidden, outputs), self.net.norm, self.net.activation, initial=self.net.initial)

    def init(self, key: jax.Array, obs: Observation, action: jax.Array) -> PyTree:
        """Returns parameters, for an example [O] and [A]."""
        return self.network(self.components * (1 + 2 * action.shape[-1])).init(key, obs)

    def density(self, params: PyTree, obs: Observation) -> Mixture:
        """Returns the density of actions at observations [B, O]; standard deviations lie in [exp(-5), exp(2)]."""
        output = apply(self.network(networks.outputs_of(params)), params, obs)
        logits, rest = output[:, : self.components], output[:, self.components :]
        mean, log_std = jnp.split(rest.reshape(len(output), self.components, -1), 2, axis=-1)
        return Mixture(jax.nn.log_softmax(logits), mean, jnp.exp(jnp.clip(log_std, -5, 2)))


def _squashed(mean: jax.Array, log_std: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns tanh(mean + std * noise) and its log density."""
    u = mean + jnp.exp(log_std) * noise
    return jnp.tanh(u), losses.tanh_log_density(u, mean, log_std)
