"""Offline datasets in HDF5 files, read into the compact columns of `jaxrl.data.files`: D4RL, Minari, robomimic low-dim.

Which of the three a file is shows in its top-level names. The observation that an episode ends with is the true one
wherever the file has it. Where it has not (D4RL without next_observations, robomimic without next_obs), the last step
of an episode that a time limit ended is dropped, and its observation becomes the last; a step that ended the task is
kept, since nothing is bootstrapped from beyond it, and its own observation stands in for the one that it led to.

D4RL (Fu et al., 2020), one row per step, episodes one after the other:

    observations [N, O]  actions [N, A]  rewards [N]  terminals [N]  timeouts [N]  next_observations [N, O] (some files)

`terminals` says that the task ended, `timeouts` that a time limit did. A file without `timeouts` and without
`next_observations` does not tell where episodes end, and is refused. What follows the last end is unfinished: it is
kept, and an extra column `unfinished` marks it, so that its return is not counted. AntMaze files go on recording after
the goal, with `terminals` true at every step near it: each such step ends an episode here, which gives the transitions
of D4RL's own `qlearning_dataset`, and episodes that are pieces of those recorded. In maze2d files, `timeouts` marks
goals that were reached. `infos/...` and `metadata/...` are not read.

Minari (main_data.hdf5), one group per episode of T steps, with the observation after the last step:

    episode_0/  observations [T + 1, O]  actions [T, A]  rewards [T]  terminations [T]  truncations [T]  infos

robomimic low_dim, one group per demonstration:

    data/demo_0/  obs/KEY [T, n]  next_obs/KEY [T, n]  actions [T, A]  rewards [T]  dones [T]  states
    mask/...

`dones` end the task, as they do for robomimic's own agents. The subsets of `mask` are not read: all demonstrations are.

Observations may be a group of named arrays (in some D4RL-like files, a dictionary or a tuple in Minari, always in
robomimic), of which `keys` chooses some. Vectors alone are put side by side in the order of their names, or in that of
`keys`, except in D4RL's layout. Where images are among them, uint8 [T, height, width, channels], each array is a column
of its own, `observations/NAME`. Actions are vectors, and put side by side too.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from jaxrl.errors import UserError, unknown

SUFFIXES = (".hdf5", ".h5")
LAYOUTS = (
    "D4RL (observations, actions, rewards, terminals, and timeouts or next_observations), Minari (episode_0, ...) and "
    "robomimic (data/demo_0, ...)"
)
NAMED_AT_MOST = 12  # keys that a message lists

Columns: TypeAlias = dict[str, np.ndarray]


def read(path: Path, keys: Sequence[str] = ()) -> tuple[Columns, str]:
    """Returns a file's columns, for `jaxrl.data.files.from_columns`, and what its observations are put together from.

    Raises:
        UserError: h5py is not installed; no HDF5 file, or a damaged one; a layout that is none of the three, with the
            keys found; arrays that are missing, are neither vectors nor images or do not fit each other; a key that
            does not exist.
    """
    try:
        import h5py
    except ModuleNotFoundError:
        raise UserError("HDF5 files are read with h5py, which is not installed: pip install 'jaxrl[data]'") from None
    if not h5py.is_hdf5(path):
        raise UserError("this is not an HDF5 file, or it is cut short")
    try:
        with h5py.File(path, "r") as file:
            if "data" in file and (demos := _numbered(file["data"], "demo")):
                return _joined((_demo(file["data"][name], keys) for name in demos), "obs")
            if episodes := _numbered(file, "episode"):
                return _joined((_episode(file[name], keys) for name in episodes), "observations")
            if {"observations", "actions", "rewards", "terminals"} <= file.keys():
                return _d4rl(file, keys), ""
            raise UserError(f"unknown HDF5 layout: found {_listed(file)}; known are {LAYOUTS}")
    except (OSError, RuntimeError, KeyError) as error:  # h5py's, of a damaged file
        raise UserError(f"the file cannot be read: {error}") from None


def _d4rl(file: Any, keys: Sequence[str]) -> Columns:
    """Returns the columns of a D4RL file: in the full layout where it has next observations, else in the compact."""
    columns = _observed(file, "observations", keys)
    rows = _rows(columns)
    columns |= {name: _array(file, name) for name in ("actions", "rewards", "terminals", "timeouts") if name in file}
    for name in ("rewards", "terminals", "timeouts"):
        if name in columns:
            columns[name] = _scalars(name, columns[name], rows)
    full = "next_observations" in file
    if full:
        columns |= _observed(file, "next_observations", keys)
    _check_steps("", columns, rows)
    if "timeouts" not in columns and not full:
        raise UserError(
            "a D4RL file with neither 'timeouts' nor 'next_observations' does not tell where time limits ended "
            f"episodes: found {_listed(file)}"
        )
    terminals = columns["terminals"] != 0
    ends = terminals | (columns.pop("timeouts", np.zeros(len(terminals))) != 0)
    if len(ends) and not ends[-1]:
        columns["unfinished"] = np.arange(len(ends)) > np.max(np.flatnonzero(ends), initial=-1)
        ends[-1] = True
    columns |= {"terminals": ends, "masks": 1 - columns["terminals"].astype(np.float32)}
    return columns if full else _without_successors(columns, terminals)


def _observed(file: Any, name: str, keys: Sequence[str]) -> Columns:
    """Returns the observations of a D4RL file by the names of their columns: one array, or one for each in a group."""
    arrays = _leaves(file[name]) if hasattr(file[name], "keys") else {"": _array(file, name)}
    if keys and "" in arrays:
        raise UserError("a D4RL file has no observation keys to choose from, unless its observations are a group")
    chosen = {key: arrays[key] for wanted in keys for key in _below(wanted, arrays)} or arrays
    return {f"{name}/{key}".rstrip("/"): array for key, array in chosen.items()}


def _without_successors(columns: Columns, terminals: np.ndarray) -> Columns:
    """Returns compact columns of rows that do not say what their steps led to; `terminals` are those that ended tasks.

    Where nothing but a time limit ended an episode its last row becomes the final observation; where a task ended, a
    row is added for it. Rows that are left alone, with no step, are dropped.
    """
    copies = 1 + terminals
    source = np.repeat(np.arange(len(terminals)), copies)
    last = columns["terminals"][source]
    last[:-1] &= source[1:] != source[:-1]  # the first of two copies is a step
    kept = ~(last & np.concatenate([[True], last[:-1]]))
    columns = {name: column[source[kept]] for name, column in columns.items()} | {"terminals": last[kept]}
    columns["rewards"][columns["terminals"]] = 0
    columns["masks"][columns["terminals"]] = 1
    if not columns.get("unfinished", np.ones(1)).any():  # it was a row without a step
        del columns["unfinished"]
    return columns


def _episode(group: Any, keys: Sequence[str]) -> tuple[Columns, str]:
    """Returns the columns of one Minari episode, and what its observations are made of."""
    observations, parts = _arrays(group, "observations", keys)
    actions = _actions(group)
    rewards, ended = (_scalars(name, _array(group, name), len(actions)) for name in ("rewards", "terminations"))
    if (found := _rows(observations)) != len(actions) + 1:
        raise UserError(
            f"{group.name[1:]}: {found} observations for {len(actions)} actions, one more is needed: of the state "
            "after the last"
        )
    return _compact(observations, actions, rewards, ended), parts


def _demo(group: Any, keys: Sequence[str]) -> tuple[Columns, str]:
    """Returns the columns of one robomimic demonstration, and what its observations are made of."""
    observations, parts = _arrays(group, "obs", keys)
    actions = _actions(group)
    rewards, ended = (_scalars(name, _array(group, name), len(actions)) for name in ("rewards", "dones"))
    _check_steps(f"{group.name[1:]}: ", {"actions": actions}, _rows(observations))
    if "next_obs" in group:
        following, _ = _arrays(group, "next_obs", keys)
        shapes = [{name: column.shape for name, column in each.items()} for each in (observations, following)]
        if shapes[0] != shapes[1]:
            one, other = (each.get("observations", each) for each in shapes)
            raise UserError(f"{group.name[1:]}: obs is {one} in all, next_obs {other}")
        observations = {name: np.concatenate([column, following[name][-1:]]) for name, column in observations.items()}
    return _compact(observations, actions, rewards, ended), parts


def _compact(observations: Columns, actions: np.ndarray, rewards: np.ndarray, ended: np.ndarray) -> Columns:
    """Returns the compact columns of an episode of T steps, whose observations are T + 1, or T and the last unknown."""
    if _rows(observations) == len(actions):
        if len(ended) and ended[-1]:
            observations = {name: np.concatenate([column, column[-1:]]) for name, column in observations.items()}
        else:
            actions, rewards, ended = actions[:-1], rewards[:-1], ended[:-1]
    rows = len(actions) + 1 if len(actions) else 0
    return {name: column[:rows] for name, column in observations.items()} | {
        "actions": np.concatenate([actions, np.zeros_like(actions[:1])]),
        "rewards": np.concatenate([rewards, np.zeros_like(rewards[:1])]),
        "masks": np.concatenate([1 - ended.astype(np.float32), np.ones_like(ended[:1], np.float32)]),
        "terminals": np.arange(rows) == rows - 1,
    }


def _joined(episodes: Iterable[tuple[Columns, str]], name: str) -> tuple[Columns, str]:
    """Returns the columns of episodes one after the other. Raises UserError where their widths differ."""
    columns, parts = zip(*episodes, strict=True)
    for other, made_of in zip(columns, parts, strict=True):
        if other.keys() != columns[0].keys():
            raise UserError(f"episodes differ: {name} is {made_of} in one, {parts[0]} in the first")
        for column in columns[0]:
            if (found := other[column].shape[1:]) != (first := columns[0][column].shape[1:]):
                found, first = (shape[0] if len(shape) == 1 else shape for shape in (found, first))
                raise UserError(f"episodes differ: {column} have {found} entries in one, {first} in the first")
        if made_of != parts[0]:
            raise UserError(f"episodes differ: {name} is {made_of} in one, {parts[0]} in the first")
    return {column: np.concatenate([each[column] for each in columns]) for column in columns[0]}, parts[0]


def _arrays(group: Any, name: str, keys: Sequence[str] = ()) -> tuple[Columns, str]:
    """Returns the columns of observations below a name, of all arrays or of those with these keys, and their parts.

    Vectors are one column side by side, whose parts are named; where there are images each array is a column.
    """
    chosen = _below_name(group, name, keys)
    if "" in chosen:
        return {"observations": chosen[""]}, ""
    images = [key for key, array in chosen.items() if array.ndim == 4 and array.dtype == np.uint8]
    for key, array in chosen.items():
        if array.ndim != 2 and key not in images:
            raise UserError(
                f"{group.name[1:]}/{name}/{key} has the shape {array.shape} and the dtype {array.dtype}, only vectors "
                "and uint8 images are read: choose others with `jaxrl data convert FILE OUT.npz --keys ...`"
            )
    if len(rows := {len(array) for array in chosen.values()}) != 1:
        raise UserError(f"{group.name[1:]}/{name}: arrays of {', '.join(map(str, sorted(rows))) or 'no'} rows")
    parts = ", ".join(f"{key} {list(array.shape[1:])}" for key, array in chosen.items())
    if images:
        return {f"observations/{key}": array for key, array in chosen.items()}, parts
    return {"observations": np.concatenate(list(chosen.values()), axis=1)}, parts


def _actions(group: Any) -> np.ndarray:
    """Returns the actions [T, A] of an episode, of all arrays below their name."""
    columns, _ = _arrays(group, "actions")
    if "observations" not in columns:
        raise UserError(f"{group.name[1:]}/actions are images: an action is a vector of numbers in [-1, 1]")
    return columns["observations"]


def _below_name(group: Any, name: str, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns all arrays below a name or those with these keys, by their path there; of a single array, that by ''."""
    if name not in group:
        raise UserError(f"{group.name[1:]}: missing {name!r}: found {_listed(group)}")
    arrays = _leaves(group[name])
    if "" in arrays and keys:
        raise UserError(f"{group.name[1:]}/{name} is one array: there are no keys to choose from")
    return {key: arrays[key] for wanted in keys for key in _below(wanted, arrays)} or arrays


def _rows(columns: Columns) -> int:
    """Returns the number of rows that columns have."""
    return len(next(iter(columns.values())))


def _leaves(node: Any) -> dict[str, np.ndarray]:
    """Returns all arrays below a node by their path, numbers as vectors of one entry; of an array, that by ''."""
    if not hasattr(node, "keys"):
        array = np.atleast_1d(node[()])
        return {"": array[:, None] if array.ndim == 1 else array}
    found = {}
    for name in sorted(node, key=_natural):
        found |= {f"{name}/{below}".rstrip("/"): array for below, array in _leaves(node[name]).items()}
    return found


def _below(key: str, names: Iterable[str]) -> list[str]:
    """Returns the names that are a key or lie in its group. Raises UserError where there are none."""
    found = [name for name in names if name == key or name.startswith(f"{key}/")]
    if not found:
        raise unknown("observation key", key, names)
    return found


def _array(group: Any, name: str) -> np.ndarray:
    if name not in group or hasattr(group[name], "keys"):
        raise UserError(f"{group.name[1:] or 'the file'}: missing array {name!r}: found {_listed(group)}")
    return np.atleast_1d(group[name][()])


def _scalars(name: str, column: np.ndarray, steps: int) -> np.ndarray:
    """Returns one number per step, of an array [T] or [T, 1]."""
    if column.shape not in ((steps,), (steps, 1)):
        raise UserError(f"{name!r} has the shape {column.shape}, there are {steps} steps")
    return column.reshape(steps)


def _check_steps(where: str, columns: Columns, steps: int) -> None:
    for name, column in columns.items():
        if len(column) != steps:
            raise UserError(f"{where}{name!r} has {len(column)} rows, there are {steps} observations")


def _numbered(group: Any, prefix: str) -> list[str]:
    """Returns the names PREFIX_0, PREFIX_1, ... of a group, by their numbers."""
    names = group.keys() if hasattr(group, "keys") else ()
    return sorted((name for name in names if re.fullmatch(rf"{prefix}_\d+", name)), key=_natural)


def _natural(name: str) -> tuple[str, int]:
    """Returns what sorts names that end in a number by that number."""
    stem = name.rstrip("0123456789")
    return stem, int(name[len(stem) :] or -1)


def _listed(group: Any) -> str:
    names = sorted(group)
    more = f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
    return ", ".join(names[:NAMED_AT_MOST]) + more or "no keys"
