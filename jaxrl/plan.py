"""What a run will take in memory, before it takes it: `jaxrl train --plan`."""

import dataclasses
import functools
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl import host, pool, session, train
from jaxrl import rollout as ro
from jaxrl.config import Config
from jaxrl.crew import Layout, Lift
from jaxrl.data import forest, record, task
from jaxrl.data.ring import Ring
from jaxrl.data.stream import Shards
from jaxrl.data.task import Sizes
from jaxrl.errors import UserError
from jaxrl.types import PyTree, on_host

KNOBS = {  # what takes memory, and what it grows with
    "agent": "the agent's hidden sizes",
    "dataset": "data_steps",
    "replay": "schedule.replay",
    "environments": "schedule.envs",
    "search trees": "the rows of the dataset",
    "working memory": "the agent's batch_size, schedule.eval_episodes",
}


def check(config: Config, env: Any) -> None:
    """Raises UserError where what a run holds cannot fit in the memory that is there. Nothing of it is allocated."""
    require(held(config, env))


def plan(config: Config, env: Any) -> str:
    """Returns a table of the run's memory, from the compiled programs themselves; nothing of it is allocated.

    "working memory" is what the largest of them needs besides its arguments. Raises UserError where it cannot fit.
    """
    check(config, env)
    amounts = held(config, env) | {"working memory": max(temporary(program) for program in programs(config, env))}
    require(amounts)
    lines = amounts | {"total on the device": sum(amounts.values())}
    if jax.default_backend() == "cpu":
        # The host keeps a copy of the dataset.
        lines["process at its peak, having compiled all"] = peak_rss() + sum(amounts.values()) + amounts["dataset"]
    return "\n".join(f"{name:<42}{amount / 2**20:>10.1f} MiB" for name, amount in lines.items())


def held(config: Config, env: Any) -> dict[str, int]:
    """Returns the bytes on the device that a run holds from its first epoch to its last, by what they are for."""
    *_, carry = abstract(config, env)
    dataset, copies = abstract_data(config, env)
    amounts = {
        "agent": size(carry.agent),
        "dataset": size(dataset) * copies,
        "replay": size(carry.world and carry.world.replay),
        "environments": size(carry.world and carry.world.rollout),
    }
    if dataset.forest is None:
        return amounts
    entries = dataset.obs.shape[-1] + dataset.actions.shape[-1]
    return amounts | {"search trees": forest.size_of_tree(dataset.valid.size, entries)}


def require(amounts: dict[str, int]) -> None:
    """Raises UserError where so many bytes are not there, naming what to lower."""
    needed, there = sum(amounts.values()), available()
    if needed > there:
        large = {name: amount for name, amount in amounts.items() if amount > needed / 10}
        advice = " or ".join(f"{KNOBS[name]} ({large[name] / 2**30:.1f} GiB)" for name in large)
        raise UserError(f"this run needs {needed / 2**30:.1f} GiB, there are {there / 2**30:.1f} GiB: lower {advice}")


def available() -> int:
    """Returns the bytes that are free: of the device's own memory, or on the CPU of this machine's."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# Sweeps

MEASURED = 8  # members whose updates are timed
UPDATES = 10  # of each


def members_that_fit(config: Config, env: Any, devices: int = 1) -> int:
    """Returns how many members of a configuration's shape can be one program, at least 1.

    Counted twice are what each of them holds, for what the program needs besides, and the dataset on each device.
    """
    amounts = held(config, env)
    each = sum(amounts[name] for name in ("agent", "replay", "environments"))
    shared = sum(amounts.values()) - each
    on_cpu = jax.default_backend() == "cpu"  # where all devices have one memory
    room = (available() - 2 * shared) // (2 * each)
    return max(room if on_cpu else room * devices, 1)


def seconds_per_layout(agents: Any, keys: jax.Array, config: Config, env: Any) -> dict[Layout, float]:
    """Returns the seconds that an update of one member takes in each layout, measured on meaningless numbers.

    Agents that search trees on the host are not measured: their members queue for them.
    """
    abstract_ring, _ = abstract_data(config, env)
    if abstract_ring.forest is not None:
        return {"map": 0.0}
    ring = zeros(abstract_ring)

    def updates(agent: Any, state: PyTree, key: jax.Array) -> PyTree:
        def update(state: PyTree, key: jax.Array) -> tuple[PyTree, None]:
            key_batch, key_step = jax.random.split(key)
            return agent.update(state, agent.sample((ring,), key_batch), key_step)[0], None

        return jax.lax.scan(update, state, jax.random.split(key, UPDATES))[0]

    seconds: dict[Layout, float] = {}
    shapes = jax.eval_shape(jax.vmap(lambda agent, key: agent.init(key, env.spec)), agents, keys)
    states = jax.tree.map(lambda x: jnp.full(x.shape, 1e-2).astype(x.dtype), shapes)
    for layout in ("vmap", "map"):
        program = jax.jit(functools.partial(Lift(layout), updates), compiler_options=train.COMPILING)
        jax.block_until_ready(program(agents, states, keys))
        start = time.perf_counter()
        jax.block_until_ready(program(agents, states, keys))
        seconds[layout] = (time.perf_counter() - start) / (UPDATES * len(keys))
    return seconds


def zeros(ring: Ring) -> Ring:
    """Returns a dataset of the shapes of one, all of whose rows are zero and valid, in one long episode."""
    full = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), ring)
    last = jnp.full_like(full.head, full.valid.shape[1] - 1)
    return dataclasses.replace(full, valid=full.valid.at[:, :-1].set(True), head=last, count=last)


# The parts


def abstract(config: Config, env: Any) -> tuple[Any, session.Timeline, train.Carry]:
    """Returns the shapes of the agent, the run's epochs, and the shapes of the carry at its end."""
    agent = jax.eval_shape(train.on_device, config.agent)
    timeline = session.Timeline(train.phases(config.schedule, config.agent.chunk))
    return agent, timeline, session.abstract_carry(agent, env, config.schedule, timeline, timeline.epochs)


def abstract_data(config: Config, env: Any) -> tuple[Ring, int]:
    """Returns the shapes of the run's dataset in device memory, and how many such datasets are there at a time.

    Of a dataset of several files that is the largest of them, and two: the one in use, and the next.
    """
    if config.data is None:
        each, lanes = record.lanes_of(config.data_steps, env.horizon)
        episodes, entries = lanes * (each // env.horizon), {"observations": (env.spec.observation,)}
        sizes = Sizes("", entries, lanes * each + episodes, episodes, env.horizon)
        return task.abstract_ring(sizes, env, config.weighting, session.asks_trees(config)), 1
    dataset = session.load_data(config, env)
    if isinstance(dataset, Shards):
        return task.abstract_ring(dataset.sizes, env, config.weighting), min(len(dataset.shards), 2)
    return task.abstract_ring(task.sizes_of(dataset), env, config.weighting, session.asks_trees(config)), 1


def programs(config: Config, env: Any) -> Iterator[Any]:
    """Yields the run's programs, compiled, in the order in which it needs them."""
    agent, timeline, carry = abstract(config, env)
    data, _ = abstract_data(config, env)
    key, episodes = jax.eval_shape(lambda: jax.random.key(0)), config.schedule.eval_episodes
    if config.data is None:
        arguments = record.arguments(env, config.behaviour, config.data_steps)
        yield record.recording.lower(*arguments, key).compile()
        policy = ro.scripted(record.behaviour_of(env, config.behaviour))
        yield session.jitted_behaviour.lower(env, policy, key, episodes).compile()
    yield train.jitted_begin.lower(agent, env, config.schedule, key).compile()
    done = 0
    for phase in timeline.phases:
        done += phase.epochs
        carry = session.abstract_carry(agent, env, config.schedule, timeline, done)
        if on_host(env) and phase.collects:
            yield from (program.compile() for program in host.lowered(agent, env, phase, carry, data, key))
        else:
            yield train.jitted_epoch.lower(agent, env, phase, carry, data).compile()
        if on_host(env):
            count = host.side_by_side(episodes, pool.cores())
            obs, turns = jnp.zeros((count, env.spec.observation)), jnp.zeros((count, 2), jnp.int32)
            yield host.jitted_act_greedily.lower(agent, carry.agent, obs, key, turns).compile()
        else:
            yield train.jitted_evaluate.lower(agent, env, episodes, carry.agent, key).compile()


def size(tree: PyTree) -> int:
    """Returns the bytes of a tree's leaves, random keys included."""
    leaves = (jax.eval_shape(jax.random.key_data, x) if _is_key(x) else x for x in jax.tree.leaves(tree))
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _is_key(leaf: Any) -> bool:
    return jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def temporary(program: Any) -> int:
    """Returns the bytes that a compiled program needs besides its arguments: scratch, and results not in place."""
    memory = program.memory_analysis()
    return memory.temp_size_in_bytes + max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0)


def peak_rss() -> int:
    """Returns the most memory that this process has held so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
