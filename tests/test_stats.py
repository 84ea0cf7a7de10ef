"""Facts about jaxrl.stats: hand-worked values, independent calculations, coverage, refusals."""

import itertools

import numpy as np
import pytest
import scipy.stats

from jaxrl.errors import UserError
from jaxrl.stats import (
    iqm,
    mean_interval,
    performance_profile,
    probability_of_improvement,
    stratified_bootstrap,
    success_interval,
)

Z95 = 1.959963984540054


def test_wilson_interval_has_its_hand_worked_values():
    # 8 of 10: centre (0.8 + z^2/20) / (1 + z^2/10) = 0.71674, half width 0.22658.
    assert success_interval(8, 10) == pytest.approx((0.49016, 0.94331), abs=2e-5)
    # 0 of n: the upper end is z^2 / (n + z^2).
    low, high = success_interval(0, 10)
    assert low == 0.0
    assert high == pytest.approx(Z95**2 / (10 + Z95**2), rel=1e-9)
    assert success_interval(10, 10) == pytest.approx((1 - high, 1.0), rel=1e-9)


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_wilson_ends_are_the_rates_that_the_score_test_just_rejects(level):
    successes, episodes = 13, 40
    z = scipy.stats.norm.ppf(0.5 + level / 2)
    for rate in success_interval(successes, episodes, level):
        score = (successes / episodes - rate) / np.sqrt(rate * (1 - rate) / episodes)
        assert abs(score) == pytest.approx(z, rel=1e-9)


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5])
def test_wilson_covers_the_true_rate(rate):
    episodes = 50
    counts = np.arange(episodes + 1)
    covered = [low <= rate <= high for low, high in (success_interval(int(k), episodes) for k in counts)]
    coverage = scipy.stats.binom.pmf(counts, episodes, rate)[covered].sum()
    assert 0.92 < coverage < 0.98


def test_iqm_drops_the_outer_quarters():
    assert iqm([8, 1, 7, 2, 6, 3, 5, 4]) == 4.5  # (3 + 4 + 5 + 6) / 4
    assert iqm([0, 1, 2, 1e9]) == 1.5
    assert iqm([0, 0, 10]) == pytest.approx(10 / 3)  # a quarter of three is no whole value
    assert iqm([[1, 2, 3, 100], [5, 6, 7, -100]]) == pytest.approx((2 + 3 + 5 + 6) / 4)
    np.testing.assert_array_equal(iqm([[1, 2, 3, 100], [5, 6, 7, -100]], axis=1), [2.5, 5.5])


def test_mean_interval_agrees_with_a_plain_loop_and_with_the_normal_theory():
    x = np.random.default_rng(1).normal(3.0, 2.0, size=200)
    low, high = mean_interval(x)
    generator = np.random.default_rng(2)
    means = [generator.choice(x, len(x)).mean() for _ in range(4000)]
    sem = x.std() / np.sqrt(len(x))
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.15 * sem)
    assert (low, high) == pytest.approx((x.mean() - Z95 * sem, x.mean() + Z95 * sem), abs=0.15 * sem)


def test_mean_interval_of_two_values_is_exact():
    # Four equally likely resamples have means 0, 1/2, 1/2, 1: each end has probability 1/4 > 2.5 %.
    assert mean_interval([0.0, 1.0]) == (0.0, 1.0)
    assert mean_interval([0.0, 1.0], level=0.3) == (0.5, 0.5)
    assert mean_interval([7.0, 7.0, 7.0]) == (7.0, 7.0)


def test_mean_interval_covers_the_true_mean():
    generator = np.random.default_rng(0)
    intervals = [mean_interval(generator.normal(size=40), 0.9, resamples=400, seed=i) for i in range(300)]
    coverage = np.mean([low <= 0.0 <= high for low, high in intervals])
    assert 0.84 < coverage < 0.95  # three standard errors about 0.9, less the known shortfall at n = 40


@pytest.mark.parametrize("statistic", [iqm, np.mean, np.median])
def test_stratified_bootstrap_agrees_with_every_possible_resample(statistic):
    scores = np.array([[0.1, 10.0], [0.7, 13.0], [0.4, 12.0]])
    rows = list(itertools.product(range(3), repeat=3))  # 27 draws of each task's runs
    values = [statistic(np.concatenate([scores[list(a), 0], scores[list(b), 1]])) for a in rows for b in rows]
    point, low, high = stratified_bootstrap(scores, statistic, resamples=20_000, level=0.8)
    assert point == pytest.approx(statistic(scores.ravel()))
    # Ends of an atomic distribution: between neighbouring quantiles, which 20 000 draws cannot miss.
    assert np.quantile(values, 0.085) - 1e-9 <= low <= np.quantile(values, 0.115) + 1e-9
    assert np.quantile(values, 0.885) - 1e-9 <= high <= np.quantile(values, 0.915) + 1e-9


def test_tasks_are_strata():
    # Runs agree on each task, tasks differ: nothing random is left, though the pooled scores spread widely.
    agreed = np.tile([0.0, 50.0, 100.0], (5, 1))
    assert stratified_bootstrap(agreed, np.mean) == (50.0, 50.0, 50.0)


def test_tasks_are_resampled_independently():
    # The same column twice halves the variance of the mean; tied rows would leave it as it was.
    column = np.random.default_rng(3).normal(size=(50, 1))
    _, low, high = stratified_bootstrap(column, np.mean)
    _, low_two, high_two = stratified_bootstrap(np.tile(column, (1, 2)), np.mean)
    assert (high_two - low_two) / (high - low) == pytest.approx(np.sqrt(0.5), rel=0.05)


def test_stratified_bootstrap_covers_the_true_iqm():
    generator = np.random.default_rng(4)
    tasks = np.array([-1.0, 0.0, 1.0])  # symmetric about 0, so the IQM of the population is 0
    hits = []
    for i in range(200):
        _, low, high = stratified_bootstrap(tasks + generator.normal(size=(20, 3)), resamples=400, seed=i)
        hits.append(low <= 0.0 <= high)
    assert 0.90 < np.mean(hits) < 0.99


def test_the_seed_decides_and_drawing_in_batches_is_as_good(monkeypatch):
    scores = np.random.default_rng(5).normal(size=(6, 4))
    first = stratified_bootstrap(scores, resamples=500, seed=7)
    assert stratified_bootstrap(scores, resamples=500, seed=7) == first
    assert stratified_bootstrap(scores, resamples=500, seed=8) != first
    monkeypatch.setattr("jaxrl.stats.DRAWS_AT_ONCE", 24 * 100)
    _, low, high = stratified_bootstrap(scores, resamples=500, seed=7)
    assert (low, high) == pytest.approx(first[1:], abs=0.15 * (first[2] - first[1]))


def test_tasks_may_have_different_numbers_of_runs():
    strata = (np.array([0.1, 0.9, 0.4]), np.array([10.0, 13.0]))
    point, low, high = stratified_bootstrap(strata, resamples=20_000, level=0.8)
    assert point == pytest.approx(scipy.stats.trim_mean(np.concatenate(strata), 0.25))
    draws = itertools.product(itertools.product(strata[0], repeat=3), itertools.product(strata[1], repeat=2))
    values = [scipy.stats.trim_mean([*a, *b], 0.25) for a, b in draws]
    assert np.quantile(values, 0.085) - 1e-9 <= low <= np.quantile(values, 0.115) + 1e-9
    assert np.quantile(values, 0.885) - 1e-9 <= high <= np.quantile(values, 0.915) + 1e-9
    table = np.random.default_rng(0).normal(size=(5, 3))
    assert stratified_bootstrap(tuple(table.T), resamples=300) == stratified_bootstrap(table, resamples=300)


def test_the_probability_of_improvement_is_the_mann_whitney_statistic_per_pair():
    generator = np.random.default_rng(6)
    x, y = generator.integers(0, 6, (7, 3)) / 5, generator.integers(0, 5, (9, 3)) / 5  # with many ties
    shares = [scipy.stats.mannwhitneyu(a, b).statistic / (7 * 9) for a, b in zip(x.T, y.T, strict=True)]
    pairs = [[(a > b) + 0.5 * (a == b) for a in x[:, task] for b in y[:, task]] for task in range(3)]
    point, low, high = probability_of_improvement(x, y)
    assert point == pytest.approx(np.mean(shares)) == pytest.approx(np.mean(pairs))
    assert low < point < high
    back, back_low, back_high = probability_of_improvement(y, x)
    assert back == pytest.approx(1 - point)
    assert (1 - back_high, 1 - back_low) == pytest.approx((low, high), abs=0.02)


def test_the_probability_of_improvement_agrees_with_every_possible_resample():
    x, y = np.array([0.2, 0.5, 0.9]), np.array([0.3, 0.6, 0.7])
    draws = [list(rows) for rows in itertools.product(range(3), repeat=3)]
    values = [np.mean([[(a > b) + 0.5 * (a == b) for b in y[j]] for a in x[i]]) for i in draws for j in draws]
    point, low, high = probability_of_improvement(x[:, None], y[:, None], resamples=40_000, level=0.8)
    assert point == pytest.approx(4 / 9)
    assert np.quantile(values, 0.09) - 1e-9 <= low <= np.quantile(values, 0.11) + 1e-9
    assert np.quantile(values, 0.89) - 1e-9 <= high <= np.quantile(values, 0.91) + 1e-9


def test_the_probability_of_improvement_of_shifted_normals_has_its_closed_form():
    generator = np.random.default_rng(7)
    truth = scipy.stats.norm.cdf(1 / np.sqrt(2))  # of N(1, 1) over N(0, 1)
    found = [
        probability_of_improvement(
            generator.normal(1, 1, (30, 1)), generator.normal(0, 1, (30, 1)), resamples=300, seed=i
        )
        for i in range(200)
    ]
    assert np.mean([point for point, _, _ in found]) == pytest.approx(truth, abs=0.015)
    assert 0.88 < np.mean([low <= truth <= high for _, low, high in found]) < 0.99


def test_where_every_pair_says_the_same_no_resample_says_otherwise():
    assert probability_of_improvement([[2.0], [3.0]], [[0.0], [1.0]]) == (1.0, 1.0, 1.0)
    assert probability_of_improvement([[1.0], [1.0]], [[1.0], [1.0]]) == (0.5, 0.5, 0.5)
    # better on one task and worse on the other
    assert probability_of_improvement([[2.0, 0.0], [3.0, 1.0]], [[0.0, 2.0], [1.0, 3.0]]) == (0.5, 0.5, 0.5)


def test_a_performance_profile_counts_the_runs_above_each_threshold():
    scores, levels = np.array([[0.1, 0.9], [0.5, 0.7], [0.5, 0.2]]), [0.0, 0.2, 0.5, 0.8, 1.0]
    share, low, high = performance_profile(scores, levels)
    np.testing.assert_allclose(share, [np.mean([value > level for value in scores.ravel()]) for level in levels])
    assert (low <= share).all() and (share <= high).all()
    ragged, _, _ = performance_profile((np.array([0.0, 1.0]), np.array([0.0, 0.0, 1.0, 1.0, 1.0, 1.0])), [0.5])
    assert ragged == pytest.approx([(1 / 2 + 4 / 6) / 2])  # tasks weigh the same


def test_the_bands_of_a_profile_are_binomial_quantiles():
    runs, above = 40, 27
    scores = np.repeat([1.0, 0.0], [above, runs - above])[:, None]
    _, low, high = performance_profile(scores, [0.5], resamples=20_000)
    law = scipy.stats.binom(runs, above / runs)
    assert (low[0] * runs, high[0] * runs) == pytest.approx((law.ppf(0.025), law.ppf(0.975)), abs=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: success_interval(0, 0), "episodes is 0"),
        (lambda: success_interval(1, 2.5), "episodes is 2.5"),  # ty: ignore[invalid-argument-type]
        (lambda: success_interval(float("nan"), 10), "successes is nan"),  # ty: ignore[invalid-argument-type]
        (lambda: success_interval(11, 10), r"successes is 11: .* from 0 to episodes \(10\)"),
        (lambda: success_interval(-1, 10), "successes is -1"),
        (lambda: success_interval(1, 10, level=95), "level is 95"),
        (lambda: mean_interval([]), r"x is empty \(shape \(0,\)\)"),
        (lambda: mean_interval([1.0]), r"x has shape \(1,\)"),
        (lambda: mean_interval([1.0, np.nan]), r"x must be finite: the value at \(1,\) is nan"),
        (lambda: mean_interval([1.0, 2.0], level=0.0), "level is 0.0"),
        (lambda: iqm([]), "x is empty"),
        (lambda: iqm(np.nan), r"x must be finite: the value at \(\) is nan"),
        (lambda: stratified_bootstrap(np.zeros((0, 3))), "scores is empty"),
        (lambda: stratified_bootstrap([[1.0, 2.0]]), r"scores has shape \(1, 2\)"),
        (lambda: stratified_bootstrap([1.0, 2.0]), r"scores has shape \(2,\)"),
        (lambda: stratified_bootstrap([[1.0, 2.0], [3.0, np.inf]]), r"the value at \(1, 1\) is inf"),
        (lambda: stratified_bootstrap(np.ones((2, 2)), resamples=0), "resamples is 0"),
        (lambda: stratified_bootstrap(np.ones((2, 2)), level=1.0), "level is 1.0"),
        (lambda: stratified_bootstrap((np.ones(3), np.ones(1))), r"scores has tasks of shapes \(3,\), \(1,\)"),
        (lambda: stratified_bootstrap((np.ones(3), np.array([1, np.nan]))), r"scores\[1\] must be finite"),
        (lambda: probability_of_improvement(np.ones((2, 2)), np.ones((2, 1))), "x has 2 tasks and y has 1"),
        (lambda: probability_of_improvement(np.ones((2, 2)), np.ones((1, 2))), r"y has shape \(1, 2\)"),
        (lambda: probability_of_improvement(np.ones((2, 2)), np.ones((2, 2)), resamples=0), "resamples is 0"),
        (lambda: performance_profile(np.ones((2, 2)), [0.5], level=0.0), "level is 0.0"),
        (lambda: performance_profile(np.ones((2, 2)), []), "thresholds is empty"),
    ],
)
def test_refusals_name_the_field_and_the_value(call, message):
    with pytest.raises(UserError, match=message):
        call()
