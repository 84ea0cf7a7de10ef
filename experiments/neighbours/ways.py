"""The ways to search for nearest pairs, and the measurement of one of them on one dataset in a process of its own."""

import dataclasses
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy.spatial import cKDTree

from jaxrl.data import files
from jaxrl.replay import neighbours
from jaxrl.replay.kdtree import Forest, keys
from jaxrl.replay.neighbours import BLOCK, Index, Method
from jaxrl.types import pytree

WAYS = ("blocks", "tree", "approximate", "scipy", "candidates")
NOISE = {"near": 0.05, "off": 0.5}
BETA = 2.0
BATCHES = 4
KNOWN = 64  # candidates per state


@pytree
class Known:
    """For some rows the rows with the nearest states, whatever their actions; all others are farther by state alone."""

    rows: jax.Array  # [Q, K] int32, -1 where there are no more
    radius: jax.Array  # [Q], the squared distance of the farthest


def known_of(index: Index, rows: jax.Array, count: int = KNOWN, batch: int = 256, block: int = BLOCK) -> Known:
    """Returns the `count` nearest states of each of the rows [Q], by a search of blocks for `batch` of them at a time.

    They hold for one scaling; under c times its weight the radius is c^2 as large.
    """
    blind = dataclasses.replace(index, actions=index.actions[:, :0])
    whole = jnp.pad(rows, (0, -len(rows) % batch)).reshape(-1, batch)

    def find(rows: jax.Array) -> Known:
        distance, row = neighbours.nearest(blind, index.states[rows], blind.actions[rows], count, "blocks", block)
        radius = distance[:, -1] * (1 - 1e-5)  # slightly less, because of rounding
        return Known(jnp.where(distance < jnp.inf, row, -1), radius)

    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[: len(rows)], lax.map(find, whole))


def nearest_known(
    index: Index,
    known: Known,
    states: jax.Array,
    actions: jax.Array,
    k: int = 1,
    method: Method = "auto",
    block: int = BLOCK,
) -> tuple[jax.Array, jax.Array]:
    """Returns what `neighbours.nearest` does, for states [B, S] of rows of which the nearest states are known, [B, K].

    Only these are compared, which is exact wherever the k-th best lies within the radius. Where that fails for one
    query, the whole batch is searched. That saves nothing under `vmap`, which does both.
    """
    neighbours.check(known.rows.shape[1], len(states), k)
    index, states, actions, known = lax.stop_gradient((index, states, actions, known))
    distance, row = neighbours.closest(index, states, actions, known.rows, k)
    sure = (distance[:, -1] <= known.radius).all()
    search = functools.partial(neighbours.nearest, index, states, actions, k, method, block)
    return lax.cond(sure, lambda: (distance, row), search)


def trajectories(rows: int, states: int = 17, actions: int = 6, length: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Returns smooth states, each entry a sum of three sines per episode, and actions, a noisy function of them."""
    rng = np.random.default_rng(0)
    episodes = -(-rows // length)
    speed, phase, size = (rng.uniform(*span, (3, episodes, 1, states)) for span in ((0.2, 2), (0, 2 * np.pi), (-1, 1)))
    clock = 0.05 * np.arange(length)[None, :, None]
    waves = sum(a * np.sin(s * clock + p) for s, p, a in zip(speed, phase, size, strict=True))
    smooth = np.asarray(waves, np.float32).reshape(-1, states)[:rows]
    mixed = smooth @ rng.normal(0, states**-0.5, (states, actions)) + 0.3 * rng.normal(size=(rows, actions))
    return smooth, np.tanh(mixed).astype(np.float32)


def pairs(source: Path | int) -> tuple[str, np.ndarray, np.ndarray]:
    """Returns a name, and the states and actions of all transitions, of a file or of so many synthetic rows."""
    if isinstance(source, int):
        return "synthetic", *trajectories(source)
    dataset = files.load(source)
    steps = ~dataset.terminals
    return source.stem, dataset.observations[steps], dataset.actions[steps]


def index_of(states: np.ndarray, actions: np.ndarray) -> Index:
    """Returns the index of pairs, with their trees still to be grown."""
    valid, mean, weight = np.ones(len(states), bool), states.mean(axis=0), BETA / (states.std(axis=0) + 1e-3)
    return Index(*map(jnp.asarray, (states, actions, valid, mean, weight)), Forest(states, actions, valid))


def queries(index: Index, batch: int, noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns rows [4, B], their states, and their actions with noise."""
    rng = np.random.default_rng(1)
    row = rng.integers(len(index.states), size=(BATCHES, batch))
    actions = np.asarray(index.actions)[row]
    noisy = np.clip(actions + noise * rng.normal(size=actions.shape), -1, 1).astype(np.float32)
    return row, np.asarray(index.states)[row], noisy


def programmed(index: Index, method: Method, asked: tuple) -> Callable[[], Any]:
    """Returns a compiled program that searches for all batches."""

    def searched(index: Index, states: jax.Array, actions: jax.Array) -> Any:
        return lax.map(lambda pair: neighbours.nearest(index, *pair, method=method), (states, actions))

    states, actions = map(jnp.asarray, asked[1:])
    program = jax.jit(searched).lower(index, states, actions).compile()
    return lambda: jax.block_until_ready(program(index, states, actions))


def peer(index: Index, asked: tuple) -> Callable[[], Any]:
    """Returns a function that asks a tree of SciPy's, on the host from beginning to end."""
    mean, weight, states, actions = map(np.asarray, (index.mean, index.weight, index.states, index.actions))
    grown = functools.cache(lambda: cKDTree(keys(mean, weight, states, actions)))
    return lambda: [grown().query(keys(mean, weight, s, a)) for s, a in zip(*asked[1:], strict=True)]


def timed_known_of(index: Index, rows: np.ndarray) -> tuple[Known, float]:
    """Returns what is known of rows [4, B], and the seconds that it would take to find that for all rows.

    Only the rows that will be searched for are looked up.
    """
    flat = jnp.asarray(rows.ravel())
    program = jax.jit(known_of).lower(index, flat).compile()
    began = time.perf_counter()
    known = jax.block_until_ready(program(index, flat))
    seconds = (time.perf_counter() - began) * len(index.states) / rows.size
    return jax.tree.map(lambda x: x.reshape(*rows.shape, *x.shape[1:]), known), seconds


def pruning(index: Index, asked: tuple, record: dict[str, Any]) -> Callable[[], Any]:
    """Returns a compiled program that searches what is known; records its price, and the queries that it answered."""
    known, record["all_candidates_s"] = timed_known_of(index, asked[0])
    states, actions = map(jnp.asarray, asked[1:])

    def searched(index: Index, *queries: Any) -> Any:
        return lax.map(lambda parts: nearest_known(index, *parts), queries)

    program = jax.jit(searched).lower(index, known, states, actions).compile()
    distance, _ = program(index, known, states, actions)
    record["answered"] = float((distance[..., 0] <= known.radius).mean())
    return lambda: jax.block_until_ready(program(index, known, states, actions))


def peak_memory(reset: bool = False) -> int:
    """Returns the bytes that this process, or its GPU, has held at most since the last reset (only Linux resets)."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["bytes_in_use"] if reset else stats["peak_bytes_in_use"]
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measured(source: Path | int, way: Any, batch: int, seconds: float) -> dict[str, Any]:
    """Returns what one way does on one dataset, from a process of its own."""
    name, states, actions = pairs(source)
    index = index_of(states, actions)
    record: dict[str, Any] = {"data": name, "rows": len(states), "entries": states.shape[1] + actions.shape[1]}
    record |= {"way": way, "load_average": os.getloadavg()[0]}
    for distance, noise in NOISE.items():
        result: dict[str, Any] = {}
        asked = queries(index, batch, noise)
        if way == "scipy":
            search = peer(index, asked)
        elif way == "candidates":
            search = pruning(index, asked, result)
        else:
            search = programmed(index, way, asked)
        held = peak_memory(reset=True)
        search()
        record["memory_mib"] = max((peak_memory() - held) / 2**20, record.get("memory_mib", 0))
        times: list[float] = []
        while sum(times) < seconds:
            began = time.perf_counter()
            search()
            times.append(time.perf_counter() - began)
        record[distance] = result | {"batch_ms": 1000 * float(np.median(times)) / BATCHES}
    if way == "candidates":
        record["memory_mib"] += (KNOWN + 1) * 4 * len(states) / 2**20  # of all rows
    return record
