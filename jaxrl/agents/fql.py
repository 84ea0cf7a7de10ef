"""FQL: a behavior flow, and a one-step policy distilled from it while maximizing the critic.

Paper: Park, Li, Levine, "Flow Q-Learning", arXiv 2502.02538. The flow v(s, a_t, t) clones the data. The one-step
policy mu(s, z) stays near the flow's ten-step solution F(s, z) of the same noise, which bounds a Wasserstein distance
to the behavior, and maximizes Q: no gradient passes through the flow's steps, and acting takes one network call.

Deliberate differences from the official code:
- Chunks of actions and n-step returns, as in Q-chunking; with chunk = backup = 1 it is FQL as published.
- In goal-conditioned tasks only the policy and the critic see the goal, not the flow.
- `critic.head="bce"` learns probabilities of success instead of values.
"""

import jax
import jax.numpy as jnp

from jaxrl.agents import learner, shared
from jaxrl.agents.learner import Draws, State
from jaxrl.agents.parts import Adam, Critic, FlowPolicy, OneStepPolicy, Windows
from jaxrl.ops import losses
from jaxrl.ranges import NonNegative
from jaxrl.types import Batch, Metrics, Observation, PyTree, Spec, count_of, pytree


@pytree
class FQL:
    """Flow Q-learning: a one-step policy with a behavior flow and a critic."""

    windows: Windows = Windows()
    flow: FlowPolicy = FlowPolicy()  # the behavior, v(s, a_t, t)
    policy: OneStepPolicy = OneStepPolicy()  # mu(s, z)
    critic: Critic = Critic()  # Q_j(s, a)
    adam: Adam = Adam()
    alpha: NonNegative = 10.0  # weight of the distillation; to be tuned per task
    normalize_q: bool = False  # whether the Q term of the policy's loss is divided by the mean |Q|

    chunk, requires, sample = shared.chunk, shared.requires, shared.sample
    learn, update = shared.learn, shared.update

    def check(self) -> None:
        """Raises UserError for inconsistent settings."""
        self.windows.goals.check_head(self.critic.head)

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the initial state."""
        key_flow, key_policy, key_critic = jax.random.split(key, 3)
        obs, chunk = spec.example(), jnp.zeros(self.chunk * spec.action)
        params = {
            "flow": self.flow.init(key_flow, spec.behaviour(obs), chunk),
            "policy": self.policy.init(key_policy, spec.actor(obs), chunk),
            "critic": self.critic.init(key_critic, spec.critic(obs), chunk),
        }
        return learner.create(spec, params, self.adam.transformation(), "critic")

    def draw(self, spec: Spec, batch: Batch, key: jax.Array) -> Draws:
        """Returns the random numbers of one update."""
        key_next, key_noise, key_time, key_distill = jax.random.split(key, 4)
        shape = (len(batch.actions), self.chunk * spec.action)
        return {
            "next_noise": jax.random.normal(key_next, shape),
            "x0": jax.random.normal(key_noise, shape),
            "t": jax.random.uniform(key_time, (len(batch.actions), 1)),
            "distill_noise": jax.random.normal(key_distill, shape),
        }

    def td_target(self, state: State, batch: Batch, draws: Draws) -> jax.Array:
        """Returns y [B], the return of the window plus the discounted value of the policy's action after it."""
        action = self.choose(state, batch.next_obs, draws["next_noise"])
        next_value = self.critic.value(state.target["critic"], state.spec.critic(batch.next_obs), action)
        y = self.windows.target(batch, next_value)
        return losses.bounded(y, self.critic.head)

    def loss(self, params: dict[str, PyTree], state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns the sum of all losses and the individual losses, in the paper's order."""
        spec, a, happened = state.spec, self.windows.actions(batch), batch.valid[:, 0]
        whole = self.windows.weight(batch)

        # the critic: (Q(s, a) - y)^2, averaged over the heads
        error = self.critic.error(params["critic"], spec.critic(batch.obs), a, self.td_target(state, batch, draws))
        critic = losses.masked_mean(error.mean(axis=0), whole)

        # the flow clones the behavior: |v(s, a_t, t) - (a - z)|^2
        seen = spec.behaviour(batch.obs)
        matching = self.flow.matching_error(params["flow"], seen, draws["x0"], a, draws["t"])
        cloning = losses.masked_mean(matching, self.windows.mask(batch))

        # the policy stays near the flow's solution F(s, z) and maximizes the critic
        noise = draws["distill_noise"]
        action = self.policy.sample(params["policy"], spec.actor(batch.obs), noise)
        solution = jax.lax.stop_gradient(self.flow.sample(state.params["flow"], seen, noise))
        distillation = losses.masked_mean(jnp.square(action - solution).mean(axis=-1), happened)
        q = self.critic.values(state.params["critic"], spec.critic(batch.obs), jnp.clip(action, -1, 1)).mean(axis=0)
        scale = jax.lax.stop_gradient(1 / jnp.abs(q).mean()) if self.normalize_q else 1.0
        climb = -scale * losses.masked_mean(q, happened)

        metrics = {"critic/loss": critic, "actor/flow_loss": cloning}
        metrics |= {"actor/distillation_loss": distillation, "actor/q_loss": climb}
        return critic + cloning + self.alpha * distillation + climb, metrics

    def choose(self, state: State, obs: Observation, noise: jax.Array) -> jax.Array:
        """Returns the policy's actions [B, D] from this noise, clipped."""
        return jnp.clip(self.policy.sample(state.params["policy"], state.spec.actor(obs), noise), -1, 1)

    def act(self, state: State, obs: Observation, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns chunks [B, H, A] from new noise; `greedy` has no effect."""
        noise = jax.random.normal(key, (count_of(obs), self.chunk * state.spec.action))
        return learner.unflatten(self.choose(state, obs, noise), state.spec.action)
