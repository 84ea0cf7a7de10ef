"""Memory requirements of a run, estimated before it starts: `jaxrl train --plan`."""

import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl import system
from jaxrl.errors import UserError
from jaxrl.replay import kdtree, loading
from jaxrl.replay.loading import Sizes
from jaxrl.replay.ring import Ring
from jaxrl.replay.streaming import Shards
from jaxrl.rollout import device as ro
from jaxrl.rollout import host, record
from jaxrl.runs import driver
from jaxrl.runs.config import Config, records, timeline_of
from jaxrl.runs.datasets import asks_trees, load_data
from jaxrl.runs.evaluation import jitted_behaviour
from jaxrl.training import loop
from jaxrl.training.host_loop import lowered
from jaxrl.training.schedule import Timeline, reads_dataset
from jaxrl.types import Agent, Env, HostEnv, Leaf, PyTree, requirements

KNOBS = {  # memory consumers, and the settings that determine their size
    "agent": "the agent's hidden sizes",
    "dataset": "data_steps",
    "replay": "schedule.replay",
    "environments": "schedule.envs",
    "search trees": "the rows of the dataset",
    "working memory": "the agent's batch, schedule.eval_episodes",
}


def check(config: Config, env: Env | HostEnv) -> None:
    """Raises UserError if a run's state does not fit in the available memory. Allocates nothing."""
    require(held(config, env))


def plan(config: Config, env: Env | HostEnv) -> str:
    """Returns a table of the run's memory, from the compiled programs, without allocating it.

    "working memory" is what the largest program needs besides its arguments. Raises UserError if it does not fit.
    """
    check(config, env)
    amounts = held(config, env) | {"working memory": max(temporary(program) for program in programs(config, env))}
    require(amounts)
    lines = amounts | {"total on the device": sum(amounts.values())}
    if jax.default_backend() == "cpu":
        # The host keeps a copy of the dataset.
        lines["process peak, including compilation"] = peak_rss() + sum(amounts.values()) + amounts["dataset"]
    return "\n".join(f"{name:<42}{amount / 2**20:>10.1f} MiB" for name, amount in lines.items())


def held(config: Config, env: Env | HostEnv) -> dict[str, int]:
    """Returns the bytes on the device that a run holds from its first to its last epoch, by purpose."""
    *_, carry = abstract(config, env)
    dataset, copies = abstract_data(config, env)
    amounts = {
        "agent": size(carry.agent),
        "dataset": size(dataset) * copies,
        "replay": size(carry.world and carry.world.replay),
        "environments": size(carry.world and carry.world.rollout),
    }
    if dataset is None or dataset.forest is None:
        return amounts
    entries = dataset.obs.shape[-1] + dataset.actions.shape[-1]
    return amounts | {"search trees": kdtree.size_of_tree(dataset.valid.size, entries)}


def require(amounts: dict[str, int]) -> None:
    """Raises UserError if the total is not available, naming the settings to lower."""
    needed, there = sum(amounts.values()), available()
    if needed > there:
        large = {name: amount for name, amount in amounts.items() if amount > needed / 10}
        advice = " or ".join(f"{KNOBS[name]} ({large[name] / 2**30:.1f} GiB)" for name in large)
        raise UserError(f"this run needs {needed / 2**30:.1f} GiB, there are {there / 2**30:.1f} GiB: lower {advice}")


def available() -> int:
    """Returns the free bytes of the device's memory, or on the CPU of the machine's."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# The parts


def abstract(config: Config, env: Env | HostEnv) -> tuple[Agent, Timeline, loop.Carry]:
    """Returns the shapes of the agent, the run's timeline, and the shapes of the carry at its end."""
    agent, execution, timeline = jax.eval_shape(loop.on_device, config.agent), config.execution, timeline_of(config)
    return agent, timeline, driver.abstract_carry(agent, env, config.schedule, timeline, timeline.epochs, execution)


def abstract_data(config: Config, env: Env | HostEnv) -> tuple[Ring | None, int]:
    """Returns the shapes of the run's dataset in device memory, and how many copies are in memory at a time.

    For a dataset of several files: the shapes of the largest file, and two copies, the file in use and the next. None
    and 0 for a run that does not learn from a dataset.
    """
    copies, trees = 1, asks_trees(config)
    if records(config):
        sizes = recorded_sizes(config, env)
    elif (dataset := load_data(config, env)) is None:
        return None, 0
    elif isinstance(dataset, Shards):
        sizes, copies, trees = dataset.sizes, min(len(dataset.shards), 2), False
    else:
        sizes = loading.sizes_of(dataset)
    return loading.abstract_ring(sizes, env, config.weighting, trees, requirements(config.agent).columns), copies


def recorded_sizes(config: Config, env: Env | HostEnv) -> Sizes:
    """Returns the sizes of a behavior's recording before it is recorded."""
    each, lanes = record.lanes_of(config.data_steps, env.horizon)
    episodes, seen = lanes * (each // env.horizon), env.spec.observation
    leaves = (Leaf("", (seen,)),) if isinstance(seen, int) else seen
    names = {"observations" + f"/{leaf.name}" * bool(leaf.name): leaf for leaf in leaves}
    entries = {name: leaf.shape for name, leaf in names.items()}
    dtypes = {name: leaf.dtype for name, leaf in names.items()}
    return Sizes("", entries, lanes * each + episodes, episodes, env.horizon, dtypes)


def programs(config: Config, env: Env | HostEnv) -> Iterator[Any]:
    """Yields the run's compiled programs, in the order in which it needs them."""
    (agent, timeline, carry), execution = abstract(config, env), jax.eval_shape(loop.on_device, config.execution)
    data, _ = abstract_data(config, env)
    key, episodes = jax.eval_shape(lambda: jax.random.key(0)), config.schedule.eval_episodes
    if records(config) and not isinstance(env, HostEnv):
        arguments = record.arguments(env, config.behaviour, config.data_steps)
        yield record.recording.lower(*arguments, key).compile()
        policy = ro.scripted(record.behaviour_of(env, config.behaviour))
        yield jitted_behaviour.lower(env, policy, key, episodes).compile()
    yield loop.jitted_begin.lower(agent, env, config.schedule, key, execution).compile()
    done = 0
    for phase in timeline.phases:
        dataset = data if reads_dataset(phase) else None
        done += phase.epochs
        carry = driver.abstract_carry(agent, env, config.schedule, timeline, done, execution)
        if isinstance(env, HostEnv) and phase.collects:
            given = (carry, dataset, key, config.schedule.envs, execution)
            yield from (program.compile() for program in lowered(agent, env, phase, *given))
        else:
            yield loop.jitted_epoch.lower(agent, env, phase, carry, dataset, execution).compile()
        if isinstance(env, HostEnv):
            count = host.side_by_side(episodes, system.cores())
            obs = jax.tree.map(lambda x, n=count: jnp.zeros((n, *x.shape), x.dtype), env.spec.example())
            known, given = (agent, execution, carry.agent), (obs, key, jnp.zeros((count, 2), jnp.int32))
            memory = host.jitted_start_greedily.eval_shape(*known, *given)
            yield host.jitted_act_greedily.lower(*known, memory, *given).compile()
        else:
            yield loop.jitted_evaluate.lower(agent, env, episodes, carry.agent, key, execution).compile()


def size(tree: PyTree) -> int:
    """Returns the bytes of a tree's leaves, including random keys."""
    leaves = (jax.eval_shape(jax.random.key_data, x) if _is_key(x) else x for x in jax.tree.leaves(tree))
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _is_key(leaf: Any) -> bool:
    return jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def temporary(program: Any) -> int:
    """Returns the bytes that a compiled program needs besides its arguments: scratch, and non-aliased results."""
    memory = program.memory_analysis()
    return memory.temp_size_in_bytes + max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0)


def peak_rss() -> int:
    """Returns the peak memory (RSS) of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
