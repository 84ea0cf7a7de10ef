"""CFPI, one-step: learns a behavior policy and its value, and improves every action in closed form when acting.

Paper: Li, Zhang, Yin, Bai, Wang, Wang, "Offline Reinforcement Learning with Closed-Form Policy Improvement Operators",
arXiv 2211.15956; the operators are in `jaxrl.ops.closed_form`.

The behavior is a mixture of Gaussians before tanh, fitted by maximum likelihood. Two quantile critics (IQN, Dabney et
al., arXiv 1806.06923) learn the behavior's value from the next action of the data. No policy is trained.

Deliberate differences from the official code:
- Behavior and critics are trained together, in alternating updates, and the last critics are used; the official code
  trains them one after the other, and selects the critics' checkpoint per dataset.
- Actions are clipped to 0.999 before atanh. Outside evaluation there is noise on actions.
- The iterative version, in which the operator also selects the critics' next actions, is not implemented.

If many actions are at the bounds, the mixture has narrow components there whose high density keeps the radii of all
others near 0: a single Gaussian (variant `single`) suits such data better than the published mixture (`mixture`).
"""

from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxrl.agents import learner, shared
from jaxrl.agents.learner import Draws, State
from jaxrl.agents.parts import Adam, MixturePolicy, QuantileCritic, Transitions
from jaxrl.errors import UserError
from jaxrl.networks import repeat_for
from jaxrl.ops import closed_form, losses
from jaxrl.ops.closed_form import ClosedForm
from jaxrl.ranges import NonNegative
from jaxrl.types import Batch, Metrics, Observation, PyTree, Spec, pytree


@pytree
class CFPI:
    """Closed-form policy improvement of a behavior policy by its value."""

    chunk: ClassVar[int] = 1

    transitions: Transitions = Transitions()
    actor: MixturePolicy = MixturePolicy()  # the behavior, p(a | s)
    critic: QuantileCritic = QuantileCritic()  # Z_1(s, a, level) and Z_2(s, a, level)
    actor_adam: Adam = Adam(1e-4)
    critic_adam: Adam = Adam()
    pessimism: NonNegative = 1.0  # beta_LB: standard deviations between the critics' mean and the value
    operator: ClosedForm = ClosedForm()  # how actions are improved
    exploration: NonNegative = 0.1  # standard deviation of the noise on actions, except in evaluation
    normalize: bool = True  # whether observations are normalized by the data's mean and standard deviation

    requires, fit, sample, update = shared.requires_transitions, shared.fit, shared.sample_transitions, shared.update

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the initial state."""
        key_actor, key_critic = jax.random.split(key)
        obs, action = spec.example(), jnp.zeros(spec.action)
        params = {
            "actor": self.actor.init(key_actor, spec.behaviour(obs), action),
            "critic": self.critic.init(key_critic, spec.critic(obs), action),
        }
        optimizers = {"actor": self.actor_adam.transformation(), "critic": self.critic_adam.transformation()}
        return learner.create(spec, params, optimizers, "critic", normalized=True)

    def draw(self, spec: Spec, batch: Batch, key: jax.Array) -> Draws:
        """Returns the random numbers of one update, for the quantile levels at the state and at the next state."""
        here, there = jax.random.uniform(key, (2, len(batch.actions), self.critic.train_levels))
        return {"levels": here, "target_levels": there}

    def learn(self, state: State, batch: Batch, draws: Draws) -> tuple[State, Metrics]:
        """Returns the state after the update with these random numbers."""
        batch = learner.normalized(state, batch)
        imitate = lambda actor: self.actor_loss(actor, state, batch)  # noqa: E731
        evaluate = lambda critic: self.critic_loss(critic, state, batch, draws)  # noqa: E731
        state, metrics = learner.step(state, "actor", imitate, self.actor_adam.transformation())
        state, more = learner.step(state, "critic", evaluate, self.critic_adam.transformation())
        return learner.counted(learner.follow(state, self.critic.tau, "critic")), {**metrics, **more}

    def actor_loss(self, actor: PyTree, state: State, batch: Batch) -> tuple[jax.Array, Metrics]:
        """Returns -log p(a | s)."""
        density = self.actor.density(actor, state.spec.behaviour(batch.obs)).log_density(batch.actions[:, 0])
        loss = -losses.masked_mean(density, batch.valid[:, 0])
        return loss, {"actor/bc_loss": loss}

    def critic_loss(self, critic: PyTree, state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns the quantile loss of both critics, each against its target network at the data's next action.

        Transitions without a next action in the data count only if they terminated.
        """
        if batch.next_action is None or batch.followed is None:
            raise UserError("CFPI: a batch needs next_action and followed, the action that the data take next")
        spec, quantiles = state.spec, self.critic.quantiles
        level, _ = levels(draws["levels"])
        next_level, share = levels(draws["target_levels"])
        next_z = quantiles(state.target["critic"], spec.critic(batch.next_obs), batch.next_action, next_level)
        reward, factor = losses.chunk_return(batch.rewards, batch.steps, self.transitions.discount)
        target = reward[None, :, None] + (factor * (1 - batch.terminated))[None, :, None] * next_z
        z = quantiles(critic, spec.critic(batch.obs), batch.actions[:, 0], level)
        loss = jax.vmap(losses.quantile_huber, (0, 0, None, None))(z, target, level, share)
        weight = batch.valid[:, 0] * jnp.maximum(batch.followed, batch.terminated)
        loss = losses.masked_mean(loss.sum(axis=0), weight)
        return loss, {"critic/loss": loss, "critic/value": losses.masked_mean(z.mean(axis=(0, 2)), weight)}

    def choose(self, state: State, obs: Observation, key: jax.Array) -> jax.Array:
        """Returns the improved actions [B, A]; the key is for a random step size."""
        assert state.normalizer is not None
        obs = state.normalizer(obs)

        def value(actions: jax.Array) -> jax.Array:
            seen = state.spec.critic(repeat_for(actions, obs))
            return closed_form.lower_bound(self.critic.values(state.params["critic"], seen, actions), self.pessimism)

        return self.operator.improve(key, self.actor.density(state.params["actor"], state.spec.behaviour(obs)), value)

    def act(self, state: State, obs: Observation, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns chunks [B, 1, A], with the noise of exploration unless `greedy`."""
        key_delta, key_noise = jax.random.split(key)
        action = self.choose(state, obs, key_delta)
        if not greedy:
            action = jnp.clip(action + self.exploration * jax.random.normal(key_noise, action.shape), -1, 1)
        return action[:, None]


def levels(uniform: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns ascending levels [B, N], the midpoints of random intervals that partition [0, 1], and their lengths."""
    share = (uniform + 0.1) / (uniform + 0.1).sum(axis=-1, keepdims=True)
    return jnp.cumsum(share, axis=-1) - share / 2, share
