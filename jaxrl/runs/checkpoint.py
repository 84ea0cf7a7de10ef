"""Saving and loading the carry with orbax, so that an interrupted run resumes bit for bit.

checkpoints/EPOCH/        the carry after that epoch, as orbax writes it
checkpoints/EPOCH.json    the sha256 of each of its files, written last: a checkpoint that does not match is not used
checkpoints.json          the latest epoch, so that checkpoints that are gone (a disk not mounted) are missed

Only these files, and what a killed process left of them, are ever removed.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxrl.errors import UserError
from jaxrl.runs.jsonlines import unwritable, write_json
from jaxrl.runs.lock import reading, unread
from jaxrl.types import PyTree

KEEP = 2  # the latest, and a fallback in case it is damaged
READ_BACK = 2**28  # bytes; larger fields of a carry, such as replay, are compared in their shapes alone
_PARTIAL = re.compile(r"\d+(\.json\.partial|\.orbax-checkpoint-tmp.*)")
_PATTERN = re.compile(r"[\[\]*?\\]")


def save(folder: Path, epoch: int, carry: PyTree) -> None:
    """Writes the carry after an epoch and removes all but the latest two; on return it is completely on disk.

    The first checkpoint in a folder is read back. Raises UserError if it cannot be, and when the folder cannot be
    written or the disk is full, leaving earlier checkpoints unchanged.
    """
    first = not epochs(folder)
    _check_writable(folder, epoch)
    (folder / f"{epoch}.json").unlink(missing_ok=True)
    try:
        with readable(folder) as place, _quiet():
            ocp.save(str(place / str(epoch)), carry, overwrite=True)
        write_json(folder / f"{epoch}.json", checksums(folder / str(epoch)))
        if first:
            check_read_back(folder, epoch, carry)
        write_json(_latest(folder), {"epoch": epoch})
    except Exception as error:  # orbax re-raises arbitrary exceptions of its threads
        keep(folder, [old for old in epochs(folder) if old != epoch])
        if any(reason in str(error) for reason in ("No space left", "Disk quota")):
            raise UserError(f"no space left in {folder} for epoch {epoch}: free some, then use --resume") from error
        if isinstance(error, OSError):
            raise unwritable(folder / str(epoch), error) from error
        raise
    keep(folder, epochs(folder)[-KEEP:])


def _check_writable(folder: Path, epoch: int) -> None:
    """Raises UserError if nothing can be written in a folder: orbax would leave threads that wait forever."""
    try:
        folder.mkdir(exist_ok=True)  # not what it is in: a run's folder that vanished must not come back
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise unwritable(folder / str(epoch), error) from error


def check_read_back(folder: Path, epoch: int, carry: PyTree) -> None:
    """Raises UserError unless a checkpoint gives the carry that was saved."""
    fields: dict[str, Any] = (
        carry
        if isinstance(carry, dict)
        else {field.name: getattr(carry, field.name) for field in dataclasses.fields(carry)}
    )
    small = {name: value for name, value in fields.items() if _bytes(value) <= READ_BACK}
    try:
        check_same_shapes(folder / str(epoch), jax.eval_shape(lambda: carry))
        found = _restore(folder, epoch, jax.eval_shape(lambda: small))
        same = all(map(np.array_equal, map(_bits, jax.tree.leaves(found)), map(_bits, jax.tree.leaves(small))))
        reason = "its numbers differ"
    except Exception as error:  # whatever orbax cannot read
        same, reason = False, str(error).splitlines()[0]
    if not same:
        raise UserError(f"checkpoint {folder / str(epoch)} cannot be read back: {reason}; name another folder")


def _bytes(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _bits(leaf: jax.Array) -> np.ndarray:
    """Returns the bytes of a leaf, which are equal where NaN is."""
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.ascontiguousarray(jax.random.key_data(leaf) if is_key else leaf).reshape(-1).view(np.uint8)


def epochs(folder: Path) -> list[int]:
    """Returns the epochs that have a checkpoint, complete or not, in ascending order."""
    return sorted({int(path.stem) for path in _entries(folder) if re.fullmatch(r"\d+(\.json)?", path.name)})


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def keep(folder: Path, wanted: Iterable[int]) -> None:
    """Removes the checkpoints of other epochs, unless another process reads them, and files of killed processes."""
    for path in filter(lambda path: _PARTIAL.fullmatch(path.name), _entries(folder)):
        _remove(path)
    for epoch in set(epochs(folder)) - set(wanted):
        with unread(folder / f"{epoch}.json") as free:
            if free:
                _remove(folder / f"{epoch}.json")
                _remove(folder / str(epoch))


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def keep_until(folder: Path, epoch: int) -> None:
    """Moves damaged checkpoints after an epoch to EPOCH.damaged, and removes those that were never whole."""
    after = [later for later in epochs(folder) if later > epoch]
    for later in (later for later in after if (folder / f"{later}.json").exists() and (folder / str(later)).exists()):
        aside = _free(folder / f"{later}.damaged")
        (folder / str(later)).rename(aside)
        (folder / f"{later}.json").rename(aside.with_name(f"{aside.name}.json"))
        print(f"the damaged checkpoint is now {aside}", file=sys.stderr)
    keep(folder, [kept for kept in epochs(folder) if kept <= epoch])


def set_aside(folder: Path) -> None:
    """Moves a folder of checkpoints, or the link to one, to FOLDER.dropped, to start over. Says so on stderr."""
    _latest(folder).unlink(missing_ok=True)
    if folder.is_symlink() or folder.exists():
        aside = _free(folder.with_name(f"{folder.name}.dropped"))
        folder.rename(aside)
        print(f"the checkpoints from before are now in {aside}", file=sys.stderr)


def _free(path: Path) -> Path:
    """Returns a path at which there is nothing: this one, or one with a number behind it."""
    names = itertools.chain([path], (path.with_name(f"{path.name}-{count}") for count in itertools.count(2)))
    return next(path for path in names if not path.exists() and not path.is_symlink())


def remove_all(folder: Path) -> None:
    """Removes the checkpoints in a folder, and the folder if nothing else is in it."""
    keep(folder, [])
    _latest(folder).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _latest(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")


def check_none_missing(folder: Path, remedy: str) -> None:
    """Raises UserError, ending in a remedy, if checkpoints were written to a folder in which none can be read."""
    if _latest(folder).exists():
        raise UserError(
            f"{folder} has no checkpoint that can be read, though there were some: is its disk there? {remedy}"
        )


def load(folder: Path, abstract: Callable[[int], PyTree]) -> tuple[int, PyTree] | None:
    """Returns (epoch, carry) of the latest intact checkpoint, or None without one.

    `abstract(epoch)` returns the shapes of the carry after that epoch, or a dict of some of its fields, to load only
    these. A damaged checkpoint is reported on stderr and the previous one is used. A run may write others meanwhile.
    Raises UserError for an intact checkpoint with different shapes: it belongs to another agent or environment.
    """
    listed = epochs(folder)
    for epoch, before in itertools.zip_longest(listed[::-1], listed[-2::-1]):
        with reading(folder / f"{epoch}.json") as text:
            wrong = _harm(folder, epoch, text)
            if wrong and epochs(folder) != listed:
                return load(folder, abstract)
            if not wrong:
                expected = abstract(epoch)
                check_same_shapes(folder / str(epoch), expected)
                return epoch, _restore(folder, epoch, expected)
        instead = "there is none before it" if before is None else f"trying that of epoch {before}"
        print(f"checkpoint of epoch {epoch} is damaged ({wrong}): {instead}", file=sys.stderr)
    return None


def _restore(folder: Path, epoch: int, expected: PyTree) -> PyTree:
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context, _quiet(), readable(folder) as place:
        return ocp.load(str(place / str(epoch)), _placed(expected))


@contextlib.contextmanager
def readable(folder: Path) -> Generator[Path]:
    """A context that gives a folder's absolute path for orbax, which takes the path itself for a pattern of names.

    Where a name in it has a character with a meaning in patterns, this is a link to it. Raises UserError if the folder
    for temporary files is no better.
    """
    path = folder.absolute()
    if not _PATTERN.search(str(path)):
        yield path
        return
    if _PATTERN.search(tempfile.gettempdir()):
        raise UserError(f"{path}: in its name and in that of TMPDIR are characters of patterns, such as [: rename one")
    with tempfile.TemporaryDirectory(prefix="jaxrl-") as place:
        link = Path(place) / "checkpoints"
        link.symlink_to(path, target_is_directory=True)
        yield link


def damage(folder: Path, epoch: int) -> str | None:
    """Returns a description of the damage to a checkpoint's files, or None if intact."""
    with reading(folder / f"{epoch}.json") as text:
        return _harm(folder, epoch, text)


def _harm(folder: Path, epoch: int, text: str | None) -> str | None:
    """Returns the damage to a checkpoint whose list of files is open already: to open it anew would drop its lock."""
    try:
        wanted = dict(json.loads(text or ""))
    except (TypeError, ValueError):
        return f"{epoch}.json cannot be read"
    found = checksums(folder / str(epoch))
    for name, checksum in wanted.items():
        if found.get(name) != checksum:
            return f"{name} is {'changed' if name in found else 'missing'}"
    return None


def checksums(folder: Path) -> dict[str, str]:
    """Returns the sha256 of every file below a folder, by relative path."""
    result = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            result[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return result


def check_same_shapes(path: Path, expected: PyTree) -> None:
    """Raises UserError if a checkpoint's leaves are not the expected ones, naming the first that differs."""
    with readable(path.parent) as place:
        stored = ocp.metadata(str(place / path.name)).metadata
    wanted, found = _shapes(expected), _shapes(stored)
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
