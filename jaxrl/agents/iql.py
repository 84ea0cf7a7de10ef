"""IQL: implicit Q-learning, which never evaluates the critic at actions outside the data.

Paper: Kostrikov, Nair, Levine, "Offline Reinforcement Learning with Implicit Q-Learning", arXiv 2110.06169. Equation
numbers are the paper's.

A value V learns an upper expectile of the critic over the data's actions (Eq. 5), the critic learns from V (Eq. 6),
and a Gaussian actor imitates the data weighted by the advantage (Eq. 7), or maximizes the critic with an imitation term
(DDPG+BC, Park et al., arXiv 2406.09329).

Deliberate differences from the official code (that of FQL's authors, the source of the recorded values):
- Chunks of actions and n-step returns, as in Q-chunking; with chunk = backup = 1 it is plain IQL.
- Windows train if the chunk's actions were executed, or the task ended within them; "drop" requires the whole window.
- One joint step with all losses at the parameters from before it, as there; Kostrikov's code updates V, actor, Q in
  turn.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxrl.agents import learner, shared
from jaxrl.agents.learner import Draws, State
from jaxrl.agents.parts import Adam, Critic, GaussianPolicy, Value, Windows, check_heads
from jaxrl.networks import repeat_for
from jaxrl.ops import guidance, losses
from jaxrl.ranges import Count, Fraction, NonNegative
from jaxrl.types import Batch, Metrics, Observation, PyTree, Scalar, Spec, count_of, pytree


@pytree
class IQL:
    """Implicit Q-learning with a Gaussian actor."""

    windows: Windows = Windows()
    actor: GaussianPolicy = GaussianPolicy()  # pi(a | s)
    critic: Critic = Critic(agg="min")  # Q_j(s, a)
    value: Value = Value()  # V(s)
    adam: Adam = Adam()
    expectile: Fraction = 0.9  # level of the value's expectile
    extraction: Literal["awr", "ddpgbc"] = "awr"  # advantage-weighted imitation, or maximize the critic and imitate
    alpha: NonNegative = 10.0  # inverse temperature of the advantage, or weight of the imitation
    advantage_of: Literal["online", "target"] = "online"  # which critic is used for the advantage
    num_samples: Count = 1  # N: number of samples, of which the best is executed
    eval_temperature: NonNegative = 0.0  # scale of the actor's noise in evaluation

    chunk, requires, sample = shared.chunk, shared.requires, shared.sample
    td_target, learn, update = shared.td_target, shared.learn, shared.update

    def check(self) -> None:
        """Raises UserError for inconsistent settings."""
        check_heads("IQL", self.critic, self.value)
        self.windows.goals.check_head(self.critic.head)

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the initial state."""
        key_actor, key_critic, key_value = jax.random.split(key, 3)
        obs, chunk = spec.example(), jnp.zeros(self.chunk * spec.action)
        params = {
            "actor": self.actor.init(key_actor, spec.actor(obs), chunk),
            "critic": self.critic.init(key_critic, spec.critic(obs), chunk),
            "value": self.value.init(key_value, spec.critic(obs)),
        }
        return learner.create(spec, params, self.adam.transformation(), "critic")

    def draw(self, spec: Spec, batch: Batch, key: jax.Array) -> Draws:
        """Returns the random numbers of one update: the noise of the actor's samples."""
        return {"actor_noise": jax.random.normal(key, (len(batch.actions), self.chunk * spec.action))}

    def loss(self, params: dict[str, PyTree], state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns the sum of all losses and the individual losses, in the paper's order."""
        a, seen = self.windows.actions(batch), state.spec.critic(batch.obs)
        weight = self.windows.weight(batch)

        # the value is an expectile of the target critic at the data's actions (Eq. 5)
        target = self.critic.value(state.target["critic"], seen, a)
        tilted = losses.tilted(self.value.output(params["value"], seen), target, self.expectile, self.value.head)
        value = losses.masked_mean(tilted, weight)

        # the critic: (Q(s, a) - y)^2, summed over the heads (Eq. 6)
        error = self.critic.error(params["critic"], seen, a, self.td_target(state, batch))
        critic = losses.masked_mean(error.sum(axis=0), weight)

        # the actor imitates the data, weighted by the advantage (Eq. 7) or while maximizing the critic
        mean, log_std = self.actor.moments(params["actor"], state.spec.actor(batch.obs))
        log_density = losses.gaussian_log_density(a, mean, log_std) * weight
        if self.extraction == "awr":
            imitation, climb = -jnp.mean(self.advantage_weight(state, batch) * log_density), jnp.zeros(())
        else:
            action = mean if self.actor.std == "unit" else mean + jnp.exp(log_std) * draws["actor_noise"]
            q = self.critic.value(state.params["critic"], seen, jnp.clip(action, -1, 1))
            imitation = -self.alpha * log_density.mean()
            climb = -(losses.masked_mean(q, batch.valid[:, 0]) / jax.lax.stop_gradient(jnp.abs(q).mean()))

        metrics = {"value/loss": value, "critic/loss": critic, "actor/bc_loss": imitation, "actor/q_loss": climb}
        return value + critic + imitation + climb, metrics

    def advantage_weight(self, state: State, batch: Batch) -> jax.Array:
        """Returns min(exp(alpha (Q - V)), 100), [B]."""
        critic = state.params["critic"] if self.advantage_of == "online" else state.target["critic"]
        obs = state.spec.critic(batch.obs)
        q = self.critic.value(critic, obs, self.windows.actions(batch))
        return jnp.minimum(jnp.exp(self.alpha * (q - self.value.value(state.params["value"], obs))), 100.0)

    def choose(self, state: State, obs: Observation, noise: jax.Array, temperature: Scalar = 1.0) -> jax.Array:
        """Returns the best [B, D] of the N clipped samples from this noise [B, N, D]."""
        obs = repeat_for(noise, obs)
        mean, log_std = self.actor.moments(state.params["actor"], state.spec.actor(obs))
        candidates = jnp.clip(mean + temperature * jnp.exp(log_std) * noise, -1, 1)
        scores = self.critic.score(state.params["critic"], state.spec.critic(obs), candidates)
        return guidance.best_of(candidates, scores)

    def act(self, state: State, obs: Observation, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns chunks [B, H, A]: samples of the actor, at `eval_temperature` in evaluation (`greedy`)."""
        noise = jax.random.normal(key, (count_of(obs), self.num_samples, self.chunk * state.spec.action))
        action = self.choose(state, obs, noise, self.eval_temperature if greedy else 1.0)
        return learner.unflatten(action, state.spec.action)
