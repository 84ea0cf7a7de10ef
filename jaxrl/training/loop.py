"""Training as three nested functions: `iteration` (collect, store, update), `epoch` (a scan of iterations), `run`
(a scan of epochs, phase after phase). All state is in one carry.

Two drivers use them. A sweep vmaps `run` or `epoch`. A logged run calls `jitted_epoch` from Python, with a donated
carry, and handles progress, checkpoints and signals between compiled calls, without host callbacks.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeGuard, TypeVar

import jax
import jax.numpy as jnp

from jaxrl.errors import UserError
from jaxrl.ops.masks import beside
from jaxrl.replay import ring as rings
from jaxrl.replay.ring import Ring
from jaxrl.rollout import device as ro
from jaxrl.rollout.executors import OPEN_LOOP, Execution
from jaxrl.sharding import shared, spread
from jaxrl.training.compiling import Measuring
from jaxrl.training.schedule import Schedule, Timeline, capacity, phases, reads_dataset, reads_replay
from jaxrl.types import (
    Agent,
    Deriving,
    Env,
    Fitting,
    HostEnv,
    Learner,
    Metrics,
    OnPolicy,
    Phase,
    PyTree,
    Staged,
    count_of,
    pytree,
)

T = TypeVar("T")
C = TypeVar("C")  # what a scan carries


@pytree
class World:
    """The state that collection adds: the environments in flight, and the replay buffer."""

    rollout: ro.Rollout | None  # None if the simulators are in worker processes
    replay: Ring | None  # None if no phase learns from it


@pytree
class Carry:
    """The full state of a run. A checkpoint is this tree; resuming is loading it."""

    agent: PyTree
    key: jax.Array
    world: World | None  # None in a run that does not collect
    updates: jax.Array  # [] int32
    steps: jax.Array  # [] int32, environment steps
    epoch: jax.Array  # [] int32


def begin(
    agent: Agent, env: Env | HostEnv, schedule: Schedule, key: jax.Array, execution: Execution = OPEN_LOOP
) -> Carry:
    """Returns the carry before the first epoch, containing only the state that the run's phases need."""
    key, key_agent, key_envs = jax.random.split(key, 3)
    state, world = agent.init(key_agent, env.spec), None
    plan = phases(schedule, agent, length=execution.length(agent.chunk))
    if any(phase.collects for phase in plan):
        policy, flight, replay = execution(ro.policy_of(agent, state)), None, None
        if kept := capacity(schedule, plan, execution.length(agent.chunk)):
            rows = kept // schedule.envs + agent.chunk + 2
            replay = rings.empty(schedule.envs, rows, env.spec, ro.extras_of(policy, env.spec))
        if not isinstance(env, HostEnv):
            flight = ro.start(env, policy, key_envs, schedule.envs)
        world = World(flight, replay)
    zero = jnp.zeros((), jnp.int32)
    return placed(Carry(state, key, world, zero, zero, zero))


def placed(carry: Carry) -> Carry:
    """Returns the carry placed on the run's devices: environments and replay are sharded, the rest is replicated."""
    return dataclasses.replace(shared(dataclasses.replace(carry, world=None)), world=spread(carry.world))


def fit(agent: Fitting, carry: Carry, dataset: Ring) -> Carry:
    """Returns the carry with the agent's state fitted to the data, see `types.Fitting`."""
    return dataclasses.replace(carry, agent=agent.fit(carry.agent, (dataset,)))


def derived(agent: Agent, data: rings.Rings) -> rings.Rings:
    """Returns the data with the columns that an agent derives from the others, see `types.Deriving`.

    This runs inside the program, since the columns may depend on swept Scalars of the agent: once per epoch for a
    dataset, in every iteration for the replay, where the end of an episode affects the rows before it.
    """
    return agent.derive_columns(data) if isinstance(agent, Deriving) else data


def enter(agent: Agent, phase: Phase, carry: Carry) -> Carry:
    """Returns the carry at the start of a phase; only agents that are `types.Staged` change."""
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
    number: jax.Array | None = None,
) -> tuple[Carry, Metrics, Metrics]:
    """Returns the carry after one iteration, the updates' mean metrics and the collection's sums.

    `number` is that of the iteration in its phase, from 0; it is needed where updates are a fraction.
    """
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
    carry, metrics = learn(agent, phase, carry, dataset, steps, key_update, number)
    return carry, metrics, sums


def on_policy(agent: Agent, phase: Phase) -> TypeGuard[OnPolicy]:
    """Returns whether an agent learns on-policy in a phase: from the latest unroll, not from stored data."""
    return isinstance(agent, OnPolicy) and phase.collects and phase.data == "none"


def learn_from(agent: OnPolicy, phase: Phase, carry: Carry, unroll: ro.Unroll, key: jax.Array) -> tuple[Carry, Metrics]:
    """Returns the carry after an on-policy agent's update on an unroll, if the phase makes updates."""
    scale, shift = phase.reward
    steps = dataclasses.replace(unroll.steps, rewards=scale * unroll.steps.rewards + shift)
    due = updates_due(phase, None)
    carry = dataclasses.replace(carry, updates=carry.updates + due, steps=carry.steps + steps.taken.sum())
    if not phase.updates:
        return carry, {}
    state, metrics = agent.learn_from(carry.agent, dataclasses.replace(unroll, steps=steps), key)
    return dataclasses.replace(carry, agent=state), metrics


def learn(
    agent: Agent,
    phase: Phase,
    carry: Carry,
    dataset: Ring | None,
    steps: rings.Steps | None,
    key: jax.Array,
    number: jax.Array | None = None,
) -> tuple[Carry, Metrics]:
    """Stores the collected steps and makes an iteration's updates; returns the carry and the updates' mean metrics."""
    world = carry.world
    if world is not None and world.replay is not None and steps is not None:
        scale, shift = phase.reward
        rewarded = dataclasses.replace(steps, rewards=scale * steps.rewards + shift)
        world = World(world.rollout, rings.add(world.replay, rewarded))
    data = chosen(phase, dataset, None if world is None else world.replay)
    due = updates_due(phase, number)
    state, metrics = updates(agent, carry.agent, derived(agent, data), key, math.ceil(phase.updates), due)
    carry = dataclasses.replace(
        carry,
        agent=state,
        world=world,
        updates=carry.updates + due,
        steps=carry.steps + (0 if steps is None else steps.taken.sum()),
    )
    return carry, metrics


def updates_due(phase: Phase, number: jax.Array | None) -> int | jax.Array:
    """Returns the updates of the iteration with this number in its phase: floor((number + 1) u) - floor(number u).

    u, the updates per iteration, is p / q with q < 2^16, so that its products, modulo q, are exact in uint32.
    """
    if isinstance(phase.updates, int):
        return phase.updates
    assert number is not None, "fractions of updates need the iteration's number"
    whole, rest = divmod(phase.updates.numerator, phase.updates.denominator)
    q = jnp.uint32(phase.updates.denominator)
    carried = (number.astype(jnp.uint32) % q) * jnp.uint32(rest) % q  # q * (number u - floor(number u))
    return whole + (carried + rest >= q).astype(jnp.int32)


def chosen(phase: Phase, dataset: Ring | None, replay: Ring | None) -> rings.Rings:
    """Returns the data that a phase learns from. Raises UserError if they do not exist."""
    found: rings.Rings = ()
    for name, wanted, ring in (("dataset", reads_dataset(phase), dataset), ("replay", reads_replay(phase), replay)):
        if wanted and ring is None:
            raise UserError(f"phase {phase.name!r} learns from the {name}, but there is none")
        if wanted and ring is not None:
            found += (ring,)
    return found


def updates(
    learner: Learner, state: PyTree, data: Any, key: jax.Array, count: int, due: int | jax.Array | None = None
) -> tuple[PyTree, Metrics]:
    """Returns a learner's state after `count` updates, each on its own batch, and the means of their metrics.

    With `due`, only as many of them are made. This training loop is shared by agents, dynamics models and models of
    data. A metric is NaN in updates that do not measure it; the mean ignores these.
    """

    def update(state: PyTree, key: jax.Array) -> tuple[PyTree, Metrics]:
        key_batch, key_step = jax.random.split(key)
        return learner.update(state, spread(learner.sample(data, key_batch)), key_step, data)

    if not count:
        return state, {}
    made = None if due is None or isinstance(due, int) else due
    state, metrics = scan(update, state, jax.random.split(key, count), made)
    return state, jax.tree.map(lambda values: mean(values, made), metrics)


def scan(
    body: Callable[[C, Any], tuple[C, Any]], carry: C, xs: PyTree, count: jax.Array | None = None
) -> tuple[C, PyTree]:
    """Returns `jax.lax.scan(body, carry, xs)`, or with `count`, the same of the first `count` of xs.

    Then the further rows of the outputs are 0. One program serves all counts, and under vmap with one count for all,
    what is beyond the count costs nothing.
    """
    if count is None:
        return jax.lax.scan(body, carry, xs)
    at = lambda i: jax.tree.map(lambda x: x[i], xs)  # noqa: E731
    _, shapes = jax.eval_shape(body, carry, at(0))
    outputs = jax.tree.map(lambda x: jnp.zeros((count_of(xs), *x.shape), x.dtype), shapes)

    def step(i: jax.Array, both: tuple[C, PyTree]) -> tuple[C, PyTree]:
        carry, output = body(both[0], at(i))
        return carry, jax.tree.map(lambda rows, row: rows.at[i].set(row), both[1], output)

    return jax.lax.fori_loop(0, count, step, (carry, outputs))


def mean(values: jax.Array, count: jax.Array | None = None) -> jax.Array:
    """Returns the mean over the first axis, or its first `count` rows, ignoring NaN, which marks what is not measured.

    NaN if nothing was measured.
    """
    if count is not None:
        counted = jnp.arange(len(values)) < count
        values = jnp.where(beside(counted, values), values.astype(jnp.float32), jnp.nan)
    return jnp.nanmean(values, axis=0)


def epoch(
    agent: Agent,
    env: Env,
    phase: Phase,
    carry: Carry,
    dataset: Ring | None,
    execution: Execution = OPEN_LOOP,
    index: jax.Array | None = None,
) -> tuple[Carry, Metrics]:
    """Returns the carry after one epoch and its metrics: means over updates, episode statistics, a digest.

    `index` is the number of earlier epochs of the run, by default the carry's: members of a sweep share it, so that the
    number of their updates is one number.
    """
    key, key_bank, key_iterations = jax.random.split(carry.key, 3)
    carry = dataclasses.replace(carry, key=key)
    flight = carry.world.rollout if carry.world is not None and phase.collects else None
    bank = None if flight is None else ro.resets(env, key_bank, len(flight.returns))
    if dataset is not None and reads_dataset(phase):
        (dataset,) = derived(agent, (dataset,))

    before = (carry.epoch if index is None else index) - phase.start  # epochs of this phase
    count = jnp.where(before + 1 == phase.epochs, phase.last, phase.iterations) if phase.last else None

    def body(carry: Carry, now: tuple[jax.Array, jax.Array | None]) -> tuple[Carry, tuple[Metrics, Metrics]]:
        key, number = now
        carry, metrics, sums = iteration(agent, env, phase, carry, dataset, bank, key, execution, number)
        return carry, (metrics, sums)

    numbers = None if isinstance(phase.updates, int) else before * phase.iterations + jnp.arange(phase.iterations)
    keys = jax.random.split(key_iterations, phase.iterations)
    carry, (metrics, sums) = scan(body, carry, (keys, numbers), count)
    metrics = {name: mean(values, count) for name, values in metrics.items()}
    metrics |= episode_metrics(jax.tree.map(jnp.sum, sums))
    carry, word = close(carry)
    return placed(carry), metrics | {"digest": word}


def close(carry: Carry) -> tuple[Carry, jax.Array]:
    """Returns the carry at the end of an epoch, and its digest."""
    carry = dataclasses.replace(carry, epoch=carry.epoch + 1)
    return carry, digest(carry)


def episode_metrics(sums: Metrics) -> Metrics:
    """Returns the means over the episodes that ended in an epoch (NaN if none did), and the count of broken steps."""
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
    """Returns the carry at the end of a whole run and each phase's metrics [epochs, ...]; pure, for vmap."""
    carry, history = begin(agent, env, schedule, key, execution), []
    if dataset is not None and isinstance(agent, Fitting):
        carry = fit(agent, carry, dataset)
    length = execution.length(agent.chunk)
    for phase in phases(schedule, agent, dataset=dataset is not None, length=length):
        step = functools.partial(epoch, agent, env, phase, execution=execution)
        carry = enter(agent, phase, carry)
        indices = phase.start + jnp.arange(phase.epochs)
        carry, metrics = jax.lax.scan(lambda c, i, step=step: step(c, dataset=dataset, index=i), carry, indices)
        history.append(metrics)
    return carry, history


def evaluate(
    agent: Agent, env: Env, episodes: int, state: PyTree, key: jax.Array, execution: Execution = OPEN_LOOP
) -> ro.Episodes:
    """Returns the agent's first episodes in fresh environments, with greedy actions."""
    return ro.evaluate(env, execution(ro.policy_of(agent, state, greedy=True)), key, episodes)


def all_finite(tree: PyTree) -> jax.Array:
    """Returns whether every number in a tree is finite, []."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in leaves]))


def digest(tree: PyTree) -> jax.Array:
    """Returns a uint32 that depends on every bit of every leaf and its position: a sum of hashes modulo 2^32."""
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
    """Returns uint32 with every bit mixed into all others (the finalizer of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def on_device(settings: T) -> T:
    """Returns settings with their Scalars as float32 arrays, so that changing one does not recompile.

    Settings may be an agent or any other pytree: a model of data, a sampler.
    """
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), settings)


jitted_begin = jax.jit(begin, static_argnames=("env", "schedule"))
jitted_fit = jax.jit(fit)
jitted_enter = jax.jit(enter, static_argnames=("phase",))
jitted_epoch = Measuring(epoch, static_argnames=("env", "phase"), donate_argnames=("carry",))
jitted_all_finite = jax.jit(all_finite)
jitted_evaluate = jax.jit(evaluate, static_argnames=("env", "episodes"))


def abstract_carry(
    agent: Agent,
    env: Env | HostEnv,
    schedule: Schedule,
    timeline: Timeline,
    epochs_done: int,
    execution: Execution = OPEN_LOOP,
) -> Carry:
    """Returns the shapes of the carry after some epochs, without computing anything."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    carry = jitted_begin.eval_shape(agent, env, schedule, key, execution)
    for phase in timeline.begun(epochs_done):
        carry = jitted_enter.eval_shape(agent, phase, carry)
    return carry
