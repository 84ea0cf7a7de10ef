"""Facts about jaxrl.data.quality and jaxrl.data.mixing: closed forms, brute force, and refusals."""

import dataclasses

import numpy as np
import pytest

from jaxrl.data import files, mixing
from jaxrl.data import quality as measures
from jaxrl.errors import UserError
from jaxrl.ops import normalizer
from jaxrl.runs import plots


def dataset_of(states, actions=None, rewards=None, **columns):
    """Returns episodes of states [E, T + 1, O], whose last rows take no step."""
    states = np.asarray(states, np.float32)
    episodes, rows, _ = states.shape
    actions = np.zeros((episodes, rows, 1)) if actions is None else np.asarray(actions)
    table = {"observations": states, "actions": actions, "terminals": np.tile(np.arange(rows) == rows - 1, episodes)}
    table |= {} if rewards is None else {"rewards": np.asarray(rewards, np.float32)}
    flat = {name: column.reshape(episodes * rows, *column.shape[2:]) for name, column in table.items()}
    return files.from_columns(flat | {"terminals": table["terminals"]} | columns)


def noise(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def twice(dataset):
    return mixing.take(dataset, [*range(len(files.episodes(dataset)[0]))] * 2)


# Returns


def test_quality_is_zero_at_the_random_return_and_one_at_the_best():
    returns = np.array([-20.0, 40.0])
    assert measures.trajectory_quality(returns, random=10, best=50) == 0
    assert measures.trajectory_quality(returns, random=-30, best=10) == 1
    assert measures.trajectory_quality(returns, random=20, best=10) == 1
    assert measures.trajectory_quality(np.array([3234.3]), -20.272305, 3234.3) == 1  # hopper's of D4RL
    with pytest.raises(UserError, match="are both 3: they must differ"):
        measures.trajectory_quality(returns, 3, 3)


def test_the_positive_variance_of_0_and_2_is_one_half():
    assert measures.positive_variance(np.array([0.0, 2.0])) == 0.5
    assert measures.positive_variance(np.array([3.0, 3.0])) == 0


def test_a_dataset_twice_is_measured_as_once():
    once = dataset_of(noise((4, 6, 2)), rewards=noise((4, 6), 1))
    both = twice(once)
    assert measures.coverage(both).cells == measures.coverage(once).cells
    quality = [measures.trajectory_quality(files.episode_returns(each), -1, 2) for each in (once, both)]
    assert quality[0] == pytest.approx(quality[1], rel=1e-12)


def test_returns_of_sparse_rewards_and_of_finished_episodes_only():
    rewards = np.array([[-1, -1, 0, 9], [-1, -1, -1, 9], [0, 0, -1, 9], [0, 0, 0, 9]])
    dataset = dataset_of(noise((4, 4, 2)), rewards=rewards, unfinished=np.arange(16) >= 12)
    found = measures.measure(dataset, scores=(-3, 0))
    np.testing.assert_array_equal(found.returns, [-2, -3, -1])  # the fourth has none
    assert found.quality == (pytest.approx(1 / 3), -3, 0)
    assert (found.values, found.succeeded) == ((-1, 0), pytest.approx(2 / 3))
    assert found.zeros == pytest.approx((1 / 3 + 0 + 2 / 3 + 1) / 4)
    np.testing.assert_array_equal(found.lengths, [3, 3, 3, 3])
    lines = [" ".join(line.split()) for line in measures.format_report(found).splitlines()]
    assert "trajectory quality TQ 0.3333 0 is a return of -3, 1 of 0" in lines
    assert "successful 66.7 % of the episodes get a reward of 0, all other rewards are -1" in lines


def test_what_rewards_do_not_allow_is_said():
    found = measures.measure(dataset_of(noise((2, 4, 2))))
    assert found.returns is None and "returns                               not measured: no rewards" in (
        measures.format_report(found)
    )
    with pytest.raises(UserError, match="has no rewards that could be compared with a return"):
        measures.measure(dataset_of(noise((2, 4, 2))), scores=(0, 1))
    dense = measures.measure(dataset_of(noise((2, 4, 2)), rewards=noise((2, 4))))
    assert dense.succeeded is None and "successful" not in measures.format_report(dense)
    rewards, unfinished = noise((2, 4)), np.ones(8, bool)
    nothing = measures.measure(dataset_of(noise((2, 4, 2)), rewards=rewards, unfinished=unfinished), scores=(0, 1))
    assert "not measured: no episode is finished" in measures.format_report(nothing)


# Coverage


def test_a_grid_of_25_cells_is_counted_exactly_with_the_maximum_in_a_cell_of_its_own():
    grid = np.stack(np.meshgrid(*[np.array([-1, 0, 1, 2, 3])] * 2), axis=-1).reshape(-1, 2) / 2.0
    assert measures.distinct(grid, grid.min(0), grid.max(0)) == 25
    centres = np.array([[0.1], [0.3], [0.6], [0.8], [1.0], [-0.1], [1.7]])
    zero, one = np.zeros(1), np.ones(1)
    assert measures.distinct(centres, zero, one) == 6  # 1.0 and 1.7 share the cell from the maximum on
    assert measures.distinct(centres[:4], zero, one) == 4
    assert measures.distinct(np.full((7, 3), 2.0), np.full(3, 2.0), np.full(3, 2.0)) == 1
    assert measures.distinct(np.zeros((0, 2)), np.zeros(2), np.ones(2)) == 0


@pytest.mark.parametrize("width", [3, 24, 25, 60])
def test_cells_are_the_distinct_rows_of_numpy_s_digits(width):
    points = np.random.default_rng(width).integers(0, 2, (400, width)) * (np.arange(width) % 7 == 0) + 0.01
    points[::5, -1] += 1
    low, high = points.min(0), points.max(0)
    digits = [np.digitize(points[:, j], np.linspace(low[j], high[j], 5)) for j in range(width)]
    assert measures.distinct(points, low, high) == len(np.unique(np.stack(digits, 1), axis=0)) <= 400


def test_coverage_is_relative_to_a_reference_of_as_many_steps_and_its_limits():
    reference = dataset_of(np.linspace(0, 1, 12).reshape(2, 6, 1))
    dataset = dataset_of(np.array([[[0.1], [0.1], [0.6], [5.0], [7.0], [0]]] * 4))
    found = measures.coverage(dataset, reference)
    assert (found.cells, found.steps, found.reference) == (3, 10, 5)  # 5 and 7 lie beyond the limits, in one cell
    assert found.ratio == 3 / 5 and found.log_ratio == pytest.approx(np.log(3) / np.log(5))
    own = measures.coverage(dataset)
    assert (own.cells, own.steps, own.ratio) == (3, 20, None)
    same = measures.coverage(reference, reference)
    assert (same.ratio, same.log_ratio) == (1, 1)
    alike = dataset_of(np.ones((2, 6, 1)))
    assert (measures.coverage(alike, alike).ratio, measures.coverage(alike, alike).log_ratio) == (1, None)
    with pytest.raises(UserError, match=r"of 3 entries in all, the dataset .* of 2"):
        measures.coverage(dataset, dataset_of(np.zeros((2, 6, 2))))


# Spread


def test_the_spread_is_exact_far_from_zero_and_constant_columns_are_not_scaled(monkeypatch):
    monkeypatch.setattr(normalizer, "PIECE", 100)
    values = np.stack([4096 + np.tile([-1, 1], 5000), np.full(10_000, 0.1), np.arange(10_000)], 1).astype(np.float32)
    found = measures.spread(values)
    np.testing.assert_allclose(found.mean, [4096, np.float32(0.1), 4999.5], rtol=1e-12)
    np.testing.assert_allclose(found.std, [1, 0, np.sqrt((1e8 - 1) / 12)], rtol=1e-12)
    np.testing.assert_allclose(found.normalizer.std, [1, 1, np.sqrt((1e8 - 1) / 12)], rtol=1e-12)
    assert found.std[1] == 0 and found.variance == (found.std**2).sum()
    units = found.normalizer(values[:2])
    assert units.dtype == np.float64
    np.testing.assert_allclose(units[:, :2], [[-1, 0], [1, 0]], atol=1e-9)


def test_constant_entries_are_named():
    states = noise((3, 5, 4))
    states[..., [1, 3]] = 7
    found = measures.measure(dataset_of(states))
    assert found.constant == (1, 3) and np.isfinite(found.neighbourhoods.nearest).all()
    assert measures.format_report(found).splitlines()[-1].endswith("2  not scaled: entries 1, 3 of 4")


def test_arrays_of_a_dict_are_measured_side_by_side_and_images_left_out():
    vector = dataset_of(noise((3, 9, 4)), rewards=noise((3, 9)))
    parts = {"a": vector.observations[:, :1], "b": vector.observations[:, 1:]}
    images = {"pixels": np.zeros((27, 2, 2, 3), np.uint8)}
    as_dict = dataclasses.replace(vector, observations=parts | images)
    expected, found = measures.measure(vector), measures.measure(as_dict)
    np.testing.assert_array_equal(found.neighbourhoods.nearest, expected.neighbourhoods.nearest)
    assert (found.coverage, found.size) == (expected.coverage, 4)
    with pytest.raises(UserError, match="observations are images, whose quality is not measured"):
        measures.measure(dataclasses.replace(vector, observations=images))


# Neighbors


@pytest.mark.parametrize(("width", "scale", "shift"), [(1, 1, 0), (2, 1, 0), (28, 1, 0), (3, 1e-3, 10), (2, 0, 1)])
def test_nearest_neighbours_of_other_episodes_are_those_of_brute_force(width, scale, shift, monkeypatch):
    monkeypatch.setattr(measures, "ENTRIES", 5000)  # several pieces
    points = shift + scale * noise((600, width))
    first = np.repeat(np.arange(0, 600, 60), 60)
    queries = np.arange(0, 600, 7)
    distances, found = measures.nearest(points, (first, first + 60), queries, 10)
    every = np.sqrt(((points[queries][:, None] - points[None]) ** 2).sum(-1))
    every[first[queries][:, None] == first[None, :]] = np.inf
    np.testing.assert_array_equal(distances, np.sort(every, axis=1)[:, :10])
    np.testing.assert_array_equal(np.take_along_axis(every, found, axis=1), distances)


def test_similarity_is_the_share_of_other_episodes_within_the_median_nearest_distance():
    states = np.concatenate([noise((5, 40, 2)), np.tile(noise((5, 1, 2), 1), (1, 40, 1)) * 0.01], axis=0)
    found = measures.neighbourhoods(dataset_of(states), neighbours=3, queries=10_000)
    rows = states[:, :-1].reshape(-1, 2).astype(np.float32)
    rows = measures.spread(states.reshape(-1, 2).astype(np.float32)).normalizer(rows)
    every = np.sqrt(((rows[:, None] - rows[None]) ** 2).sum(-1))
    owner = np.repeat(np.arange(10), 39)
    every[owner[:, None] == owner[None]] = np.inf
    assert found.epsilon == np.median(every.min(1)) and len(found.nearest) == 390
    np.testing.assert_allclose(found.similarity, (every <= found.epsilon).sum(1) / (390 - 39))
    assert found.similarity.max() * 351 > 3  # so that some were counted anew


def test_a_deterministic_policy_has_less_action_variance_the_denser_the_states():
    def variance(count):
        states = np.random.default_rng(0).uniform(-1, 1, (10, count + 1, 1))
        found = measures.neighbourhoods(dataset_of(states, 0.8 * states), neighbours=5, queries=200)
        return found.action_variance.mean(), found.relative_action_variance

    few, many = variance(10), variance(1000)
    # Six neighbours span about 6 / N of the range, and their variance is about the square of that.
    assert few[0] > 100 * many[0] and many[0] < 1e-5 and many[1] < 1e-4


def test_two_experts_of_opposite_actions_have_an_action_variance_of_one_per_entry():
    states = np.tile(noise((1, 30, 2)), (2, 1, 1))
    actions = np.stack([np.ones((30, 3)), -np.ones((30, 3))])
    found = measures.neighbourhoods(dataset_of(states, actions), neighbours=1)
    np.testing.assert_array_equal(found.action_variance, 3.0)
    assert found.relative_action_variance == 1 and found.epsilon == 0
    np.testing.assert_array_equal(found.similarity, 1 / 29)


def test_additive_noise_is_the_transition_diversity_less_the_share_of_the_step_itself():
    # Each step starts near one of far apart places and is thrown elsewhere at random: its changes are noise alone.
    entries, std, k = 2, 0.5, 9
    throws = std * noise((400, entries))
    states = np.stack([np.zeros((400, entries)), throws], axis=1)
    dataset = dataset_of(states)
    found = measures.neighbourhoods(dataset, neighbours=k, queries=400)
    scale = measures.spread(dataset.observations).std
    expected = (throws.var(axis=0) / scale**2).sum() * (1 - 1 / (k + 1))
    # All start alike, so that which nine are nearest is arbitrary, and their changes are independent of each other.
    assert found.diversity.mean() == pytest.approx(expected, rel=0.15)
    assert found.change_spread == pytest.approx((throws.var(axis=0) / scale**2).sum(), rel=1e-6)
    assert found.relative_diversity == pytest.approx(0.9, rel=0.15)


def test_deterministic_dynamics_have_no_transition_diversity():
    states = np.random.default_rng(0).uniform(-1, 1, (2000, 1, 1))
    actions = np.random.default_rng(1).uniform(-1, 1, (2000, 1, 1))
    pairs = np.concatenate([states, 0.5 * states + actions], axis=1)
    dataset = dataset_of(pairs, np.concatenate([actions, actions], axis=1))
    assert measures.neighbourhoods(dataset, neighbours=3, queries=500).relative_diversity < 2e-3
    still = dataset_of(np.tile(states, (1, 2, 1)))
    assert measures.neighbourhoods(still).relative_diversity == 0
    assert measures.neighbourhoods(still).relative_action_variance == 0


def test_queries_are_drawn_by_seed_and_neighbours_are_as_many_as_there_are():
    dataset = dataset_of(noise((3, 5, 2)))
    found = measures.neighbourhoods(dataset, neighbours=100, queries=6, seed=1)
    assert (found.neighbours, len(found.nearest), found.steps, found.seed) == (8, 6, 12, 1)
    again = measures.neighbourhoods(dataset, neighbours=100, queries=6, seed=1)
    np.testing.assert_array_equal(found.nearest, again.nearest)
    assert "6  of 12 steps (seed 1), each with the 8 nearest of other" in measures.format_report(
        dataclasses.replace(measures.measure(dataset), neighbourhoods=found)
    )


def test_one_episode_has_no_neighbours_and_counts_are_checked():
    alone = dataset_of(noise((1, 9, 2)))
    assert "neighbors                             not measured: they are searched for in other" in (
        measures.format_report(measures.measure(alone))
    )
    with pytest.raises(UserError, match="has one episode; neighbors are searched for in other"):
        measures.neighbourhoods(alone)
    for name in ("neighbours", "queries"):
        with pytest.raises(UserError, match=f"{name} = 0: must be at least 1"):
            measures.neighbourhoods(dataset_of(noise((2, 5, 2))), **{name: 0})


def test_pictures_show_what_was_measured_and_say_what_was_not(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    plots.dataset(measures.measure(dataset_of(noise((3, 5, 2)), rewards=noise((3, 5)))), tmp_path / "a.png")
    plots.dataset(measures.measure(dataset_of(noise((1, 5, 2)))), tmp_path / "b.png")
    counts = [sum(bar.get_height() for bar in axis.patches) for axis in drawn[0].axes]
    assert counts == [3, 3, 12, 12]  # episodes, episodes, steps, steps
    assert drawn[0].axes[2].get_xscale() == "log"
    said = [[text.get_text() for text in axis.texts] for axis in drawn[1].axes]
    assert said == [["no rewards"], [], ["one episode"], ["one episode"]]


# Builders


def test_a_mixture_has_its_share_of_whole_episodes_of_each():
    good = dataset_of(np.full((3, 5, 1), 1.0) + np.arange(5)[:, None] / 10, rewards=np.ones((3, 5)))
    bad = dataset_of(np.zeros((2, 8, 1)) - np.arange(8)[:, None] / 10, rewards=np.zeros((2, 8)))
    mixed = mixing.mix(good, bad, 0.25, 100, seed=3)
    first, last = files.episodes(mixed)
    assert sorted(last - first) == [4] * 7 + [7] * 11  # 28 steps for 25, 77 for 75
    of_good = mixed.observations[first, 0] == 1
    np.testing.assert_array_equal(last - first, np.where(of_good, 4, 7))
    assert 0 < np.flatnonzero(of_good).min() or of_good[7:].any()  # not one source after the other
    for i, j in zip(first, last, strict=True):
        np.testing.assert_allclose(np.diff(mixed.observations[i : j + 1, 0]), 0.1 if j - i == 4 else -0.1, atol=1e-6)
    assert mixing.mix(good, bad, 0.25, 100, seed=3).digest == mixed.digest
    assert mixing.mix(good, bad, 0.25, 100, seed=4).digest != mixed.digest
    assert (mixing.mix(good, bad, 0, 10).rewards == 0).all() and (mixing.mix(good, bad, 1, 10).rewards == 1).all()


def test_a_mixture_has_the_columns_that_both_have():
    good = dataset_of(np.ones((1, 3, 1)), masks=np.array([1, 0, 1]), qpos=np.ones((3, 2)), goal=np.ones(3))
    bad = dataset_of(np.zeros((1, 3, 1)), qpos=np.zeros((3, 2)))
    mixed = mixing.mix(good, bad, 0.5, 4)
    assert set(mixed.extra) == {"qpos"} and mixed.rewards is None
    ends = mixed.masks == 0
    assert ends.sum() == 1 and (mixed.observations[ends] == 1).all()  # the other's steps end no task


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.5, 10), r"ratio = 1.5: must be in \[0, 1\]"),
        ((float("nan"), 10), r"ratio = nan: must be in \[0, 1\]"),
        ((0.5, 0), "steps = 0: must be at least 1"),
    ],
)
def test_impossible_mixtures_are_refused(arguments, message):
    dataset = dataset_of(np.ones((2, 3, 1)))
    with pytest.raises(UserError, match=message):
        mixing.mix(dataset, dataset, *arguments)


def test_datasets_that_are_unlike_are_not_mixed():
    dataset = dataset_of(np.ones((2, 3, 1)))
    with pytest.raises(UserError, match=r"a row of column 'observations' is \(1,\) in .*, \(2,\) in "):
        mixing.mix(dataset, dataset_of(np.ones((2, 3, 2))), 0.5, 10)
    with pytest.raises(UserError, match="has no rewards, the other has: relabel both with --env"):
        mixing.mix(dataset, dataset_of(np.ones((2, 3, 1)), rewards=np.ones((2, 3))), 0.5, 10)


def test_the_best_episodes_are_kept_in_their_order():
    rewards = np.array([[1, 0, 99], [3, 0, 0], [0, 2, 0], [-1, 0, 99], [2, 0, 0]])
    dataset = dataset_of(np.arange(5)[:, None, None] * np.ones((1, 3, 1)), rewards=rewards)
    assert mixing.top(dataset, 0.6).observations[::3, 0].tolist() == [1, 2, 4]
    assert mixing.top(dataset, 0.5).observations[::3, 0].tolist() == [1, 2]  # of equal ones the first
    assert mixing.top(dataset, 0.01).observations[::3, 0].tolist() == [1]
    assert mixing.top(dataset, 1).digest == dataset.digest
    for fraction in (0, 1.1, float("nan")):
        with pytest.raises(UserError, match=r"must be in \(0, 1\]"):
            mixing.top(dataset, fraction)
    with pytest.raises(UserError, match="has no rewards to compare episodes by"):
        mixing.top(dataset_of(np.ones((2, 3, 1))), 0.5)
