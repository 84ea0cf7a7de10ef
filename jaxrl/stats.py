"""Statistics of results, on the host: intervals of a success rate and of a mean, IQM, stratified bootstrap.

Every interval is two-sided and is returned as plain floats. What has no interval (one run, a NaN) is refused, never
reported as an interval of width zero.
"""

from collections.abc import Callable

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike

from jaxrl.errors import UserError

DRAWS_AT_ONCE = 4_000_000  # numbers drawn at a time by the bootstrap: 32 MB


def success_interval(successes: int, episodes: int, level: float = 0.95) -> tuple[float, float]:
    """Returns (low, high), the Wilson score interval of a success rate.

    Episodes count as independent with one common rate: pool those of one policy, not those of several runs.

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

    Each quarter is rounded down to whole values, so of fewer than four nothing is cut.

    Raises:
        UserError: no values, a NaN or infinity.
    Source: Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (2021), section 4.3.
    """
    return scipy.stats.trim_mean(_finite("x", x), 0.25, axis=axis)


def stratified_bootstrap(
    scores: ArrayLike,
    statistic: Callable[..., np.ndarray | np.floating] = iqm,
    *,
    resamples: int = 9_999,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """Returns (point, low, high) of a statistic of the pooled scores [runs, tasks], with its percentile interval.

    Each resample draws as many runs as there are, with replacement and anew for each task: which tasks there are is
    fixed and only the runs are random. `statistic` is called as numpy's are, `statistic(pooled, axis=-1)`, on
    [resamples, runs * tasks]: `iqm`, `numpy.mean` and `numpy.median` fit.

    With few runs the interval is too narrow (a property of the percentile bootstrap): prefer ten or more.

    Raises:
        UserError: scores not [runs >= 2, tasks >= 1], a NaN or infinity, no resamples, a level outside (0, 1).
    Source: Agarwal et al. (2021), section 4.1 and appendix A.
    """
    table = _finite("scores", scores)
    if table.ndim != 2 or len(table) < 2:
        raise UserError(f"scores has shape {table.shape}: a bootstrap over runs needs [runs, tasks], at least 2 runs")
    if resamples < 1:
        raise UserError(f"resamples is {resamples}: it must be at least 1")
    _check_level(level)

    def pooled_statistic(*tasks: np.ndarray, axis: int) -> np.ndarray | np.floating:
        return statistic(np.concatenate(tasks, axis=axis), axis=axis)

    result = scipy.stats.bootstrap(
        tuple(table.T),
        pooled_statistic,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, DRAWS_AT_ONCE // table.size),
        method="percentile",
        confidence_level=level,
        rng=np.random.default_rng(seed),
    )
    interval = result.confidence_interval
    return float(statistic(table.ravel(), axis=-1)), float(interval.low), float(interval.high)


def _finite(name: str, x: ArrayLike) -> np.ndarray:
    """Returns x as float64; refuses what is empty or holds a NaN or infinity."""
    values = np.asarray(x, dtype=np.float64)
    if values.size == 0:
        raise UserError(f"{name} is empty (shape {values.shape}): at least one value is needed")
    if not np.isfinite(values).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0]) if values.ndim else ()
        raise UserError(f"{name} must be finite: the value at {where} is {values[where]}")
    return values


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise UserError(f"level is {level}: a confidence level lies between 0 and 1, both excluded")
