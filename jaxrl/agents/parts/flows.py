"""Flows, flow maps and one-step maps of noise to action chunks."""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxrl import networks
from jaxrl.agents.parts.settings import Net
from jaxrl.networks import TIME_FEATURES, TimeFeatures, apply
from jaxrl.ops import flow, losses
from jaxrl.ranges import Count, Natural, check_at_least
from jaxrl.types import Observation, PyTree, pytree

FEWEST_FEATURES = {"fourier": 4, "sinusoidal": 2, "raw": 1}
"""Minimum number of time features of each kind: Fourier features include both ends of the frequency range."""


@pytree
class FlowPolicy:
    """A flow over action chunks: the velocity v(s, x, t), integrated by Euler steps."""

    net: Net = Net()
    time: TimeFeatures = "raw"  # encoding of the time
    time_size: Count = TIME_FEATURES  # number of time features, unless raw
    steps: Count = 10  # Euler steps from noise to action

    def check(self) -> None:
        """Raises UserError for fewer time features than their kind requires."""
        check_at_least(self, time_size=FEWEST_FEATURES[self.time])

    def network(self, size: int) -> networks.Velocity:
        """Returns the network of chunks of `size` numbers."""
        return networks.Velocity(size, *self.net.layers, self.time, self.time_size, self.net.initial)

    def init(self, key: jax.Array, obs: Observation, chunk: jax.Array) -> PyTree:
        """Returns parameters, for an example [O] and [D]."""
        return self.network(chunk.shape[-1]).init(key, obs, chunk, jnp.zeros(1))

    def velocity(self, params: PyTree, obs: Observation) -> flow.AverageVelocity:
        """Returns the velocity at time t as a function (x, r, t) of flat chunks [..., D]; r is ignored."""
        return lambda x, r, t: apply(self.network(x.shape[-1]), params, obs, x, t)

    def sample(self, params: PyTree, obs: Observation, noise: jax.Array) -> jax.Array:
        """Returns chunks [..., D] from noise [..., D], clipped to [-1, 1]."""
        return jnp.clip(flow.euler(self.velocity(params, obs), noise, self.steps), -1, 1)

    def matching_error(self, params: PyTree, obs: Observation, x0: jax.Array, x1: jax.Array, t: jax.Array) -> jax.Array:
        """Returns the flow-matching error [B, D] of data x1 [B, D] under noise x0 [B, D] at times [B, 1]."""
        return flow.matching_error(self.velocity(params, obs), x0, x1, t)


@pytree
class FlowMapPolicy:
    """A flow map over action chunks: the average velocity u(s, x, r, t) over [r, t], for one-step jumps."""

    net: Net = Net()
    time: TimeFeatures = "fourier"  # encoding of the times; derivatives of "sinusoidal" are too large
    time_size: Count = TIME_FEATURES  # number of features of each time, unless raw

    def check(self) -> None:
        """Raises UserError for fewer time features than their kind requires."""
        check_at_least(self, time_size=FEWEST_FEATURES[self.time])

    def network(self, size: int) -> networks.Velocity:
        """Returns the network of chunks of `size` numbers."""
        return networks.Velocity(size, *self.net.layers, self.time, self.time_size, self.net.initial)

    def init(self, key: jax.Array, obs: Observation, chunk: jax.Array) -> PyTree:
        """Returns parameters, for an example [O] and [D]."""
        return self.network(chunk.shape[-1]).init(key, obs, chunk, jnp.zeros(1), jnp.zeros(1))

    def velocity(self, params: PyTree, obs: Observation) -> flow.AverageVelocity:
        """Returns u as a function (x, r, t) of flat chunks [..., D], for observations [..., O]."""
        return lambda x, r, t: apply(self.network(x.shape[-1]), params, obs, x, r, t)

    def sample(self, params: PyTree, obs: Observation, noise: jax.Array) -> jax.Array:
        """Returns chunks [..., D], the jump X_{0,1} from noise [..., D], clipped to [-1, 1]."""
        return jnp.clip(flow.jump(self.velocity(params, obs), noise), -1, 1)


@pytree
class SelfDistillation:
    """The losses of a flow map: flow matching on the diagonal r = t, and self-distillation off it."""

    kind: Literal["esd", "lsd", "lsd_reverse", "psd"] = "esd"  # the loss off the diagonal
    velocity: Literal["sample", "diagonal"] = "sample"  # velocity along which ESD differentiates
    warmup: Natural = 5_000  # updates with only the diagonal loss
    curriculum: Natural = 50_000  # update at which the intervals [r, t] reach their full width

    def check(self) -> None:
        """Raises UserError for inconsistent settings."""
        check_at_least(self, curriculum=self.warmup)

    def draw(self, key: jax.Array, count: int, size: int) -> dict[str, jax.Array]:
        """Returns the random numbers of one update with `count` chunks of `size` numbers."""
        key_x0, key_t, key_y0, key_rt, key_split = jax.random.split(key, 5)
        off_r, off_t = flow.uniform_times(key_rt, count)
        return {
            "x0": jax.random.normal(key_x0, (count, size)),
            "t": jax.random.uniform(key_t, (count, 1)),
            "off_x0": jax.random.normal(key_y0, (count, size)),
            "off_r": off_r,
            "off_t": off_t,
            "off_split": jax.random.uniform(key_split, (count, 1)),
        }

    def losses(
        self, u: flow.AverageVelocity, x1: jax.Array, mask: jax.Array, draws: dict[str, jax.Array], step: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the losses on and off the diagonal at an update number, for data x1 [B, D] with a mask [B, D]."""
        diagonal = flow.matching_error(u, draws["x0"], x1, draws["t"])
        progress = jnp.clip((step - self.warmup) / max(self.curriculum - self.warmup, 1), 0, 1)
        r, t = flow.widen(draws["off_r"], draws["off_t"], progress)
        if self.kind == "esd":
            off = flow.esd_error(u, draws["off_x0"], x1, r, t, self.velocity)
        elif self.kind == "psd":
            off = flow.psd_error(u, draws["off_x0"], x1, r, t, draws["off_split"])
        else:
            off = flow.lsd_error(u, draws["off_x0"], x1, r, t, reverse=self.kind == "lsd_reverse")
        return losses.masked_mean(diagonal, mask), losses.masked_mean(off, mask)


@pytree
class OneStepPolicy:
    """A map of noise to action chunks, mu(s, z)."""

    net: Net = Net()

    def network(self, size: int) -> networks.Velocity:
        """Returns the network of chunks of `size` numbers."""
        return networks.Velocity(size, *self.net.layers, initial=self.net.initial)

    def init(self, key: jax.Array, obs: Observation, chunk: jax.Array) -> PyTree:
        """Returns parameters, for an example [O] and [D]."""
        return self.network(chunk.shape[-1]).init(key, obs, chunk)

    def sample(self, params: PyTree, obs: Observation, noise: jax.Array) -> jax.Array:
        """Returns chunks [..., D] from noise [..., D], not clipped."""
        return apply(self.network(noise.shape[-1]), params, obs, noise)
