"""What a run will take in memory, before it takes it: `jaxrl train --plan`."""

import resource
import sys
from typing import Any

import jax
import numpy as np

from jaxrl import session, train
from jaxrl.config import Config
from jaxrl.data.ring import Ring
from jaxrl.types import PyTree


def plan(config: Config, env: Any) -> str:
    """Returns a table of the run's memory, from the compiled programs themselves; nothing of it is allocated."""
    agent = jax.eval_shape(train.on_device, config.agent)
    timeline = session.Timeline(train.phases(config.schedule, config.agent.chunk))
    carry = session.abstract_carry(agent, env, config.schedule, timeline, timeline.epochs)
    data = abstract_data(config, env)
    lines = {
        "agent (parameters, optimiser)": size(carry.agent),
        "dataset": size(data),
        "replay": size(carry.world and carry.world.replay),
        "environments": size(carry.world and carry.world.rollout),
    }
    held = sum(lines.values())
    working = max(temporary(program) for program in programs(config, env, agent, timeline, data))
    lines |= {"working memory of the largest program": working, "total on the device": held + working}
    if jax.default_backend() == "cpu":
        lines["process, compiled and at its peak"] = peak_rss() + held + working
    return "\n".join(f"{name:<40}{amount / 2**20:>10.1f} MiB" for name, amount in lines.items())


def abstract_data(config: Config, env: Any) -> Ring:
    """Returns the shapes of the run's dataset in device memory."""
    if config.data is not None:
        ring = session.to_ring(session.load_data(config, env), env)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), ring)
    rows = config.data_steps + config.data_steps // env.horizon + 1
    return jax.eval_shape(lambda: train.rings.empty(1, rows, env.spec.observation, env.spec.action))


def programs(config: Config, env: Any, agent: Any, timeline: session.Timeline, data: Ring) -> list[Any]:
    """Returns the run's compiled programs: an epoch of each phase, and the evaluation."""
    result, done = [], 0
    for phase in timeline.phases:
        done += phase.epochs
        carry = session.abstract_carry(agent, env, config.schedule, timeline, done)
        result.append(train.jitted_epoch.lower(agent, env, phase, carry, data).compile())
    key = jax.eval_shape(lambda: jax.random.key(0))
    episodes = config.schedule.eval_episodes
    result.append(train.jitted_evaluate.lower(agent, env, episodes, carry.agent, key).compile())
    return result


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
