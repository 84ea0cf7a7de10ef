"""PRDC: policy regularization with a dataset constraint, TD3 that stays near dataset actions of similar states.

Paper: Ran, Li, Zhang, Zhang, Yu, "Policy Regularization with Dataset Constraint for Offline Reinforcement Learning",
arXiv 2306.06569.

While TD3+BC regularizes the actor toward the action stored with the state, PRDC finds the pair (beta s', a') of the
whole dataset nearest to (beta s, pi(s)), and regularizes toward that a'. With a large beta only the same state counts,
as in TD3+BC; with a small one any nearby state may provide the action.

As in the official code, the penalty is the squared distance of the actions, averaged over batch and entries. The
nearest neighbor is searched exactly for every actor step, in the program (`jaxrl.replay.neighbours`). With
`neighbours` k > 1, not covered by the official code, the actor is regularized toward the mean of the k nearest actions.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxrl.agents import learner
from jaxrl.agents.learner import Draws, State
from jaxrl.agents.td3 import TD3, climb
from jaxrl.errors import UserError
from jaxrl.ops import losses
from jaxrl.ranges import Count, NonNegative
from jaxrl.replay.neighbours import BLOCK, Index, Method, check, index_of, nearest
from jaxrl.replay.ring import Rings
from jaxrl.types import Batch, Metrics, Observation, PyTree, Requirements, Spec, pytree


@pytree
class PRDC:
    """TD3 whose actor is regularized toward the nearest state-action pair of the whole dataset."""

    chunk: ClassVar[int] = 1

    td3: TD3 = TD3(normalize=True)
    alpha: NonNegative = 2.5  # weight of the critic relative to the constraint
    beta: NonNegative = 2.0  # weight of states relative to actions in the distance
    neighbours: Count = 1  # number of nearest pairs to average
    search: Method = "auto"  # search method: blocks of keys in the program, a tree on the CPU, or approximate
    block: Count = BLOCK  # number of keys compared at a time

    def requires(self) -> Requirements:
        """Returns the requirements on its data."""
        return dataclasses.replace(self.td3.requires(), dataset=True, kdtree=self.search in ("auto", "tree"))

    def check_data(self, transitions: int) -> None:
        """Raises UserError if neighbors among this many transitions cannot be searched with these settings."""
        check(transitions, self.td3.transitions.batch, self.neighbours, self.search, self.block)

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the initial state. Raises UserError for dict observations."""
        if not isinstance(spec.observation, int):
            raise UserError("PRDC: neighbors are searched among observations that are arrays, these are dicts")
        return self.td3.init(key, spec)

    def fit(self, state: State, data: Rings) -> State:
        """Returns the initial state with the data's normalizer."""
        return self.td3.fit(state, data)

    def sample(self, data: Rings, key: jax.Array) -> Batch:
        """Returns a batch of transitions."""
        return self.td3.sample(data, key)

    def update(self, state: State, batch: Batch, key: jax.Array, data: Rings = ()) -> tuple[State, Metrics]:
        """Returns the state after a step of the critics and, every `delay`-th time, of the actor and the targets.

        Neighbors are searched in `data[0]`, the dataset, never in the replay. Raises UserError without a dataset.
        """
        if not data:
            raise UserError("PRDC.update: data is empty: pass the rings in which neighbors are looked up")
        return self.learn(state, batch, self.td3.draw(state.spec, batch, key), data)

    def learn(self, state: State, batch: Batch, draws: Draws, data: Rings) -> tuple[State, Metrics]:
        """Returns the state after the update with these random numbers."""
        raw, batch = batch, learner.normalized(state, batch)

        def loss(actor: PyTree, state: State) -> tuple[jax.Array, Metrics]:
            return self.actor_loss(actor, state, batch, self.nearest_action(state, raw, data))

        return self.td3.learn(state, batch, draws, loss)

    def index(self, state: State, data: Rings) -> Index:
        """Returns the dataset's pairs (beta s, a), s normalized and without a goal."""
        assert state.normalizer is not None
        size = data[0].obs.shape[-1]
        mean, std = state.normalizer.mean[:size], state.normalizer.std[:size]
        return index_of(data, mean, self.beta / std)

    def nearest(self, state: State, batch: Batch, data: Rings) -> tuple[jax.Array, jax.Array]:
        """Returns the squared distance and the row [B, k] of the pairs nearest to (beta s, pi(s)); raw states."""
        index, action = self.index(state, data), self.td3.choose(state, batch.obs)
        states = batch.obs[:, : index.states.shape[-1]]
        return nearest(index, states, action, self.neighbours, self.search, self.block)

    def nearest_action(self, state: State, batch: Batch, data: Rings) -> jax.Array:
        """Returns the mean action [B, A] over the k nearest pairs."""
        _, row = self.nearest(state, batch, data)
        return self.index(state, data).actions[row].mean(axis=1)

    def actor_loss(self, actor: PyTree, state: State, batch: Batch, near: jax.Array) -> tuple[jax.Array, Metrics]:
        """Returns -lambda Q_1(s, pi(s)) + (pi(s) - near)^2, the mean over batch and entries of the action."""
        action = self.td3.actor.action(actor, state.spec.actor(batch.obs))
        climbing, weight = climb(self.td3.first_q(state, batch, action), self.alpha, batch)
        constraint = losses.masked_mean(jnp.square(action - near).mean(axis=-1), batch.valid[:, 0])
        metrics = {"actor/q_loss": climbing, "actor/constraint": constraint, "actor/lambda": weight}
        return climbing + constraint, metrics

    def act(self, state: State, obs: Observation, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns chunks [B, 1, A], with the noise of exploration unless `greedy`."""
        return self.td3.act(state, obs, key, greedy=greedy)
