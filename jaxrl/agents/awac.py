"""AWAC: advantage-weighted actor-critic; the policy imitates actions weighted by exponential advantages.

Paper: Nair, Gupta, Dalal, Levine, "AWAC: Accelerating Online Reinforcement Learning with Offline Datasets",
arXiv 2006.09359.

The critics learn the value of the policy (Eq. 4). The policy, a Gaussian, maximizes the likelihood of the data's
actions weighted by exp(advantage / temperature), the solution of KL-constrained policy improvement (Eq. 13). The same
update is used offline and online.

The advantage is measured against one sample of the policy, as in CORL's code, whose settings are the defaults.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxrl.agents import learner, shared
from jaxrl.agents.learner import Draws, State
from jaxrl.agents.parts import Adam, Critic, GaussianPolicy, Net, Transitions
from jaxrl.ops import losses
from jaxrl.ranges import NonNegative, Positive
from jaxrl.types import Batch, Metrics, Observation, PyTree, Spec, count_of, pytree

_NET = Net((256, 256, 256), "relu", "none", "torch")


@pytree
class AWAC:
    """Advantage-weighted imitation of the data, with a critic of the policy's value."""

    chunk: ClassVar[int] = 1

    transitions: Transitions = Transitions()
    actor: GaussianPolicy = GaussianPolicy(_NET, std="learned")  # pi(a | s)
    critic: Critic = Critic(_NET, agg="min")  # Q_1(s, a) and Q_2(s, a)
    actor_adam: Adam = Adam()
    critic_adam: Adam = Adam()
    temperature: Positive = 1 / 3  # of the advantage; 0.1 for sparse rewards
    max_weight: NonNegative = 100.0  # bound of the weights
    normalize: bool = True  # whether observations are normalized by the data's mean and standard deviation

    requires, fit, sample, update = shared.requires_transitions, shared.fit, shared.sample_transitions, shared.update

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the initial state."""
        key_actor, key_critic = jax.random.split(key)
        obs, action = spec.example(), jnp.zeros(spec.action)
        params = {
            "actor": self.actor.init(key_actor, spec.actor(obs), action),
            "critic": self.critic.init(key_critic, spec.critic(obs), action),
        }
        optimizers = {"actor": self.actor_adam.transformation(), "critic": self.critic_adam.transformation()}
        return learner.create(spec, params, optimizers, "critic", normalized=True)

    def draw(self, spec: Spec, batch: Batch, key: jax.Array) -> Draws:
        """Returns the random numbers of one update: the noise of the policy at the next states, and at the states."""
        key_next, key_here = jax.random.split(key)
        shape = (len(batch.actions), spec.action)
        return {"next_noise": jax.random.normal(key_next, shape), "noise": jax.random.normal(key_here, shape)}

    def learn(self, state: State, batch: Batch, draws: Draws) -> tuple[State, Metrics]:
        """Returns the state after the update with these random numbers."""
        batch = learner.normalized(state, batch)
        loss = lambda critic: self.critic_loss(critic, state, batch, draws)  # noqa: E731
        after, metrics = learner.step(state, "critic", loss, self.critic_adam.transformation())
        loss = lambda actor: self.actor_loss(actor, after, batch, draws)  # noqa: E731
        improved, more = learner.step(after, "actor", loss, self.actor_adam.transformation())
        return learner.counted(learner.follow(improved, self.critic.tau, "critic")), {**metrics, **more}

    def td_target(self, state: State, batch: Batch, draws: Draws) -> jax.Array:
        """Returns y [B], the TD target with the lower target critic's value of the policy's next action."""
        spec, next_obs = state.spec, batch.next_obs
        action = self.actor.sample(state.params["actor"], spec.actor(next_obs), draws["next_noise"])
        next_value = self.critic.value(state.target["critic"], spec.critic(next_obs), action)
        return self.transitions.target(batch, next_value)

    def critic_loss(self, critic: PyTree, state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns the TD loss, summed over the critics (Eq. 4)."""
        y = self.td_target(state, batch, draws)
        error = self.critic.error(critic, state.spec.critic(batch.obs), batch.actions[:, 0], y)
        loss = losses.masked_mean(error.sum(axis=0), batch.valid[:, 0])
        return loss, {"critic/loss": loss}

    def advantage_weight(self, state: State, batch: Batch, draws: Draws) -> jax.Array:
        """Returns min(exp((Q(s, a) - Q(s, a_pi)) / temperature), max_weight), [B], without gradient."""
        critic, obs = state.params["critic"], state.spec.critic(batch.obs)
        own = self.actor.sample(state.params["actor"], state.spec.actor(batch.obs), draws["noise"])
        advantage = self.critic.value(critic, obs, batch.actions[:, 0]) - self.critic.value(critic, obs, own)
        return jax.lax.stop_gradient(jnp.minimum(jnp.exp(advantage / self.temperature), self.max_weight))

    def actor_loss(self, actor: PyTree, state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns the loss of the weighted imitation (Eq. 13)."""
        density = self.actor.log_density(actor, state.spec.actor(batch.obs), batch.actions[:, 0])
        weight = self.advantage_weight(state, batch, draws)
        loss = -losses.masked_mean(weight * density, batch.valid[:, 0])
        return loss, {"actor/loss": loss, "actor/weight": weight.mean()}

    def act(self, state: State, obs: Observation, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns chunks [B, 1, A]: samples of the policy, clipped; its mean in evaluation (`greedy`)."""
        assert state.normalizer is not None
        noise = jax.random.normal(key, (count_of(obs), state.spec.action)) * (0.0 if greedy else 1.0)
        return self.actor.sample(state.params["actor"], state.spec.actor(state.normalizer(obs)), noise)[:, None]
