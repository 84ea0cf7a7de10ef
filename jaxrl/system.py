"""What this process runs on: processor cores, versions of packages, settings of JAX."""

import os
from typing import Any


def cores() -> int:
    """Returns how many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "mujoco", "mujoco-mjx", "brax", "numpy", "jaxrl")


def jax_setting(name: str) -> Any:
    """Returns a setting of JAX; not every version declares them to type checkers."""
    import jax  # late: worker processes, which ask for cores alone, do without

    return getattr(jax.config, f"jax_{name}")
