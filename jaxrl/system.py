"""What this process runs on: processor cores, versions of packages, settings of JAX."""

import os
from typing import Any

from jaxrl.errors import UserError


def cores() -> int:
    """Returns how many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "mujoco", "mujoco-mjx", "brax", "numpy", "jaxrl")


def jax_setting(name: str) -> Any:
    """Returns a setting of JAX; not every version declares them to type checkers."""
    import jax  # late: worker processes, which ask for cores alone, do without

    return getattr(jax.config, f"jax_{name}")


def check_precision() -> None:
    """Raises UserError if JAX is set to 64-bit numbers, which the programs here do not support."""
    if jax_setting("enable_x64"):
        raise UserError(
            "JAX_ENABLE_X64 is on: runs compute with 32-bit numbers; unset it, or call "
            "jax.config.update('jax_enable_x64', False)"
        )
