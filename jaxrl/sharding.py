"""One large run on several devices: environments, replay and batches lie across them, the agent is on each.

XLA divides the work along these arrays; where gradients meet it adds the devices' parts up. Without a mesh in scope
nothing here does anything. (Members of a sweep need none of this: `jaxrl.sweeps.population`.)
"""

import contextlib
from collections.abc import Generator
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxrl.errors import UserError
from jaxrl.types import PyTree, on_host

AXIS = "devices"


@contextlib.contextmanager
def across(count: int) -> Generator[None]:
    """A context in which runs are spread over so many devices of this process; 1 is no context at all."""
    if count == 1:
        yield
        return
    with jax.set_mesh(Mesh(np.array(jax.local_devices()[:count]), (AXIS,), axis_types=(AxisType.Auto,))):
        yield


def check(config: Any, env: Any, count: int) -> None:
    """Raises UserError where a run cannot be spread over so many devices, before anything is built."""
    here = len(jax.local_devices())
    if not 1 <= count <= here:
        raise UserError(f"devices = {count}: there are {here}")
    if count > 1 and on_host(env):
        raise UserError(f"devices = {count}: the simulators of {config.env!r} step on the CPU, one device is enough")
    for name, size in (("agent.batch_size", config.agent.batch_size), ("schedule.envs", config.schedule.envs)):
        if size % count:
            raise UserError(f"{name} = {size}: must be a multiple of the {count} devices")


def several() -> bool:
    """Whether there is a context of several devices."""
    return AXIS in jax.sharding.get_abstract_mesh().axis_names


def spec_of(leaf: Any, devices: int) -> PartitionSpec:
    """Returns how an array lies: its first axis across the devices, if it can be divided so."""
    return PartitionSpec(AXIS) if leaf.ndim and leaf.shape[0] % devices == 0 else PartitionSpec()


def lay(x: Any, spec: PartitionSpec) -> Any:
    """Returns an array as it is to lie on the devices in scope: a rule for the program, or moved there."""
    return jax.lax.with_sharding_constraint(x, spec) if isinstance(x, Tracer) else jax.device_put(x, spec)


def spread(tree: PyTree) -> PyTree:
    """Returns trees [N, ...] across the devices in scope, within a program or not."""
    if not several():
        return tree
    count = jax.sharding.get_abstract_mesh().size
    return jax.tree.map(lambda x: lay(x, spec_of(x, count)), tree)


def shared(tree: PyTree) -> PyTree:
    """Returns a tree whole on each of the devices in scope, within a program or not."""
    if not several():
        return tree
    return jax.tree.map(lambda x: lay(x, PartitionSpec()), tree)
