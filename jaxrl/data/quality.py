"""Measures of an offline dataset that predict which method will work on it. On the host, pure functions of arrays.

Of the returns: trajectory quality TQ and the state-action coverage SACo (Schweighofer et al., "A Dataset Perspective
on Offline Reinforcement Learning", 2022), the positive-sided variance V+ (Hong et al., "Harnessing Mixed Offline
Reinforcement Learning Datasets via Trajectory Weighting", 2023). Episodes that a file marks as `unfinished` have no
return, and count for everything else.

Of the neighbors, estimators of the two concepts of Belkhale et al., "Data Quality in Imitation Learning" (2023): how
much the actions taken in one place differ (action variance), and where one action in one place leads (transition
diversity); how dense the data are (state similarity, distance of the nearest neighbor). Neighbors are the k nearest
states of other episodes, in observations scaled to unit variance (constant entries stay as they are). The search is
exact, for a random subset of the steps. It compares a step with all rows, unlike `jaxrl.replay.kdtree`: the states
nearest to a step are those of its own episode, which do not count, and a tree is slow to find points so far away.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np

from jaxrl.data import files
from jaxrl.data.files import Dataset
from jaxrl.errors import UserError
from jaxrl.ops import normalizer
from jaxrl.ops.normalizer import Normalizer

FIRST = 100_000  # steps that coverage is counted over, at most
EDGES = 5  # per entry, so that there are 6 cells: below the least, four between, from the greatest on
DIGITS = 24  # of base 6 that fit into 64 bits
BETA = 2.0  # how much a state counts beside an action, for transition diversity
ENTRIES = 1 << 22  # distances held at a time
LARGEST = np.finfo(np.float32).max / 4  # a limit of squares that can still be widened
QUANTILES = (0.1, 0.5, 0.9)


@dataclasses.dataclass(frozen=True, eq=False)
class Spread:
    """How the columns of an array vary, in float64."""

    mean: np.ndarray  # [n]
    std: np.ndarray  # [n], of the population, 0 where a column is constant
    constant: np.ndarray  # [n] bool

    @property
    def variance(self) -> float:
        """The variance of all columns together."""
        return float((self.std**2).sum())

    @property
    def normalizer(self) -> Normalizer:
        """Values in standard deviations from the mean; constant columns are only shifted."""
        return Normalizer(self.mean, np.where(self.constant, 1.0, self.std))


def spread(values: np.ndarray) -> Spread:
    """Returns the spread of the columns of values [N, n]."""
    mean, variance = normalizer.of_columns(values)
    constant = values.min(axis=0) == values.max(axis=0)
    return Spread(mean, np.where(constant, 0.0, np.sqrt(variance)), constant)


def trajectory_quality(returns: np.ndarray, random: float, best: float) -> float:
    """Returns TQ, the mean return on the scale where a random policy's is 0 and the best known policy's is 1."""
    if random == best:
        raise UserError(f"the returns of the random and of the best policy are both {best:g}: they must differ")
    return float((returns.mean() - random) / (best - random))


def positive_variance(returns: np.ndarray) -> float:
    """Returns V+, the mean square of the returns' excess over their mean, 0 for those below."""
    return float(np.mean(np.maximum(returns - returns.mean(), 0) ** 2))


def distinct(points: np.ndarray, low: np.ndarray, high: np.ndarray) -> int:
    """Returns u, the number of distinct cells among points [N, n], counted exactly.

    An entry's cell is `np.digitize(x, np.linspace(low, high, 5))`, from 0 to 5: 0 is below `low`, and `high` itself
    lies in the cell 5, together with all beyond.
    """
    cells = np.stack(
        [
            np.digitize(points[:, j], np.linspace(low[j], high[j], EDGES)).astype(np.uint64)
            for j in range(points.shape[1])
        ]
    )
    words = []
    for start in range(0, len(cells), DIGITS):
        word = np.zeros(len(points), np.uint64)
        for digit in cells[start : start + DIGITS]:
            word = word * np.uint64(EDGES + 1) + digit
        words.append(word)
    order = np.lexsort(words)
    new = np.zeros(max(len(points) - 1, 0), bool)
    for word in words:
        new |= np.diff(word[order]) != 0
    return int(new.sum()) + (len(points) > 0)


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How many distinct cells of state and action there are."""

    cells: int
    steps: int  # the first so many were looked at
    reference: int | None = None  # cells of the reference's first steps, as many

    @property
    def ratio(self) -> float | None:
        """SACo, the cells as a multiple of the reference's."""
        return None if self.reference is None else self.cells / self.reference

    @property
    def log_ratio(self) -> float | None:
        """The ratio of the logarithms; None also where the reference fills a single cell."""
        return None if self.reference in (None, 1) else float(np.log(self.cells) / np.log(self.reference))


def coverage(dataset: Dataset, reference: Dataset | None = None) -> Coverage:
    """Returns the distinct cells of the first steps (at most 100,000), as D4RL's datasets were counted.

    Limits are the least and greatest entries in the reference's first steps, and both have equally many; without a
    reference, limits are the dataset's own, and the count is comparable with no other dataset.
    """
    points = _state_actions(dataset)
    if reference is None:
        return Coverage(distinct(points, points.min(axis=0), points.max(axis=0)), len(points))
    others = _state_actions(reference)
    if others.shape[1] != points.shape[1]:
        raise UserError(
            f"the reference {reference.path} has observations and actions of {others.shape[1]} entries in all, "
            f"the dataset {dataset.path} of {points.shape[1]}"
        )
    steps = min(len(points), len(others))
    limits = others[:steps].min(axis=0), others[:steps].max(axis=0)
    return Coverage(distinct(points[:steps], *limits), steps, distinct(others[:steps], *limits))


def _states(dataset: Dataset) -> np.ndarray:
    """Returns observations as vectors [N, O], without images. Raises UserError where there is nothing but images."""
    states = files.vectors(dataset.observations)
    if not states.shape[1]:
        raise UserError(f"dataset {dataset.path}: observations are images, whose quality is not measured")
    return states


def _state_actions(dataset: Dataset) -> np.ndarray:
    """Returns states beside actions [n, O + A] of the first steps."""
    rows = np.flatnonzero(~dataset.terminals)[:FIRST]
    return np.concatenate([_states(dataset)[rows], dataset.actions[rows]], axis=1)


@dataclasses.dataclass(frozen=True, eq=False)
class Neighbourhoods:
    """What the steps drawn find around them in other episodes; the arrays [Q] hold one number per step drawn."""

    neighbours: int  # k: as asked for, or as many as other episodes have
    steps: int  # of the dataset, of which Q were drawn
    seed: int
    beta: float
    epsilon: float  # the median of `nearest`
    nearest: np.ndarray  # [Q] distance of the nearest state of another episode
    similarity: np.ndarray  # [Q] share of the other episodes' states within epsilon
    action_variance: np.ndarray  # [Q] mean square distance from their mean of the actions here and at the neighbors
    diversity: np.ndarray  # [Q] square distance of the step's change of state from the mean change around it
    action_spread: float  # variance of all actions, over all entries together
    change_spread: float  # variance of all changes of state, over all entries together

    @property
    def relative_diversity(self) -> float:
        """TD: the mean diversity as a share of the variance of all changes; 0 where all are equal."""
        return float(self.diversity.mean()) / self.change_spread if self.change_spread else 0.0

    @property
    def relative_action_variance(self) -> float:
        """AV as a share of the variance of all actions; 0 where all are equal."""
        return float(self.action_variance.mean()) / self.action_spread if self.action_spread else 0.0


def neighbourhoods(
    dataset: Dataset, neighbours: int = 10, queries: int = 10_000, seed: int = 0, beta: float = BETA
) -> Neighbourhoods:
    """Returns the measures of neighbors, of at most `queries` steps drawn without replacement.

    A step's neighborhood is the step itself and the k nearest of other episodes: by the state for the variance of
    actions, by (beta * state, action) for the diversity of changes of state. States are scaled to unit variance.

    Raises UserError for no neighbors or queries, and for a dataset of one episode.
    """
    for name, value in (("neighbours", neighbours), ("queries", queries)):
        if value < 1:
            raise UserError(f"{name} = {value}: must be at least 1")
    rows, bounds = _steps_of(dataset)
    others = len(rows) - (bounds[1] - bounds[0])  # steps outside the episode of each step
    neighbours = min(neighbours, int(others.min()))
    drawn = np.sort(np.random.default_rng(seed).permutation(len(rows))[:queries])

    obs, actions = _states(dataset), dataset.actions[rows]
    units = spread(obs).normalizer
    states, changes = units(obs[rows]), (obs[rows + 1] - obs[rows]) / units.std
    distances, found = nearest(states, bounds, drawn, neighbours)
    _, alike = nearest(np.concatenate([beta * states, actions], axis=1), bounds, drawn, neighbours)
    around = actions[np.column_stack([drawn, found])].astype(np.float64)
    mean_change = changes[np.column_stack([drawn, alike])].mean(axis=1)
    epsilon = float(np.median(distances[:, 0]))
    return Neighbourhoods(
        neighbours=neighbours,
        steps=len(rows),
        seed=seed,
        beta=beta,
        epsilon=epsilon,
        nearest=distances[:, 0],
        similarity=_within(states, bounds, drawn, distances, epsilon) / others[drawn],
        action_variance=around.var(axis=1).sum(axis=-1),
        diversity=((changes[drawn] - mean_change) ** 2).sum(axis=1),
        action_spread=spread(actions).variance,
        change_spread=spread(changes).variance,
    )


Bounds: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Of each point, the first of its episode's points and the one after their last."""


def _steps_of(dataset: Dataset) -> tuple[np.ndarray, Bounds]:
    """Returns the rows that are steps [n], and which of these are of one episode. Raises UserError for one episode."""
    first, last = files.episodes(dataset)
    if len(first) < 2:
        raise UserError(f"dataset {dataset.path}: has one episode; neighbors are searched for in other episodes")
    lengths = last - first
    bounds = np.repeat(np.cumsum(lengths) - lengths, lengths), np.repeat(np.cumsum(lengths), lengths)
    return np.flatnonzero(~dataset.terminals), bounds


def nearest(points: np.ndarray, bounds: Bounds, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (distances, indices) [Q, count] of the nearest points outside the episode of each query, ascending.

    `queries` are indices of points; there must be `count` points outside any episode.
    """
    block = max(1, min(256, len(points) // (8 * count)))  # so that there are many more blocks than neighbors

    def bound(squares: np.ndarray, _: np.ndarray) -> np.ndarray:
        """Returns a value that at least `count` entries of each row do not exceed: the minima of so many blocks."""
        least = squares.reshape(len(squares), block, -1).min(axis=1)
        return np.partition(least, count - 1)[:, count - 1]

    distances, indices = np.empty((len(queries), count)), np.empty((len(queries), count), np.intp)
    for i, (found, away) in enumerate(_candidates(points, bounds, queries, block, bound)):
        order = np.argsort(away, kind="stable")[:count]
        distances[i], indices[i] = away[order], found[order]
    return distances, indices


def _within(
    points: np.ndarray, bounds: Bounds, queries: np.ndarray, distances: np.ndarray, epsilon: float
) -> np.ndarray:
    """Returns how many points outside its episode are no farther than epsilon from each query.

    `distances` are those of the nearest; a query is counted again only if all of these are within epsilon.
    """
    counts = np.sum(distances <= epsilon, axis=1)
    more = np.flatnonzero(distances[:, -1] <= epsilon)
    near = _candidates(points, bounds, queries[more], 1, lambda _, norms: epsilon**2 - norms)
    counts[more] = [(away <= epsilon).sum() for _, away in near]
    return counts


def _candidates(
    points: np.ndarray,
    bounds: Bounds,
    queries: np.ndarray,
    block: int,
    bound: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields for each query the points of other episodes that may lie within a bound, and their exact distances.

    One matrix product gives |y|^2 - 2 x.y in float32 for all points y. `bound` returns a limit on that for each query
    [B], from these numbers [B, points up to a whole block] and the |x|^2 [B]. The limit is widened by the largest
    rounding error, so that no point is missed; distances are then computed in float64.
    """
    size, width = points.shape
    single = points.astype(np.float32)
    norms = (points**2).sum(axis=1)
    table = np.zeros((width + 1, size + -size % block), np.float32)
    table[:width, :size], table[width, :size] = -2 * single.T, norms
    for start in range(0, len(queries), step := max(1, ENTRIES // table.shape[1])):
        rows = queries[start : start + step]
        squares = np.concatenate([single[rows], np.ones((len(rows), 1), np.float32)], axis=1) @ table
        squares[:, size:] = np.inf
        for line, row in zip(squares, rows, strict=True):
            line[bounds[0][row] : bounds[1][row]] = np.inf
        limits = np.minimum(bound(squares, norms[rows]), LARGEST)
        reach = np.sqrt(norms[rows]) + np.sqrt(np.maximum(limits + norms[rows], 0))  # no |y| within the limit is above
        slack = (width + 4) * np.finfo(np.float32).eps * (np.sqrt(norms[rows]) + reach) ** 2
        widened = np.nextafter((limits + slack).astype(np.float32), np.float32(np.inf))
        for line, row, limit in zip(squares, rows, widened, strict=True):
            found = np.flatnonzero(line <= limit)
            yield found, np.sqrt(((points[found] - points[row]) ** 2).sum(axis=1))


@dataclasses.dataclass(frozen=True, eq=False)
class Measures:
    """All measures of a dataset; those of returns are None without rewards, those of neighbors with one episode."""

    path: str
    lengths: np.ndarray  # [E] steps of each episode
    coverage: Coverage
    neighbourhoods: Neighbourhoods | None
    constant: tuple[int, ...]  # entries of the observation that are the same everywhere
    size: int  # entries of the observation
    returns: np.ndarray | None = None  # [R] of the episodes that are finished
    quality: tuple[float, float, float] | None = None  # TQ, the return that counts as 0, the one that counts as 1
    values: tuple[float, float] | None = None  # where rewards take two values only: these
    succeeded: float | None = None  # then: the share of finished episodes that get the larger one
    zeros: float | None = None  # the mean share of zero rewards in an episode


def measure(
    dataset: Dataset,
    *,
    reference: Dataset | None = None,
    scores: tuple[float, float] | None = None,
    neighbours: int = 10,
    queries: int = 10_000,
    seed: int = 0,
) -> Measures:
    """Returns the measures of a dataset: of its returns as its own rewards give them, TQ where `scores` are known.

    `scores` are the returns of a random and of the best known policy, `reference` is what coverage is compared with.

    Raises UserError for scores without rewards or that are equal, and where `coverage` and `neighbourhoods` do.
    """
    if scores is not None and dataset.rewards is None:
        raise UserError(f"dataset {dataset.path}: has no rewards that could be compared with a return: name its --env")
    first, last = files.episodes(dataset)
    obs = _states(dataset)
    rewarded = {} if dataset.rewards is None else _reward_measures(dataset, dataset.rewards, scores)
    return Measures(
        path=dataset.path,
        lengths=last - first,
        **rewarded,
        coverage=coverage(dataset, reference),
        neighbourhoods=neighbourhoods(dataset, neighbours, queries, seed) if len(first) > 1 else None,
        constant=tuple(np.flatnonzero(spread(obs).constant).tolist()),
        size=obs.shape[1],
    )


def _reward_measures(dataset: Dataset, rewards: np.ndarray, scores: tuple[float, float] | None) -> dict[str, Any]:
    """Returns the fields of `Measures` that follow from rewards."""
    first, last = files.episodes(dataset)
    steps = ~dataset.terminals
    unfinished = dataset.extra.get("unfinished", np.zeros(len(steps), bool))
    finished = ~np.logical_or.reduceat(unfinished, first)
    returns = files.episode_returns(dataset)[finished]
    zeros = np.add.reduceat((rewards == 0) & steps, first, dtype=np.int64) / (last - first)
    fields: dict[str, Any] = {"returns": returns, "zeros": float(np.mean(zeros))}
    if len(found := np.unique(rewards[steps])) == 2:
        got = np.logical_or.reduceat((rewards == found[1]) & steps, first)[finished]
        fields |= {"values": (float(found[0]), float(found[1])), "succeeded": float(got.mean()) if got.size else None}
    if scores is not None and len(returns):
        fields["quality"] = (trajectory_quality(returns, *scores), *scores)
    return fields


def format_report(measures: Measures) -> str:
    """Returns the measures as a table for people."""
    lines = [*_return_lines(measures), *_coverage_lines(measures.coverage)]
    if measures.neighbourhoods is None:
        lines.append(("neighbors", "", "not measured: they are searched for in other episodes, and there is only one"))
    else:
        lines += _neighbour_lines(measures.neighbourhoods)
    if measures.constant:
        entries = ", ".join(map(str, measures.constant))
        lines.append(
            ("constant entries", f"{len(measures.constant)}", f"not scaled: entries {entries} of {measures.size}")
        )
    return "\n".join(f"{name:<24}{value:>12}  {remark}".rstrip() for name, value, remark in lines)


Line: TypeAlias = tuple[str, str, str]  # name, value, what it means


def _return_lines(measures: Measures) -> list[Line]:
    returns = measures.returns
    if returns is None:
        return [("returns", "", "not measured: no rewards, they come from the task that --env names")]
    if not len(returns):
        return [("returns", "", "not measured: no episode is finished")]
    low, middle, high = (f"{value:.4g}" for value in np.quantile(returns, QUANTILES))
    lines = [("return quantiles", middle, f"median; a tenth are below {low}, a tenth above {high}")]
    lines.append(
        ("positive variance V+", f"{positive_variance(returns):.4g}", "mean square of the excess over the mean")
    )
    if measures.quality is None:
        remark = "needs --random-return and --best-return, those of a random and of the best known policy"
        lines.append(("trajectory quality TQ", "", remark))
    else:
        value, random, best = measures.quality
        lines.append(("trajectory quality TQ", f"{value:.4f}", f"0 is a return of {random:g}, 1 of {best:g}"))
    if measures.values is not None and measures.succeeded is not None:
        usual, rare = measures.values
        remark = f"of the episodes get a reward of {rare:g}, all other rewards are {usual:g}"
        lines.append(("successful", f"{100 * measures.succeeded:.1f} %", remark))
    return [*lines, ("zero rewards", f"{100 * (measures.zeros or 0):.1f} %", "of an episode's steps, on average")]


def _coverage_lines(found: Coverage) -> list[Line]:
    limits = "the dataset's own limits" if found.reference is None else "the reference's limits"
    remark = f"in the first {found.steps:,} steps, {EDGES} edges per entry between {limits}"
    lines = [("distinct cells u", f"{found.cells:,}", remark)]
    if found.ratio is not None:
        log = "" if found.log_ratio is None else f", {found.log_ratio:.4f} in logarithms"
        lines.append(("coverage SACo", f"{found.ratio:.4f}", f"of the reference's {found.reference:,} cells{log}"))
    return lines


def _neighbour_lines(found: Neighbourhoods) -> list[Line]:
    low, _, high = (f"{value:.4g}" for value in np.quantile(found.nearest, QUANTILES))
    share, relative = 100 * found.relative_action_variance, found.relative_diversity
    return [
        ("action variance AV", f"{found.action_variance.mean():.4g}", f"{share:.1f} % of the variance of all actions"),
        (
            "transition diversity TD",
            f"{relative:.4g}",
            f"of the variance of all changes of state; beta = {found.beta:g} in [beta s, a]",
        ),
        (
            "state similarity SS",
            f"{found.similarity.mean():.4g}",
            f"of other episodes' states are within epsilon = {found.epsilon:.4g}",
        ),
        ("nearest neighbor", f"{found.epsilon:.4g}", f"median; a tenth are below {low}, a tenth above {high}"),
        (
            "neighborhoods",
            f"{len(found.nearest):,}",
            f"of {found.steps:,} steps (seed {found.seed}), each with the {found.neighbours} nearest of other episodes",
        ),
    ]
