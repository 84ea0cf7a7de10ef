"""Execution of chunks: executors turn the policy that predicts chunks into the policy that acts in the environments.

A policy predicts H actions at a time. An executor queries it every h <= H steps and determines which action is
executed at each of these steps. Its state is kept in memory per environment, which is reset with each episode.
Executors depend only on `device.Policy`, so device and CPU simulators, collection and evaluation share them.

Extras stored with steps are those of the decision made at the first of the steps (`Adaptive`: of the decision that
predicted them), even if actions predicted earlier are executed.
"""

import dataclasses
import math
from typing import Annotated, Literal, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.errors import UserError
from jaxrl.ranges import Natural, Range
from jaxrl.rollout.device import Decision, Policy, where
from jaxrl.types import Agent, EnvState, OnPolicy, PyTree, Scalar, pytree

Kind: TypeAlias = Literal["open_loop", "receding", "ensemble", "real_time", "adaptive"]


class Executor(Protocol):
    """A function that transforms policies."""

    def __call__(self, policy: Policy) -> Policy:
        """Returns the policy with its chunks executed in this way; its `chunk` is the executed length."""
        ...


@pytree
class OpenLoop:
    """Executes whole chunks."""

    def __call__(self, policy: Policy) -> Policy:
        """Returns the policy itself."""
        return policy


@pytree
class RecedingHorizon:
    """Executes the first h actions of each chunk and discards the others."""

    execute: Natural = 0  # h; 0: all

    def __call__(self, policy: Policy) -> Policy:
        """Returns the policy that is queried every h steps."""
        length = executed(self.execute, policy.chunk)

        def act(memory: PyTree, states: EnvState, key: jax.Array) -> Decision:
            memory, chunks, extras = policy.act(memory, states, key)
            return memory, chunks[:, :length], extras

        return Policy(policy.start, act, length)


@pytree
class Predicted:
    """The last P chunks of N environments, newest first."""

    policy: PyTree  # the policy's memory
    chunks: jax.Array  # [N, P, H, A]
    count: jax.Array  # [N] int32, how many of them belong to this episode


@pytree
class TemporalEnsemble:
    """Executes the weighted mean of all predictions of a step, of which there are up to ceil(H / h).

    A prediction made k steps before the newest one has weight exp(-decay * k), normalized. Action chunking with
    transformers (Zhao et al., arXiv 2304.13705, Algorithm 2) gives the oldest prediction the largest weight: its m is
    `decay` = -m, its default -0.01, with h = 1.
    """

    execute: Natural = 0  # h; 0: the whole chunk, and nothing overlaps
    decay: Scalar = 0.1  # per step of age; 0 gives equal weights, negative values favor the oldest

    def __call__(self, policy: Policy) -> Policy:
        """Returns the policy that is queried every h steps and keeps its last chunks."""
        length = executed(self.execute, policy.chunk)
        past = math.ceil(policy.chunk / length) - 1
        if past == 0:
            return policy

        def start(states: EnvState, key: jax.Array) -> Predicted:
            memory = policy.start(states, key)
            chunks, _ = no_decision(policy, memory, states, key)
            empty = jnp.repeat(jnp.zeros_like(chunks)[:, None], past, axis=1)
            return Predicted(memory, empty, jnp.zeros(len(chunks), jnp.int32))

        def act(memory: Predicted, states: EnvState, key: jax.Array) -> Decision:
            inner, newest, extras = policy.act(memory.policy, states, key)
            chunks = jnp.concatenate([newest[:, None], memory.chunks], axis=1)
            actions = self.mean(chunks, memory.count + 1, length)
            count = jnp.minimum(memory.count + 1, past)
            return Predicted(inner, chunks[:, :past], count), actions, extras

        return Policy(start, act, length)

    def mean(self, chunks: jax.Array, count: jax.Array, length: int) -> jax.Array:
        """Returns actions [N, h, A] from chunks [N, K, H, A] that were made h steps apart, the first `count` [N]."""
        number, horizon = chunks.shape[1:3]
        age = length * jnp.arange(number)[:, None]  # [K, 1], at the first of the h steps
        step = age + jnp.arange(length)[None]  # [K, h], of each chunk
        overlap = chunks[:, jnp.arange(number)[:, None], jnp.minimum(step, horizon - 1)]
        made = jnp.arange(number)[None] < count[:, None]
        known = made[:, :, None] & (step < horizon)[None]
        scores = jnp.where(known, (-self.decay * age)[None], -jnp.inf)
        mean = jnp.sum(jax.nn.softmax(scores, axis=1)[..., None] * overlap, axis=1)
        return jnp.clip(mean, -1, 1)  # rounding may exceed the bounds


@pytree
class Queue:
    """The rest of the last chunk of N environments."""

    policy: PyTree  # the policy's memory
    rest: jax.Array  # [N, d, A], executed while the next chunk is computed
    begun: jax.Array  # [N] bool: there is a last chunk


@pytree
class RealTime:
    """Executes the rest of the last chunk while the next one is computed, which takes d steps.

    The policy is queried every h steps. A query at step t sees the observation of step t, predicts the actions of steps
    t, t + 1, ... and is answered at step t + d. Steps t to t + d - 1 execute the previous chunk's predictions for these
    steps, later ones the new chunk's; its first d actions are not executed. The first query of an episode is answered
    immediately. A chunk must last until the next one arrives and queries must not overlap: h + d <= H and d <= h, the
    setting of real-time chunking (Black et al., arXiv 2506.07339). That paper also inpaints the new chunk to continue
    the old one; here the policy does not see what is executed meanwhile.
    """

    execute: Natural = 0  # h; 0: the whole chunk
    delay: Natural = 0  # d, steps from a query to its answer

    def __call__(self, policy: Policy) -> Policy:
        """Returns the policy queried every h steps, with a delay. Raises UserError if chunks are too short."""
        length, delay = executed(self.execute, policy.chunk), self.delay
        check_delay(delay, length, policy.chunk)
        if delay == 0:
            return RecedingHorizon(length)(policy)

        def start(states: EnvState, key: jax.Array) -> Queue:
            memory = policy.start(states, key)
            chunks, _ = no_decision(policy, memory, states, key)
            return Queue(memory, chunks[:, :delay], jnp.zeros(len(chunks), bool))

        def act(memory: Queue, states: EnvState, key: jax.Array) -> Decision:
            inner, chunks, extras = policy.act(memory.policy, states, key)
            meanwhile = where(memory.begun, memory.rest, chunks[:, :delay])
            actions = jnp.concatenate([meanwhile, chunks[:, delay:length]], axis=1)
            rest = chunks[:, length : length + delay]
            return Queue(inner, rest, jnp.ones_like(memory.begun)), actions, extras

        return Policy(start, act, length)


@pytree
class Following:
    """The chunks that N environments execute."""

    policy: PyTree  # the policy's memory
    chunks: jax.Array  # [N, H, A]
    extras: dict[str, jax.Array]  # [N, ...], of the decisions that predicted them
    agreed: jax.Array  # [N] int32, number of steps on which the samples agree; 0 at the start of an episode
    done: jax.Array  # [N] int32, steps executed so far


@pytree
class Adaptive:
    """Executes a chunk as long as several samples agree on it, for at least h steps.

    A query samples K chunks, of which the first is executed. The samples agree on a step if the standard deviation of
    every action entry is at most `threshold`. Every h steps, an environment continues its chunk if the samples agree on
    all of the next h steps, and queries the policy otherwise. With a `threshold` of 1 or more they always agree, since
    actions lie in [-1, 1].
    """

    execute: Natural = 0  # h; 0: the whole chunk
    samples: Annotated[int, Range(2)] = 4  # K
    threshold: Annotated[Scalar, Range(0, math.inf)] = 1.0  # largest standard deviation that counts as agreement

    def __call__(self, policy: Policy) -> Policy:
        """Returns the policy that is queried every h steps, or later."""
        length = executed(self.execute, policy.chunk)
        if length == policy.chunk:
            return policy

        def start(states: EnvState, key: jax.Array) -> Following:
            memory = policy.start(states, key)
            none = jnp.zeros(len(states.reward), jnp.int32)
            return Following(memory, *no_decision(policy, memory, states, key), none, none)

        def act(memory: Following, states: EnvState, key: jax.Array) -> Decision:
            exhausted = memory.done + length > memory.agreed
            memory = where(exhausted, self.query(policy, memory.policy, states, key), memory)
            step = memory.done[:, None] + jnp.arange(length)[None]
            actions = jnp.take_along_axis(memory.chunks, step[..., None], axis=1)
            return dataclasses.replace(memory, done=memory.done + length), actions, memory.extras

        return Policy(start, act, length)

    def query(self, policy: Policy, memory: PyTree, states: EnvState, key: jax.Array) -> Following:
        """Returns new chunks, and the number of steps on which the samples agree."""
        keys = jax.random.split(key, self.samples)
        drawn = jax.vmap(policy.act, in_axes=(None, None, 0))(memory, states, keys)
        agreed = (drawn[1].std(axis=0) <= self.threshold).all(axis=-1)
        count = jnp.cumprod(agreed, axis=1).sum(axis=1, dtype=jnp.int32)
        return Following(*jax.tree.map(lambda x: x[0], drawn), count, jnp.zeros_like(count))


def executed(execute: int, chunk: int) -> int:
    """Returns how many of `chunk` actions are executed; 0 means all. Raises UserError for more than `chunk`."""
    if execute > chunk:
        raise UserError(
            f"execution.execute = {execute}: must be at most {chunk}, the actions that the agent predicts at a time "
            "(agent.windows.chunk); 0 executes all of them"
        )
    return execute or chunk


def check_delay(delay: int, length: int, chunk: int) -> None:
    """Raises UserError if queries overlap, or a chunk ends before the next one arrives."""
    if delay > length:
        raise UserError(
            f"execution.delay = {delay}: must be at most {length}, the steps between queries (execution.execute), "
            "which do not overlap: lower it or raise execution.execute"
        )
    if length + delay > chunk:
        raise UserError(
            f"execution.delay = {delay}: must be at most {chunk - length}, what a chunk of {chunk} has left after "
            f"{length} executed steps: lower it or execution.execute, or raise agent.windows.chunk"
        )


def no_decision(policy: Policy, memory: PyTree, states: EnvState, key: jax.Array) -> tuple[jax.Array, dict]:
    """Returns zeros of the shape of a policy's chunks and extras."""
    _, chunks, extras = jax.eval_shape(policy.act, memory, states, key)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (chunks, extras))


# As a setting

USED: dict[str, tuple[str, ...]] = {
    "open_loop": (),
    "receding": ("execute",),
    "ensemble": ("execute", "decay"),
    "real_time": ("execute", "delay"),
    "adaptive": ("execute", "samples", "threshold"),
}
"""The fields of `Execution` that each kind uses."""


@pytree
class Execution:
    """Execution of the agent's chunks, in training and in evaluation: an executor, and its parameters."""

    kind: Kind = "open_loop"
    """Execute whole chunks; the first steps; the mean of overlapping chunks; with a delay; or while samples agree."""
    execute: Natural = 0
    """Steps executed per decision; 0: the agent's whole chunk."""
    delay: Natural = 0
    """real_time: steps until a decision arrives, during which the previous chunk is executed."""
    decay: Scalar = 0.1
    """ensemble: predictions have weight exp(-decay * age in steps); negative values favor the oldest."""
    samples: Annotated[int, Range(2)] = 4
    """adaptive: chunks sampled per decision."""
    threshold: Annotated[Scalar, Range(0, math.inf)] = 1.0
    """adaptive: largest standard deviation over the samples that counts as agreement; at 1 they always agree."""

    def check(self) -> None:
        """Raises UserError if a field is set that the kind does not use."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "kind" or field.name in USED[self.kind] or np.all(value == field.default):
                continue
            kinds = " or ".join(kind for kind, names in USED.items() if field.name in names)
            raise UserError(
                f"execution.{field.name} = {value}: has no effect with execution.kind = {self.kind!r}: "
                f"leave it at {field.default}, or choose --execution.kind {kinds}"
            )

    def check_fits(self, chunk: int) -> None:
        """Raises UserError if chunks of `chunk` actions cannot be executed in this way."""
        check_delay(self.delay, self.length(chunk), chunk)

    def length(self, chunk: int) -> int:
        """Returns the number of executed steps per decision, for agents that predict `chunk` actions at a time."""
        return executed(self.execute, chunk)

    def executor(self) -> Executor:
        """Returns the executor."""
        match self.kind:
            case "open_loop":
                return OpenLoop()
            case "receding":
                return RecedingHorizon(self.execute)
            case "ensemble":
                return TemporalEnsemble(self.execute, self.decay)
            case "real_time":
                return RealTime(self.execute, self.delay)
            case "adaptive":
                return Adaptive(self.execute, self.samples, self.threshold)

    def __call__(self, policy: Policy) -> Policy:
        """Returns the policy with its chunks executed in this way."""
        return self.executor()(policy)


OPEN_LOOP = Execution()


def check_learning(agent: Agent, execution: Execution) -> None:
    """Raises UserError if an on-policy agent would learn from chunks that are not executed as chosen."""
    if isinstance(agent, OnPolicy) and execution.length(agent.chunk) < agent.chunk:
        raise UserError(
            f"execution.kind = {execution.kind!r}: {type(agent).__name__} learns from its own chunks, executed as they "
            f"are: train with open_loop, and evaluate with jaxrl eval RUN --execution.kind {execution.kind}"
        )
