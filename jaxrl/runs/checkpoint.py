"""Saving and loading the carry with orbax, so that an interrupted run resumes bit for bit.

checkpoints/EPOCH/        the carry after that epoch, as orbax writes it
checkpoints/EPOCH.json    the sha256 of each of its files, written last: a checkpoint that does not match is not used
"""

import contextlib
import hashlib
import itertools
import json
import logging
import shutil
import sys
from collections.abc import Callable, Generator, Iterable
from pathlib import Path

import jax
from orbax.checkpoint import v1 as ocp

from jaxrl.errors import UserError
from jaxrl.runs.jsonlines import write_json
from jaxrl.types import PyTree

KEEP = 2  # the latest, and a fallback in case it is damaged


def save(folder: Path, epoch: int, carry: PyTree) -> None:
    """Writes the carry after an epoch and removes all but the latest two; on return it is completely on disk.

    Raises UserError when the disk is full, leaving earlier checkpoints unchanged.
    """
    (folder / f"{epoch}.json").unlink(missing_ok=True)
    try:
        with _quiet():
            ocp.save(str((folder / str(epoch)).absolute()), carry, overwrite=True)
        write_json(folder / f"{epoch}.json", checksums(folder / str(epoch)))
    except Exception as error:  # orbax re-raises arbitrary exceptions of its threads
        keep(folder, [old for old in epochs(folder) if old != epoch])
        if any(reason in str(error) for reason in ("No space left", "Disk quota")):
            raise UserError(f"no space left in {folder} for epoch {epoch}: free some, then use --resume") from error
        raise
    keep(folder, epochs(folder)[-KEEP:])


def epochs(folder: Path) -> list[int]:
    """Returns the epochs that have a checkpoint, complete or not, in ascending order."""
    return sorted({int(p.stem) for p in folder.glob("*") if p.stem.isdigit() and p.suffix in ("", ".json")})


def keep(folder: Path, wanted: Iterable[int]) -> None:
    """Removes the checkpoints of other epochs, and partial files of killed processes."""
    names = {name for epoch in wanted for name in (f"{epoch}", f"{epoch}.json")}
    for entry in folder.glob("*"):
        if entry.name not in names:
            shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink()


def load(folder: Path, abstract: Callable[[int], PyTree]) -> tuple[int, PyTree] | None:
    """Returns (epoch, carry) of the latest intact checkpoint, or None without one.

    `abstract(epoch)` returns the shapes of the carry after that epoch, or a dict of some of its fields, to load only
    these. A damaged checkpoint is reported on stderr and the previous one is used. Raises UserError for an intact
    checkpoint with different shapes: it belongs to another agent or environment.
    """
    newest_first = epochs(folder)[::-1]
    for epoch, before in itertools.zip_longest(newest_first, newest_first[1:]):
        if wrong := damage(folder, epoch):
            instead = "there is none before it" if before is None else f"trying that of epoch {before}"
            print(f"checkpoint of epoch {epoch} is damaged ({wrong}): {instead}", file=sys.stderr)
            continue
        path, expected = folder / str(epoch), abstract(epoch)
        check_same_shapes(path, expected)
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context, _quiet():
            return epoch, ocp.load(str(path.absolute()), _placed(expected))
    return None


def damage(folder: Path, epoch: int) -> str | None:
    """Returns a description of the damage to a checkpoint's files, or None if intact."""
    try:
        recorded = json.loads((folder / f"{epoch}.json").read_text())
    except (FileNotFoundError, ValueError):
        return f"{epoch}.json cannot be read"
    found = checksums(folder / str(epoch))
    for name, checksum in recorded.items():
        if found.get(name) != checksum:
            return f"{name} is {'changed' if name in found else 'missing'}"
    return None


def checksums(folder: Path) -> dict[str, str]:
    """Returns the sha256 of every file below a folder, by relative path."""
    result = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            result[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return result


def check_same_shapes(path: Path, expected: PyTree) -> None:
    """Raises UserError if a checkpoint's leaves are not the expected ones, naming the first that differs."""
    wanted, found = _shapes(expected), _shapes(ocp.metadata(str(path.absolute())).metadata)
    fields = {name.partition("/")[0] for name in wanted}
    for name in sorted(found.keys() | wanted.keys()):
        if name.partition("/")[0] in fields and found.get(name) != wanted.get(name):
            raise UserError(
                f"checkpoint {path} does not fit this agent and environment: {name} is "
                f"{found.get(name, 'absent')} there and {wanted.get(name, 'absent')} here"
            )


def _shapes(tree: PyTree) -> dict[str, str]:
    """Returns the shape of every leaf by its path; random keys have the shape of their key data."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): str(_stored_shape(leaf)) for path, leaf in leaves}


def _stored_shape(leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return tuple((jax.eval_shape(jax.random.key_data, leaf) if is_key else leaf).shape)


def _placed(abstract: PyTree) -> PyTree:
    """Returns the abstract carry with every leaf placed on the default device."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract)


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Suppresses orbax's printing of tracebacks, since it also raises the errors."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
