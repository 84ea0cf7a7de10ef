"""Facts about trajectory weighting: its law, its exact draw inside the program, and the option of a run."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.stats

from jaxrl import cli
from jaxrl.agents import BC
from jaxrl.agents.parts import Windows
from jaxrl.data import files
from jaxrl.data.files import Dataset
from jaxrl.errors import UserError
from jaxrl.replay import loading
from jaxrl.replay import ring as rings
from jaxrl.replay.weighting import (
    FULL,
    Weighting,
    alias_table,
    draw_rows,
    probabilities,
    trajectory_weights,
    weights_of,
)
from jaxrl.runs import directory, driver, memory
from jaxrl.runs.config import Config, from_dict, to_dict
from jaxrl.types import Spec
from tests import tiny
from tests.golden.trajweight import drawn

pytestmark = pytest.mark.usefixtures("quick")

KEY = jax.random.key(0)
windows = jax.jit(rings.windows, static_argnums=(2, 3))


def law(returns, kind, lengths=None, obs=None, **settings) -> np.ndarray:
    """Returns the probability of a transition of each trajectory."""
    lengths = np.ones(len(returns), int) if lengths is None else np.asarray(lengths)
    obs = np.zeros((len(returns), 1)) if obs is None else obs
    return probabilities(trajectory_weights(np.asarray(returns), lengths, obs, kind, **settings), lengths)


def starts(count: int = 40) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 3)).astype(np.float32)


# The law


def test_two_trajectories_of_known_returns():
    best = np.exp(1) / (2 + 3 * np.exp(1))
    np.testing.assert_allclose(law([0, 1], "return", [2, 3], temperature=1.0), [best / np.e, best], rtol=1e-12)
    assert best == pytest.approx(0.2677, abs=2e-4)


@pytest.mark.parametrize("kind", ["uniform", "return", "advantage", "top"])
def test_the_transitions_of_all_trajectories_have_probability_one_together(kind):
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 50, 40)
    p = law(rng.normal(size=40) * 100, kind, lengths, starts(), temperature=0.05, fraction=0.3)
    assert np.sum(p * lengths) == pytest.approx(1, abs=1e-12)
    if kind == "uniform":
        np.testing.assert_allclose(p, 1 / lengths.sum(), rtol=1e-12)


def test_the_best_is_drawn_more_often_than_the_worst_by_the_exponential_of_the_inverse_temperature():
    p = law([3.0, -2, 7, 5], "return", [4, 1, 9, 2], temperature=0.1)
    assert p[2] / p[1] == pytest.approx(np.exp(10), rel=1e-9)


def test_hot_weights_are_uniform_and_cold_ones_keep_the_best():
    returns, lengths = [1.0, 3, 2], [5, 2, 3]
    np.testing.assert_allclose(law(returns, "return", lengths, temperature=1e9), 0.1, rtol=1e-6)
    np.testing.assert_array_equal(law(returns, "return", lengths, temperature=1e-4), [0, 0.5, 0])


def test_returns_may_be_scaled_and_shifted_without_effect():
    returns = np.random.default_rng(2).normal(size=20)
    np.testing.assert_allclose(law(7.5 * returns - 300, "return"), law(returns, "return"), rtol=1e-9)


def test_an_advantage_does_not_see_what_the_start_explains():
    obs, noise = starts(), np.random.default_rng(3).normal(size=40)
    explained = obs @ np.array([3.0, -1.0, 20.0]) + 7
    ours = law(noise, "advantage", obs=obs)
    np.testing.assert_allclose(law(noise + explained, "advantage", obs=obs), ours, rtol=1e-6)
    assert np.ptp(np.log(ours)) == pytest.approx(10) and not np.allclose(ours, law(noise, "return"))
    np.testing.assert_array_equal(law(explained, "advantage", obs=obs), np.full(40, 1 / 40))
    rounded = explained.astype(np.float32)  # what is left over is rounding, not an advantage
    np.testing.assert_array_equal(law(rounded, "advantage", obs=obs), np.full(40, 1 / 40))


def test_a_start_whose_entries_do_not_vary_leaves_the_advantage_a_return():
    returns = np.random.default_rng(4).normal(size=9)
    same = np.full((9, 3), np.float32(0.1))
    same[:, 1] += np.linspace(0, 3e-8, 9)  # rounding of a constant
    np.testing.assert_allclose(law(returns, "advantage", obs=same), law(returns, "return"), rtol=1e-9)


@pytest.mark.parametrize("kind", ["return", "advantage"])
def test_equal_returns_are_drawn_alike(kind):
    for returns in ([0.0, 0, 0], [-3.5, -3.5, -3.5], [0.3, 0.1 + 0.2, 0.3]):
        np.testing.assert_array_equal(law(returns, kind, [1, 4, 5], starts(3)), [0.1] * 3)
    np.testing.assert_array_equal(law([5.0], kind, [4], starts(1)), [0.25])


@pytest.mark.parametrize(
    ("fraction", "kept"), [(0.25, [1]), (0.5, [1, 2]), (0.74, [1, 2]), (1.0, [0, 1, 2, 3]), (0.01, [1])]
)
def test_the_top_are_the_largest_returns_rounded_down_and_at_least_one(fraction, kept):
    p = law([0.0, 4, 3, 3], "top", [3, 2, 5, 5], fraction=fraction)
    lengths = np.array([3, 2, 5, 5])
    np.testing.assert_allclose(p, np.isin(np.arange(4), kept) / lengths[kept].sum(), rtol=1e-12)


def test_a_share_of_the_trajectories_that_is_a_whole_number_is_not_rounded_down():
    assert np.sum(law(np.arange(100.0), "top", fraction=0.29) > 0) == 29  # 0.29 * 100 < 29 in floating point


# The draw


@pytest.mark.parametrize("spread", [0, 1, 10, 1000])
def test_the_table_is_the_law_to_the_last_bit_of_a_random_word(spread):
    rng = np.random.default_rng(5)
    lengths = rng.integers(1, 1000, 777)
    log_weights = spread * rng.random(777)
    table = drawn(weights_of(log_weights, lengths, lengths))
    np.testing.assert_allclose(table, probabilities(log_weights, lengths) * lengths, rtol=0, atol=2 / FULL)


def test_trajectories_without_weight_or_steps_are_never_given():
    log_weights = np.where(np.arange(50) % 7 == 3, 0.0, -np.inf)
    lengths = np.full(50, 4)
    lengths[10] = 0
    weights = weights_of(log_weights, 4 * np.arange(50), lengths, room=64)
    given = drawn(weights)
    assert len(given) == 64
    np.testing.assert_allclose(given[(given > 0)], 1 / 6, atol=1e-8)
    assert set(np.flatnonzero(given)) == {3, 17, 24, 31, 38, 45}
    rows = np.asarray(draw_rows(weights, KEY, 2000))
    assert set(rows // 4) == {3, 17, 24, 31, 38, 45}


def test_one_trajectory_is_always_given():
    share, other = alias_table(np.array([0.3]))
    assert (share[0], other[0]) == (FULL - 1, 0)


def test_a_million_draws_follow_the_law():
    lengths = np.array([1, 7, 3, 12, 5, 0, 2])
    first = np.cumsum(lengths + 1) - lengths - 1
    log_weights = np.array([0.0, -1.5, 2.0, -np.inf, 1.0, 3.0, -4.0])
    p = np.zeros(first[-1] + 3)
    for start, steps, each in zip(first, lengths, probabilities(log_weights, lengths), strict=True):
        p[start : start + steps] = each
    counts = np.bincount(draw_rows(weights_of(log_weights, first, lengths), KEY, 1_000_000), minlength=len(p))
    assert len(counts) == len(p) and np.all(counts[p == 0] == 0)
    assert scipy.stats.chisquare(counts[p > 0], 1e6 * p[p > 0]).pvalue > 0.01
    uniform = np.where(p > 0, 1 / np.sum(p > 0), 0)
    assert scipy.stats.chisquare(counts[p > 0], 1e6 * uniform[p > 0]).pvalue < 1e-9


# In the data of a run


class Plain:
    """An environment that cannot relabel."""

    spec = Spec(observation=2, action=1)


class Tasks:
    """One with goals."""

    spec = Spec(observation=4, action=1, goal=2)


def episodes(*steps: int) -> Dataset:
    """Returns episodes of so many steps whose row i holds i, and whose reward is the episode's number at each step."""
    number = np.repeat(np.arange(len(steps)), np.array(steps) + 1)
    ids = np.arange(len(number), dtype=np.float32)
    ends = np.append(np.diff(number) > 0, True)
    rewards = np.where(ends, 99, number).astype(np.float32)  # what is said of an episode's last row means nothing
    return Dataset(np.repeat(ids[:, None], 2, 1), ids[:, None] / 1000, ends, rewards)


def laid(dataset: Dataset, weighting: Weighting, **settings) -> rings.Ring:
    return loading.to_ring(dataset, Plain(), weighting=weighting, **settings)


def test_windows_start_in_the_trajectories_that_have_weight_and_do_not_leave_them():
    ring = laid(episodes(6, 5, 4, 3), Weighting("top", fraction=0.5))  # returns 0, 5, 8, 9: rows 13..16 and 18..20
    batch = windows((ring,), KEY, 700, 3)
    start = np.asarray(batch.obs[:, 0]).astype(int)
    np.testing.assert_array_equal(np.unique(start), [13, 14, 15, 16, 18, 19, 20])
    assert np.bincount(start)[[*range(13, 17), *range(18, 21)]].min() > 60  # 100 each
    last = np.where(start < 17, 17, 21)  # the row of the last observation
    np.testing.assert_array_equal(batch.steps, np.minimum(3, last - start))
    np.testing.assert_array_equal(batch.next_obs[:, 0], np.minimum(start + 3, last))
    np.testing.assert_array_equal(batch.valid[:, 0], 1)
    np.testing.assert_array_equal(batch.rewards[:, 0], np.where(start < 17, 2, 3))


def test_weights_come_from_rewards_as_they_are_in_the_data():
    dataset, weighting = episodes(6, 5, 4, 3), Weighting("return", temperature=1.0)
    known = np.exp(np.array([0.0, 5, 8, 9]) / 9) * [6, 5, 4, 3]
    moved = laid(dataset, weighting, scale=3.0, shift=-20.0)  # by which the shortest would be the best by far
    assert moved.weights is not None
    np.testing.assert_allclose(drawn(moved.weights), known / known.sum(), atol=1e-8)
    np.testing.assert_array_equal(moved.rewards[0, 18:21], -11)


def test_uniform_data_are_laid_out_as_if_there_were_no_weights():
    dataset = episodes(6, 5)
    plain = laid(dataset, Weighting())
    assert plain.weights is None
    assert jax.tree.structure(plain) == jax.tree.structure(loading.to_ring(dataset, Plain()))


def test_files_of_several_sizes_are_one_program():
    weighting, traces = Weighting("return"), []

    @jax.jit
    def drawn(ring: rings.Ring):
        traces.append(ring)
        return windows((ring,), KEY, 50, 2)

    for dataset in (episodes(6, 5, 4, 3), episodes(9)):
        ring = laid(dataset, weighting, room=(30, 8))
        assert ring.weights is not None and ring.weights.steps.shape == (8,)
        assert drawn(ring).valid[:, 0].min() == 1
    assert len(traces) == 1


def test_a_replay_keeps_its_share_of_the_rows():
    data, other = laid(episodes(6, 5, 4, 3), Weighting("top")), laid(episodes(43), Weighting())  # 22 and 44 rows
    marked = dataclasses.replace(other, obs=other.obs + 1000)
    batch = windows((data, marked), KEY, 3000, 1)
    assert np.mean(np.asarray(batch.obs[:, 0]) >= 1000) == pytest.approx(2 / 3, abs=0.03)
    assert set(np.asarray(batch.obs[:, 0])[np.asarray(batch.obs[:, 0]) < 1000]) == {18.0, 19.0, 20.0}


def test_the_memory_of_a_weighted_dataset_is_foreseen():
    dataset, weighting = episodes(6, 5, 4, 3), Weighting("advantage")
    ring, foreseen = laid(dataset, weighting), loading.abstract_ring(loading.sizes_of(dataset), Plain(), weighting)
    assert memory.size(foreseen) == memory.size(ring) == memory.size(laid(dataset, Weighting())) + 4 * 4 * 4
    assert jax.tree.map(lambda x: (x.shape, x.dtype), foreseen) == jax.tree.map(lambda x: (x.shape, x.dtype), ring)


# The option


def test_the_command_line_sets_it_and_the_run_remembers_it(tmp_path):
    data = tiny.write_data(tmp_path / "data.npz")
    small = "--agent.flow.net.hidden 8 --agent.windows.batch=16 --agent.windows.chunk=2"
    flags = f"train bc {tiny.ENV} --data={data} {small}".split()
    flags += "--schedule.offline-updates=20 --schedule.updates-per-epoch=10 --schedule.eval-episodes=2".split()
    weighted = "--weighting.kind advantage --weighting.temperature 0.2".split()
    with tiny.quick():
        for name, more in (("weighted", weighted), ("uniform", [])):
            assert cli.main([*flags, *more, f"--out={tmp_path / name}"]) == 0
        assert cli.main(["replay", str(tmp_path / "weighted"), "--epochs=2"]) == 0
    config = directory.read_config(tmp_path / "weighted")
    assert config.weighting == Weighting("advantage", temperature=0.2)
    assert tiny.rows(tmp_path / "weighted")[0]["digest"] != tiny.rows(tmp_path / "uniform")[0]["digest"]


def test_runs_from_before_the_option_are_uniform():
    before = to_dict(Config(BC()))
    del before["weighting"]
    assert from_dict(before) == Config(BC()) and Config(BC()).weighting.kind == "uniform"
    assert from_dict(to_dict(Config(BC(), weighting=Weighting("top")))).weighting == Weighting("top")


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "weighting.temperature = 0.0: must be above 0"),
        ({"temperature": float("nan")}, "weighting.temperature = nan"),
        ({"temperature": float("inf")}, "weighting.temperature = inf"),
        ({"fraction": 0.0}, "weighting.fraction = 0.0: must be above 0 and at most 1"),
        ({"fraction": 1.5}, "weighting.fraction = 1.5"),
        ({"kind": "advantages"}, "unknown weighting.kind 'advantages': did you mean 'advantage'"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Config(BC(), weighting=Weighting(**settings)).check()


@pytest.mark.parametrize(
    ("log_weights", "lengths", "message"),
    [
        ([-np.inf, -np.inf], [2, 3], "the weights of all trajectories are zero"),
        ([0.0, -np.inf], [0, 3], "the weights of all trajectories are zero"),
        ([0.0, np.nan], [2, 3], "a weight is not a finite number"),
        ([0.0, np.inf], [2, 3], "a weight is not a finite number"),
    ],
)
def test_weights_of_which_nothing_can_be_drawn_are_refused(log_weights, lengths, message):
    with pytest.raises(UserError, match=message):
        weights_of(np.array(log_weights), np.array([0, 4]), np.array(lengths))


def test_returns_that_are_no_numbers_or_of_other_trajectories_are_refused():
    with pytest.raises(UserError, match="the return of trajectory 1 is not finite"):
        law([0.0, np.inf], "return")
    with pytest.raises(UserError, match="must be of the same trajectories"):
        law([0.0, 1.0], "return", [1, 2, 3])
    with pytest.raises(UserError, match="at least one"):
        law([], "return")


def test_trajectories_towards_goals_in_hindsight_have_no_weights(tmp_path):
    dataset = dataclasses.replace(episodes(6, 5), rewards=None)
    weighting = Weighting("return")
    for build in (loading.to_ring, functools.partial(loading.abstract_ring, loading.sizes_of(dataset))):
        arguments = (dataset, Tasks()) if build is loading.to_ring else (Tasks(),)
        with pytest.raises(UserError, match=r"weighting\.kind = 'return': goals are drawn in hindsight"):
            build(*arguments, weighting=weighting)
    env, config = tiny.make(f"{tiny.ENV}&goal_conditioned=true"), Config(BC(Windows(2, 2)), weighting=weighting)
    with pytest.raises(UserError, match="only 'uniform' is possible"):
        driver.prepare(config, env, files.load(tiny.write_data(Path(tmp_path) / "data.npz")))
