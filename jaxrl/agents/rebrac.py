"""ReBRAC: TD3+BC revisited, with a penalty on the target's actions as well and layer norm in the critics.

Paper: Tarasov, Kurenkov, Nikulin, Kolesnikov, "Revisiting the Minimalist Approach to Offline Reinforcement Learning",
arXiv 2305.09836.

The target is lowered by how far the slow actor's next action lies from the one that the data took next (Eq. 3), and
the actor by how far its own lies from the data's (Eq. 4); both distances are sums over the action's entries. The actor
climbs the lower of the two critics. Observations are not normalised.

A transition after which the data took no action, for the clock ran out, trains the actor but not the critics. Layers
begin as all of this family's do; the authors' hidden biases of 0.1 and small last layers are not copied.

`joint` is the order of FQL's authors: one optimiser for both networks, which also moves the actor on its momentum in
updates that do not train it; errors averaged over the two critics; targets that follow the parameters from before.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax

from jaxrl.agents import common, td3
from jaxrl.agents.common import Draws, State
from jaxrl.networks import Activation, Init, Norm, apply
from jaxrl.ops import losses
from jaxrl.replay.hindsight import Goals
from jaxrl.replay.ring import Rings
from jaxrl.types import Batch, Metrics, PyTree, Scalar, Spec, pytree


@pytree
class ReBRAC:
    """TD3 with penalties for leaving the data, in the actor's loss and in the critics' target."""

    chunk: ClassVar[int] = 1

    actor_hidden: tuple[int, ...] = (256, 256, 256)  # widths of the actor
    critic_hidden: tuple[int, ...] = (256, 256, 256)  # widths of each critic
    activation: Activation = "relu"  # of all networks
    initial: Init = "torch"  # how layers begin
    actor_norm: Norm = "none"  # layer norm in the actor
    critic_norm: Norm = "after"  # layer norm in the critics
    batch_size: int = 256  # transitions per update
    actor_lr: Scalar = 3e-4  # learning rate of Adam
    critic_lr: Scalar = 3e-4  # learning rate of Adam
    discount: Scalar = 0.99  # gamma, per environment step
    tau: Scalar = 0.005  # polyak rate of the targets
    delay: int = 2  # critic updates per actor update
    target_noise: Scalar = 0.2  # standard deviation of the noise on target actions
    noise_clip: Scalar = 0.5  # bound of that noise, and of exploration's
    beta_actor: Scalar = 0.01  # penalty in the actor's loss; to be tuned per task
    beta_critic: Scalar = 0.01  # penalty in the critics' target; to be tuned per task
    joint: bool = False  # whether one optimiser, at the actor's rate, serves both networks; see above
    exploration: Scalar = 0.1  # standard deviation of the noise on actions, but in evaluation
    normalize: bool = False  # whether observations are normalised by the data's mean and spread
    goals: Goals = Goals()  # how goals are drawn where the task has some

    def check(self) -> None:
        """Raises UserError where a value is out of range."""
        td3.check(self)
        common.check_range(self, beta_actor=(0, None), beta_critic=(0, None))

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the initial state."""
        state = td3.init(self, key, spec)
        return dataclasses.replace(state, opt=optax.adam(self.actor_lr).init(state.params)) if self.joint else state

    def fit(self, state: State, data: Rings) -> State:
        """Returns the initial state with the data's normaliser."""
        return td3.fit(self, state, data)

    def sample(self, data: Rings, key: jax.Array) -> Batch:
        """Returns a batch of transitions."""
        return td3.sample(self, data, key)

    def update(self, state: State, batch: Batch, key: jax.Array, data: Rings = ()) -> tuple[State, Metrics]:
        """Returns the state after a step of the critic and, every `delay`-th time, of the actor and the targets."""
        return self.learn(state, batch, td3.draw(state.spec, batch, key))

    def learn(self, state: State, batch: Batch, draws: Draws) -> tuple[State, Metrics]:
        """Returns the state after the update with these random numbers."""
        batch = common.normalized(state, batch)
        if self.joint:
            return self.learn_jointly(state, batch, draws)
        loss = lambda critic: self.critic_loss(critic, state, batch, draws)  # noqa: E731
        state, metrics = common.step(state, "critic", loss, optax.adam(self.critic_lr))

        def improve(state: State) -> tuple[State, Metrics]:
            loss = lambda actor: self.actor_loss(actor, state, batch)  # noqa: E731
            state = common.follow(state, self.tau, "actor", "critic")  # the actor's target lags by one step
            return common.step(state, "actor", loss, optax.adam(self.actor_lr))

        state, more = common.every(self.delay, state, improve)
        return common.counted(state), {**metrics, **more}

    def learn_jointly(self, state: State, batch: Batch, draws: Draws) -> tuple[State, Metrics]:
        """Returns the state after one step of one optimiser on both losses, the actor's every `delay`-th time."""
        whole = (state.step + 1) % self.delay == 0

        def loss(params: dict[str, PyTree]) -> tuple[jax.Array, Metrics]:
            critic, metrics = self.critic_loss(params["critic"], state, batch, draws)
            actor, more = self.actor_loss(params["actor"], state, batch)
            return critic + jnp.where(whole, actor, 0.0), {**metrics, **more}

        gradient, metrics = jax.grad(loss, has_aux=True)(state.params)
        updates, opt = optax.adam(self.actor_lr).update(gradient, state.opt, state.params)
        moved = common.follow(state, jnp.where(whole, self.tau, 0.0), "actor", "critic")
        params = optax.apply_updates(state.params, updates)
        return common.counted(dataclasses.replace(moved, params=params, opt=opt)), metrics

    def penalty(self, batch: Batch, action: jax.Array) -> jax.Array:
        """Returns beta_critic |a' - a'_data|^2, [B]."""
        assert batch.next_action is not None
        return self.beta_critic * jnp.square(action - batch.next_action).sum(axis=-1)

    def critic_loss(self, critic: PyTree, state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns the TD loss of both critics (Eq. 3)."""
        assert batch.followed is not None
        action = td3.target_action(self, state, batch, draws)
        y = td3.td_target(self, state.target["critic"], batch, action, self.penalty(batch, action))
        known = batch.valid[:, 0] * jnp.maximum(batch.followed, batch.terminated)
        loss = td3.critic_loss(self, critic, batch, y, known)
        loss = loss / 2 if self.joint else loss
        return loss, {"critic/loss": loss}

    def actor_loss(self, actor: PyTree, state: State, batch: Batch) -> tuple[jax.Array, Metrics]:
        """Returns beta_actor |pi(s) - a|^2 - lambda min Q(s, pi(s)), with lambda = 1 / mean |min Q| (Eq. 4)."""
        action = apply(td3.policy(self, state.spec), actor, batch.obs)
        q = apply(td3.critics(self), state.params["critic"], batch.obs, action).min(axis=0)
        climb, weight = td3.climb(q, 1.0, batch)
        imitation = losses.masked_mean(jnp.square(action - batch.actions[:, 0]).sum(axis=-1), batch.valid[:, 0])
        metrics = {"actor/q_loss": climb, "actor/bc_loss": self.beta_actor * imitation, "actor/lambda": weight}
        return climb + self.beta_actor * imitation, metrics

    def choose(self, state: State, obs: jax.Array) -> jax.Array:
        """Returns the actor's actions [B, A]."""
        return td3.choose(self, state, obs)

    def act(self, state: State, obs: jax.Array, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns chunks [B, 1, A], with the noise of exploration unless `greedy`."""
        return td3.act(self, state, obs, key, greedy)
