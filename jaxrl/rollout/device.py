"""Rollouts on the device: execution of action chunks, resets from a bank of states, evaluation without resets.

`Env.step` never resets. An environment whose episode ends inside a chunk is masked until the end of the chunk; only
then is it replaced by a fresh state. `jaxrl.rollout.executors` determines how much of each chunk is executed, and when.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxrl.ops.masks import beside
from jaxrl.replay.ring import Steps
from jaxrl.sharding import spread
from jaxrl.types import (
    Agent,
    Behaviour,
    Env,
    EnvState,
    Metrics,
    Observation,
    PyTree,
    Remembering,
    Spec,
    count_of,
    pytree,
)

Decision: TypeAlias = tuple[PyTree, jax.Array, dict[str, jax.Array]]
"""The new memory, the chunks [N, H, A] to execute, and the extras [N, ...] to store with their steps, by name."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """A policy for N environments: two functions, and the memory passed between them.

    `chunk` is the number of actions H executed per decision. An agent may predict more.
    """

    start: Callable[[EnvState, jax.Array], PyTree]  # (states, key) -> memory at the start of episodes, leaves [N, ...]
    act: Callable[[PyTree, EnvState, jax.Array], Decision]  # (memory, states, key) -> decision
    chunk: int = 1


def policy_of(agent: Agent, state: PyTree, greedy: bool = False) -> Policy:
    """Returns the policy of an agent, which executes whole chunks open loop.

    Agents that are `types.Remembering` use `start` and `decide`, others `act`.
    """
    if isinstance(agent, Remembering):
        return Policy(
            lambda states, key: agent.start(state, states.obs, key),
            lambda memory, states, key: agent.decide(state, memory, states.obs, key, greedy=greedy),
            agent.chunk,
        )
    return from_function(lambda obs, key: agent.act(state, obs, key, greedy=greedy), agent.chunk)


def from_function(act: Callable[[Observation, jax.Array], jax.Array], chunk: int = 1) -> Policy:
    """Returns the policy of a function that returns chunks [N, chunk, A] for observations [N, O] and a key."""
    return Policy(lambda states, key: (), lambda memory, states, key: (memory, act(states.obs, key), {}), chunk)


def scripted(behaviour: Behaviour) -> Policy:
    """Returns the policy of a scripted behavior, which decides at every step."""

    def start(states: EnvState, key: jax.Array) -> PyTree:
        return jax.vmap(behaviour.start)(states, jax.random.split(key, len(states.reward)))

    def act(memory: PyTree, states: EnvState, key: jax.Array) -> Decision:
        memory, action = jax.vmap(behaviour.act)(memory, states, jax.random.split(key, len(states.reward)))
        return memory, action[:, None], {}

    return Policy(start, act)


def observed(obs: Observation) -> EnvState:
    """Returns states with only the observations [N, O] set, for example for CPU simulators."""
    count = count_of(obs)
    no = jnp.zeros(count, bool)
    return EnvState((), obs, jnp.zeros(count), no, no, no, jnp.zeros(count, jnp.int32))


def extras_of(policy: Policy, spec: Spec) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shape and dtype of each extra that a policy stores per step. Computes nothing."""

    def extras(obs: Observation, key: jax.Array) -> dict[str, jax.Array]:
        states = observed(jax.tree.map(lambda x: x[None], obs))
        return jax.tree.map(lambda x: x[0], policy.act(policy.start(states, key), states, key)[2])

    return jax.eval_shape(extras, spec.example(), jax.random.key(0))


@pytree
class Rollout:
    """N environments with unfinished episodes, and the returns of these episodes so far."""

    states: EnvState  # leaves [N, ...]
    memory: PyTree  # the policy's
    returns: jax.Array  # [N]


@pytree
class Unroll:
    """The steps of N environments in T decisions of H executed steps each. On-policy agents learn from it."""

    steps: Steps  # leaves [T, N, H, ...]
    last_obs: Observation  # [N, O], after the last decision, before any reset
    memory: PyTree  # the policy's before the first decision, leaves [N, ...]
    sums: Metrics  # over the episodes that ended


@pytree
class Episodes:
    """The results of the first episode in each of N environments."""

    success: jax.Array  # [N] bool: the task was solved at any time
    returns: jax.Array  # [N], undiscounted
    lengths: jax.Array  # [N] int32
    broken: jax.Array  # [N] bool: the simulator's state became non-finite
    track: Observation  # [T + 1, O], observations of the first environment; constant after its episode ends


def start(env: Env, policy: Policy, key: jax.Array, count: int) -> Rollout:
    """Returns `count` fresh environments."""
    key_reset, key_memory = jax.random.split(key)
    states = resets(env, key_reset, count)
    return Rollout(states, policy.start(states, key_memory), jnp.zeros(count))


def resets(env: Env, key: jax.Array, count: int) -> EnvState:
    """Returns `count` fresh states, leaves [count, ...].

    A state whose observation is not finite is over before its first step, and its observation is zeros: no number
    that is not finite reaches a policy or the replay, and `execute` counts the episode as broken.
    """
    states = jax.vmap(env.reset)(jax.random.split(key, count))
    finite = finite_of(states.obs)
    obs = where(finite, states.obs, jax.tree.map(jnp.zeros_like, states.obs))
    return spread(dataclasses.replace(states, obs=obs, truncated=states.truncated | ~finite))


def where(mask: jax.Array, a: PyTree, b: PyTree) -> PyTree:
    """Returns `a` where mask [N] is true and `b` elsewhere, per environment."""
    return jax.tree.map(lambda x, y: jnp.where(beside(mask, x), x, y), a, b)


def execute(env: Env, states: EnvState, actions: jax.Array) -> tuple[EnvState, Steps]:
    """Returns the environments after their chunks [N, H, A], and the executed steps.

    An environment stops at the first step that terminates, truncates or is not finite. In the last case it keeps the
    state before that step, the step is marked invalid, and the episode counts as ended. The same holds for the first
    step of a state that is over already, because its reset was not finite.
    """
    sound = ~(states.terminated | states.truncated)

    def step(carry: tuple[EnvState, jax.Array], action: jax.Array) -> tuple[tuple[EnvState, jax.Array], dict]:
        states, ended = carry
        proposed = jax.vmap(env.step)(states, action)
        finite = finite_of((proposed.obs, proposed.reward)) & sound
        taken = ~ended
        after = where(taken & finite, proposed, states)
        over = proposed.terminated | proposed.truncated
        record = {
            "obs": after.obs,
            "rewards": jnp.where(finite & taken, proposed.reward, 0),
            "terminated": proposed.terminated & finite,
            "truncated": proposed.truncated & finite,
            "valid": finite,
            "taken": taken,
        }
        return (after, ended | over | ~finite), record

    begin = (states, jnp.zeros(len(actions), bool))
    (after, ended), record = jax.lax.scan(step, begin, jnp.swapaxes(actions, 0, 1))
    record = jax.tree.map(lambda values: jnp.swapaxes(values, 0, 1), record)
    obs = jax.tree.map(lambda x, y: jnp.concatenate([x[:, None], y], axis=1), states.obs, record.pop("obs"))
    return after, Steps(obs=obs, actions=actions, ended=ended, **record)


def finite_of(numbers: PyTree) -> jax.Array:
    """Returns whether all numbers are finite [N], for trees with leaves [N, ...]; integers always are."""
    leaves = [x for x in jax.tree.leaves(numbers) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return functools.reduce(operator.and_, (jnp.isfinite(x).all(axis=tuple(range(1, x.ndim))) for x in leaves))


def with_extras(steps: Steps, extras: dict[str, jax.Array]) -> Steps:
    """Returns the steps with a decision's extras [N, ...] stored at each of them, as [N, H, ...]."""
    length = steps.actions.shape[1]
    extra = {name: jnp.repeat(values[:, None], length, axis=1) for name, values in extras.items()}
    return dataclasses.replace(steps, extra=extra)


def advance(
    env: Env, policy: Policy, rollout: Rollout, bank: EnvState, key: jax.Array
) -> tuple[Rollout, Steps, Metrics]:
    """Returns the rollout after one decision, the steps for the ring, and sums over the episodes that ended.

    An environment whose episode ended is replaced by a random state from the bank of resets, with a new memory.
    """
    key_act, key_bank, key_memory = jax.random.split(key, 3)
    memory, actions, extras = policy.act(rollout.memory, rollout.states, key_act)
    states, steps = execute(env, rollout.states, actions)
    steps = with_extras(steps, extras)
    returns = rollout.returns + steps.rewards.sum(axis=1)
    over, sums = steps.ended, sums_of(steps, states.success, returns)
    drawn = jax.random.randint(key_bank, over.shape, 0, len(bank.reward))
    fresh = jax.tree.map(lambda x: x[drawn], bank)
    memory = where(over, policy.start(fresh, key_memory), memory)
    return Rollout(where(over, fresh, states), memory, jnp.where(over, 0, returns)), steps, sums


def sums_of(steps: Steps, success: Any, returns: Any) -> Metrics:
    """Returns sums over the episodes that ended with these steps, of JAX or of NumPy."""
    return {
        "episodes": steps.ended.sum(),
        "successes": (steps.ended & success).sum(),
        "returns": (returns * steps.ended).sum(),
        "steps": steps.taken.sum(),
        "broken": (steps.taken & ~steps.valid).sum(),
    }


def unroll(
    env: Env, policy: Policy, rollout: Rollout, bank: EnvState, key: jax.Array, decisions: int
) -> tuple[Rollout, Unroll]:
    """Returns the rollout after `decisions` decisions, and their steps."""

    def decide(rollout: Rollout, key: jax.Array) -> tuple[Rollout, tuple[Steps, Metrics]]:
        rollout, steps, sums = advance(env, policy, rollout, bank, key)
        return rollout, (steps, sums)

    after, (steps, sums) = jax.lax.scan(decide, rollout, jax.random.split(key, decisions))
    return after, unrolled(steps, rollout.memory, jax.tree.map(lambda x: x.sum(axis=0), sums))


def unrolled(steps: Steps, memory: PyTree, sums: Metrics) -> Unroll:
    """Returns the unroll of steps with leaves [T, N, H, ...]."""
    return Unroll(steps, jax.tree.map(lambda x: x[-1, :, -1], steps.obs), memory, sums)


def evaluate(env: Env, policy: Policy, key: jax.Array, episodes: int) -> Episodes:
    """Returns the first episode of each of `episodes` environments. Equal keys give equal starts for any agent."""
    key_start, key_act = jax.random.split(key)
    first = start(env, policy, key_start, episodes)
    no = jnp.zeros(episodes, bool)
    fresh = Episodes(no, jnp.zeros(episodes), jnp.zeros(episodes, jnp.int32), no, ())

    def decide(carry: tuple, key: jax.Array) -> tuple[tuple, Observation]:
        states, memory, over, so_far = carry
        memory, actions, _ = policy.act(memory, states, key)
        after, steps = execute(env, states, actions)
        happened = steps.taken & ~over[:, None]
        so_far = Episodes(
            success=so_far.success | (after.success & ~over),
            returns=so_far.returns + jnp.sum(steps.rewards * happened, axis=1),
            lengths=so_far.lengths + happened.sum(axis=1),
            broken=so_far.broken | (happened & ~steps.valid).any(axis=1),
            track=(),
        )
        after = where(over, states, after)
        seen = jax.tree.map(lambda x, y: jnp.where(over[0], x[:1], y[0, 1:]), states.obs, steps.obs)
        return (after, memory, over | steps.ended, so_far), seen

    keys = jax.random.split(key_act, math.ceil(env.horizon / policy.chunk))
    (*_, result), seen = jax.lax.scan(decide, (first.states, first.memory, no, fresh), keys)
    track = jax.tree.map(lambda x, y: jnp.concatenate([x[:1], y.reshape(-1, *y.shape[2:])]), first.states.obs, seen)
    return dataclasses.replace(result, track=track)
