"""ReBRAC: TD3+BC with an additional penalty on the target's actions, and layer norm in the critics.

Paper: Tarasov, Kurenkov, Nikulin, Kolesnikov, "Revisiting the Minimalist Approach to Offline Reinforcement Learning",
arXiv 2305.09836.

The target is penalized by the distance of the target actor's next action from the data's next action (equation 3), and
the actor's loss by the distance of its action from the data's (equation 4); both squared distances are sums over the
action's entries. The actor maximizes the lower of the two critics. Observations are not normalized.

Deliberate differences from the official code:
- Transitions without a next action in the data, because of truncation, train the actor but not the critics.
- Layers are initialized as in TD3; the authors' hidden biases of 0.1 and small last layers are not copied.
- `joint` is the scheme of FQL's authors: one optimizer for both networks, whose momentum also moves the actor in
  updates that do not train it; errors averaged over the two critics; targets follow the parameters from before the
  step.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxrl.agents import learner
from jaxrl.agents.learner import Draws, State
from jaxrl.agents.parts import Critic, DeterministicPolicy, Net
from jaxrl.agents.td3 import TD3, climb
from jaxrl.ops import losses
from jaxrl.ranges import NonNegative
from jaxrl.replay.ring import Rings
from jaxrl.types import Batch, Metrics, Observation, PyTree, Requirements, Spec, pytree


@pytree
class ReBRAC:
    """TD3 with behavior penalties in the actor's loss and in the critics' target."""

    chunk: ClassVar[int] = 1

    td3: TD3 = TD3(
        DeterministicPolicy(Net((256, 256, 256), "relu", "none", "torch")),
        Critic(Net((256, 256, 256), "relu", "after", "torch"), agg="min"),
    )
    beta_actor: NonNegative = 0.01  # penalty in the actor's loss; to be tuned per task
    beta_critic: NonNegative = 0.01  # penalty in the critics' target; to be tuned per task
    joint: bool = False  # whether both networks share one optimizer, at the actor's learning rate; see above

    def requires(self) -> Requirements:
        """Returns the requirements on its data."""
        return self.td3.requires()

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the initial state."""
        state = self.td3.init(key, spec)
        if not self.joint:
            return state
        return dataclasses.replace(state, opt=self.td3.actor_adam.transformation().init(state.params))

    def fit(self, state: State, data: Rings) -> State:
        """Returns the initial state with the data's normalizer, if observations are normalized."""
        return self.td3.fit(state, data)

    def sample(self, data: Rings, key: jax.Array) -> Batch:
        """Returns a batch of transitions."""
        return self.td3.sample(data, key)

    def update(self, state: State, batch: Batch, key: jax.Array, data: Rings = ()) -> tuple[State, Metrics]:
        """Returns the state after a step of the critics and, every `delay`-th time, of the actor and the targets."""
        return self.learn(state, batch, self.td3.draw(state.spec, batch, key))

    def learn(self, state: State, batch: Batch, draws: Draws) -> tuple[State, Metrics]:
        """Returns the state after the update with these random numbers."""
        batch = learner.normalized(state, batch)
        y = self.td_target(state, batch, draws)
        if self.joint:
            return self.learn_jointly(state, batch, y)
        state, metrics = self.td3.learn_critic(state, batch, y, continued(batch))

        def improve(state: State) -> tuple[State, Metrics]:
            state = learner.follow(state, self.td3.critic.tau, "actor", "critic")  # the actor's target lags by one step
            loss = lambda actor: self.actor_loss(actor, state, batch)  # noqa: E731
            return learner.step(state, "actor", loss, self.td3.actor_adam.transformation())

        state, more = learner.every(self.td3.delay, state, improve)
        return learner.counted(state), {**metrics, **more}

    def learn_jointly(self, state: State, batch: Batch, y: jax.Array) -> tuple[State, Metrics]:
        """Returns the state after one step of one optimizer on both losses, the actor's every `delay`-th time."""
        whole = (state.step + 1) % self.td3.delay == 0

        def loss(params: dict[str, PyTree]) -> tuple[jax.Array, Metrics]:
            critic = self.td3.critic_loss(params["critic"], state, batch, y, continued(batch)) / 2
            actor, metrics = self.actor_loss(params["actor"], state, batch)
            return critic + jnp.where(whole, actor, 0.0), {"critic/loss": critic, **metrics}

        tau = jnp.where(whole, self.td3.critic.tau, 0.0)
        return learner.descend(state, loss, self.td3.actor_adam.transformation(), tau, "actor", "critic")

    def td_target(self, state: State, batch: Batch, draws: Draws) -> jax.Array:
        """Returns y [B], the TD target with the next value reduced by beta_critic |a' - a'_data|^2 (eq. 3)."""
        action = self.td3.target_action(state, batch, draws)
        return self.td3.td_target(state, state.target["critic"], batch, action, self.penalty(batch, action))

    def penalty(self, batch: Batch, action: jax.Array) -> jax.Array:
        """Returns beta_critic |a' - a'_data|^2 [B] of next actions [B, A]."""
        assert batch.next_action is not None
        return self.beta_critic * jnp.square(action - batch.next_action).sum(axis=-1)

    def actor_loss(self, actor: PyTree, state: State, batch: Batch) -> tuple[jax.Array, Metrics]:
        """Returns beta_actor |pi(s) - a|^2 - lambda min Q(s, pi(s)), with lambda = 1 / mean |min Q| (eq. 4)."""
        action = self.td3.actor.action(actor, state.spec.actor(batch.obs))
        q = self.td3.critic.value(state.params["critic"], state.spec.critic(batch.obs), action)
        climbing, weight = climb(q, 1.0, batch)
        imitation = losses.masked_mean(jnp.square(action - batch.actions[:, 0]).sum(axis=-1), batch.valid[:, 0])
        imitation = self.beta_actor * imitation
        return climbing + imitation, {
            "actor/q_loss": climbing,
            "actor/bc_loss": imitation,
            "actor/lambda": weight,
        }

    def act(self, state: State, obs: Observation, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns chunks [B, 1, A], with the noise of exploration unless `greedy`."""
        return self.td3.act(state, obs, key, greedy=greedy)


def continued(batch: Batch) -> jax.Array:
    """Returns 1 for transitions with a next action in the data or a terminated task, else 0, [B]."""
    assert batch.followed is not None
    return batch.valid[:, 0] * jnp.maximum(batch.followed, batch.terminated)
