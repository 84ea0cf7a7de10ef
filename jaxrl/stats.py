"""Statistics of results, on the host: intervals of a success rate and of a mean, IQM, stratified bootstrap, probability
of improvement, performance profiles.

Every interval is two-sided and is returned as plain floats. Input without an interval (one run, a NaN) raises an error
instead of giving an interval of width zero.

Scores are a table [runs, tasks], or a tuple of one array [runs] per task if tasks have different numbers of runs.
"""

from collections.abc import Callable

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike

from jaxrl.errors import UserError

DRAWS_AT_ONCE = 4_000_000  # numbers drawn at a time by the bootstrap: 32 MB


def success_interval(successes: int, episodes: int, level: float = 0.95) -> tuple[float, float]:
    """Returns (low, high), the Wilson score interval of a success rate.

    Assumes independent episodes with one common rate: pool episodes of one policy, not of several runs.

    Raises:
        UserError: no episodes, a count that is not whole or outside 0..episodes, a level outside (0, 1).
    Source: Wilson, "Probable inference, the law of succession, and statistical inference" (1927).
    """
    _check_level(level)
    if not float(episodes).is_integer() or episodes < 1:
        raise UserError(f"episodes is {episodes}: it must be a whole number, at least 1")
    if not float(successes).is_integer() or not 0 <= successes <= episodes:
        raise UserError(f"successes is {successes}: it must be a whole number from 0 to episodes ({episodes})")
    test = scipy.stats.binomtest(int(successes), int(episodes))
    interval = test.proportion_ci(confidence_level=level, method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(x: ArrayLike, level: float = 0.95, *, resamples: int = 9_999, seed: int = 0) -> tuple[float, float]:
    """Returns (low, high), the percentile-bootstrap interval of the mean of the values x [n], n >= 2.

    Raises:
        UserError: fewer than two values, a NaN or infinity, more than one axis, a level outside (0, 1).
    Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13.
    """
    values = _finite("x", x)
    if values.ndim != 1 or len(values) < 2:
        raise UserError(f"x has shape {values.shape}: an interval of the mean needs one axis of at least 2 values")
    _, low, high = stratified_bootstrap(values[:, None], np.mean, resamples=resamples, seed=seed, level=level)
    return low, high


def iqm(x: ArrayLike, axis: int | None = None) -> np.ndarray | np.floating:
    """Returns the interquartile mean: the mean without the lowest and the highest quarter, over `axis` or all of x.

    Each quarter is rounded down to whole values, so with fewer than four values nothing is cut.

    Raises:
        UserError: no values, a NaN or infinity.
    Source: Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (2021), section 4.3.
    """
    return scipy.stats.trim_mean(_finite("x", x), 0.25, axis=axis)


Scores = ArrayLike | tuple[np.ndarray, ...]


def stratified_bootstrap(
    scores: Scores,
    statistic: Callable[..., np.ndarray | np.floating] = iqm,
    *,
    resamples: int = 9_999,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """Returns (point, low, high) of a statistic of the pooled scores, with its percentile interval.

    Each resample draws as many runs as there are, with replacement and independently per task: tasks are fixed and only
    the runs are random. `statistic` has the signature of numpy's, `statistic(pooled, axis=-1)`, and is called on
    [resamples, all runs of all tasks]; `iqm`, `numpy.mean` and `numpy.median` fit.

    With few runs the interval is too narrow (a property of the percentile bootstrap): prefer ten or more.

    Raises:
        UserError: a task with fewer than 2 runs, no tasks, a NaN or infinity, no resamples, a level outside (0, 1).
    Source: Agarwal et al. (2021), section 4.1 and appendix A.
    """
    strata = _strata("scores", scores)
    _check_draws(resamples, level)

    def pooled_statistic(*tasks: np.ndarray, axis: int) -> np.ndarray | np.floating:
        return statistic(np.concatenate(tasks, axis=axis), axis=axis)

    pooled = np.concatenate(strata)
    result = scipy.stats.bootstrap(
        strata,
        pooled_statistic,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, DRAWS_AT_ONCE // pooled.size),
        method="percentile",
        confidence_level=level,
        rng=np.random.default_rng(seed),
    )
    interval = result.confidence_interval
    return float(statistic(pooled, axis=-1)), float(interval.low), float(interval.high)


def probability_of_improvement(
    x: Scores, y: Scores, *, resamples: int = 9_999, seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """Returns (point, low, high): the probability that a run of x scores higher than a run of y, with its interval.

    Per task, the fraction of pairs in which x is higher, with ties counting half (the Mann-Whitney statistic divided by
    the number of pairs); then the mean over tasks. The percentile bootstrap resamples the runs of x and of y per task.
    If all pairs agree, all resamples agree too, and both bounds equal the point.

    Raises:
        UserError: different numbers of tasks, a task with fewer than 2 runs, a NaN or infinity, no resamples, a level
            outside (0, 1).
    Source: Agarwal et al. (2021), section 4.3 and appendix A.
    """
    ours, theirs = _strata("x", x), _strata("y", y)
    _check_draws(resamples, level)
    if len(ours) != len(theirs):
        raise UserError(f"x has {len(ours)} tasks and y has {len(theirs)}: runs are compared task by task")
    generator = np.random.default_rng(seed)
    points, drawn = [], []
    for a, b in zip(ours, theirs, strict=True):
        higher = (np.sign(a[:, None] - b[None, :]) + 1) / 2  # [runs of x, runs of y]
        points.append(higher.mean())
        drawn.append(
            np.sum((_weights(generator, len(a), resamples) @ higher) * _weights(generator, len(b), resamples), 1)
        )
    low, high = np.quantile(np.mean(drawn, axis=0), [(1 - level) / 2, (1 + level) / 2])
    return float(np.mean(points)), float(low), float(high)


def performance_profile(
    scores: Scores, thresholds: ArrayLike, *, resamples: int = 2_000, seed: int = 0, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (fraction, low, high) [thresholds]: the fraction of runs that score above each, with pointwise intervals.

    The fraction is the mean over tasks; runs are resampled per task.

    Raises:
        UserError: a task with fewer than 2 runs, no tasks, a NaN or infinity, no resamples, a level outside (0, 1).
    Source: Agarwal et al. (2021), section 4.3 and appendix A: the score distribution.
    """
    strata, levels = _strata("scores", scores), _finite("thresholds", thresholds)
    _check_draws(resamples, level)
    generator = np.random.default_rng(seed)
    above = [(runs[:, None] > levels[None, :]).astype(float) for runs in strata]  # [runs, thresholds] each
    drawn = np.mean([_weights(generator, len(one), resamples) @ one for one in above], axis=0)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return np.mean([one.mean(axis=0) for one in above], axis=0), low, high


def _weights(generator: np.random.Generator, runs: int, resamples: int) -> np.ndarray:
    """Returns how often each resample draws each run, as fractions [resamples, runs]."""
    return generator.multinomial(runs, np.full(runs, 1 / runs), size=resamples) / runs


def _strata(name: str, scores: Scores) -> tuple[np.ndarray, ...]:
    """Returns the runs of each task. Raises UserError if a task has fewer than two."""
    if isinstance(scores, tuple) and scores and all(isinstance(one, np.ndarray) for one in scores):
        strata = tuple(_finite(f"{name}[{i}]", one) for i, one in enumerate(scores))
        if any(one.ndim != 1 or len(one) < 2 for one in strata):
            shapes = ", ".join(str(one.shape) for one in strata)
            raise UserError(f"{name} has tasks of shapes {shapes}: a bootstrap over runs needs at least 2 runs of each")
        return strata
    table = _finite(name, scores)
    if table.ndim != 2 or len(table) < 2:
        raise UserError(f"{name} has shape {table.shape}: a bootstrap over runs needs [runs, tasks], at least 2 runs")
    return tuple(table.T)


def _finite(name: str, x: ArrayLike) -> np.ndarray:
    """Returns x as float64. Raises UserError if it is empty or contains a NaN or infinity."""
    values = np.asarray(x, dtype=np.float64)
    if values.size == 0:
        raise UserError(f"{name} is empty (shape {values.shape}): at least one value is needed")
    if not np.isfinite(values).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0]) if values.ndim else ()
        raise UserError(f"{name} must be finite: the value at {where} is {values[where]}")
    return values


def _check_draws(resamples: int, level: float) -> None:
    if resamples < 1:
        raise UserError(f"resamples is {resamples}: it must be at least 1")
    _check_level(level)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise UserError(f"level is {level}: a confidence level lies between 0 and 1, both excluded")
