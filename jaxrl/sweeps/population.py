"""A sweep: many runs as one program, each with its own Scalars and seed, over one dataset.

The functions of `jaxrl.training.loop` are lifted over a leading axis of members, by `vmap` or sequentially, and that
axis is sharded over the devices. Everything specific to sweeps is in this package, not in the layers below: which
members are active, the record of each member, and resuming.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxrl.replay.ring import Ring
from jaxrl.rollout import device as ro
from jaxrl.rollout.executors import OPEN_LOOP, Execution
from jaxrl.training import compiling, loop
from jaxrl.training.loop import Carry
from jaxrl.training.schedule import Schedule
from jaxrl.types import Agent, Env, Fitting, HostEnv, Metrics, Phase, PyTree, pytree

T = TypeVar("T")
AXIS = "members"
RUNNING = 0
Layout = Literal["vmap", "map"]


# Functions of one member, lifted


@dataclasses.dataclass(frozen=True)
class Lift:
    """Lifts a function of one member to M members, whose trees have a leading axis [M].

    "vmap" computes all at once, which fills a large device; "map" computes one member after the other, which can be
    faster on a CPU, and skips stopped members. On D devices, each has M / D members.
    """

    layout: Layout
    devices: int = 1

    def __call__(self, function: Callable[..., PyTree], *members: PyTree) -> PyTree:
        """Returns the stacked results of the function for each member."""
        if self.layout == "vmap":
            return jax.vmap(function)(*members)
        if self.devices == 1:
            return jax.lax.map(lambda one: function(*one), members)
        lanes = jax.tree.map(lambda x: x.reshape(self.devices, len(x) // self.devices, *x.shape[1:]), members)
        found = jax.vmap(lambda lane: jax.lax.map(lambda one: function(*one), lane))(lanes)
        return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), found)


@pytree
class Population:
    """The full state of the members that run together, leaves [M, ...]. A checkpoint is this tree."""

    carry: Carry
    stopped: jax.Array  # [M] int32: 0 while running; e if it diverged in epoch e; -e if it was dropped after epoch e


def begin(
    agents: Agent,
    env: Env | HostEnv,
    schedule: Schedule,
    keys: jax.Array,
    lift: Lift,
    execution: Execution = OPEN_LOOP,
) -> Population:
    """Returns the members before their first epoch."""
    carry = lift(lambda agent, key: loop.begin(agent, env, schedule, key, execution), agents, keys)
    return Population(carry, jnp.zeros(len(keys), jnp.int32))


def fit(agents: Fitting, population: Population, dataset: Ring, lift: Lift) -> Population:
    """Returns the members with their states fitted to the data, see `loop.fit`."""
    return dataclasses.replace(
        population, carry=lift(lambda agent, c: loop.fit(agent, c, dataset), agents, population.carry)
    )


def enter(agents: Agent, phase: Phase, population: Population, lift: Lift) -> Population:
    """Returns the members at the start of a phase."""
    return dataclasses.replace(
        population, carry=lift(lambda agent, c: loop.enter(agent, phase, c), agents, population.carry)
    )


def epoch(
    agents: Agent,
    env: Env,
    phase: Phase,
    population: Population,
    dataset: Ring | None,
    lift: Lift,
    execution: Execution = OPEN_LOOP,
    index: jax.Array | None = None,
) -> tuple[Population, Metrics]:
    """Returns the members after one epoch, and their metrics [M], which are meaningless for stopped members.

    `index` is the number of earlier epochs, shared by all that run.

    A member whose agent state becomes non-finite is stopped, with its agent reset to that before the epoch. Continuing
    would not affect other members, but its simulator could become slow.
    """

    @jax.jit  # so that it is traced once, not again for the shapes of its metrics
    def go(agent: Agent, carry: Carry) -> tuple[Carry, Metrics, jax.Array]:
        after, metrics = loop.epoch(agent, env, phase, carry, dataset, execution, index)
        finite = loop.all_finite(after.agent)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after.agent, carry.agent)
        return dataclasses.replace(after, agent=kept), metrics, finite

    def stay(agent: Agent, carry: Carry) -> tuple[Carry, Metrics, jax.Array]:
        metrics = jax.eval_shape(lambda: go(agent, carry)[1])
        return carry, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics), jnp.array(True)

    def one(agent: Agent, carry: Carry, stopped: jax.Array) -> tuple[Carry, Metrics, jax.Array]:
        if lift.layout == "map":  # under vmap both branches would be computed
            carry, metrics, finite = jax.lax.cond(stopped == RUNNING, go, stay, agent, carry)
        else:
            carry, metrics, finite = go(agent, carry)
        return carry, metrics, jnp.where((stopped == RUNNING) & ~finite, carry.epoch, stopped)

    carry, metrics, stopped = lift(one, agents, population.carry, population.stopped)
    return Population(carry, stopped), metrics


def evaluate(
    agents: Agent,
    env: Env,
    episodes: int,
    states: PyTree,
    key: jax.Array,
    lift: Lift,
    execution: Execution = OPEN_LOOP,
) -> ro.Episodes:
    """Returns every member's evaluation episodes, leaves [M, episodes], same seeds for each; without tracks."""

    def one(agent: Agent, state: PyTree) -> ro.Episodes:
        found = loop.evaluate(agent, env, episodes, state, key, execution)
        return dataclasses.replace(found, track=jnp.zeros(()))

    return lift(one, agents, states)


class Programs:
    """These functions compiled for a set of devices: members are sharded, shared data are replicated."""

    def __init__(self, env: Env | HostEnv, layout: Layout, devices: list[jax.Device] | None = None) -> None:
        """Sets up the functions without compiling; by default for the first device of this process."""
        self.layout, self.devices = layout, devices or jax.local_devices()[:1]
        mesh = Mesh(np.array(self.devices), (AXIS,), axis_types=(AxisType.Auto,))
        self.spread, self.whole = NamedSharding(mesh, PartitionSpec(AXIS)), NamedSharding(mesh, PartitionSpec())
        lifted: dict[str, Any] = {"lift": Lift(layout, len(self.devices))}
        here: dict[str, Any] = {"out_shardings": self.spread}
        self.begin = jax.jit(functools.partial(begin, env=env, **lifted), static_argnames=("schedule",), **here)
        self.fit = jax.jit(functools.partial(fit, **lifted), **here)
        self.enter = jax.jit(functools.partial(enter, **lifted), static_argnames=("phase",), **here)
        self.epoch = compiling.Measuring(
            functools.partial(epoch, env=env, **lifted),
            static_argnames=("phase",),
            donate_argnames=("population",),
            **here,
        )
        self.evaluate = jax.jit(functools.partial(evaluate, env=env, **lifted), static_argnames=("episodes",), **here)

    def place(self, tree: PyTree, room: int = 0) -> PyTree:
        """Returns trees [M, ...] sharded over the devices, padded to equal counts per device and at least `room`.

        The last member is repeated as padding; its results are ignored.
        """

        def one(x: Any) -> jax.Array:
            extra = self.size(max(len(x), room)) - len(x)
            return jax.device_put(jnp.concatenate([x, jnp.repeat(x[-1:], extra, axis=0)]) if extra else x, self.spread)

        return jax.tree.map(one, tree)

    def size(self, room: int) -> int:
        """Returns `room` rounded up to a multiple of the number of devices."""
        return -(-room // len(self.devices)) * len(self.devices)

    def pad(self, population: Population, count: int, room: int = 0) -> Population:
        """Returns `count` members sharded over the devices, with the padding marked as stopped."""
        population = self.place(population, room)
        stopped = np.where(np.arange(len(population.stopped)) < count, np.asarray(population.stopped), -1).astype(
            np.int32
        )
        return dataclasses.replace(population, stopped=jax.device_put(stopped, self.spread))

    def share(self, tree: PyTree) -> PyTree:
        """Returns a tree shared by all members, replicated on every device."""
        return jax.device_put(tree, self.whole)


def programs(env: Env | HostEnv, layout: Layout, devices: tuple[jax.Device, ...]) -> Programs:
    """Returns the compiled functions of an environment, cached."""
    return _programs(env, layout, devices)  # ty: ignore[invalid-argument-type]  (environments are static arguments)


@functools.lru_cache(maxsize=4)
def _programs(env: Env | HostEnv, layout: Layout, devices: tuple[jax.Device, ...]) -> Programs:
    return Programs(env, layout, list(devices))


def stacked(agents: list[T]) -> T:
    """Returns agents of equal structure stacked into one, whose Scalars are arrays [M] in float32."""
    return jax.tree.map(lambda *x: jnp.asarray(np.array(x, np.float32)), *agents)


def keys_of(seeds: Iterable[int]) -> jax.Array:
    """Returns the keys [M] of runs with these seeds, equal to those of single runs."""
    return jnp.stack([jax.random.key(seed) for seed in seeds])
