"""PRDC: policy regularisation with a dataset constraint, TD3 that stays near what anyone did in a state like this one.

Paper: Ran, Li, Zhang, Zhang, Yu, "Policy Regularization with Dataset Constraint for Offline Reinforcement Learning",
arXiv 2306.06569.

Where TD3+BC pulls the actor to the action that was stored with the state, PRDC looks for the pair (beta s', a') of the
whole dataset that is nearest to (beta s, pi(s)), and pulls it to that a'. With a large beta only the same state counts,
as in TD3+BC; with a small one any state near by may supply the action.

As in the official code the penalty is the squared distance of the actions, in the mean over batch and entries. The
neighbour is looked up anew for every actor step, exactly, in the program (`jaxrl.replay.neighbours`). With `neighbours`
k > 1, for which the official code is no guide, the actor is pulled to the mean of the k nearest actions.
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
from jaxrl.replay.neighbours import Index, Method, check, index_of, nearest
from jaxrl.replay.ring import Rings
from jaxrl.types import Batch, Metrics, PyTree, Scalar, Spec, pytree


@pytree
class PRDC:
    """TD3 whose actor stays near the nearest state and action of the whole dataset."""

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
    alpha: Scalar = 2.5  # weight of the critic against the constraint
    beta: Scalar = 2.0  # weight of states against actions in the distance
    neighbours: int = 1  # how many nearest pairs are averaged
    search: Method = "auto"  # how they are found: blocks of keys in the program, a tree on the CPU, or approximately
    block: int = 65_536  # keys that are compared at a time
    exploration: Scalar = 0.1  # standard deviation of the noise on actions, but in evaluation
    normalize: bool = True  # whether observations are normalised by the data's mean and spread
    goals: Goals = Goals()  # how goals are drawn where the task has some

    def check(self) -> None:
        """Raises UserError where a value is out of range."""
        td3.check(self)
        common.check_range(self, alpha=(0, None), beta=(0, None), neighbours=(1, None), block=(1, None))

    def check_data(self, transitions: int) -> None:
        """Raises UserError where neighbours among so many transitions cannot be searched as asked."""
        check(transitions, self.batch_size, self.neighbours, self.search, self.block)

    @property
    def searches(self) -> bool:
        """Whether a tree of the dataset is of use."""
        return self.search in ("auto", "tree")

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the initial state."""
        return td3.init(self, key, spec)

    def fit(self, state: State, data: Rings) -> State:
        """Returns the initial state with the data's normaliser."""
        return td3.fit(self, state, data)

    def sample(self, data: Rings, key: jax.Array) -> Batch:
        """Returns a batch of transitions, with the data that neighbours are looked up in."""
        return dataclasses.replace(td3.sample(self, data, key), rings=data[:1])

    def update(self, state: State, batch: Batch, key: jax.Array, data: Rings = ()) -> tuple[State, Metrics]:
        """Returns the state after a step of the critic and, every `delay`-th time, of the actor and the targets."""
        return self.learn(state, batch, td3.draw(state.spec, batch, key))

    def learn(self, state: State, batch: Batch, draws: Draws) -> tuple[State, Metrics]:
        """Returns the state after the update with these random numbers."""
        raw, batch = batch, common.normalized(state, batch)
        loss = lambda critic: self.critic_loss(critic, state, batch, draws)  # noqa: E731
        state, metrics = common.step(state, "critic", loss, optax.adam(self.critic_lr))

        def improve(state: State) -> tuple[State, Metrics]:
            near = self.nearest_action(state, raw)
            loss = lambda actor: self.actor_loss(actor, state, batch, near)  # noqa: E731
            state, metrics = common.step(state, "actor", loss, optax.adam(self.actor_lr))
            return common.follow(state, self.tau, "actor", "critic"), metrics

        state, more = common.every(self.delay, state, improve)
        return common.counted(state), {**metrics, **more}

    def index(self, state: State, batch: Batch) -> Index:
        """Returns the dataset's pairs (beta s, a), s normalised and without a goal."""
        assert state.normalizer is not None
        states = batch.rings[0].obs.shape[-1]
        return index_of(batch.rings, state.normalizer.mean[:states], self.beta / state.normalizer.std[:states])

    def nearest(self, state: State, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns the squared distance and the row [B, k] of the pairs nearest to (beta s, pi(s)); raw states."""
        index = self.index(state, batch)
        states = batch.obs[:, : index.states.shape[-1]]
        return nearest(index, states, td3.choose(self, state, batch.obs), self.neighbours, self.search, self.block)

    def nearest_action(self, state: State, batch: Batch) -> jax.Array:
        """Returns the actions [B, A] of these pairs, in the mean over the k."""
        _, row = self.nearest(state, batch)
        return self.index(state, batch).actions[row].mean(axis=1)

    def critic_loss(self, critic: PyTree, state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns the TD loss of both critics."""
        y = td3.td_target(self, state.target["critic"], batch, td3.target_action(self, state, batch, draws))
        loss = td3.critic_loss(self, critic, batch, y)
        return loss, {"critic/loss": loss}

    def actor_loss(self, actor: PyTree, state: State, batch: Batch, near: jax.Array) -> tuple[jax.Array, Metrics]:
        """Returns -lambda Q_1(s, pi(s)) + (pi(s) - near)^2, the mean over batch and entries of the action."""
        action = apply(td3.policy(self, state.spec), actor, batch.obs)
        q = td3.first_q(self, state.params["critic"], batch.obs, action)
        climb, weight = td3.climb(q, self.alpha, batch)
        constraint = losses.masked_mean(jnp.square(action - near).mean(axis=-1), batch.valid[:, 0])
        metrics = {"actor/q_loss": climb, "actor/constraint": constraint, "actor/lambda": weight}
        return climb + constraint, metrics

    def choose(self, state: State, obs: jax.Array) -> jax.Array:
        """Returns the actor's actions [B, A]."""
        return td3.choose(self, state, obs)

    def act(self, state: State, obs: jax.Array, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns chunks [B, 1, A], with the noise of exploration unless `greedy`."""
        return td3.act(self, state, obs, key, greedy)
