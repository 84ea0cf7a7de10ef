"""Offline datasets on disk, in OGBench's npz layout: read and checked, written, described. Host side, NumPy only.

HDF5 files of other projects are read too: see `jaxrl.data.hdf5`.

Layout (OGBench calls it compact; Park et al., "OGBench: Benchmarking Offline Goal-Conditioned RL", 2024): whole
episodes one after the other. Row t is an observation, the action taken there, and what the step from row t to row
t + 1 brought (reward, mask). The last row of an episode, where `terminals` is true, holds the final observation; its
action leads nowhere, and its reward and mask mean nothing.

Observations are one column `observations`, or one column `observations/NAME` for each array of a dict. Images are
uint8, [rows, height, width, channels], and stay so; all other observations are read as float32.

`terminals` says where episodes end, not why: `masks` is 0 at a step that ended the task (no bootstrap after it) and 1
elsewhere. A file without masks has time limits only.

A file with a `next_observations` column (or `next_observations/NAME` columns) is in the full layout, one row per step,
and becomes compact when it is read: an episode ends where `terminals` is true, where `next_observations` differs from
the following row's observation, and at the end of the file; there it gets one more row, with that next observation, a
zero action, reward 0, and every other column repeated.

Actions are vectors of continuous numbers in [-1, 1]. Columns of discrete actions are refused.
"""

import dataclasses
import difflib
import errno
import functools
import hashlib
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from jaxrl.data import hdf5
from jaxrl.errors import UserError, unknown

REQUIRED = ("observations", "actions", "terminals")
RANKS = {"observations": 2, "next_observations": 2, "actions": 2, "terminals": 1, "rewards": 1, "masks": 1}
OBSERVED = ("observations", "next_observations")
IMAGE = 4  # axes of a column of images
SUFFIXES = (".npz", *hdf5.SUFFIXES)
ACTION_TOLERANCE = 1e-5  # rounding that is clipped away; also how near to a bound counts as at the bound
CONTINUOUS = "discrete actions are not supported, an action is a vector of continuous numbers in [-1, 1]"

Observations: TypeAlias = Any
"""An array [N, O] float32, images [N, H, W, C] uint8, or a dict of arrays by name: uint8 images, all else float32."""


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Whole episodes in the compact layout, checked by `from_columns` and `load`. Do not write into its arrays."""

    observations: Observations
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


Relabel: TypeAlias = Callable[[Observations, np.ndarray, Observations], tuple[Any, Any]]
"""An environment's own (rewards, terminated) [n] of steps (observations [n, ...], actions [n, A], next [n, ...])."""


def load(path: str | os.PathLike[str], keys: Sequence[str] = ()) -> Dataset:
    """Returns the dataset in an .npz file (compact or full layout) or an HDF5 file (`jaxrl.data.hdf5`), checked.

    `keys` chooses among the named arrays of which observations consist in some files, and orders them where they are
    put side by side.

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
        return from_columns(_chosen(_read(path), keys), str(path))
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
            float32; an action outside [-1, 1], or discrete actions; a flag other than 0 and 1; no rows; no episode
            end, a last row that ends no episode, an episode of one row; in the full layout, rows that are not in time
            order.
    """
    check_names(columns)
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
    if _named("next_observations", arrays):
        arrays = _compact(arrays)
    _check_episodes(arrays["terminals"])
    _check_continuous(arrays["actions"][~arrays["terminals"]])
    names = _named("observations", arrays)
    parted = {name.partition("/")[2]: arrays.pop(name) for name in names}
    return Dataset(
        observations=parted.get("", parted),
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
    clash = sorted(name for name in dataset.extra if kind_of(name) in RANKS)
    if clash:
        raise UserError(f"extra column {clash[0]!r} has a reserved name: {', '.join(sorted(RANKS))}")
    others = {name: getattr(dataset, name) for name in ("actions", "terminals", "rewards", "masks")}
    named = observation_columns(dataset.observations) | others
    return {name: column for name, column in named.items() if column is not None} | dict(dataset.extra)


def observation_columns(observations: Observations) -> dict[str, np.ndarray]:
    """Returns the columns of observations by name, as a file holds them."""
    if isinstance(observations, Mapping):
        return {f"observations/{name}": column for name, column in observations.items()}
    return {"observations": observations}


def mapped(function: Callable[..., Any], *observations: Observations) -> Observations:
    """Returns what a function makes of each array of observations, or of the arrays with the same name of several."""
    if isinstance(observations[0], Mapping):
        return {name: function(*(each[name] for each in observations)) for name in observations[0]}
    return function(*observations)


def vectors(observations: Observations) -> np.ndarray:
    """Returns observations as vectors [N, O]: the arrays of a dict side by side in the order of their names.

    Images are left out.
    """
    columns = [column for _, column in sorted(observation_columns(observations).items())]
    flat = [column.reshape(len(column), -1) for column in columns if column.dtype != np.uint8]
    if len(columns) == len(flat) == 1:
        return flat[0]
    return np.concatenate([np.zeros((len(columns[0]), 0), np.float32), *flat], axis=1)


def kind_of(name: str) -> str:
    """Returns what a column is by its name: that of `RANKS` which stands before a slash, or the name itself."""
    kind = name.partition("/")[0]
    return kind if kind in OBSERVED else name


def stored_dtype(name: str, dtype: np.dtype, rank: int) -> np.dtype:
    """Returns the dtype in which a column is kept: extra ones their own, images uint8, all others float32."""
    image = kind_of(name) in OBSERVED and dtype == np.uint8 and rank == IMAGE
    return dtype if image or kind_of(name) not in RANKS else np.dtype(np.float32)


def check_names(columns: Mapping[str, Any]) -> None:
    """Raises UserError where a required column is missing, or observations are both one array and several."""
    found = {kind_of(name) for name in columns}
    if missing := [name for name in REQUIRED if name not in found]:
        raise UserError(f"missing column {missing[0]!r}: found {', '.join(sorted(columns)) or 'no columns'}")
    names = [_named(kind, columns) for kind in OBSERVED]
    for kind, group in zip(OBSERVED, names, strict=True):
        if kind in group and len(group) > 1:
            raise UserError(
                f"column {kind!r} stands beside {group[1]!r}: observations are one array or several by name"
            )
    for name in names[1]:
        if (without := name.removeprefix("next_")) not in names[0]:
            raise UserError(f"column {name!r} has no column {without!r} to follow")
    if names[1] and len(names[1]) < len(names[0]):
        lacking = next(name for name in names[0] if f"next_{name}" not in names[1])
        raise UserError(f"missing column 'next_{lacking}': there is {names[1][0]!r}")


def check_layout(name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Raises UserError where a column has not the axes that its name asks for, or holds discrete actions."""
    if name == "actions" and dtype.kind in "biu":
        raise UserError(f"column 'actions' has the dtype {dtype}: {CONTINUOUS}")
    rank, large = len(shape), name in OBSERVED and len(shape) > 2
    fits = rank == RANKS.get(name, max(1, rank)) or (large and rank == IMAGE and dtype == np.uint8)
    if not fits or 0 in shape[1:]:
        layout = {1: "[rows]", 2: "[rows, entries]"}.get(RANKS.get(name, 0), "[rows, ...]")
        or_else = ", or images of dtype uint8, [rows, height, width, channels]" if large else ""
        raise UserError(f"column {name!r} must be {layout}{or_else}: its shape is {shape}")


def relabelled(dataset: Dataset, relabel: Relabel) -> Dataset:
    """Returns the dataset with an environment's own rewards and masks for its steps, in place of the file's if any."""
    before = np.flatnonzero(~dataset.terminals)
    rewards, masks = np.zeros(len(dataset.terminals), np.float32), np.ones(len(dataset.terminals), np.float32)
    now, then = (mapped(lambda x, rows=rows: x[rows], dataset.observations) for rows in (before, before + 1))
    reward, terminated = relabel(now, dataset.actions[before], then)
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
        "observations": _observation_ranges(dataset.observations) | ({"parts": dataset.parts} if dataset.parts else {}),
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


def _chosen(columns: dict[str, np.ndarray], keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns the columns of an .npz file, of its observations those with these keys; all of them without keys."""
    if not keys:
        return columns
    names = [name.partition("/")[2] for name in _named("observations", columns)]
    if not any(names):
        raise UserError("an .npz file has no observation keys to choose from, unless it has columns 'observations/KEY'")
    for key in keys:
        if key not in names:
            raise unknown("observation key", key, names)
    kept = {f"{kind}/{key}" for kind in OBSERVED for key in keys}
    return {name: column for name, column in columns.items() if kind_of(name) == name or name in kept}


def _named(kind: str, columns: Iterable[str]) -> list[str]:
    """Returns the names of the columns of one kind, sorted: of observations there may be several."""
    return sorted(name for name in columns if kind_of(name) == kind)


def _column(name: str, column: np.ndarray) -> np.ndarray:
    """Returns a finite numeric column of the right rank, in the dtype in which it is kept."""
    column = np.asarray(column)
    if column.dtype.kind not in "biuf":
        raise UserError(f"column {name!r} must be numeric: its dtype is {column.dtype}")
    check_layout(name, column.shape, column.dtype)
    with np.errstate(over="ignore"):
        numbers = column.astype(stored_dtype(name, column.dtype, column.ndim), copy=False)
    if numbers.dtype.kind == "f" and not np.isfinite(numbers).all():
        where = tuple(np.argwhere(~np.isfinite(numbers))[0])
        raise UserError(f"column {name!r} must be finite in {numbers.dtype}: row {where[0]} holds {column[where]}")
    return numbers


def _check_lengths(arrays: Mapping[str, np.ndarray]) -> None:
    first = _named("observations", arrays)[0]
    rows = len(arrays[first])
    for name, column in arrays.items():
        if len(column) != rows:
            raise UserError(f"column {name!r} has {len(column)} rows, {first!r} has {rows}")
    if rows == 0:
        raise UserError("the columns hold no rows")
    for name in _named("next_observations", arrays):
        found, wanted = (arrays[each].shape[1:] for each in (name, name.removeprefix("next_")))
        if found != wanted:
            found, wanted = (shape[0] if len(shape) == 1 else shape for shape in (found, wanted))
            raise UserError(f"column {name!r} has {found} entries, {name.removeprefix('next_')!r} has {wanted}")


def _clipped(actions: np.ndarray) -> np.ndarray:
    outside = np.abs(actions) > 1 + ACTION_TOLERANCE
    if outside.any():
        row, entry = np.argwhere(outside)[0]
        where = f"row {row}, entry {entry} is {actions[row, entry]:g}"
        if actions.shape[1] == 1 and actions.min() >= 0 and (actions == np.round(actions)).all():
            raise UserError(f"column 'actions' holds whole numbers only, {where}: {CONTINUOUS}")
        raise UserError(f"column 'actions' must lie in [-1, 1]: {where}")
    return np.clip(actions, -1, 1)


def _check_continuous(actions: np.ndarray) -> None:
    """Raises UserError where the actions [n, A] of steps look like numbers of choices: one column of 0 and 1."""
    if actions.shape[1] == 1 and np.array_equal(np.unique(actions), [0, 1]):
        raise UserError(
            f"column 'actions' holds 0 and 1 only, as discrete actions do: {CONTINUOUS}; if these are continuous, "
            "scale them so that their least is -1"
        )


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
    following = _named("next_observations", full)
    joined = np.ones(rows - 1, bool)
    for name in following:
        same = full[name][:-1] == full[name.removeprefix("next_")][1:]
        joined &= same.reshape(rows - 1, -1).all(axis=1)
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
    compact = {name: column[source] for name, column in full.items() if name not in following}
    for name in following:
        compact[name.removeprefix("next_")][added] = full[name][ends]
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


def _observation_ranges(observations: Observations) -> dict[str, Any]:
    """Returns the ranges of vectors; of a dict those of each array by name; of images those of all pixels together."""
    if isinstance(observations, Mapping):
        return {"arrays": {name: _observation_ranges(column) for name, column in observations.items()}}
    if observations.dtype != np.uint8:
        return _ranges(observations.reshape(len(observations), -1))
    return _ranges(observations.reshape(-1, 1)) | {"image": list(observations.shape[1:])}


def _range_table(observations: Mapping[str, Any], actions: Mapping[str, Any]) -> str:
    """Returns one row for each array of observations, one for all action entries and one for each of these."""
    arrays = {f"observations/{name}": ranges for name, ranges in observations.get("arrays", {}).items()}
    lines = [(*_titled(name, ranges), ranges) for name, ranges in (arrays or {"observations": observations}).items()]
    lines.append((f"actions [{actions['size']}]", f"{100 * np.mean(actions['at_bound']):.1f} % at a bound", actions))
    for i, share in enumerate(actions["at_bound"]):
        entry = {name: [actions[name][i]] for name in ("min", "mean", "max")}
        lines.append((f"  action {i}", f"{100 * share:.1f} % at a bound", entry))
    width = max(18, 1 + max(len(title) for title, _, _ in lines))
    rows = [f"{'range':<{width}}{'min':>10}{'mean':>10}{'max':>10}"]
    for title, remark, ranges in lines:
        low, mean, high = min(ranges["min"]), float(np.mean(ranges["mean"])), max(ranges["max"])
        rows.append(f"{title:<{width}}{low:>10.4g}{mean:>10.3f}{high:>10.4g}  {remark}")
    return "\n".join(line.rstrip() for line in rows)


def _titled(name: str, ranges: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the title of a row about observations, and a remark."""
    if "image" in ranges:
        return f"{name} {ranges['image']}", "pixels"
    constant = sum(low == high for low, high in zip(ranges["min"], ranges["max"], strict=True))
    return f"{name} [{ranges['size']}]", f"{constant} constant" if constant else ""
