"""Small pieces that several agents share: views of a batch, and the check of a field's range."""

from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.errors import UserError
from jaxrl.types import Batch

CutWindows: TypeAlias = Literal["keep", "drop"]
"""Whether windows that an episode's end cuts short train the critic."""


def flat_actions(batch: Batch) -> jax.Array:
    """Returns the windows' actions as flat chunks [B, H * A]."""
    return batch.actions.reshape(len(batch.actions), -1)


def step_mask(batch: Batch) -> jax.Array:
    """Returns the windows' validity for every entry of a flat chunk, [B, H * A]."""
    return jnp.repeat(batch.valid, batch.actions.shape[-1], axis=-1)


def critic_weight(batch: Batch, chunk: int, cut_windows: CutWindows) -> jax.Array:
    """Returns the weight [B] of each window in the critic's loss.

    "keep": 1 where all `chunk` actions that the critic sees happened, or the task ended on the way, after which
    nothing matters. "drop": 1 where the whole window happened, as in the official code of QC and its kin.
    """
    if cut_windows == "drop":
        return batch.valid[:, -1]
    return jnp.maximum(batch.valid[:, chunk - 1], batch.terminated)


def unflatten(chunk: jax.Array, action: int) -> jax.Array:
    """Returns flat chunks [B, H * A] as [B, H, A]."""
    return chunk.reshape(len(chunk), -1, action)


def check_range(agent: Any, **bounds: tuple[float | None, float | None]) -> None:
    """Raises UserError for the first field whose value lies outside its closed [low, high]; None leaves a side open."""
    for name, (low, high) in bounds.items():
        values = np.asarray(getattr(agent, name))
        if (low is not None and not (values >= low).all()) or (high is not None and not (values <= high).all()):
            allowed = f"at least {low}" if high is None else f"at most {high}" if low is None else f"in [{low}, {high}]"
            raise UserError(f"{type(agent).__name__}.{name} = {getattr(agent, name)}: must be {allowed}")
