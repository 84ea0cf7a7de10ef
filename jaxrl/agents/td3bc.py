"""TD3+BC: TD3 whose actor also imitates the data, a minimal change for offline learning.

Paper: Fujimoto, Gu, "A Minimalist Approach to Offline Reinforcement Learning", arXiv 2106.06860.

The critic learns as in TD3. The actor maximizes the critic, normalized by its scale, and stays near the data's action
(equations 3 and 5). Observations are normalized.

Deliberate difference from the official code: truncated transitions keep their true next state; the official data drop
them.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxrl.agents import learner
from jaxrl.agents.learner import Draws, State
from jaxrl.agents.td3 import TD3, climb
from jaxrl.ops import losses
from jaxrl.ranges import NonNegative
from jaxrl.replay.ring import Rings
from jaxrl.types import Batch, Metrics, Observation, PyTree, Requirements, Spec, pytree


@pytree
class TD3BC:
    """TD3 with behavior cloning in the actor's loss."""

    chunk: ClassVar[int] = 1

    td3: TD3 = TD3(normalize=True)
    alpha: NonNegative = 2.5  # weight of the critic relative to the imitation

    def requires(self) -> Requirements:
        """Returns the requirements on its data."""
        return self.td3.requires()

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the initial state."""
        return self.td3.init(key, spec)

    def fit(self, state: State, data: Rings) -> State:
        """Returns the initial state with the data's normalizer."""
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
        return self.td3.learn(state, batch, draws, lambda actor, state: self.actor_loss(actor, state, batch))

    def actor_loss(self, actor: PyTree, state: State, batch: Batch) -> tuple[jax.Array, Metrics]:
        """Returns -lambda Q_1(s, pi(s)) + (pi(s) - a)^2, the mean over batch and entries of the action (eq. 3)."""
        action = self.td3.actor.action(actor, state.spec.actor(batch.obs))
        climbing, weight = climb(self.td3.first_q(state, batch, action), self.alpha, batch)
        imitation = losses.masked_mean(jnp.square(action - batch.actions[:, 0]).mean(axis=-1), batch.valid[:, 0])
        metrics = {"actor/q_loss": climbing, "actor/bc_loss": imitation, "actor/lambda": weight}
        return climbing + imitation, metrics

    def act(self, state: State, obs: Observation, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        """Returns chunks [B, 1, A], with the noise of exploration unless `greedy`."""
        return self.td3.act(state, obs, key, greedy=greedy)
