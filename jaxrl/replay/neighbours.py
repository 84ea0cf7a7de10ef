"""Exact nearest pairs of a whole dataset: of each query (s, a) the rows j with the smallest

    |[(s - mean) * weight, a] - [(s_j - mean) * weight, a_j]|^2

found inside the compiled program. With mean and standard deviation of the states and weight = beta / std these are
the neighbors of PRDC (Ran et al., arXiv 2306.06569): a large beta asks for the same state, a small one for the same
action.

There are two exact ways. By blocks: the distances to a block of keys are one matrix product, |x|^2 - 2 q.x, and the
smallest of all blocks are kept. That expansion rounds to about 1e-7 of the largest |x|^2, too coarse to choose between
keys where they are dense. So it only nominates: the rows of the best k + 7 groups are compared again as sums of
squares. By a KD-tree on the host (`jaxrl.replay.kdtree`), which was faster on a CPU for all robots' data that were
tried, with keys of up to 60 entries. A tree is of no use where keys have many entries that vary independently.

A search has no gradient.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxrl.errors import UserError
from jaxrl.replay.kdtree import Forest
from jaxrl.replay.ring import Ring, Rings
from jaxrl.types import Scalar, pytree

Method: TypeAlias = Literal["auto", "blocks", "tree", "approximate"]
"""How to search. "auto": by tree on a CPU if there is one and keys have at most 64 entries, else by blocks."""

BLOCK = 65_536  # keys compared at a time
CACHED = 4096  # keys compared at a time on a CPU, at most, whose distances fit its cache
CEILING = 2**30  # bytes that the distances to one block may take
FEW = 64  # entries of a key up to which trees were faster on a CPU, for all queries and numbers of rows tried
SPARE = 7  # groups nominated beyond k
NOMINATED = 512  # rows nominated per query, at most, where k is small
LARGEST = float(np.finfo(np.float32).max)  # of a row that counts, instead of a distance that is not finite


@pytree
class Index:
    """What is searched: N rows as they are stored, and the scaling of their states. It holds no copies."""

    states: jax.Array  # [N, S]
    actions: jax.Array  # [N, A]
    valid: jax.Array  # [N] bool: the rows that count
    mean: jax.Array  # [S]
    weight: jax.Array  # [S]
    forest: Forest | None = None  # KD-trees of the same rows


def with_forest(ring: Ring) -> Ring:
    """Returns the ring with KD-trees of its rows, each of which is built when it is first searched."""
    rows = (np.asarray(x) for x in _rows(ring))
    return dataclasses.replace(ring, forest=Forest(*rows))


def index_of(rings: Rings, mean: jax.Array | Scalar, weight: jax.Array | Scalar) -> Index:
    """Returns the index of the first ring: the dataset, or the replay where there is no dataset.

    Its rows are the ring's lanes, one after another; rows that no transition leaves do not count. `mean` and `weight`
    are one number, or one per entry of the state [S].
    """
    ring = rings[0]
    states, actions, valid = _rows(ring)
    mean, weight = (jnp.broadcast_to(jnp.asarray(x, states.dtype), states.shape[1:]) for x in (mean, weight))
    return Index(states, actions, valid, mean, weight, ring.forest)


def _rows(ring: Ring) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns states [N, S], actions [N, A] and validity [N] of a ring's lanes, one after another."""
    if isinstance(ring.obs, Mapping):
        raise UserError(f"neighbours: observations are a dict ({', '.join(ring.obs)}); only vectors can be searched")
    states, actions, valid = (x.reshape(-1, *x.shape[2:]) for x in (ring.obs, ring.actions, ring.valid))
    return states, actions, valid


def check(rows: int, batch: int, k: int = 1, method: Method = "auto", block: int = BLOCK) -> None:
    """Raises UserError where `batch` queries for k neighbors among so many rows cannot be answered."""
    if method not in get_args(Method):
        raise UserError(f"neighbours: method = {method!r}: must be one of {', '.join(get_args(Method))}")
    if k < 1:
        raise UserError(f"neighbours: k = {k}: must be at least 1")
    if rows < k:
        raise UserError(f"neighbours: k = {k}: the dataset has {rows} rows to choose from")
    if block < k:
        raise UserError(f"neighbours: block = {block}: must be at least k = {k}")
    if (size := 4 * batch * min(block, rows)) > CEILING:
        raise UserError(
            f"neighbours: block = {block}: with {batch} queries its distances take {size / 2**30:.1f} GiB, "
            f"at most {CEILING / 2**30:.0f} GiB are allowed"
        )


def nearest(
    index: Index,
    states: jax.Array,
    actions: jax.Array,
    k: int = 1,
    method: Method = "auto",
    block: int = BLOCK,
) -> tuple[jax.Array, jax.Array]:
    """Returns the k nearest rows of the queries states [B, S] and actions [B, A], the nearest first.

    As squared distances [B, k] in float32, summed as squares, and rows [B, k] int32. Rows that do not count are not
    returned, unless fewer than k count: the surplus ones are infinitely far, as everything is from a query that is not
    finite. Of equally near rows any is returned.

    "blocks" holds two arrays of floats [B, block] at a time, whatever N is, and so does "approximate": it nominates by
    `jax.lax.approx_min_k`, and may miss a neighbor, but its distances are exact. "tree" takes little memory in the
    program (on the host, see `Forest`), and is slow for queries that are far from all rows. Under `vmap` blocks are
    searched side by side, trees one after the other.

    Raises UserError as `check` does, and for "tree" where the index has no forest.
    """
    check(len(index.states), len(states), k, method, block)
    index, states, actions = lax.stop_gradient((index, states, actions))
    if method == "auto":
        method = "tree" if tree_is_faster(index) else "blocks"
    if jax.default_backend() == "cpu":
        block = min(block, CACHED)
    if method == "tree":
        rows = by_tree(index, states, actions, k)
    else:
        rows = by_blocks(index, states, actions, k + SPARE, block, approximate=method == "approximate")
    return closest(index, states, actions, rows, k)


def tree_is_faster(index: Index) -> bool:
    """Returns whether "auto" searches on the host: on a CPU, with a forest, and with keys of few entries."""
    entries = index.states.shape[1] + index.actions.shape[1]
    return index.forest is not None and entries <= FEW and jax.default_backend() == "cpu"


def by_tree(index: Index, states: jax.Array, actions: jax.Array, k: int) -> jax.Array:
    """Returns the nearest rows [B, k] int32, which the forest on the host finds."""
    if index.forest is None:
        raise UserError(
            "neighbours: method = 'tree': there are no trees of this data. They are only made of a single file that a "
            "run on the CPU holds in memory; use 'blocks' or 'auto'"
        )
    ask = functools.partial(_ask, index.forest, k)
    shape = jax.ShapeDtypeStruct((len(states), k), jnp.int32)
    return jax.pure_callback(ask, shape, index.mean, index.weight, states, actions, vmap_method="sequential")


def _ask(forest: Forest, k: int, *arrays: jax.Array) -> np.ndarray:
    return forest.nearest(*map(np.asarray, arrays), k=k)  # no JAX here: it would wait for the program that calls this


def by_blocks(
    index: Index, states: jax.Array, actions: jax.Array, count: int, block: int, approximate: bool = False
) -> jax.Array:
    """Returns rows [B, R] int32 that are nominated block by block, each at most once, -1 for none.

    They are the members of the `count` groups (runs of consecutive rows) with the smallest expansions |x|^2 - 2 q.x;
    with `approximate` they are `count` rows with nearly the smallest.
    """
    block = min(block, len(index.states))
    size = 1 if approximate else max(1, min(NOMINATED // count, block))  # of a group
    groups = -(-block // size)
    query = scaled(index, states, actions)

    def visit(best: tuple[jax.Array, jax.Array], number: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        value = expansion(index, query, number, block)
        if approximate:
            value, group = lax.approx_min_k(value, min(count, block))
        else:
            padded = jnp.pad(value, ((0, 0), (0, groups * size - block)), constant_values=jnp.inf)
            value = padded.reshape(-1, groups, size).min(axis=-1)
            group = jnp.broadcast_to(jnp.arange(groups, dtype=jnp.int32), value.shape)
        values, ids = (jnp.concatenate(pair, 1) for pair in zip(best, (value, number * groups + group), strict=True))
        return smallest(values, ids, count), None

    none = jnp.full((len(query), count), jnp.inf), jnp.zeros((len(query), count), jnp.int32)
    blocks = jnp.arange(-(-len(index.states) // block), dtype=jnp.int32)
    (value, best), _ = lax.scan(visit, none, blocks)
    number, group = best // groups, best % groups
    place = group[..., None] * size + jnp.arange(size, dtype=jnp.int32)[None, None]  # in the block
    row = place + start_of(index, number, block)[..., None]
    member = (value < jnp.inf)[..., None] & (place < block) & (row >= number[..., None] * block)
    return jnp.where(member, row, -1).reshape(len(query), -1)


def start_of(index: Index, number: jax.Array, block: int) -> jax.Array:
    """Returns the first row of a block; the last block overlaps the one before, so that all have one length."""
    return jnp.minimum(number * block, len(index.states) - block)


def expansion(index: Index, query: jax.Array, number: jax.Array, block: int) -> jax.Array:
    """Returns |x|^2 - 2 q.x [B, block] of the keys x of a block: their squared distances, less |q|^2.

    Infinite for rows that do not count or belong to an earlier block; LARGEST where it is not finite.
    """
    start = start_of(index, number, block)
    states, actions, valid = (
        lax.dynamic_slice_in_dim(x, start, block) for x in (index.states, index.actions, index.valid)
    )
    key = scaled(index, states, actions)
    value = jnp.square(key).sum(axis=-1)[None] - 2 * product(query, key)
    own = valid & (start + jnp.arange(block) >= number * block)
    return jnp.where(own[None], jnp.where(jnp.isfinite(value), value, LARGEST), jnp.inf)


def product(query: jax.Array, key: jax.Array) -> jax.Array:
    """Returns the products q.x [B, N], in full float32, also on devices that use fewer bits by default."""
    return jnp.matmul(query, key.T, precision=lax.Precision.HIGHEST)


def scaled(index: Index, states: jax.Array, actions: jax.Array) -> jax.Array:
    """Returns the keys [(s - mean) * weight, a]."""
    return jnp.concatenate([(states - index.mean[None]) * index.weight[None], actions], axis=-1)


def smallest(value: jax.Array, row: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns the k smallest values [B, k], ascending, the first of equal ones, and their rows."""
    value, place = lax.top_k(-value, k)
    return -value, jnp.take_along_axis(row, place, axis=-1)


def closest(
    index: Index, states: jax.Array, actions: jax.Array, rows: jax.Array, k: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the k nearest of the nominated rows [B, R], by distances that are sums of squares.

    A distance that is not finite is infinite, and so is that to a row that does not count or is -1, which is returned
    as 0. The former come first.
    """
    there = (rows >= 0) & index.valid[rows]
    rows = jnp.maximum(rows, 0)
    apart = (states[:, None] - index.states[rows]) * index.weight[None, None]
    distance = jnp.square(apart).sum(axis=-1) + jnp.square(actions[:, None] - index.actions[rows]).sum(axis=-1)
    distance = jnp.where(jnp.isfinite(distance), distance, LARGEST)
    distance, row = smallest(jnp.where(there, distance, jnp.inf), rows, k)
    return jnp.where(distance < LARGEST, distance, jnp.inf), row
