"""Training with simulators on CPU cores: the epoch of `jaxrl.training.loop` as a Python loop of the same iterations."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.replay.ring import Ring, Steps
from jaxrl.rollout import device as ro
from jaxrl.rollout import host
from jaxrl.rollout.executors import OPEN_LOOP, Execution
from jaxrl.rollout.host import Simulators
from jaxrl.rollout.workers import WorkerDied
from jaxrl.training import loop
from jaxrl.training.compiling import Measuring
from jaxrl.training.loop import Carry
from jaxrl.training.schedule import reads_dataset
from jaxrl.types import Agent, HostEnv, Metrics, Observation, Phase, PyTree


class Interrupted(Exception):  # noqa: N818  (a resumable run is not an error)
    """A worker died during an epoch. Holds the carry after the last iteration."""

    def __init__(self, carry: Carry) -> None:
        """Stores the carry."""
        super().__init__()
        self.carry = carry


def start(agent: Agent, execution: Execution, state: PyTree, obs: Observation, key: jax.Array) -> PyTree:
    """Returns the policy's memory at the start of episodes, from their first observations [N, O]."""
    return execution(ro.policy_of(agent, state)).start(ro.observed(obs), key)


def act(
    agent: Agent,
    execution: Execution,
    state: PyTree,
    memory: PyTree,
    began: jax.Array,
    obs: Observation,
    key: jax.Array,
    key_start: jax.Array,
) -> tuple[PyTree, ro.Decision]:
    """Returns the memory before a decision, reset where an episode `began`, and the decision for obs [N, O]."""
    policy, states = execution(ro.policy_of(agent, state)), ro.observed(obs)
    memory = ro.where(began, policy.start(states, key_start), memory)
    return memory, policy.act(memory, states, key)


def resume(carry: Carry) -> Carry:
    """Returns the carry for restarted environments: unfinished episodes are marked as truncated."""
    if carry.world is None or carry.world.replay is None:
        return carry
    ring = carry.world.replay
    lanes, rows = ring.valid.shape
    before = (jnp.arange(lanes), (ring.head - 1) % rows)
    cut = (ring.count > 0) & ring.valid[before]  # else the row before the head already ends an episode
    replay = dataclasses.replace(
        ring,
        truncated=ring.truncated.at[before].set(ring.truncated[before] | cut),
        head=(ring.head + cut) % rows,
        count=jnp.minimum(ring.count + cut, rows - 1),
    )
    return dataclasses.replace(carry, world=dataclasses.replace(carry.world, replay=replay))


jitted_start = jax.jit(start)


jitted_act = jax.jit(act)


jitted_resume = jax.jit(resume, donate_argnames=("carry",))


jitted_learn = Measuring(loop.learn, static_argnames=("phase",), donate_argnames=("carry",))


jitted_learn_from = Measuring(loop.learn_from, static_argnames=("phase",), donate_argnames=("carry",))


jitted_close = jax.jit(loop.close, donate_argnames=("carry",))


def epoch(
    simulators: Simulators,
    agent: Agent,
    phase: Phase,
    carry: Carry,
    dataset: Ring | None,
    envs: int,
    execution: Execution = OPEN_LOOP,
) -> tuple[Carry, Metrics]:
    """Returns the carry after one epoch that collects in `envs` environments, and its metrics, as `loop.epoch` does.

    Raises Interrupted, with the carry after the last iteration, if a worker dies.
    """
    key, key_starts, key_iterations = jax.random.split(carry.key, 3)
    random = host.generator(key_starts)
    history: list[Any] = []
    sums: list[dict[str, Any]] = []
    try:
        if simulators.flight is None:
            carry = jitted_resume(carry)
            simulators.flight = host.reset_all(simulators, random, envs)
        carry = dataclasses.replace(carry, key=key)
        if dataset is not None and reads_dataset(phase):
            (dataset,) = loop.derived(agent, (dataset,))
        pairs = (jax.random.split(key, phase.iterations) for key in (key_iterations, key_starts))
        before = int(carry.epoch) - phase.start
        numbers = range(before * phase.iterations, before * phase.iterations + phase.size(before))
        for number, *keys in zip(numbers, *pairs, strict=False):
            args = (agent, phase, carry, dataset, execution, random, keys, number)
            carry, metrics, happened = iteration(simulators, *args)
            history.append(metrics)
            sums.append(happened)
    except WorkerDied as error:
        simulators.flight = None
        raise Interrupted(carry) from error
    carry, word = jitted_close(carry)
    totals = {name: jnp.asarray(value) for name, value in total(sums).items()}
    found: Metrics = {**means(history), **loop.episode_metrics(totals), "digest": word}
    return carry, found


def means(history: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Returns the mean of each metric over the iterations that measured it; NaN if none did."""
    result = {}
    for name in history[0]:
        values = np.stack([metrics[name] for metrics in history])
        measured = values[~np.isnan(values)]
        result[name] = np.mean(measured) if len(measured) else values[0]
    return result


def iteration(
    simulators: Simulators,
    agent: Agent,
    phase: Phase,
    carry: Carry,
    dataset: Ring | None,
    execution: Execution,
    random: np.random.Generator,
    keys: Sequence[jax.Array],
    number: int,
) -> tuple[Carry, Metrics, dict[str, Any]]:
    """Returns the carry after one iteration, the updates' mean metrics and the collection's sums.

    The keys are the iteration's and one for the memory of new episodes; `number` is the iteration's in its phase.
    """
    key, key_start = keys
    key_act, key_learn = jax.random.split(key)
    collect = functools.partial(decide, simulators, agent, execution, carry.agent, random)
    if loop.on_policy(agent, phase):
        pairs = [jax.random.split(key, agent.unroll) for key in (key_act, key_start)]
        memories, steps, sums = zip(*(collect(*pair) for pair in zip(*pairs, strict=True)), strict=True)
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *steps)
        unroll = ro.unrolled(stacked, memories[0], total(sums))
        carry, metrics = jitted_learn_from(agent, phase, carry, unroll, key_learn)
        return carry, metrics, dict(unroll.sums)
    _, steps, sums = collect(key_act, key_start)
    numbered = None if isinstance(phase.updates, int) else jnp.asarray(number, jnp.int32)
    carry, metrics = jitted_learn(agent, phase, carry, dataset, steps, key_learn, numbered)
    return carry, metrics, sums


def decide(
    simulators: Simulators,
    agent: Agent,
    execution: Execution,
    state: PyTree,
    random: np.random.Generator,
    key: jax.Array,
    key_start: jax.Array,
) -> tuple[PyTree, Steps, dict[str, Any]]:
    """Returns the policy's memory before one decision in every environment, its steps, and sums over ended episodes."""
    flight = simulators.flight
    assert flight is not None
    if flight.memory is None:
        flight.memory = jitted_start(agent, execution, state, flight.obs, key_start)
    before, decision = jitted_act(agent, execution, state, flight.memory, flight.began, flight.obs, key, key_start)
    flight.memory, chunks, extras = decision
    steps, sums = host.advance(simulators, np.asarray(chunks), random)
    return before, ro.with_extras(steps, extras), sums


def total(sums: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the totals of the sums, by name."""
    return {name: np.sum([values[name] for values in sums]) for name in sums[0]}


def lowered(
    agent: Agent,
    env: HostEnv,
    phase: Phase,
    carry: Carry,
    dataset: Ring | None,
    key: jax.Array,
    envs: int,
    execution: Execution = OPEN_LOOP,
) -> Iterator[Any]:
    """Yields the lowered programs of an epoch that collects, from the shapes of its arguments."""
    count, length = envs, execution.length(agent.chunk)
    obs = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), env.spec.example())
    memory = jitted_start.eval_shape(agent, execution, carry.agent, obs, key)
    began = jnp.zeros(count, bool)
    arguments = (agent, execution, carry.agent, memory, began, obs, key, key)
    yield jitted_act.lower(*arguments)
    _, (_, actions, extras) = jitted_act.eval_shape(*arguments)
    flag, reward = jnp.zeros((count, length), bool), jnp.zeros((count, length))
    rows = jax.tree.map(lambda x: jnp.zeros((count, length + 1, *x.shape[1:]), x.dtype), obs)
    extra = jax.tree.map(lambda x: jnp.zeros((count, length, *x.shape[1:]), x.dtype), extras)
    steps = Steps(rows, actions, reward, flag, flag, flag, flag, began, extra)
    if loop.on_policy(agent, phase):
        stacked = jax.tree.map(lambda x: jnp.zeros((agent.unroll, *x.shape), x.dtype), steps)
        yield jitted_learn_from.lower(agent, phase, carry, ro.unrolled(stacked, memory, {}), key)
        return
    if dataset is not None and reads_dataset(phase):
        (dataset,) = jax.eval_shape(lambda agent, *data: loop.derived(agent, data), agent, dataset)
    yield jitted_learn.lower(
        agent, phase, carry, dataset, steps, key, None if isinstance(phase.updates, int) else jnp.int32(0)
    )
