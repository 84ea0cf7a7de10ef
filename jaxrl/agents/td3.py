"""TD3: a deterministic actor, twin critics, and target networks.

Paper: Fujimoto, van Hoof, Meger, "Addressing Function Approximation Error in Actor-Critic Methods", arXiv 1802.09477.

The critics learn from the lower of two targets at a smoothed target action (sections 4.2 and 5.3); the actor and the
targets are updated in every `delay`-th update (section 5.2). TD3+BC, ReBRAC, PRDC and A2PR differ in how they
regularize the actor toward the data: each has a TD3 as a field, and its own file.

Deliberate differences from the official code:
- Truncated transitions bootstrap from their true next state.
- Exploration noise is clipped like that of target actions.
- `critic.head="bce"` learns probabilities of success instead of values.
"""

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax

from jaxrl.agents import learner, shared
from jaxrl.agents.learner import Draws, State
from jaxrl.agents.parts import Adam, Critic, DeterministicPolicy, Net, Transitions
from jaxrl.ops import losses
from jaxrl.ranges import Count, NonNegative
from jaxrl.replay.ring import Rings
from jaxrl.types import Batch, Metrics, Observation, PyTree, Requirements, Scalar, Spec, pytree

ActorLoss = Callable[[PyTree, State], tuple[jax.Array, Metrics]]
"""The loss of the actor's parameters in a state, and metrics."""


@pytree
class TD3:
    """Twin delayed deterministic policy gradients."""

    chunk: ClassVar[int] = 1

    actor: DeterministicPolicy = DeterministicPolicy()  # pi(s)
    critic: Critic = Critic(Net((256, 256), "relu", "none", "torch"), agg="min")  # Q_1(s, a) and Q_2(s, a)
    actor_adam: Adam = Adam()
    critic_adam: Adam = Adam()
    transitions: Transitions = Transitions()
    delay: Count = 2  # critic updates per actor update
    target_noise: NonNegative = 0.2  # standard deviation of the noise on target actions
    noise_clip: NonNegative = 0.5  # bound of that noise, and of exploration's
    exploration: NonNegative = 0.1  # standard deviation of the noise on actions, except in evaluation
    normalize: bool = False  # whether observations are normalized by the data's mean and standard deviation

    fit, sample = shared.fit, shared.sample_transitions

    def check(self) -> None:
        """Raises UserError for inconsistent settings."""
        self.transitions.goals.check_head(self.critic.head)

    def requires(self) -> Requirements:
        """Returns the requirements on its data."""
        return self.transitions.requires(self.critic.head)

    def init(self, key: jax.Array, spec: Spec, **more: tuple[PyTree, optax.GradientTransformation]) -> State:
        """Returns the initial state; `more` has (parameters, optimizer) of further networks by name."""
        key_actor, key_critic = jax.random.split(key)
        obs, action = spec.example(), jnp.zeros(spec.action)
        actor = self.actor.init(key_actor, spec.actor(obs), action)
        critic = self.critic.init(key_critic, spec.critic(obs), action)
        nets = {
            "actor": (actor, self.actor_adam.transformation()),
            "critic": (critic, self.critic_adam.transformation()),
            **more,
        }
        params, optimizers = ({name: pair[i] for name, pair in nets.items()} for i in (0, 1))
        return learner.create(spec, params, optimizers, "actor", "critic", normalized=True)

    def update(self, state: State, batch: Batch, key: jax.Array, data: Rings = ()) -> tuple[State, Metrics]:
        """Returns the state after a step of the critics and, every `delay`-th time, of the actor and the targets."""
        batch, draws = learner.normalized(state, batch), self.draw(state.spec, batch, key)
        return self.learn(state, batch, draws, lambda actor, state: self.actor_loss(actor, state, batch))

    def draw(self, spec: Spec, batch: Batch, key: jax.Array) -> Draws:
        """Returns the random numbers of one update: the noise of the target actions."""
        return {"target_noise": jax.random.normal(key, (len(batch.actions), spec.action))}

    def learn(self, state: State, batch: Batch, draws: Draws, actor_loss: ActorLoss) -> tuple[State, Metrics]:
        """Returns the state after the update with these random numbers, on normalized observations."""
        y = self.td_target(state, state.target["critic"], batch, self.target_action(state, batch, draws))
        state, metrics = self.learn_critic(state, batch, y, batch.valid[:, 0])
        state, more = self.learn_actor(state, actor_loss)
        return learner.counted(state), {**metrics, **more}

    # The critics

    def target_action(self, state: State, batch: Batch, draws: Draws) -> jax.Array:
        """Returns a' [B, A], the target actor's action at the next state with clipped noise (section 5.3)."""
        action = self.actor.action(state.target["actor"], state.spec.actor(batch.next_obs))
        return self.noisy(action, draws["target_noise"], self.target_noise)

    def noisy(self, action: jax.Array, noise: jax.Array, scale: Scalar) -> jax.Array:
        """Returns actions [B, A] plus standard normal noise, scaled and clipped; the sum is clipped to [-1, 1]."""
        return jnp.clip(action + jnp.clip(scale * noise, -self.noise_clip, self.noise_clip), -1, 1)

    def td_target(
        self, state: State, critic: PyTree, batch: Batch, action: jax.Array, penalty: jax.Array | float = 0.0
    ) -> jax.Array:
        """Returns y [B]: the TD target with the lower of two critics' values of the next action, minus a penalty."""
        next_value = self.critic.value(critic, state.spec.critic(batch.next_obs), action) - penalty
        y = self.transitions.target(batch, next_value)
        return losses.bounded(y, self.critic.head)

    def critic_loss(self, critic: PyTree, state: State, batch: Batch, y: jax.Array, weight: jax.Array) -> jax.Array:
        """Returns the weighted mean squared error of both critics against y [B], summed over the two (section 4.2)."""
        error = self.critic.error(critic, state.spec.critic(batch.obs), batch.actions[:, 0], y)
        return losses.masked_mean(error.sum(axis=0), weight)

    def learn_critic(self, state: State, batch: Batch, y: jax.Array, weight: jax.Array) -> tuple[State, Metrics]:
        """Returns the state after a step of the critics toward y [B], with transition weights [B]."""

        def loss(critic: PyTree) -> tuple[jax.Array, Metrics]:
            value = self.critic_loss(critic, state, batch, y, weight)
            return value, {"critic/loss": value}

        return learner.step(state, "critic", loss, self.critic_adam.transformation())

    # The actor

    def learn_actor(self, state: State, loss: ActorLoss) -> tuple[State, Metrics]:
        """Returns the state after a step of the actor and then of the targets, in every `delay`-th update."""

        def improve(state: State) -> tuple[State, Metrics]:
            state, metrics = learner.step(
                state, "actor", lambda actor: loss(actor, state), self.actor_adam.transformation()
            )
            return learner.follow(state, self.critic.tau, "actor", "critic"), metrics

        return learner.every(self.delay, state, improve)

    def first_q(self, state: State, batch: Batch, action: jax.Array) -> jax.Array:
        """Returns Q_1(s, a) [B] of actions [B, A]."""
        return self.critic.first(state.params["critic"], state.spec.critic(batch.obs), action)

    def actor_loss(self, actor: PyTree, state: State, batch: Batch) -> tuple[jax.Array, Metrics]:
        """Returns -Q_1(s, pi(s))."""
        q = self.first_q(state, batch, self.actor.action(actor, state.spec.actor(batch.obs)))
        loss = -losses.masked_mean(q, batch.valid[:, 0])
        return loss, {"actor/q_loss": loss}

    def choose(self, state: State, obs: Observation) -> jax.Array:
        """Returns the actor's actions [B, A] for raw observations."""
        assert state.normalizer is not None
        return self.actor.action(state.params["actor"], state.spec.actor(state.normalizer(obs)))

    def act(self, state: State, obs: Observation, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns actions as chunks [B, 1, A], with the noise of exploration unless `greedy`."""
        action = self.choose(state, obs)
        if not greedy:
            action = self.noisy(action, jax.random.normal(key, action.shape), self.exploration)
        return action[:, None]


def climb(q: jax.Array, alpha: Scalar, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns the loss -lambda mean Q of values [B], and lambda = alpha / mean |Q|, without gradient.

    With this normalization, the trade-off between maximizing Q and imitating does not depend on the reward scale
    (Fujimoto and Gu, arXiv 2106.06860, equation 5).
    """
    weight = jax.lax.stop_gradient(alpha / jnp.abs(q).mean())
    return -weight * losses.masked_mean(q, batch.valid[:, 0]), weight
