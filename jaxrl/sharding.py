"""One large run on several devices: environments, replay and batches are sharded, the agent is replicated.

XLA partitions the computation along these arrays and sums the devices' gradients. Without a mesh in scope, nothing here
has an effect. Sweeps do not use this, see `jaxrl.sweeps.population`.
"""

import contextlib
from collections.abc import Generator
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxrl.errors import UserError
from jaxrl.types import Agent, Env, HostEnv, PyTree, requirements

AXIS = "devices"


@contextlib.contextmanager
def across(count: int) -> Generator[None]:
    """A context in which runs are sharded over `count` devices of this process; 1 changes nothing."""
    if count == 1:
        yield
        return
    with jax.set_mesh(Mesh(np.array(jax.local_devices()[:count]), (AXIS,), axis_types=(AxisType.Auto,))):
        yield


def check(agent: Agent, env: Env | HostEnv, envs: int, count: int) -> None:
    """Raises UserError if a run of `envs` environments cannot be sharded over `count` devices.

    Called before anything is built.
    """
    here, batch = len(jax.local_devices()), requirements(agent).batch
    if not 1 <= count <= here:
        raise UserError(f"devices = {count}: there are {here}")
    if count > 1 and isinstance(env, HostEnv):
        raise UserError(f"devices = {count}: this environment's simulators run on the CPU, use one device")
    for name, size in (("the agent's batch", batch), ("schedule.envs", envs)):
        if size is not None and size % count:
            raise UserError(f"{name} = {size}: must be a multiple of the {count} devices")


def several() -> bool:
    """Returns whether a context of several devices is active."""
    return AXIS in jax.sharding.get_abstract_mesh().axis_names


def spec_of(leaf: Any, devices: int) -> PartitionSpec:
    """Returns the partition of an array: its first axis over the devices if divisible, else replicated."""
    return PartitionSpec(AXIS) if leaf.ndim and leaf.shape[0] % devices == 0 else PartitionSpec()


def lay(x: Any, spec: PartitionSpec) -> Any:
    """Returns an array placed on the devices in scope: constrained within a program, moved outside of one."""
    return jax.lax.with_sharding_constraint(x, spec) if isinstance(x, Tracer) else jax.device_put(x, spec)


def spread(tree: PyTree) -> PyTree:
    """Returns trees [N, ...] sharded over the devices in scope, inside or outside of a program."""
    if not several():
        return tree
    count = jax.sharding.get_abstract_mesh().size
    return jax.tree.map(lambda x: lay(x, spec_of(x, count)), tree)


def shared(tree: PyTree) -> PyTree:
    """Returns a tree replicated on the devices in scope, inside or outside of a program."""
    if not several():
        return tree
    return jax.tree.map(lambda x: lay(x, PartitionSpec()), tree)
