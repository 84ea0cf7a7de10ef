"""TD3+BC: TD3 whose actor also imitates the data, the least that makes it work offline.

Paper: Fujimoto, Gu, "A Minimalist Approach to Offline Reinforcement Learning", arXiv 2106.06860.

The critic learns as in TD3. The actor climbs the critic, whose scale is divided out, and stays near the action that
the data took (Eq. 3 and 5). Observations are normalised. As published, but that a transition cut off by the clock
keeps its true next state where the official data drop it.
"""

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
class TD3BC:
    """TD3 with behaviour cloning in the actor's loss."""

    chunk: ClassVar[int] = 1

    actor_hidden: tuple[int, ...] = (256, 256)  # widths of the actor
    critic_hidden: tuple[int, ...] = (256, 256)  # widths of each critic
    activation: Activation = "relu"  # of all networks
    initial: Init = "torch"  # how layers begin
    actor_norm: Norm = "none"  # layer norm in the actor
    critic_norm: Norm = "none"  # layer norm in the critics
    batch_size: int = 256  # transitions per update
    actor_lr: Scalar = 3e-4  # learning rate of Adam
    critic_lr: Scalar = 3e-4  # learning rate of Adam
    discount: Scalar = 0.99  # gamma, per environment step
    tau: Scalar = 0.005  # polyak rate of the targets
    delay: int = 2  # critic updates per actor update
    target_noise: Scalar = 0.2  # standard deviation of the noise on target actions
    noise_clip: Scalar = 0.5  # bound of that noise, and of exploration's
    alpha: Scalar = 2.5  # weight of the critic against the imitation
    exploration: Scalar = 0.1  # standard deviation of the noise on actions, but in evaluation
    normalize: bool = True  # whether observations are normalised by the data's mean and spread
    goals: Goals = Goals()  # how goals are drawn where the task has some

    def check(self) -> None:
        """Raises UserError where a value is out of range."""
        td3.check(self)
        common.check_range(self, alpha=(0, None))

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the initial state."""
        return td3.init(self, key, spec)

    def fit(self, state: State, data: Rings) -> State:
        """Returns the initial state with the data's normaliser."""
        return td3.fit(self, state, data)

    def sample(self, data: Rings, key: jax.Array) -> Batch:
        """Returns a batch of transitions."""
        return td3.sample(self, data, key)

    def update(self, state: State, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        """Returns the state after a step of the critic and, every `delay`-th time, of the actor and the targets."""
        return self.learn(state, batch, td3.draw(state.spec, batch, key))

    def learn(self, state: State, batch: Batch, draws: Draws) -> tuple[State, Metrics]:
        """Returns the state after the update with these random numbers."""
        batch = common.normalized(state, batch)
        loss = lambda critic: self.critic_loss(critic, state, batch, draws)  # noqa: E731
        state, metrics = common.step(state, "critic", loss, optax.adam(self.critic_lr))

        def improve(state: State) -> tuple[State, Metrics]:
            loss = lambda actor: self.actor_loss(actor, state, batch)  # noqa: E731
            state, metrics = common.step(state, "actor", loss, optax.adam(self.actor_lr))
            return common.follow(state, self.tau, "actor", "critic"), metrics

        state, more = common.every(self.delay, state, improve)
        return common.counted(state), {**metrics, **more}

    def critic_loss(self, critic: PyTree, state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns the TD loss of both critics."""
        y = td3.td_target(self, state.target["critic"], batch, td3.target_action(self, state, batch, draws))
        loss = td3.critic_loss(self, critic, batch, y)
        return loss, {"critic/loss": loss}

    def actor_loss(self, actor: PyTree, state: State, batch: Batch) -> tuple[jax.Array, Metrics]:
        """Returns -lambda Q_1(s, pi(s)) + (pi(s) - a)^2, the mean over batch and entries of the action (Eq. 3)."""
        action = apply(td3.policy(self, state.spec), actor, batch.obs)
        q = td3.first_q(self, state.params["critic"], batch.obs, action)
        climb, weight = td3.climb(q, self.alpha, batch)
        imitation = losses.masked_mean(jnp.square(action - batch.actions[:, 0]).mean(axis=-1), batch.valid[:, 0])
        metrics = {"actor/q_loss": climb, "actor/bc_loss": imitation, "actor/lambda": weight}
        return climb + imitation, metrics

    def choose(self, state: State, obs: jax.Array) -> jax.Array:
        """Returns the actor's actions [B, A]."""
        return td3.choose(self, state, obs)

    def act(self, state: State, obs: jax.Array, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns chunks [B, 1, A], with the noise of exploration unless `greedy`."""
        return td3.act(self, state, obs, key, greedy)
