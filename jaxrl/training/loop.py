"""Training as three nested functions: `iteration` (collect, store, update), `epoch` (a scan of iterations), `run`
(a scan of epochs, phase after phase). Everything that changes is in one carry.

Two drivers use them. A sweep vmaps `run` or `epoch`. A logged run calls `jitted_epoch` from Python, with its carry
donated, so that progress, checkpoints and signals happen between compiled calls and nothing calls back from inside.
"""

import dataclasses
import functools
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp

from jaxrl.replay import ring as rings
from jaxrl.replay.ring import Ring
from jaxrl.rollout import device as ro
from jaxrl.rollout.executors import OPEN_LOOP, Execution
from jaxrl.sharding import shared, spread
from jaxrl.training.schedule import Schedule, Timeline, phases
from jaxrl.types import Agent, Deriving, Env, Fitting, Metrics, OnPolicy, Phase, PyTree, Staged, on_host, pytree

COMPILING = {"xla_cpu_copy_insertion_use_region_analysis": True, "xla_cpu_prefer_vector_width": 512}
"""Options of `jax.jit` for programs that make many updates; they concern CPUs alone. By default XLA copies every weight
once per update, as it does not see that the optimizer comes after the last product that reads it, and computes on half
of the widest registers. Together 3 to 11 % of an epoch's time, on an AMD EPYC."""


@pytree
class World:
    """What going online adds: the environments in flight, and what was seen in them."""

    rollout: ro.Rollout | None  # None where the simulators live in worker processes
    replay: Ring


@pytree
class Carry:
    """All that changes in a run. A checkpoint is this tree; resuming is loading it."""

    agent: PyTree
    key: jax.Array
    world: World | None  # None in a run without online phase
    updates: jax.Array  # [] int32
    steps: jax.Array  # [] int32, environment steps
    epoch: jax.Array  # [] int32


def begin(agent: Agent, env: Env, schedule: Schedule, key: jax.Array, execution: Execution = OPEN_LOOP) -> Carry:
    """Returns the carry before the first epoch."""
    key, key_agent, key_envs = jax.random.split(key, 3)
    state, world = agent.init(key_agent, env.spec), None
    if schedule.online_steps:
        rows = min(schedule.replay, 2 * schedule.online_steps) // schedule.envs + agent.chunk + 2
        replay = rings.empty(schedule.envs, rows, env.spec.observation, env.spec.action)
        policy = execution(ro.policy_of(agent, state))
        flight = None if on_host(env) else ro.start(env, policy, key_envs, schedule.envs)
        world = World(flight, replay)
    zero = jnp.zeros((), jnp.int32)
    return placed(Carry(state, key, world, zero, zero, zero))


def placed(carry: Carry) -> Carry:
    """Returns the carry as it lies on the devices of a run on several: environments and replay across them."""
    return dataclasses.replace(shared(dataclasses.replace(carry, world=None)), world=spread(carry.world))


def fit(agent: Agent, carry: Carry, dataset: Ring) -> Carry:
    """Returns the carry of an agent that is `types.Fitting`, whose state now knows the data."""
    return dataclasses.replace(carry, agent=agent.fit(carry.agent, (dataset,)))


def derived(agent: Agent, data: rings.Rings) -> rings.Rings:
    """Returns the data with the columns that an agent derives from the others, see `types.Deriving`.

    That happens within the program, as the columns may depend on numbers of the agent that are swept: to a dataset once
    per epoch, to the replay, in which the end of an episode tells of the rows before it, in every iteration.
    """
    return agent.derive_columns(data) if isinstance(agent, Deriving) else data


def enter(agent: Agent, phase: Phase, carry: Carry) -> Carry:
    """Returns the carry at the start of a phase, which means something to agents that are `types.Staged`."""
    if not isinstance(agent, Staged):
        return carry
    return placed(dataclasses.replace(carry, agent=agent.enter(carry.agent, phase)))


def iteration(
    agent: Agent,
    env: Env,
    phase: Phase,
    carry: Carry,
    dataset: Ring | None,
    bank: PyTree,
    key: jax.Array,
    execution: Execution = OPEN_LOOP,
) -> tuple[Carry, Metrics, Metrics]:
    """Returns the carry after one iteration, the updates' mean metrics and the collection's sums."""
    key_collect, key_update = jax.random.split(key)
    world, steps, sums = carry.world, None, {}
    if world is not None and world.rollout is not None and phase.collects:
        policy = execution(ro.policy_of(agent, carry.agent))
        if on_policy(agent, phase):
            rollout, unroll = ro.unroll(env, policy, world.rollout, bank, key_collect, agent.unroll)
            carry = dataclasses.replace(carry, world=World(rollout, world.replay))
            carry, metrics = learn_from(agent, phase, carry, unroll, key_update)
            return carry, metrics, unroll.sums
        rollout, steps, sums = ro.advance(env, policy, world.rollout, bank, key_collect)
        carry = dataclasses.replace(carry, world=World(rollout, world.replay))
    carry, metrics = learn(agent, phase, carry, dataset, steps, key_update)
    return carry, metrics, sums


def on_policy(agent: Agent, phase: Phase) -> TypeGuard[OnPolicy]:
    """Returns whether an agent learns in a phase from what it has just done, and from nothing that is stored."""
    return isinstance(agent, OnPolicy) and phase.collects and phase.data == "none"


def learn_from(agent: OnPolicy, phase: Phase, carry: Carry, unroll: ro.Unroll, key: jax.Array) -> tuple[Carry, Metrics]:
    """Returns the carry after an on-policy agent has learned from an unroll, unless the phase makes no updates."""
    scale, shift = phase.reward
    steps = dataclasses.replace(unroll.steps, rewards=scale * unroll.steps.rewards + shift)
    carry = dataclasses.replace(carry, updates=carry.updates + phase.updates, steps=carry.steps + steps.taken.sum())
    if not phase.updates:
        return carry, {}
    state, metrics = agent.learn_from(carry.agent, dataclasses.replace(unroll, steps=steps), key)
    return dataclasses.replace(carry, agent=state), metrics


def learn(
    agent: Agent, phase: Phase, carry: Carry, dataset: Ring | None, steps: rings.Steps | None, key: jax.Array
) -> tuple[Carry, Metrics]:
    """Returns the carry with what was collected stored and an iteration's updates made, and their mean metrics."""
    world, data = carry.world, () if dataset is None else (dataset,)
    if world is not None and steps is not None:
        scale, shift = phase.reward
        steps = dataclasses.replace(steps, rewards=scale * steps.rewards + shift)
        world = World(world.rollout, rings.add(world.replay, steps))
        data = (*data, world.replay)
    data = derived(agent, data)

    def update(state: PyTree, key: jax.Array) -> tuple[PyTree, Metrics]:
        key_batch, key_step = jax.random.split(key)
        return agent.update(state, spread(agent.sample(data, key_batch)), key_step, data)

    state, metrics = jax.lax.scan(update, carry.agent, jax.random.split(key, phase.updates))
    carry = dataclasses.replace(
        carry,
        agent=state,
        world=world,
        updates=carry.updates + phase.updates,
        steps=carry.steps + (0 if steps is None else steps.taken.sum()),
    )
    return carry, jax.tree.map(mean, metrics) if phase.updates else {}


def mean(values: jax.Array) -> jax.Array:
    """Returns the mean over the first axis of what was measured: not every update measures all that an agent does."""
    return jnp.nanmean(values, axis=0)


def epoch(
    agent: Agent,
    env: Env,
    phase: Phase,
    carry: Carry,
    dataset: Ring | None,
    execution: Execution = OPEN_LOOP,
) -> tuple[Carry, Metrics]:
    """Returns the carry after one epoch and its metrics: means over updates, episode statistics, a digest."""
    key, key_bank, key_iterations = jax.random.split(carry.key, 3)
    carry = dataclasses.replace(carry, key=key)
    flight = carry.world.rollout if carry.world is not None and phase.collects else None
    bank = None if flight is None else ro.resets(env, key_bank, len(flight.returns))
    if dataset is not None:
        (dataset,) = derived(agent, (dataset,))

    def body(carry: Carry, key: jax.Array) -> tuple[Carry, tuple[Metrics, Metrics]]:
        carry, metrics, sums = iteration(agent, env, phase, carry, dataset, bank, key, execution)
        return carry, (metrics, sums)

    carry, (metrics, sums) = jax.lax.scan(body, carry, jax.random.split(key_iterations, phase.iterations))
    metrics = jax.tree.map(mean, metrics) | episode_metrics(jax.tree.map(jnp.sum, sums))
    carry, word = close(carry)
    return placed(carry), metrics | {"digest": word}


def close(carry: Carry) -> tuple[Carry, jax.Array]:
    """Returns the carry at the end of an epoch, and its digest."""
    carry = dataclasses.replace(carry, epoch=carry.epoch + 1)
    return carry, digest(carry)


def episode_metrics(sums: Metrics) -> Metrics:
    """Returns the means over the episodes that ended in an epoch (NaN when none did), and what went wrong."""
    if not sums:
        return {}
    ended = jnp.where(sums["episodes"] > 0, sums["episodes"], jnp.nan)
    return {
        "collect/success": sums["successes"] / ended,
        "collect/return": sums["returns"] / ended,
        "collect/episodes": sums["episodes"],
        "collect/broken": sums["broken"],
    }


def run(
    agent: Agent,
    env: Env,
    schedule: Schedule,
    key: jax.Array,
    dataset: Ring | None,
    execution: Execution = OPEN_LOOP,
) -> tuple[Carry, list[Metrics]]:
    """Returns the carry at the end of a whole run and each phase's metrics [epochs, ...]; pure, to be vmapped."""
    carry, history = begin(agent, env, schedule, key, execution), []
    if dataset is not None and isinstance(agent, Fitting):
        carry = fit(agent, carry, dataset)
    for phase in phases(schedule, execution.length(agent.chunk)):
        step = functools.partial(epoch, agent, env, phase, execution=execution)
        carry = enter(agent, phase, carry)
        carry, metrics = jax.lax.scan(
            lambda c, _, step=step: step(c, dataset=dataset), carry, None, length=phase.epochs
        )
        history.append(metrics)
    return carry, history


def evaluate(
    agent: Agent, env: Env, episodes: int, state: PyTree, key: jax.Array, execution: Execution = OPEN_LOOP
) -> ro.Episodes:
    """Returns the agent's first episodes in fresh environments, acting as in evaluation."""
    return ro.evaluate(env, execution(ro.policy_of(agent, state, greedy=True)), key, episodes)


def digest(tree: PyTree) -> jax.Array:
    """Returns a uint32 that depends on every bit of every leaf and on its place: a sum of hashes modulo 2^32."""
    total = jnp.zeros((), jnp.uint32)
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        words = leaf if leaf.dtype == jnp.bool_ else leaf.view(f"uint{8 * leaf.dtype.itemsize}")
        words = words.astype(jnp.uint32).ravel()
        places = jnp.arange(1, words.size + 1, dtype=jnp.uint32) * jnp.uint32(0x9E3779B1)
        total = _scramble(total) + jnp.sum(_scramble(words ^ places), dtype=jnp.uint32)
    return total


def _scramble(x: jax.Array) -> jax.Array:
    """Returns uint32 with every bit spread over all others (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def on_device(agent: Agent) -> Any:
    """Returns the agent with its Scalars as float32 arrays, so that changing one is not another program."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), agent)


jitted_begin = jax.jit(begin, static_argnames=("env", "schedule"))
jitted_fit = jax.jit(fit)
jitted_enter = jax.jit(enter, static_argnames=("phase",))
jitted_epoch = jax.jit(epoch, static_argnames=("env", "phase"), donate_argnames=("carry",), compiler_options=COMPILING)
jitted_evaluate = jax.jit(evaluate, static_argnames=("env", "episodes"))


def abstract_carry(
    agent: Agent,
    env: Env,
    schedule: Schedule,
    timeline: Timeline,
    epochs_done: int,
    execution: Execution = OPEN_LOOP,
) -> Carry:
    """Returns the shapes of the carry after some epochs, without computing anything."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    carry = jitted_begin.eval_shape(agent, env, schedule, key, execution)
    phase, _ = timeline.at(max(epochs_done - 1, 0))
    return jitted_enter.eval_shape(agent, phase, carry)
