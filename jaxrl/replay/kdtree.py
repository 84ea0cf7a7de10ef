"""KD-trees of a dataset's rows on the host, for the exact search of neighbors where the backend is the CPU."""

import collections
import threading
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from jaxrl import system
from jaxrl.errors import UserError
from jaxrl.types import Static

if TYPE_CHECKING:
    from scipy.spatial import KDTree

MANY = 500_000  # points from which on several threads pay off; to start them takes a millisecond
SHARE = 64  # queries per thread, at least


class Forest(Static):
    """The rows of a ring, and one KD-tree of them for each scaling that was asked for, of the most recent `TREES`.

    Trees split boxes in the middle of their widest side instead of at the median. That made a search of robots' data
    with 33 and 60 entries 20 and 500 times as fast; with 4 and 23 entries it made no difference.

    A tree over N rows of D entries takes about 8 D + 40 bytes per row, and is built when it is first searched. There is
    one tree per value of (mean, weight), so a sweep over more than `TREES` values of a scaling builds them again and
    again: search such a sweep by blocks.

    Forests are compared by identity: each compiles separately, and a compiled program keeps its forest in memory.
    """

    TREES: ClassVar[int] = 8

    def __init__(self, states: np.ndarray, actions: np.ndarray, valid: np.ndarray) -> None:
        """Takes rows of states [N, S] and actions [N, A], which are not copied, and whether each row counts, [N]."""
        self.states, self.actions, self.valid = states, actions, valid
        self.trees: collections.OrderedDict[bytes, tuple[KDTree, np.ndarray]] = collections.OrderedDict()
        self.lock = threading.Lock()

    def nearest(
        self, mean: np.ndarray, weight: np.ndarray, states: np.ndarray, actions: np.ndarray, k: int = 1
    ) -> np.ndarray:
        """Returns the rows [B, k] int32 nearest to states [B, S] and actions [B, A], by float64 distances, ascending.

        States are scaled as (s - mean) * weight. A query that is not finite gets any rows; rows that are not finite are
        never returned. Raises UserError if fewer than k rows are left.
        """
        tree, rows = self.tree(mean, weight)
        if tree.n < k:
            raise UserError(f"{tree.n} rows of the dataset can be searched, {k} neighbors were asked for")
        query = keys(mean, weight, states, actions)
        query[~np.isfinite(query).all(axis=1)] = 0
        threads = min(system.cores(), -(-len(query) // SHARE)) if tree.n >= MANY else 1
        _, found = tree.query(query, k=np.arange(1, k + 1), workers=threads)
        return rows[found]

    def tree(self, mean: np.ndarray, weight: np.ndarray) -> "tuple[KDTree, np.ndarray]":
        """Returns the tree of a scaling, built if it is new, and the row [n] int32 of each of its n points."""
        name = mean.tobytes() + weight.tobytes()
        with self.lock:
            if name not in self.trees:
                self.trees[name] = self.grown(mean, weight)
            self.trees.move_to_end(name)
            if len(self.trees) > self.TREES:
                self.trees.popitem(last=False)
            return self.trees[name]

    def grown(self, mean: np.ndarray, weight: np.ndarray) -> "tuple[KDTree, np.ndarray]":
        """Returns a new tree of the finite rows that count, and the row of each of its points."""
        from scipy.spatial import KDTree  # slow to import, and rarely needed

        rows = np.flatnonzero(self.valid).astype(np.int32)
        points = keys(mean, weight, self.states[rows], self.actions[rows])
        finite = np.isfinite(points).all(axis=1)
        points, rows = (points, rows) if finite.all() else (points[finite], rows[finite])
        return KDTree(points, balanced_tree=False), rows


def bare() -> Forest:
    """Returns a forest without rows, for programs that are compiled but never run."""
    return Forest(np.zeros((0, 0), np.float32), np.zeros((0, 0), np.float32), np.zeros(0, bool))


def size_of_tree(rows: int, entries: int) -> int:
    """Returns the bytes that a tree takes while it is built, the most that was measured; later about 8 per entry."""
    return rows * (12 * entries + 40)


def keys(mean: np.ndarray, weight: np.ndarray, states: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Returns the points [N, S + A] in float64 that are searched: [(s - mean) * weight, a]."""
    size = states.shape[1]
    points = np.empty((len(states), size + actions.shape[1]))  # filled in place: no other array is as large
    np.subtract(states, mean, out=points[:, :size], dtype=np.float64)
    points[:, :size] *= weight
    points[:, size:] = actions
    return points
