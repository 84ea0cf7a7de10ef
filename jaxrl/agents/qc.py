"""QC: Q-learning on chunks of actions, with a policy that keeps the temporal coherence of the data.

Paper: Li, Zhou, Levine, "Reinforcement Learning with Action Chunking", arXiv 2507.07969. The critic evaluates whole
chunks of H actions, so that one unbiased backup covers H rewards; a behavior flow proposes chunks.

`actor="best_of_n"` (QC) acts on the best of N proposals, in the environment and in the TD target. `actor="distill"`
(QC-FQL) trains FQL's one-step policy instead. With chunk 1 and backup n they are BFN-n and FQL-n.

Deliberate differences from the official code:
- Windows shortened by termination train the critic ("keep"); the official code drops them ("drop").
- The action after an episode's end repeats the last one instead of reading on into the next episode.
- In goal-conditioned tasks the flow does not see the goal. `critic.head="bce"` learns probabilities of success.
- The best-of-N agent has no one-step policy; the official one initializes it without using it.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxrl.agents import learner, shared
from jaxrl.agents.learner import Draws, State
from jaxrl.agents.parts import AdamW, Critic, FlowPolicy, OneStepPolicy, Windows
from jaxrl.networks import repeat_for
from jaxrl.ops import guidance, losses
from jaxrl.ranges import Count, NonNegative
from jaxrl.types import Batch, Metrics, Observation, PyTree, Spec, count_of, pytree


@pytree
class QC:
    """Q-chunking: a chunked critic with a behavior flow, best-of-N or distilled."""

    windows: Windows = Windows(chunk=5, backup=5)
    actor: Literal["best_of_n", "distill"] = "best_of_n"  # how actions are derived from the flow and the critic
    flow: FlowPolicy = FlowPolicy()  # the behavior, v(s, a_t, t)
    policy: OneStepPolicy = OneStepPolicy()  # mu(s, z), for "distill"
    critic: Critic = Critic()  # Q_j(s, chunk)
    adam: AdamW = AdamW()
    num_samples: Count = 32  # N, for "best_of_n": number of proposals, of which the best is executed
    alpha: NonNegative = 100.0  # weight of the distillation, for "distill"; to be tuned per task

    chunk, requires, sample = shared.chunk, shared.requires, shared.sample
    learn, update = shared.learn, shared.update
    proposals, scores = shared.proposals, shared.scores

    def check(self) -> None:
        """Raises UserError for inconsistent settings."""
        self.windows.goals.check_head(self.critic.head)

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the initial state."""
        key_flow, key_critic, key_policy = jax.random.split(key, 3)
        obs, chunk = spec.example(), jnp.zeros(self.chunk * spec.action)
        params = {
            "flow": self.flow.init(key_flow, spec.behaviour(obs), chunk),
            "critic": self.critic.init(key_critic, spec.critic(obs), chunk),
        }
        if self.actor == "distill":
            params["policy"] = self.policy.init(key_policy, spec.actor(obs), chunk)
        return learner.create(spec, params, self.adam.transformation(), "critic")

    def noise(self, spec: Spec, key: jax.Array, count: int) -> jax.Array:
        """Returns the noise for `choose` for `count` observations: [B, N, D], or [B, 1, D] if distilled."""
        samples = self.num_samples if self.actor == "best_of_n" else 1
        return jax.random.normal(key, (count, samples, self.chunk * spec.action))

    def draw(self, spec: Spec, batch: Batch, key: jax.Array) -> Draws:
        """Returns the random numbers of one update."""
        key_next, key_noise, key_time, key_distill = jax.random.split(key, 4)
        count, size = len(batch.actions), self.chunk * spec.action
        return {
            "next_noise": self.noise(spec, key_next, count),
            "x0": jax.random.normal(key_noise, (count, size)),
            "t": jax.random.uniform(key_time, (count, 1)),
            "distill_noise": jax.random.normal(key_distill, (count, size)),
        }

    def td_target(self, state: State, batch: Batch, draws: Draws) -> jax.Array:
        """Returns y [B]: the return of the window plus the discounted value of the policy's next chunk (Eq. 7)."""
        action = self.choose(state, batch.next_obs, draws["next_noise"])
        next_value = self.critic.value(state.target["critic"], state.spec.critic(batch.next_obs), action)
        y = self.windows.target(batch, next_value)
        return losses.bounded(y, self.critic.head)

    def loss(self, params: dict[str, PyTree], state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns the sum of all losses and the individual losses, in the paper's order."""
        spec, a, happened = state.spec, self.windows.actions(batch), batch.valid[:, 0]
        whole = self.windows.weight(batch)

        # the critic: (Q(s, a) - y)^2 of whole chunks, averaged over the heads
        error = self.critic.error(params["critic"], spec.critic(batch.obs), a, self.td_target(state, batch, draws))
        critic = losses.masked_mean(error.mean(axis=0), whole)

        # the flow clones the behavior: |v(s, a_t, t) - (a - z)|^2
        seen = spec.behaviour(batch.obs)
        matching = self.flow.matching_error(params["flow"], seen, draws["x0"], a, draws["t"])
        cloning = losses.masked_mean(matching, self.windows.mask(batch))
        total, metrics = critic + cloning, {"critic/loss": critic, "actor/flow_loss": cloning}
        if self.actor == "best_of_n":
            return total, metrics

        # FQL's policy stays near the flow's solution F(s, z) and maximizes the critic
        noise = draws["distill_noise"]
        action = self.policy.sample(params["policy"], spec.actor(batch.obs), noise)
        solution = jax.lax.stop_gradient(self.flow.sample(state.params["flow"], seen, noise))
        distillation = losses.masked_mean(jnp.square(action - solution).mean(axis=-1), happened)
        q = self.critic.values(state.params["critic"], spec.critic(batch.obs), jnp.clip(action, -1, 1)).mean(axis=0)
        climb = -losses.masked_mean(q, happened)
        metrics |= {"actor/distillation_loss": distillation, "actor/q_loss": climb}
        return total + (self.alpha * distillation + climb), metrics

    def choose(self, state: State, obs: Observation, noise: jax.Array) -> jax.Array:
        """Returns the policy's chunks [B, D] from this noise [B, N, D]."""
        if self.actor == "distill":
            return jnp.clip(self.policy.sample(state.params["policy"], state.spec.actor(obs), noise[:, 0]), -1, 1)
        obs = repeat_for(noise, obs)
        candidates = self.proposals(state, obs, noise)
        return guidance.best_of(candidates, self.scores(state, obs, candidates))

    def act(self, state: State, obs: Observation, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns chunks [B, H, A] from new noise; `greedy` has no effect."""
        chunk = self.choose(state, obs, self.noise(state.spec, key, count_of(obs)))
        return learner.unflatten(chunk, state.spec.action)
