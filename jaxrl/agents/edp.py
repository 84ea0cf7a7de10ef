"""EDP: a flow policy trained to maximize the critic at its one-step denoised action.

Paper: Kang et al., "Efficient Diffusion Policies for Offline Reinforcement Learning", arXiv 2305.20081, as a flow
with an IQL critic: the variant used as a baseline in "Q-Guided Flow" (arXiv 2606.11087). Critic, value and cloning
are those of QGF. The policy gradient through the critic needs no sampling chain: it is computed at the one-step
estimate of the action (the paper's action approximation) from a point between noise and data.

Deliberate differences from the official code: those of QGF, except that the policy sees the goal.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxrl.agents import learner, shared
from jaxrl.agents.learner import Draws, State
from jaxrl.agents.qgf import QGF
from jaxrl.ops import flow, losses
from jaxrl.ops.guidance import QGuidance
from jaxrl.ranges import NonNegative
from jaxrl.replay.ring import Rings
from jaxrl.types import Batch, Metrics, Observation, PyTree, Requirements, Spec, pytree


@pytree
class EDP:
    """A flow policy trained by cloning the data and maximizing an IQL critic."""

    qgf: QGF = QGF(guide=QGuidance(weight=0.0))
    bc_weight: NonNegative = 100.0  # weight of the cloning relative to the critic; to be tuned per task

    @property
    def chunk(self) -> int:
        """H, the actions of one decision."""
        return self.qgf.chunk

    def requires(self) -> Requirements:
        """Returns the requirements on its data."""
        return self.qgf.requires()

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the initial state."""
        return self.qgf.init(key, dataclasses.replace(spec, goal=0))  # the flow is a policy, and sees the goal

    def sample(self, data: Rings, key: jax.Array) -> Batch:
        """Returns a batch of windows."""
        return self.qgf.sample(data, key)

    update = shared.update

    def draw(self, spec: Spec, batch: Batch, key: jax.Array) -> Draws:
        """Returns the random numbers of one update: the flow's noise and times."""
        return self.qgf.draw(spec, batch, key)

    def learn(self, state: State, batch: Batch, draws: Draws) -> tuple[State, Metrics]:
        """Returns the state after the update with these random numbers."""
        loss = lambda params: self.loss(params, state, batch, draws)  # noqa: E731
        return learner.descend(state, loss, self.qgf.optimizer(), self.qgf.critic.tau, "critic")

    def loss(self, params: dict[str, PyTree], state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns the sum of the losses and the individual losses."""
        x, v = self.velocity(params, state, batch, draws)
        cloning = self.qgf.cloning(lambda x, r, t: v, batch, draws)

        # the policy maximizes the target critic: -Q(s, clip(a_t + (1 - t) v(s, a_t, t)))
        action = self.one_step(x, v, draws)
        climbing = -losses.masked_mean(self.qgf.score(state, batch.obs)(action), batch.valid[:, 0])

        critic, value = self.qgf.value_losses(params, state, batch)
        metrics = {"actor/flow_loss": cloning, "actor/q_loss": climbing, "critic/loss": critic, "value/loss": value}
        return self.bc_weight * cloning + climbing + critic + value, metrics

    def velocity(
        self, params: dict[str, PyTree], state: State, batch: Batch, draws: Draws
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the points between noise and data, and the flow's velocity there, [B, H * A] each."""
        x = flow.interpolate(draws["x0"], self.qgf.windows.actions(batch), draws["t"])
        return x, self.qgf.flow.velocity(params["flow"], state.spec.actor(batch.obs))(x, draws["t"], draws["t"])

    def one_step(self, x: jax.Array, v: jax.Array, draws: Draws) -> jax.Array:
        """Returns the one-step denoised chunks [B, H * A], clipped: the action approximation, for a flow."""
        return jnp.clip(x + (1 - draws["t"]) * v, -1, 1)

    def act(self, state: State, obs: Observation, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns chunks [B, H, A] of the flow, the best of `qgf.num_samples`; `greedy` has no effect."""
        return self.qgf.act(state, obs, key, greedy=greedy)
