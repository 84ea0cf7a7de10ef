"""A sweep: many runs as one program, each with its own Scalars and seed, over one dataset.

The functions of `jaxrl.training.loop` are lifted over a leading axis of members, by `vmap` or one member after the
other, and that axis lies across the devices. What is particular to a sweep is here and nowhere below: who is still in
it, what is written about each member, and how a stopped sweep goes on.
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
    """How a function of one member becomes one of M members, whose trees have a leading axis [M].

    "vmap" computes all at once, which fills a large device; "map" one member after the other, which on a CPU can be
    faster, and skips members that have left. On D devices, each has M / D members.
    """

    layout: Layout
    devices: int = 1

    def __call__(self, function: Callable[..., PyTree], *members: PyTree) -> PyTree:
        """Returns what the function returns for each member, stacked."""
        if self.layout == "vmap":
            return jax.vmap(function)(*members)
        if self.devices == 1:
            return jax.lax.map(lambda one: function(*one), members)
        lanes = jax.tree.map(lambda x: x.reshape(self.devices, len(x) // self.devices, *x.shape[1:]), members)
        found = jax.vmap(lambda lane: jax.lax.map(lambda one: function(*one), lane))(lanes)
        return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), found)


@pytree
class Population:
    """All that changes in the members that run together, leaves [M, ...]. A checkpoint is this tree."""

    carry: Carry
    stopped: jax.Array  # [M] int32: 0 while a member runs; e after epoch e, in which it diverged; -e where dropped then


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
    """Returns the members with what their states hold of the data, see `loop.fit`."""
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
) -> tuple[Population, Metrics]:
    """Returns the members after one epoch, and their metrics [M], which mean nothing for those that have left.

    A member whose state is no longer finite leaves, with its agent as it was before the epoch: what it went on to
    compute could harm no other, but its simulator could take long over it.
    """

    @jax.jit  # so that it is traced once, not again for the shapes of its metrics
    def go(agent: Agent, carry: Carry) -> tuple[Carry, Metrics, jax.Array]:
        after, metrics = loop.epoch(agent, env, phase, carry, dataset, execution)
        finite = all_finite(after.agent)
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


def all_finite(tree: PyTree) -> jax.Array:
    """Returns whether every number in a tree is finite, []."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in leaves]))


def evaluate(
    agents: Agent,
    env: Env,
    episodes: int,
    states: PyTree,
    key: jax.Array,
    lift: Lift,
    execution: Execution = OPEN_LOOP,
) -> ro.Episodes:
    """Returns every member's evaluation episodes, leaves [M, episodes], the same ones for each; no track of them."""

    def one(agent: Agent, state: PyTree) -> ro.Episodes:
        found = loop.evaluate(agent, env, episodes, state, key, execution)
        return dataclasses.replace(found, track=jnp.zeros(()))

    return lift(one, agents, states)


class Programs:
    """These functions compiled for a set of devices: members across them, what members share on each."""

    def __init__(self, env: Env | HostEnv, layout: Layout, devices: list[jax.Device] | None = None) -> None:
        """Compiles nothing yet; by default for the first device of this process."""
        self.layout, self.devices = layout, devices or jax.local_devices()[:1]
        mesh = Mesh(np.array(self.devices), (AXIS,), axis_types=(AxisType.Auto,))
        self.spread, self.whole = NamedSharding(mesh, PartitionSpec(AXIS)), NamedSharding(mesh, PartitionSpec())
        lifted: dict[str, Any] = {"lift": Lift(layout, len(self.devices))}
        here: dict[str, Any] = {"out_shardings": self.spread}
        self.begin = jax.jit(functools.partial(begin, env=env, **lifted), static_argnames=("schedule",), **here)
        self.fit = jax.jit(functools.partial(fit, **lifted), **here)
        self.enter = jax.jit(functools.partial(enter, **lifted), static_argnames=("phase",), **here)
        self.epoch = jax.jit(
            functools.partial(epoch, env=env, **lifted),
            static_argnames=("phase",),
            donate_argnames=("population",),
            compiler_options=compiling.options(),
            **here,
        )
        self.evaluate = jax.jit(functools.partial(evaluate, env=env, **lifted), static_argnames=("episodes",), **here)

    def place(self, tree: PyTree, room: int = 0) -> PyTree:
        """Returns trees [M, ...] across the devices, as many members on each and `room` at least.

        The last member is repeated for that; what the repetitions compute is never looked at.
        """

        def one(x: Any) -> jax.Array:
            extra = self.size(max(len(x), room)) - len(x)
            return jax.device_put(jnp.concatenate([x, jnp.repeat(x[-1:], extra, axis=0)]) if extra else x, self.spread)

        return jax.tree.map(one, tree)

    def size(self, room: int) -> int:
        """Returns how many members the program has where there is to be room for so many: as many on each device."""
        return -(-room // len(self.devices)) * len(self.devices)

    def pad(self, population: Population, count: int, room: int = 0) -> Population:
        """Returns `count` members across the devices, with the repetitions marked as having left."""
        population = self.place(population, room)
        stopped = np.where(np.arange(len(population.stopped)) < count, np.asarray(population.stopped), -1).astype(
            np.int32
        )
        return dataclasses.replace(population, stopped=jax.device_put(stopped, self.spread))

    def share(self, tree: PyTree) -> PyTree:
        """Returns a tree that all members share, on every device."""
        return jax.device_put(tree, self.whole)


def programs(env: Env | HostEnv, layout: Layout, devices: tuple[jax.Device, ...]) -> Programs:
    """Returns the compiled functions of an environment; the same ones when they are asked for again."""
    return _programs(env, layout, devices)  # ty: ignore[invalid-argument-type]  (environments are static arguments)


@functools.lru_cache(maxsize=4)
def _programs(env: Env | HostEnv, layout: Layout, devices: tuple[jax.Device, ...]) -> Programs:
    return Programs(env, layout, list(devices))


def stacked(agents: list[T]) -> T:
    """Returns agents of one shape as one, whose Scalars are arrays [M] in float32."""
    return jax.tree.map(lambda *x: jnp.asarray(np.array(x, np.float32)), *agents)


def keys_of(seeds: Iterable[int]) -> jax.Array:
    """Returns the keys [M] of runs with these seeds, as they would have them alone."""
    return jnp.stack([jax.random.key(seed) for seed in seeds])
