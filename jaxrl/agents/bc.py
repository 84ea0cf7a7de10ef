"""Flow behavior cloning: a conditional flow of the data's action chunks, without a critic.

Loss: conditional flow matching (Lipman et al., arXiv 2210.02747, equation 23, with straight paths) on flat H-step
chunks, with steps past an episode's end masked. Acting integrates the learned velocity with Euler steps. All flow
methods build on this policy, and it is their baseline.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from jaxrl.agents import learner, shared
from jaxrl.agents.learner import Draws, State
from jaxrl.agents.parts import Adam, FlowPolicy, Windows
from jaxrl.ops import losses
from jaxrl.types import Batch, Metrics, Observation, PyTree, Requirements, Spec, count_of, pytree


@pytree
class BC:
    """Flow behavior cloning on H-step action chunks."""

    windows: Windows = Windows(chunk=5, backup=5)
    flow: FlowPolicy = FlowPolicy(time="fourier")  # v(s, x_t, t)
    adam: Adam = Adam()

    chunk, sample = shared.chunk, shared.sample
    draw, update = shared.draw, shared.update

    def requires(self) -> Requirements:
        """Returns the requirements on its data."""
        return self.windows.requires()

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the initial state."""
        params = {"flow": self.flow.init(key, spec.actor(spec.example()), jnp.zeros(self.chunk * spec.action))}
        return learner.create(spec, params, self.adam.transformation())

    def learn(self, state: State, batch: Batch, draws: Draws) -> tuple[State, Metrics]:
        """Returns the state after the update with these random numbers."""
        gradient, metrics = jax.grad(self.loss, has_aux=True)(state.params, state, batch, draws)
        updates, opt = self.adam.transformation().update(gradient, state.opt)
        params = optax.apply_updates(state.params, updates)
        metrics = {**metrics, "actor/grad_norm": optax.tree.norm(gradient)}
        return dataclasses.replace(state, params=params, opt=opt, step=state.step + 1), metrics

    def loss(self, params: dict[str, PyTree], state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns the flow-matching loss, |v(s, x_t, t) - (a - x_0)|^2."""
        seen, chunk = state.spec.actor(batch.obs), self.windows.actions(batch)
        error = self.flow.matching_error(params["flow"], seen, draws["x0"], chunk, draws["t"])
        loss = losses.masked_mean(error, self.windows.mask(batch))
        return loss, {"actor/flow_loss": loss}

    def choose(self, state: State, obs: Observation, noise: jax.Array) -> jax.Array:
        """Returns the flow's chunks [B, D] from this noise, clipped."""
        return self.flow.sample(state.params["flow"], state.spec.actor(obs), noise)

    def act(self, state: State, obs: Observation, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns chunks [B, H, A] from new noise; `greedy` has no effect."""
        noise = jax.random.normal(key, (count_of(obs), self.chunk * state.spec.action))
        return learner.unflatten(self.choose(state, obs, noise), state.spec.action)
