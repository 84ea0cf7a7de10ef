"""Saving and loading the carry (orbax), so that a run that was stopped anywhere goes on bit for bit."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from jaxrl.errors import UserError
from jaxrl.types import PyTree

KEEP = 2  # the newest, and one to fall back on should its file be damaged


def open_folder(folder: Path) -> ocp.training.Checkpointer:
    """Returns a folder's checkpointer. Saves are atomic; what a killed process left half written is removed."""
    policy = ocp.training.preservation_policies.LatestN(KEEP)
    return ocp.training.Checkpointer(
        str(folder.absolute()),
        preservation_policy=policy,  # ty: ignore[invalid-argument-type]
        cleanup_tmp_directories=True,
    )


def save(folder: ocp.training.Checkpointer, epoch: int, carry: PyTree) -> None:
    """Writes the carry after an epoch; on return it is whole on disk. Raises UserError when the disk is full."""
    try:
        folder.save(epoch, carry, overwrite=True)
    except Exception as error:
        if "No space left" in str(error) or "RESOURCE_EXHAUSTED" in str(error):
            raise UserError(f"no space left on the device for the checkpoint of epoch {epoch}") from error
        raise


def epochs(folder: ocp.training.Checkpointer) -> list[int]:
    """Returns the epochs of which there is a checkpoint, ascending."""
    return sorted(int(checkpoint.step) for checkpoint in folder.checkpoints)


def load(
    folder: ocp.training.Checkpointer, abstract: Callable[[int], PyTree], say: Callable[[str], Any] = print
) -> tuple[int, PyTree] | None:
    """Returns (epoch, carry) of the newest checkpoint that can be read, or None where there is none.

    `abstract(epoch)` gives the shapes that the carry has after that epoch. A checkpoint that cannot be read is named,
    and the one before it is used. One of other shapes is a UserError: it belongs to another agent or environment.
    """
    for epoch in reversed(epochs(folder)):
        expected = abstract(epoch)
        check_same_shapes(folder, epoch, expected)
        try:
            return epoch, folder.load(epoch, _placed(expected))
        except Exception as error:  # whatever a damaged file makes the readers underneath raise
            say(f"checkpoint of epoch {epoch} is damaged ({type(error).__name__}), using the one before it")
    return None


def check_same_shapes(folder: ocp.training.Checkpointer, epoch: int, expected: PyTree) -> None:
    """Raises UserError where a checkpoint holds other leaves than expected, naming the first that differs."""
    try:
        with warnings.catch_warnings(action="ignore"):
            stored = folder.checkpointables_metadata(epoch).metadata["state"]
    except Exception:
        return  # unreadable: loading will say so
    found, wanted = _shapes(stored), _shapes(expected)
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"checkpoint of epoch {epoch} does not fit this agent and environment: {name} is "
                f"{found.get(name, 'absent')} in the checkpoint and {wanted.get(name, 'absent')} here"
            )


def _shapes(tree: PyTree) -> dict[str, str]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_name(path): str(tuple(leaf.shape)) for path, leaf in leaves if hasattr(leaf, "shape")}


def _name(path: tuple) -> str:
    parts = (getattr(k, "name", getattr(k, "key", getattr(k, "idx", k))) for k in path)
    return "/".join(str(part) for part in parts)


def _placed(abstract: PyTree) -> PyTree:
    """Returns the abstract carry with a place for each leaf: the default device."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract)
