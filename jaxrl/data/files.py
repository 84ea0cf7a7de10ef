"""Offline datasets on disk, in OGBench's npz layout: read and checked, written, described. Host side, numpy only.

HDF5 files of other projects are read too: see `jaxrl.data.hdf5`.

Layout (OGBench calls it compact; Park et al., "OGBench: Benchmarking Offline Goal-Conditioned RL", 2024): whole
episodes one after the other. Row t is an observation, the action taken there, and what the step from row t to row
t + 1 brought (reward, mask). The last row of an episode, where `terminals` is true, holds the final observation; its
action leads nowhere, and its reward and mask mean nothing.

`terminals` says where episodes end, not why: `masks` is 0 at a step that ended the task (no bootstrap after it) and 1
elsewhere. A file without masks has time limits only.

A file with a `next_observations` column is in the full layout, one row per step, and becomes compact when it is read:
an episode ends where `terminals` is true, where `next_observations` differs from the following row's observation, and
at the end of the file; there it gets one more row, with that next observation, a zero action, reward 0, and every
other column repeated.
"""

import dataclasses
import difflib
import errno
import functools
import hashlib
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from jaxrl.data import hdf5
from jaxrl.errors import UserError

REQUIRED = ("observations", "actions", "terminals")
RANKS = {"observations": 2, "next_observations": 2, "actions": 2, "terminals": 1, "rewards": 1, "masks": 1}
SUFFIXES = (".npz", *hdf5.SUFFIXES)
ACTION_TOLERANCE = 1e-5  # rounding that is clipped away; also how near to a bound counts as at the bound


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Whole episodes in the compact layout, checked by `from_columns` and `load`. Do not write into its arrays."""

    observations: np.ndarray  # [N, O] float32
    actions: np.ndarray  # [N, A] float32, in [-1, 1]
    terminals: np.ndarray  # [N] bool, true on the last row of each episode
    rewards: np.ndarray | None = None  # [N] float32, of the step from row t to row t + 1
    masks: np.ndarray | None = None  # [N] float32, 0 where that step ended the task, else 1
    extra: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # [N, ...], their own dtypes
    path: str = ""
    parts: str = ""  # what an observation is put together from, where the file holds several arrays

    @functools.cached_property
    def digest(self) -> str:
        """The sha256 (hex) of names, dtypes, shapes and bytes of all columns: of the data, not of the file."""
        sha = hashlib.sha256()
        for name, column in sorted(to_columns(self).items()):
            sha.update(f"{name} {column.dtype.str} {column.shape}\n".encode())
            sha.update(np.ascontiguousarray(column).data)
        return sha.hexdigest()


Relabel: TypeAlias = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[Any, Any]]
"""An environment's own (rewards, terminated) [n] of steps (observations [n, O], actions [n, A], next [n, O])."""


def load(path: str | os.PathLike[str], keys: Sequence[str] = ()) -> Dataset:
    """Returns the dataset in an .npz file (compact or full layout) or an HDF5 file (`jaxrl.data.hdf5`), checked.

    `keys` chooses among the named arrays of which observations consist in some HDF5 files, and orders them.

    Raises:
        UserError: no such file (the nearest one is named), one that may not be read, is of another format or is
            damaged, and all that `from_columns` and `hdf5.read` refuse.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(_no_such_file(path))
    try:
        if path.stat().st_size == 0:
            raise UserError("the file is empty (0 bytes)")
        path.open("rb").close()  # may it be read?
        if path.suffix.lower() in hdf5.SUFFIXES:
            columns, parts = hdf5.read(path, keys)
            return from_columns(columns, str(path), parts)
        if keys:
            raise UserError("an .npz file has no observation keys to choose from")
        return from_columns(_read(path), str(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def save(path: str | os.PathLike[str], dataset: Dataset) -> None:
    """Writes a checked dataset to `path` as a compressed .npz: all of it or, on any error, nothing.

    Raises:
        UserError: a name without .npz, no such folder, no space left or another refusal of the file system, and all
            that `from_columns` refuses.
    """
    path = Path(path).expanduser()
    if path.suffix != ".npz":
        raise UserError(f"cannot write {path}: the name of a dataset file ends in .npz")
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: no folder {path.parent}")
    columns = to_columns(from_columns(to_columns(dataset)))
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "wb") as stream:
            np.savez_compressed(stream, **columns)  # ty: ignore[invalid-argument-type]
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            size = sum(column.nbytes for column in columns.values()) / 1e6
            raise UserError(f"no space left to write {path}: it needs up to {size:.1f} MB") from error
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def from_columns(columns: Mapping[str, np.ndarray], path: str = "", parts: str = "") -> Dataset:
    """Returns the dataset made of named columns, in the compact or the full layout; other names become `extra`.

    Actions beyond [-1, 1] by rounding (1e-5) are clipped.

    Raises:
        UserError: a missing column; a column that is not numeric, of the wrong rank or length, or not finite in
            float32; an action outside [-1, 1]; a flag other than 0 and 1; no rows; no episode end, a last row that
            ends no episode, an episode of one row; in the full layout, rows that are not in time order.
    """
    missing = [name for name in REQUIRED if name not in columns]
    if missing:
        raise UserError(f"missing column {missing[0]!r}: found {', '.join(sorted(columns)) or 'no columns'}")
    arrays = {name: _column(name, column) for name, column in columns.items()}
    _check_lengths(arrays)
    arrays["actions"] = _clipped(arrays["actions"])
    for name in ("terminals", "masks"):
        if name in arrays and (wrong := np.flatnonzero(~np.isin(arrays[name], (0, 1)))).size:
            raise UserError(f"column {name!r} must hold 0 and 1 only: row {wrong[0]} is {arrays[name][wrong[0]]:g}")
    arrays["terminals"] = arrays["terminals"].astype(bool)
    if not arrays["terminals"].any():
        raise UserError(
            f"no episode ends: column 'terminals' is false in all {len(arrays['terminals'])} rows, "
            "it must be true in the last row of each episode"
        )
    if "next_observations" in arrays:
        arrays = _compact(arrays)
    _check_episodes(arrays["terminals"])
    return Dataset(
        observations=arrays.pop("observations"),
        actions=arrays.pop("actions"),
        terminals=arrays.pop("terminals"),
        rewards=arrays.pop("rewards", None),
        masks=arrays.pop("masks", None),
        extra=arrays,
        path=path,
        parts=parts,
    )


def to_columns(dataset: Dataset) -> dict[str, np.ndarray]:
    """Returns the columns of a dataset by name, as a file holds them.

    Raises:
        UserError: an extra column that has the name of one of the others.
    """
    clash = sorted(RANKS.keys() & dataset.extra.keys())
    if clash:
        raise UserError(f"extra column {clash[0]!r} has a reserved name: {', '.join(sorted(RANKS))}")
    named = {field.name: getattr(dataset, field.name) for field in dataclasses.fields(dataset) if field.name in RANKS}
    return {name: column for name, column in named.items() if column is not None} | dict(dataset.extra)


def relabelled(dataset: Dataset, relabel: Relabel) -> Dataset:
    """Returns the dataset with an environment's own rewards and masks for its steps, in place of the file's if any."""
    before = np.flatnonzero(~dataset.terminals)
    rewards, masks = np.zeros(len(dataset.terminals), np.float32), np.ones(len(dataset.terminals), np.float32)
    reward, terminated = relabel(
        dataset.observations[before], dataset.actions[before], dataset.observations[before + 1]
    )
    rewards[before] = np.asarray(reward)
    masks[before] = 1 - np.asarray(terminated, np.float32)
    return from_columns(to_columns(dataset) | {"rewards": rewards, "masks": masks}, dataset.path, dataset.parts)


def episodes(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Returns (first, last), the rows [E] at which each episode begins and ends; last - first is its steps."""
    last = np.flatnonzero(dataset.terminals)
    return np.concatenate([[0], last[:-1] + 1]), last


def episode_returns(dataset: Dataset) -> np.ndarray:
    """Returns the undiscounted return [E] of each episode, float64, of a dataset that has rewards."""
    assert dataset.rewards is not None
    return np.add.reduceat(np.where(dataset.terminals, 0.0, dataset.rewards), episodes(dataset)[0], dtype=np.float64)


def describe(dataset: Dataset, relabel: Relabel | None = None) -> dict[str, Any]:
    """Returns what a dataset holds, as plain numbers, strings, lists and dicts (fit for JSON).

    Lengths and returns (undiscounted) are per episode and in steps: an episode of n rows has n - 1. Actions count
    where a step was taken, observations everywhere. With `relabel`, returns and ends are judged by the environment's
    rewards and masks, else by the file's.
    """
    judged, source = dataset, "from the file: row t holds the reward of the step from row t to row t + 1"
    if relabel is not None:
        judged, source = relabelled(dataset, relabel), "relabelled by the environment, as its own step gives them"
    elif dataset.rewards is None:
        source = "none in the file: they come from an environment's own relabelling"
    first, last = episodes(judged)
    steps = last - first
    actions = dataset.actions[~dataset.terminals]
    at_bound = np.abs(actions) >= 1 - ACTION_TOLERANCE
    return {
        "path": dataset.path,
        "digest": dataset.digest,
        "episodes": len(last),
        "rows": len(dataset.terminals),
        "steps": int(steps.sum()),
        "length": {"min": int(steps.min()), "median": float(np.median(steps)), "max": int(steps.max())},
        "ends": _ends(judged),
        "rewards": source,
        "returns": _returns(judged),
        "observations": _ranges(dataset.observations) | ({"parts": dataset.parts} if dataset.parts else {}),
        "actions": _ranges(actions) | {"at_bound": at_bound.mean(axis=0).tolist()},
        "extra": {name: f"{column.dtype} {list(column.shape)}" for name, column in dataset.extra.items()},
    }


def format_report(report: Mapping[str, Any]) -> str:
    """Returns the table that people read, from what `describe` returned."""
    length, ends, returns = report["length"], report["ends"], report["returns"]
    lines = [
        ("dataset", report["path"] or "(in memory)"),
        ("sha256", report["digest"]),
        ("episodes", f"{report['episodes']:,} ({report['rows']:,} rows, {report['steps']:,} steps)"),
        ("steps each", f"min {length['min']:,}, median {length['median']:,g}, max {length['max']:,}"),
        ("ended by", f"task {ends['terminated']:,}, time limit {ends['time_limit']:,}"),
    ]
    if ends["earlier"]:
        lines.append(("", f"the task is also over at {ends['earlier']:,} steps before an episode's last"))
    lines.append(("rewards", report["rewards"]))
    if returns is not None:
        lines.append(("returns", f"min {returns['min']:.4g}, mean {returns['mean']:.4g}, max {returns['max']:.4g}"))
    if "parts" in report["observations"]:
        lines.append(("observations", report["observations"]["parts"]))
    lines += [(f"column {name}", shape) for name, shape in report["extra"].items()]
    width = 2 + max(len(name) for name, _ in lines)
    head = "\n".join(f"{name:<{width}}{value}" for name, value in lines)
    return f"{head}\n\n{_range_table(report['observations'], report['actions'])}"


def _no_such_file(path: Path) -> str:
    if path.is_dir():
        return f"{path} is a folder: a dataset is one .npz file"
    names = sorted(other.name for suffix in SUFFIXES for other in path.parent.glob(f"*{suffix}"))
    if not names:
        return f"no file {path}: its folder holds no .npz file" if path.parent.is_dir() else f"no folder {path.parent}"
    return f"no file {path}: did you mean {difflib.get_close_matches(path.name, names, n=1, cutoff=0.0)[0]!r}?"


def _read(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of an .npz file; pickled objects are never loaded."""
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as stream:
            begins_well = stream.read(4) == b"PK\x03\x04"
        raise UserError("the file is cut short: copy it again" if begins_well else "this is not an .npz file")
    columns, name = {}, None
    try:
        with np.load(path, allow_pickle=False) as file:
            for name in file.files:
                columns[name] = file[name]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"column {name!r} cannot be read: {error}") from None
    return columns


def _column(name: str, column: np.ndarray) -> np.ndarray:
    """Returns a finite numeric column of the right rank: the known ones as float32, others in their own dtype."""
    column = np.asarray(column)
    if column.dtype.kind not in "biuf":
        raise UserError(f"column {name!r} must be numeric: its dtype is {column.dtype}")
    layout = {1: "[rows]", 2: "[rows, entries]"}.get(RANKS.get(name, 0), "[rows, ...]")
    if column.ndim != RANKS.get(name, max(1, column.ndim)) or 0 in column.shape[1:]:
        raise UserError(f"column {name!r} must be {layout}: its shape is {column.shape}")
    with np.errstate(over="ignore"):
        numbers = column.astype(np.float32, copy=False) if name in RANKS else column
    if not np.isfinite(numbers).all():
        where = tuple(np.argwhere(~np.isfinite(numbers))[0])
        raise UserError(f"column {name!r} must be finite in {numbers.dtype}: row {where[0]} holds {column[where]}")
    return numbers


def _check_lengths(arrays: Mapping[str, np.ndarray]) -> None:
    rows, entries = arrays["observations"].shape
    for name, column in arrays.items():
        if len(column) != rows:
            raise UserError(f"column {name!r} has {len(column)} rows, 'observations' has {rows}")
    if rows == 0:
        raise UserError("the columns hold no rows")
    if "next_observations" in arrays and (found := arrays["next_observations"].shape[1]) != entries:
        raise UserError(f"column 'next_observations' has {found} entries, 'observations' has {entries}")


def _clipped(actions: np.ndarray) -> np.ndarray:
    outside = np.abs(actions) > 1 + ACTION_TOLERANCE
    if outside.any():
        row, entry = np.argwhere(outside)[0]
        raise UserError(f"column 'actions' must lie in [-1, 1]: row {row}, entry {entry} is {actions[row, entry]:g}")
    return np.clip(actions, -1, 1)


def _check_episodes(terminals: np.ndarray) -> None:
    if not terminals[-1]:
        raise UserError(f"the last row ({len(terminals) - 1}) must end an episode: its 'terminals' is false")
    alone = np.flatnonzero(terminals & np.concatenate([[True], terminals[:-1]]))
    if alone.size:
        raise UserError(
            f"row {alone[0]} is an episode of one row: an episode needs at least two, a step and the observation it "
            "leads to ('terminals' is true in the last row of an episode only)"
        )


def _compact(full: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the compact layout of full columns: one more row where an episode ends (see the module's docstring)."""
    rows = len(full["terminals"])
    joined = (full["next_observations"][:-1] == full["observations"][1:]).all(axis=1)
    inside = ~full["terminals"][:-1]
    if 2 * np.sum(joined & inside) < np.sum(inside):
        raise UserError(
            f"rows are not in time order: 'next_observations' equals the following row's observation at "
            f"{np.sum(joined & inside)} of the {np.sum(inside)} steps inside episodes"
        )
    ends = full["terminals"] | ~np.append(joined, False)
    copies = 1 + ends
    source = np.repeat(np.arange(rows), copies)
    added = np.zeros(len(source), bool)
    added[np.cumsum(copies)[ends] - 1] = True
    compact = {name: column[source] for name, column in full.items() if name != "next_observations"}
    compact["observations"][added] = full["next_observations"][ends]
    compact["terminals"] = added
    for name in ("actions", "rewards"):
        if name in compact:
            compact[name][added] = 0
    return compact


def _ends(dataset: Dataset) -> dict[str, int]:
    """Returns how many episodes the task ended, how many the clock, and at how many earlier steps a mask is 0."""
    _, last = episodes(dataset)
    masks = np.ones(len(dataset.terminals)) if dataset.masks is None else dataset.masks
    terminated = int(np.sum(masks[last - 1] == 0))
    steps_with_mask_0 = int(np.sum(masks[~dataset.terminals] == 0))
    return {"terminated": terminated, "time_limit": len(last) - terminated, "earlier": steps_with_mask_0 - terminated}


def _returns(dataset: Dataset) -> dict[str, float] | None:
    if dataset.rewards is None:
        return None
    returns = episode_returns(dataset)
    return {"min": float(returns.min()), "mean": float(returns.mean()), "max": float(returns.max())}


def _ranges(values: np.ndarray) -> dict[str, Any]:
    """Returns size, and per entry min, mean and max, of values [rows, entries]."""
    return {
        "size": values.shape[1],
        "min": values.min(axis=0).tolist(),
        "mean": values.mean(axis=0, dtype=np.float64).tolist(),
        "max": values.max(axis=0).tolist(),
    }


def _range_table(observations: Mapping[str, Any], actions: Mapping[str, Any]) -> str:
    """Returns one row for all observation entries, one for all action entries and one for each of these."""

    def row(label: str, ranges: Mapping[str, Any], last: str) -> str:
        low, mean, high = min(ranges["min"]), float(np.mean(ranges["mean"])), max(ranges["max"])
        return f"{label:<18}{low:>10.4g}{mean:>10.3f}{high:>10.4g}  {last}"

    constant = sum(low == high for low, high in zip(observations["min"], observations["max"], strict=True))
    rows = [
        f"{'range':<18}{'min':>10}{'mean':>10}{'max':>10}",
        row(f"observations [{observations['size']}]", observations, f"{constant} constant" if constant else ""),
        row(f"actions [{actions['size']}]", actions, f"{100 * np.mean(actions['at_bound']):.1f} % at a bound"),
    ]
    for i, share in enumerate(actions["at_bound"]):
        entry = {name: [actions[name][i]] for name in ("min", "mean", "max")}
        rows.append(row(f"  action {i}", entry, f"{100 * share:.1f} % at a bound"))
    return "\n".join(line.rstrip() for line in rows)
