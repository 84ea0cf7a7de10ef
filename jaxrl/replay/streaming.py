"""A dataset larger than memory: a folder of files. Each epoch uses one while the next is being loaded.

A pass over the files takes them in a random order, which depends only on the run's seed and the number of the pass, so
a run can be resumed at any epoch. All have the same layout, with room for the largest, so that one program fits all.
Two are in memory at a time.

The headers of all files are read before a run begins, and a file that differs from the first is refused then. The
digest is computed from the checksums that an .npz file keeps of its columns, without reading their content.
"""

import concurrent.futures
import dataclasses
import functools
import glob
import hashlib
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from jaxrl.data import files
from jaxrl.data.files import Dataset
from jaxrl.errors import UserError
from jaxrl.replay.loading import Sizes
from jaxrl.replay.ring import Ring


@dataclasses.dataclass(frozen=True)
class Shard:
    """One of the files."""

    path: Path
    sizes: Sizes
    checksum: str  # of all its columns


@dataclasses.dataclass(frozen=True)
class Shards:
    """The files, in the order of their names."""

    path: str
    shards: tuple[Shard, ...]

    @property
    def sizes(self) -> Sizes:
        """Rows and episodes of the largest; the longest episode that every file has."""
        each = [shard.sizes for shard in self.shards]
        rows, episodes = max(sizes.rows for sizes in each), max(sizes.episodes for sizes in each)
        longest = min(sizes.longest for sizes in each)
        return dataclasses.replace(each[0], path=self.path, rows=rows, episodes=episodes, longest=longest)

    @functools.cached_property
    def digest(self) -> str:
        """The sha256 (hex) of the names and checksums of all files."""
        lines = "".join(f"{shard.path.name} {shard.checksum}\n" for shard in self.shards)
        return hashlib.sha256(lines.encode()).hexdigest()


def find(data: str) -> Shards | None:
    """Returns the files in a folder or of a pattern; None where `data` is the name of a single file.

    Files called *-val.npz are validation splits and are left out. Raises UserError where there are no files, and for
    the first that cannot be read or differs from the others.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        found = path.glob("*.npz")
    elif path.is_file() or not set("*?[") & set(data):
        return None
    else:
        found = map(Path, glob.glob(str(path)))
    paths = sorted(path for path in found if path.suffix == ".npz" and not path.name.endswith("-val.npz"))
    if not paths:
        raise UserError(f"no .npz files in {data} (those called *-val.npz are validation splits)")
    shards = tuple(peek(path) for path in paths)
    for shard in shards[1:]:
        check_alike(shards[0].sizes, shard.sizes)
    return Shards(data, shards)


def peek(path: Path) -> Shard:
    """Returns a file's sizes, from its headers and episode ends. Raises UserError where it is no compact dataset."""
    try:
        with zipfile.ZipFile(path) as archive:
            headers = {info.filename.removesuffix(".npy"): header_of(archive, info) for info in archive.infolist()}
            files.check_names(headers)
            with archive.open("terminals.npy") as column:
                terminals = np.lib.format.read_array(column, allow_pickle=False).astype(bool)
        return Shard(path, sizes_of(path, headers, terminals), checksum(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def header_of(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype]:
    """Returns the shape and dtype of an array from its header."""
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
        return shape, dtype


def sizes_of(path: Path, headers: dict[str, tuple[tuple[int, ...], np.dtype]], terminals: np.ndarray) -> Sizes:
    """Returns the sizes of a file. Raises UserError where rows are missing, or no episode ends with the last one."""
    for name, (shape, dtype) in headers.items():
        if files.kind_of(name) == "next_observations":
            raise UserError(f"has a column {name!r}, a file of several must be compact: jaxrl.data.files")
        if shape[:1] != terminals.shape:
            raise UserError(f"column {name!r} has the shape {shape}, 'terminals' has {terminals.shape}")
        files.check_layout(name, shape, dtype)
    if not terminals[-1:].any():
        raise UserError("the last row must end an episode: its 'terminals' is false")
    longest = np.diff(np.flatnonzero(terminals), prepend=-1).max() - 1
    entries = {name: shape[1:] for name, (shape, _) in headers.items()}
    dtypes = {name: files.stored_dtype(name, dtype, len(shape)).name for name, (shape, dtype) in headers.items()}
    dtypes["terminals"] = "bool"
    return Sizes(str(path), entries, len(terminals), int(terminals.sum()), int(longest), dtypes)


def checksum(path: Path) -> str:
    """Returns the CRC-32 checksums of a file's columns, which an .npz file stores: its content is not read."""
    with zipfile.ZipFile(path) as archive:
        return " ".join(sorted(f"{info.filename}:{info.file_size}:{info.CRC:08x}" for info in archive.infolist()))


def check_alike(first: Sizes, other: Sizes) -> None:
    """Raises UserError where a file's columns are not those of the first."""
    for name in sorted(first.entries.keys() | other.entries.keys()):
        if first.entries.get(name) != other.entries.get(name):
            has = [f"{sizes.entries[name]}" if name in sizes.entries else "none" for sizes in (other, first)]
            raise UserError(f"{other.path}: a row of column {name!r} is {has[0]}, in {first.path} it is {has[1]}")
        if files.kind_of(name) == "observations" and first.row(name).dtype != other.row(name).dtype:
            raise UserError(
                f"{other.path}: column {name!r} is {other.row(name).dtype}, in {first.path} it is "
                f"{first.row(name).dtype}"
            )


def order(seed: int, epoch: int, count: int) -> int:
    """Returns which of `count` files an epoch uses: each once per pass, in an order that depends on seed and pass."""
    passed, place = divmod(epoch, count)
    return int(np.random.default_rng([seed, passed]).permutation(count)[place])


class Stream:
    """The data of a run's epochs, one file each. An error in a file is raised by the epoch that needs it."""

    def __init__(self, shards: Shards, place: Callable[[Dataset], Ring], seed: int, epochs: int) -> None:
        """Loads nothing yet; `place` lays a file out in device memory."""
        self.shards, self.place, self.seed, self.epochs = shards, place, seed, epochs
        self.held: dict[int, concurrent.futures.Future[Ring]] = {}

    def at(self, epoch: int) -> Ring:
        """Returns an epoch's data once they are loaded, and starts to load those of the next in a thread."""
        count = len(self.shards.shards)
        now, then = (order(self.seed, min(e, self.epochs - 1), count) for e in (epoch, epoch + 1))
        self.held = {now: self.held.get(now) or self._load(now)}  # drops all others
        ring = self.held[now].result()
        if then not in self.held:
            self.held[then] = self._load(then)
        return ring

    def _load(self, number: int) -> concurrent.futures.Future[Ring]:
        thread = concurrent.futures.ThreadPoolExecutor(1, "shard")
        future = thread.submit(load, self.shards.shards[number], self.place)
        thread.shutdown(wait=False)  # it ends when this is done
        return future


def load(shard: Shard, place: Callable[[Dataset], Ring]) -> Ring:
    """Returns a file in device memory. Raises UserError where it is damaged, or not what it was when the run began."""
    dataset = files.load(shard.path)
    if checksum(shard.path) != shard.checksum:
        raise UserError(f"{shard.path} has changed since the run began")
    return jax.block_until_ready(place(dataset))


def format_report(shards: Shards) -> str:
    """Returns a table of the files."""
    lines = [("file", "rows", "episodes", "longest")]
    each = [shard.sizes for shard in shards.shards]
    lines += [(Path(s.path).name, f"{s.rows:,}", f"{s.episodes:,}", f"{s.longest:,}") for s in each]
    rows, episodes = sum(s.rows for s in each), sum(s.episodes for s in each)
    lines.append((f"all {len(each)}", f"{rows:,}", f"{episodes:,}", f"{max(s.longest for s in each):,}"))
    width = 2 + max(len(line[0]) for line in lines)
    table = "\n".join(f"{name:<{width}}{rows:>14}{count:>10}{steps:>10}" for name, rows, count, steps in lines)
    return f"{table}\n\nsha256 {shards.digest}"
