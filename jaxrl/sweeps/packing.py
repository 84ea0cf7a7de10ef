"""How the members of a sweep share devices: how many fit, and which layout is faster."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp

from jaxrl.replay.ring import Ring
from jaxrl.runs.config import Config
from jaxrl.runs.memory import abstract, abstract_data, available, held
from jaxrl.sweeps.population import Layout, Lift
from jaxrl.training import compiling, loop
from jaxrl.types import Agent, Env, HostEnv, PyTree

MEASURED = 8  # members whose updates are timed


UPDATES = 10  # timed updates per member


def members_that_fit(config: Config, env: Env | HostEnv, devices: int = 1) -> int:
    """Returns how many members of a configuration's shape fit in one program, at least 1.

    Each member's state and each device's dataset are counted twice, to allow for the program's working memory.
    """
    amounts = held(config, env)
    each = sum(amounts[name] for name in ("agent", "replay", "environments"))
    shared = sum(amounts.values()) - each
    on_cpu = jax.default_backend() == "cpu"  # where all devices share one memory
    room = (available() - 2 * shared) // (2 * each)
    return max(room if on_cpu else room * devices, 1)


def seconds_per_layout(agents: Agent, keys: jax.Array, config: Config, env: Env | HostEnv) -> dict[Layout, float]:
    """Returns the seconds per update of one member in each layout, measured on dummy data.

    The data are a dataset of zeros, or a replay buffer of zeros without a dataset. Not measured are agents that search
    trees on the host, where members wait for each other, and agents that learn from neither.
    """
    data, _ = abstract_data(config, env)
    if data is None:
        data = replay_of(config, env)
    if data is None or data.forest is not None:
        return {"map": 0.0}
    ring = zeros(data)

    def updates(agent: Agent, state: PyTree, key: jax.Array) -> PyTree:
        return loop.updates(agent, state, (ring,), key, UPDATES)[0]

    seconds: dict[Layout, float] = {}
    shapes = jax.eval_shape(jax.vmap(lambda agent, key: agent.init(key, env.spec)), agents, keys)
    states = jax.tree.map(lambda x: jnp.full(x.shape, 1e-2).astype(x.dtype), shapes)
    for layout in ("vmap", "map"):
        program = jax.jit(functools.partial(Lift(layout), updates), compiler_options=compiling.options())
        jax.block_until_ready(program(agents, states, keys))
        start = time.perf_counter()
        jax.block_until_ready(program(agents, states, keys))
        seconds[layout] = (time.perf_counter() - start) / (UPDATES * len(keys))
    return seconds


def replay_of(config: Config, env: Env | HostEnv) -> Ring | None:
    """Returns the shapes of a run's replay buffer; None if no phase learns from one."""
    *_, carry = abstract(config, env)
    return None if carry.world is None else carry.world.replay


def zeros(ring: Ring) -> Ring:
    """Returns a dataset of the given shapes whose rows are all zero and valid, as one long episode."""
    full = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), ring)
    last = jnp.full_like(full.head, full.valid.shape[1] - 1)
    return dataclasses.replace(full, valid=full.valid.at[:, :-1].set(True), head=last, count=last)
