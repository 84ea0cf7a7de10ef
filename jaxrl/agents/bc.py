"""Flow behaviour cloning: the data's action chunks as a conditional flow, without any critic.

Loss: conditional flow matching (Lipman et al., arXiv 2210.02747, equation 23, with straight paths) on flat H-step
chunks, steps past an episode's end masked. Acting integrates the learned velocity with `flow_steps` Euler steps.
It is the policy that every method here starts from, and the baseline that each must beat.
"""

import jax
import jax.numpy as jnp
import optax

from jaxrl.agents.common import Draws, check_range, flat_actions, step_mask, unflatten
from jaxrl.networks import TIME_FEATURES, Activation, Norm, TimeFeatures, Velocity, apply
from jaxrl.ops import flow, losses
from jaxrl.replay.ring import Rings, windows
from jaxrl.types import Batch, Metrics, PyTree, Scalar, Spec, pytree


@pytree
class BCState:
    """Sizes, parameters, optimiser state and the count of updates."""

    spec: Spec
    params: PyTree
    opt: PyTree
    step: jax.Array


@pytree
class BC:
    """Flow behaviour cloning on H-step action chunks."""

    chunk: int = 5  # H: actions per decision, executed open loop
    hidden: tuple[int, ...] = (512, 512, 512, 512)  # widths of the velocity network
    activation: Activation = "gelu"  # of all networks
    norm: Norm = "none"  # layer norm in the velocity network
    time: TimeFeatures = "fourier"  # how it sees the time
    time_size: int = TIME_FEATURES  # number of time features, unless raw
    batch_size: int = 256  # windows per update
    flow_steps: int = 10  # euler steps from noise to action
    lr: Scalar = 3e-4  # learning rate of Adam

    def check(self) -> None:
        """Raises UserError where a value is out of range."""
        counts = ("chunk", "hidden", "batch_size", "flow_steps")
        check_range(self, **dict.fromkeys(counts, (1, None)), time_size=(4, None), lr=(0, None))

    def init(self, key: jax.Array, spec: Spec) -> BCState:
        """Returns the initial state for an environment's sizes."""
        size = self.chunk * spec.action
        params = self.network(size).init(key, jnp.zeros(spec.observation), jnp.zeros(size), jnp.zeros(1))
        return BCState(spec, params, optax.adam(self.lr).init(params), jnp.zeros((), jnp.int32))

    def network(self, size: int) -> Velocity:
        """Returns v(s, x_t, t)."""
        return Velocity(size, self.hidden, self.norm, self.activation, self.time, self.time_size)

    def sample(self, data: Rings, key: jax.Array) -> Batch:
        """Returns a batch of H-step windows."""
        return windows(data, key, self.batch_size, self.chunk)

    def velocity(self, params: PyTree, obs: jax.Array) -> flow.AverageVelocity:
        """Returns the flow as a function v(x, r, t) of flat chunks, at time t; its observations are closed over."""
        return lambda x, r, t: apply(self.network(x.shape[-1]), params, obs, x, t)

    def update(self, state: BCState, batch: Batch, key: jax.Array, data: Rings = ()) -> tuple[BCState, Metrics]:
        """Returns the state after one gradient step on the flow-matching loss, and its metrics."""
        return self.learn(state, batch, self.draw(state.spec, batch, key))

    def draw(self, spec: Spec, batch: Batch, key: jax.Array) -> Draws:
        """Returns the random numbers of one update: the flow's noise and times."""
        key_noise, key_time = jax.random.split(key)
        noise = jax.random.normal(key_noise, (len(batch.obs), self.chunk * spec.action))
        return {"x0": noise, "t": jax.random.uniform(key_time, (len(noise), 1))}

    def loss(self, params: PyTree, batch: Batch, draws: Draws) -> jax.Array:
        """Returns the flow-matching loss."""
        velocity = self.velocity(params, batch.obs)
        error = flow.matching_error(velocity, draws["x0"], flat_actions(batch), draws["t"])
        return losses.masked_mean(error, step_mask(batch))

    def learn(self, state: BCState, batch: Batch, draws: Draws) -> tuple[BCState, Metrics]:
        """Returns the state after the update with these random numbers."""
        value, gradient = jax.value_and_grad(self.loss)(state.params, batch, draws)
        updates, opt = optax.adam(self.lr).update(gradient, state.opt)
        metrics = {"actor/flow_loss": value, "actor/grad_norm": optax.tree.norm(gradient)}
        return BCState(state.spec, optax.apply_updates(state.params, updates), opt, state.step + 1), metrics

    def choose(self, state: BCState, obs: jax.Array, noise: jax.Array) -> jax.Array:
        """Returns the flow's chunks [B, D] from this noise, clipped."""
        return jnp.clip(flow.euler(self.velocity(state.params, obs), noise, self.flow_steps), -1, 1)

    def act(self, state: BCState, obs: jax.Array, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns chunks [B, H, A] for observations [B, O]; `greedy` changes nothing."""
        noise = jax.random.normal(key, (len(obs), self.chunk * state.spec.action))
        return unflatten(self.choose(state, obs, noise), state.spec.action)
