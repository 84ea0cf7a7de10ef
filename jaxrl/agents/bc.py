"""Flow behaviour cloning: the data's action chunks as a conditional flow, without any critic.

Loss: conditional flow matching (Lipman et al., arXiv 2210.02747, equation 23, with straight paths) on flat H-step
chunks, steps past an episode's end masked. Acting integrates the learned velocity with `flow_steps` Euler steps.
It is the policy that every method here starts from, and the baseline that each must beat.
"""

import jax
import jax.numpy as jnp
import optax

from jaxrl import flow, losses
from jaxrl.agents.common import check_range, flat_actions, step_mask, unflatten
from jaxrl.data.ring import Rings, windows
from jaxrl.networks import Velocity, apply
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
    batch_size: int = 256  # windows per update
    flow_steps: int = 10  # euler steps from noise to action
    lr: Scalar = 3e-4  # learning rate of Adam

    def check(self) -> None:
        """Raises UserError where a value is out of range."""
        check_range(self, chunk=(1, None), hidden=(1, None), batch_size=(1, None), flow_steps=(1, None), lr=(0, None))

    def init(self, key: jax.Array, spec: Spec) -> BCState:
        """Returns the initial state for an environment's sizes."""
        size = self.chunk * spec.action
        params = self.network(size).init(key, jnp.zeros(spec.observation), jnp.zeros(size), jnp.zeros(1))
        return BCState(spec, params, optax.adam(self.lr).init(params), jnp.zeros((), jnp.int32))

    def network(self, size: int) -> Velocity:
        """Returns v(s, x_t, t)."""
        return Velocity(size, self.hidden)

    def sample(self, data: Rings, key: jax.Array) -> Batch:
        """Returns a batch of H-step windows."""
        return windows(data, key, self.batch_size, self.chunk)

    def update(self, state: BCState, batch: Batch, key: jax.Array) -> tuple[BCState, Metrics]:
        """Returns the state after one gradient step on the flow-matching loss, and its metrics."""
        x1 = flat_actions(batch)
        key_noise, key_time = jax.random.split(key)
        x0 = jax.random.normal(key_noise, x1.shape)
        t = jax.random.uniform(key_time, (len(x1), 1))

        def loss(params: PyTree) -> jax.Array:
            def velocity(x: jax.Array, _: jax.Array, t: jax.Array) -> jax.Array:
                return apply(self.network(x.shape[-1]), params, batch.obs, x, t)

            return losses.masked_mean(flow.matching_error(velocity, x0, x1, t), step_mask(batch))

        value, gradient = jax.value_and_grad(loss)(state.params)
        updates, opt = optax.adam(self.lr).update(gradient, state.opt)
        metrics = {"actor/flow_loss": value, "actor/grad_norm": optax.tree.norm(gradient)}
        return BCState(state.spec, optax.apply_updates(state.params, updates), opt, state.step + 1), metrics

    def act(self, state: BCState, obs: jax.Array, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns chunks [B, H, A] for observations [B, O]; `greedy` changes nothing."""

        def velocity(x: jax.Array, t: jax.Array, _: jax.Array) -> jax.Array:
            return apply(self.network(x.shape[-1]), state.params, obs, x, t)

        noise = jax.random.normal(key, (len(obs), self.chunk * state.spec.action))
        return unflatten(jnp.clip(flow.euler(velocity, noise, self.flow_steps), -1, 1), state.spec.action)
