"""Agent and environment together: chunks executed open loop, resets from a bank, evaluation without resets.

`step` of an environment knows nothing of resets and nothing here hides one: an environment that ends inside a chunk
waits, masked, for the chunk's end, and only then is replaced by a fresh one.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl.replay.ring import Steps
from jaxrl.sharding import spread
from jaxrl.types import Behaviour, Env, EnvState, Metrics, PyTree, pytree


@dataclasses.dataclass(frozen=True)
class Policy:
    """How N environments are acted in: two functions, and the memory that passes between them."""

    start: Callable[[EnvState, jax.Array], PyTree]  # (states, key) -> memory, leaves [N, ...]
    act: Callable[[PyTree, EnvState, jax.Array], tuple[PyTree, jax.Array]]  # (memory, states, key) -> chunks [N, H, A]
    chunk: int = 1


def policy_of(agent: Any, state: PyTree, greedy: bool = False) -> Policy:
    """Returns the policy that asks an agent for a chunk whenever the last one has been executed."""

    def act(memory: PyTree, states: EnvState, key: jax.Array) -> tuple[PyTree, jax.Array]:
        return memory, agent.act(state, states.obs, key, greedy=greedy)

    return Policy(lambda states, key: (), act, agent.chunk)


def from_function(act: Callable[[jax.Array, jax.Array], jax.Array], chunk: int = 1) -> Policy:
    """Returns the policy of a function that says chunks [N, chunk, A] for observations [N, O] and a key."""
    return Policy(lambda states, key: (), lambda memory, states, key: (memory, act(states.obs, key)), chunk)


def scripted(behaviour: Behaviour) -> Policy:
    """Returns the policy of a scripted behaviour, which decides at every step."""

    def start(states: EnvState, key: jax.Array) -> PyTree:
        return jax.vmap(behaviour.start)(states, jax.random.split(key, len(states.obs)))

    def act(memory: PyTree, states: EnvState, key: jax.Array) -> tuple[PyTree, jax.Array]:
        memory, action = jax.vmap(behaviour.act)(memory, states, jax.random.split(key, len(states.obs)))
        return memory, action[:, None]

    return Policy(start, act)


@pytree
class Rollout:
    """N environments in flight and what their unfinished episodes have earned."""

    states: EnvState  # leaves [N, ...]
    memory: PyTree  # the policy's
    returns: jax.Array  # [N]


@pytree
class Episodes:
    """What N environments did until their first episode ended."""

    success: jax.Array  # [N] bool: the task was solved at some time
    returns: jax.Array  # [N], undiscounted
    lengths: jax.Array  # [N] int32
    broken: jax.Array  # [N] bool: the simulator's state became non-finite
    track: jax.Array  # [T + 1, O], what the first environment observed; constant once its episode is over


def start(env: Env, policy: Policy, key: jax.Array, count: int) -> Rollout:
    """Returns `count` fresh environments."""
    key_reset, key_memory = jax.random.split(key)
    states = resets(env, key_reset, count)
    return Rollout(states, policy.start(states, key_memory), jnp.zeros(count))


def resets(env: Env, key: jax.Array, count: int) -> EnvState:
    """Returns `count` fresh states, leaves [count, ...]."""
    return spread(jax.vmap(env.reset)(jax.random.split(key, count)))


def where(mask: jax.Array, a: PyTree, b: PyTree) -> PyTree:
    """Returns, environment by environment, `a` where mask [N] is true and `b` elsewhere."""
    return jax.tree.map(lambda x, y: jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 1)), x, y), a, b)


def execute(env: Env, states: EnvState, actions: jax.Array) -> tuple[EnvState, Steps]:
    """Returns the environments after their chunks [N, H, A], and the steps that happened on the way.

    An environment stops at the first step that terminates, truncates or is not finite. In the last case it keeps the
    state from before that step, the step is marked invalid, and the episode counts as ended.
    """

    def step(carry: tuple[EnvState, jax.Array], action: jax.Array) -> tuple[tuple[EnvState, jax.Array], dict]:
        states, ended = carry
        proposed = jax.vmap(env.step)(states, action)
        finite = jnp.isfinite(proposed.obs).all(axis=-1) & jnp.isfinite(proposed.reward)
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
    record = {name: jnp.swapaxes(values, 0, 1) for name, values in record.items()}
    obs = jnp.concatenate([states.obs[:, None], record.pop("obs")], axis=1)
    return after, Steps(obs=obs, actions=actions, ended=ended, **record)


def advance(
    env: Env, policy: Policy, rollout: Rollout, bank: EnvState, key: jax.Array
) -> tuple[Rollout, Steps, Metrics]:
    """Returns the rollout after one decision, the steps for the ring, and sums over the episodes that ended.

    Ended environments go on from a state drawn from the bank of resets.
    """
    key_act, key_bank, key_memory = jax.random.split(key, 3)
    memory, actions = policy.act(rollout.memory, rollout.states, key_act)
    states, steps = execute(env, rollout.states, actions)
    returns = rollout.returns + steps.rewards.sum(axis=1)
    over = steps.ended
    sums = {
        "episodes": over.sum(),
        "successes": (over & states.success).sum(),
        "returns": jnp.sum(returns * over),
        "steps": steps.taken.sum(),
        "broken": (steps.taken & ~steps.valid).sum(),
    }
    drawn = jax.random.randint(key_bank, over.shape, 0, len(bank.obs))
    fresh = jax.tree.map(lambda x: x[drawn], bank)
    memory = where(over, policy.start(fresh, key_memory), memory)
    return Rollout(where(over, fresh, states), memory, jnp.where(over, 0, returns)), steps, sums


def evaluate(env: Env, policy: Policy, key: jax.Array, episodes: int) -> Episodes:
    """Returns the first episode of each of `episodes` environments. The same key gives the same starts to any agent."""
    key_start, key_act = jax.random.split(key)
    first = start(env, policy, key_start, episodes)
    no = jnp.zeros(episodes, bool)
    fresh = Episodes(no, jnp.zeros(episodes), jnp.zeros(episodes, jnp.int32), no, first.states.obs[:1])

    def decide(carry: tuple, key: jax.Array) -> tuple[tuple, jax.Array]:
        states, memory, over, so_far = carry
        memory, actions = policy.act(memory, states, key)
        after, steps = execute(env, states, actions)
        happened = steps.taken & ~over[:, None]
        so_far = Episodes(
            success=so_far.success | (after.success & ~over),
            returns=so_far.returns + jnp.sum(steps.rewards * happened, axis=1),
            lengths=so_far.lengths + happened.sum(axis=1),
            broken=so_far.broken | (happened & ~steps.valid).any(axis=1),
            track=so_far.track,
        )
        after = where(over, states, after)
        seen = jnp.where(over[0], states.obs[0][None], steps.obs[0, 1:])
        return (after, memory, over | steps.ended, so_far), seen

    keys = jax.random.split(key_act, math.ceil(env.horizon / policy.chunk))
    (*_, result), seen = jax.lax.scan(decide, (first.states, first.memory, no, fresh), keys)
    track = jnp.concatenate([first.states.obs[:1], seen.reshape(-1, seen.shape[-1])])
    return dataclasses.replace(result, track=track)
