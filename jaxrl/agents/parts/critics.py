"""Ensembles of critics, quantile critics and state values."""

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from jaxrl import networks
from jaxrl.agents.parts.settings import Net
from jaxrl.errors import UserError
from jaxrl.networks import apply
from jaxrl.ops import losses
from jaxrl.ranges import Count, Fraction, Range, Widths
from jaxrl.types import Observation, PyTree, pytree


@pytree
class Critic:
    """An ensemble of critics Q_j(s, a), or state values V_j(s), aggregated by mean or minimum."""

    net: Net = Net(norm="after")
    heads: Count = 2  # number of critics
    agg: losses.Aggregate = "mean"  # how they are aggregated
    head: losses.Head = "mse"  # whether their outputs are values, or logits of probabilities
    tau: Fraction = 0.005  # Polyak rate of their targets
    epsilon: Literal["1e-6", "1e-5"] = "1e-6"  # LayerNorm's epsilon: the defaults of flax and of PyTorch

    @property
    def network(self) -> networks.Critic:
        """The network."""
        return networks.Critic(self.heads, *self.net.layers, self.net.initial, float(self.epsilon))

    def init(self, key: jax.Array, obs: Observation, action: jax.Array | None = None) -> PyTree:
        """Returns parameters, for an example [O] and [D]."""
        return self.network.init(key, *_given(obs, action))

    def outputs(self, params: PyTree, obs: Observation, action: jax.Array | None = None) -> jax.Array:
        """Returns the networks' outputs [K, ...] for actions [..., D]: values or logits."""
        return apply(self.network, params, *_given(obs, action))

    def values(self, params: PyTree, obs: Observation, action: jax.Array | None = None) -> jax.Array:
        """Returns each critic's value [K, ...] of actions [..., D]."""
        return losses.value_of(self.outputs(params, obs, action), self.head)

    def value(self, params: PyTree, obs: Observation, action: jax.Array | None = None) -> jax.Array:
        """Returns the aggregated value [...] of actions [..., D]."""
        return losses.aggregate(self.values(params, obs, action), self.agg)

    def score(self, params: PyTree, obs: Observation, action: jax.Array | None = None) -> jax.Array:
        """Returns the aggregated output [...] of actions [..., D], values or logits, for ranking and gradients."""
        return losses.aggregate(self.outputs(params, obs, action), self.agg)

    def first(self, params: PyTree, obs: Observation, action: jax.Array | None = None) -> jax.Array:
        """Returns the first critic's value [...], without computing the others."""
        alone = dataclasses.replace(self, heads=1)
        return alone.values(networks.first_of(params), obs, action)[0]

    def error(self, params: PyTree, obs: Observation, action: jax.Array | None, target: jax.Array) -> jax.Array:
        """Returns each critic's error [K, B] against targets [B]: squared, or the cross entropy of its logit."""
        return losses.regression(self.outputs(params, obs, action), target[None], self.head)


@pytree
class QuantileCritic:
    """An ensemble of critics Z_k(s, a, level) that learn quantiles of the return (IQN, arXiv 1806.06923)."""

    hidden: Widths = (256, 256)  # widths of each critic's layers before the level is input
    heads: Annotated[int, Range(2)] = 2  # number of critics
    levels: Count = 32  # number of levels averaged in a value
    train_levels: Count = 8  # number of random levels per transition in the loss
    tau: Fraction = 0.005  # Polyak rate of their targets

    @property
    def network(self) -> networks.QuantileCritic:
        """The network."""
        return networks.QuantileCritic(self.heads, self.hidden)

    def init(self, key: jax.Array, obs: Observation, action: jax.Array) -> PyTree:
        """Returns parameters, for an example [O] and [D]."""
        return self.network.init(key, obs, action, jnp.zeros(1))

    def quantiles(self, params: PyTree, obs: Observation, action: jax.Array, level: jax.Array) -> jax.Array:
        """Returns quantiles [K, ..., N] of actions [..., D] at levels [..., N] in [0, 1]."""
        return apply(self.network, params, obs, action, level)

    def values(self, params: PyTree, obs: Observation, action: jax.Array) -> jax.Array:
        """Returns each critic's value [K, ...] of actions [..., D], the mean of equally spaced quantiles."""
        middles = (jnp.arange(self.levels) + 0.5) / self.levels
        level = jnp.broadcast_to(middles, (*action.shape[:-1], self.levels))
        return self.quantiles(params, obs, action, level).mean(axis=-1)


@pytree
class Value:
    """A state value V(s)."""

    net: Net = Net(norm="after")
    head: losses.Head = "mse"  # whether its output is a value, or the logit of a probability

    @property
    def network(self) -> networks.Value:
        """The network."""
        return networks.Value(*self.net.layers, self.net.initial)

    def init(self, key: jax.Array, obs: Observation) -> PyTree:
        """Returns parameters, for an example [O]."""
        return self.network.init(key, obs)

    def output(self, params: PyTree, obs: Observation) -> jax.Array:
        """Returns the network's output [...]: values or logits."""
        return apply(self.network, params, obs)

    def value(self, params: PyTree, obs: Observation) -> jax.Array:
        """Returns values [...]."""
        return losses.value_of(self.output(params, obs), self.head)


def check_heads(agent: str, critic: Critic, value: Value, name: str = "the critic") -> None:
    """Raises UserError unless an agent's critic and value both learn values, or both probabilities."""
    if critic.head != value.head:
        raise UserError(f"{agent}.value.head = {value.head!r}: must be that of {name}, {critic.head!r}")


def _given(obs: Observation, action: jax.Array | None) -> tuple[Observation, ...]:
    return (obs,) if action is None else (obs, action)
