"""Methods that many agents share: `chunk, update = shared.chunk, shared.update` in the body of a class.

The Protocols state what an agent needs for each.
"""

from typing import Protocol

import jax

from jaxrl.agents import learner
from jaxrl.agents.learner import Draws, State
from jaxrl.agents.parts import Adam, AdamW, Critic, FlowPolicy, Transitions, Value, Windows
from jaxrl.ops import losses
from jaxrl.replay.ring import Rings
from jaxrl.types import Batch, Metrics, Observation, PyTree, Requirements, Spec


class WithWindows(Protocol):
    """An agent that learns from windows."""

    @property
    def windows(self) -> Windows:
        """What one update learns from."""
        ...


class WithTransitions(Protocol):
    """An agent that learns from transitions."""

    @property
    def transitions(self) -> Transitions:
        """What one update learns from."""
        ...


class Normalizing(Protocol):
    """An agent that may normalize observations."""

    @property
    def normalize(self) -> bool:
        """Whether it does."""
        ...


class WithCritic(Protocol):
    """An agent with a critic."""

    @property
    def critic(self) -> Critic:
        """The critic."""
        ...


class Drawing(Protocol):
    """An agent that draws the random numbers of an update first."""

    def draw(self, spec: Spec, batch: Batch, key: jax.Array) -> Draws:
        """Returns the random numbers of one update."""
        ...

    def learn(self, state: State, batch: Batch, draws: Draws) -> tuple[State, Metrics]:
        """Returns the state after the update with these random numbers."""
        ...


class ValuesWindows(WithWindows, WithCritic, Protocol):
    """An agent whose critic learns from windows."""


class WithFlow(WithCritic, Protocol):
    """An agent with a flow that clones the behavior policy of the data, and a critic of its chunks."""

    @property
    def flow(self) -> FlowPolicy:
        """The flow."""
        ...


class WithValue(ValuesWindows, Protocol):
    """An agent whose critic bootstraps from a state value."""

    @property
    def value(self) -> Value:
        """The state value."""
        ...


class WithLoss(WithCritic, Protocol):
    """An agent that minimizes the sum of all its losses with one optimizer."""

    @property
    def adam(self) -> Adam | AdamW:
        """The optimizer."""
        ...

    def loss(self, params: dict[str, PyTree], state: State, batch: Batch, draws: Draws) -> tuple[jax.Array, Metrics]:
        """Returns the sum of all losses and the individual losses."""
        ...


@property
def chunk(agent: WithWindows) -> int:
    """H, the actions of one decision."""
    return agent.windows.chunk


def requires(agent: ValuesWindows) -> Requirements:
    """Returns the requirements on an agent's data."""
    return agent.windows.requires(agent.critic.head)


def sample(agent: WithWindows, data: Rings, key: jax.Array) -> Batch:
    """Returns a batch of windows, uniform over all rings, with hindsight-relabeled goals if the task has goals."""
    return agent.windows.sample(data, key)


def requires_transitions(agent: WithTransitions) -> Requirements:
    """Returns the requirements on an agent's data."""
    return agent.transitions.requires()


def sample_transitions(agent: WithTransitions, data: Rings, key: jax.Array) -> Batch:
    """Returns a batch of transitions, uniform over all rings."""
    return agent.transitions.sample(data, key)


def fit(agent: Normalizing, state: State, data: Rings) -> State:
    """Returns the initial state with the data's normalizer, if `normalize`."""
    return learner.fit(state, data) if agent.normalize else state


def update(agent: Drawing, state: State, batch: Batch, key: jax.Array, data: Rings = ()) -> tuple[State, Metrics]:
    """Returns an agent's state after one update with newly drawn random numbers, and its metrics."""
    return agent.learn(state, batch, agent.draw(state.spec, batch, key))


def learn(agent: WithLoss, state: State, batch: Batch, draws: Draws) -> tuple[State, Metrics]:
    """Returns an agent's state after one step on the sum of its losses; only the critic has a target network."""
    loss = lambda params: agent.loss(params, state, batch, draws)  # noqa: E731
    return learner.descend(state, loss, agent.adam.transformation(), agent.critic.tau, "critic")


def draw(agent: WithWindows, spec: Spec, batch: Batch, key: jax.Array) -> Draws:
    """Returns the random numbers of one update with flow matching: the flow's noise and times."""
    key_noise, key_time = jax.random.split(key)
    noise = jax.random.normal(key_noise, (len(batch.actions), agent.windows.chunk * spec.action))
    return {"x0": noise, "t": jax.random.uniform(key_time, (len(noise), 1))}


def td_target(agent: WithValue, state: State, batch: Batch) -> jax.Array:
    """Returns y [B], the return of the window plus the discounted online value after it, bounded for probabilities."""
    next_value = agent.value.value(state.params["value"], state.spec.critic(batch.next_obs))
    return losses.bounded(agent.windows.target(batch, next_value), agent.critic.head)


def proposals(agent: WithFlow, state: State, obs: Observation, noise: jax.Array) -> jax.Array:
    """Returns the behavior flow's clipped chunks from this noise, with the noise's shape."""
    return agent.flow.sample(state.params["flow"], state.spec.behaviour(obs), noise)


def scores(agent: WithCritic, state: State, obs: Observation, chunks: jax.Array) -> jax.Array:
    """Returns the online critic's score [...] of each chunk [..., D]."""
    return agent.critic.score(state.params["critic"], state.spec.critic(obs), chunks)
