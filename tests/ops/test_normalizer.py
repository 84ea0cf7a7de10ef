"""Facts about jaxrl.ops.normalizer: moments are NumPy's, however rows are divided, ordered and masked."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.agents import learner
from jaxrl.ops import normalizer
from jaxrl.ops.normalizer import LIMIT, Moments, Normalizer, empty, merge, of_rows, updated
from jaxrl.replay import ring as rings
from jaxrl.replay.hindsight import Hindsight
from jaxrl.types import Leaf, Spec
from tests.known import same

SIZES = (1, 7, 64, 300, 2, 1000, 33)
update = jax.jit(updated)


def batches(sizes=SIZES, seed: int = 0) -> list[np.ndarray]:
    """Returns batches of rows with three entries of different scales, all far from 0 for their spread."""
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(n, 3)) * [1, 0.01, 50] + [10, -1, 300]).astype(np.float32) for n in sizes]


def whole(batch) -> jax.Array:
    return jnp.ones(len(batch), bool)


def after(parts) -> Moments:
    return functools.reduce(lambda moments, part: update(moments, part, whole(part)), parts, empty(jnp.zeros(3)))


def assert_moments_of(rows, moments: Moments, rtol=1e-5):
    rows = np.asarray(rows, float)
    assert int(moments.count) == len(rows)
    np.testing.assert_allclose(moments.mean, rows.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(moments.variance, rows.var(axis=0), rtol=rtol)


# Running


def test_batches_of_any_sizes_give_numpys_mean_and_variance_of_all_rows():
    parts = batches()
    assert_moments_of(np.concatenate(parts), after(parts))


def test_three_numbers_by_hand():
    moments = after([np.full((1, 3), 1.0, np.float32), np.array([[3.0] * 3, [8.0] * 3], np.float32)])
    np.testing.assert_allclose(moments.mean, 4, rtol=1e-6)
    np.testing.assert_allclose(moments.variance, (9 + 1 + 16) / 3, rtol=1e-6)


def test_a_first_batch_is_taken_as_it_is_and_an_empty_one_changes_nothing():
    (part,) = batches((50,))
    once = jax.jit(of_rows)(part, whole(part))
    assert same(jax.jit(merge)(empty(jnp.zeros(3)), once), once)
    assert same(update(once, part, jnp.zeros(50, bool)), once)
    assert same(update(empty(jnp.zeros(3)), part, jnp.zeros(50, bool)), empty(jnp.zeros(3)))


def test_the_order_of_batches_matters_only_to_rounding():
    parts = batches()
    forth, back = after(parts), after(parts[::-1])
    halves = jax.jit(merge)(after(parts[:3]), after(parts[3:]))
    for other in (back, halves):
        assert int(other.count) == int(forth.count)
        np.testing.assert_allclose(other.mean, forth.mean, rtol=1e-6)
        np.testing.assert_allclose(other.variance, forth.variance, rtol=2e-5)


def test_leading_axes_are_any_and_rows_that_are_masked_out_may_be_anything():
    rng = np.random.default_rng(1)
    rows, mask = rng.normal(3, 2, (6, 5, 3)).astype(np.float32), rng.random((6, 5)) < 0.5
    broken = np.where(mask[..., None], rows, np.nan)
    for given in (mask, mask.astype(np.float32)):
        assert_moments_of(rows[mask], update(empty(jnp.zeros(3)), broken, given))


def test_members_side_by_side_have_moments_of_their_own():
    rng = np.random.default_rng(2)
    rows, mask = rng.normal(size=(4, 10, 20, 3)).astype(np.float32), rng.random((4, 10, 20)) < 0.7

    @jax.jit
    @jax.vmap
    def run(rows, mask):
        return jax.lax.scan(lambda m, part: (updated(m, *part), None), empty(jnp.zeros(3)), (rows, mask))[0]

    found = run(rows, mask)
    for i in range(4):
        assert_moments_of(rows[i][mask[i]], jax.tree.map(lambda x, i=i: x[i], found))


@pytest.mark.parametrize("count", [2**24, 2**25 + 1, 2**31, LIMIT - 4])
def test_counts_beyond_what_float32_resolves_go_on(count):
    many = Moments(jnp.uint32(count), jnp.array([1.0]), jnp.array([4.0]))
    three = update(many, jnp.full((3, 1), 1.0), jnp.ones(3, bool))
    assert int(three.count) == count + 3
    np.testing.assert_allclose([three.mean[0], three.variance[0]], [1, 4], rtol=1e-6)


def test_at_the_limit_the_count_stays_and_later_rows_replace_earlier_ones():
    full = Moments(jnp.uint32(LIMIT), jnp.zeros(1), jnp.ones(1))
    assert int(update(full, jnp.zeros((5, 1)), jnp.ones(5, bool)).count) == LIMIT
    both = merge(full, Moments(jnp.uint32(LIMIT), jnp.full(1, 2.0), jnp.ones(1)))
    assert int(both.count) == LIMIT
    np.testing.assert_allclose([both.mean[0], both.variance[0]], [1, 2], rtol=1e-6)  # halves, one apart from the middle


def test_a_variance_holds_over_more_rows_than_a_float32_sum_of_squares_could():
    """2^28 rows, then 2^28 more in batches of 16, whose part of that sum is below its resolution: 32."""
    batch = jnp.tile(jnp.array([[-1.0], [1.0]]), (8, 1))
    start = Moments(jnp.uint32(2**28), jnp.zeros(1), jnp.ones(1))
    part = of_rows(batch, whole(batch))
    many = Moments(part.count * 2**12, part.mean, part.variance)

    @jax.jit
    def run(moments, part):
        return jax.lax.scan(lambda m, _: (merge(m, part), None), moments, None, 2**12)[0]

    by_batches, by_thousands = run(start, part), run(start, many)
    assert int(by_batches.count) == 2**28 + 2**16 and int(by_thousands.count) == 2**29
    for found in (by_batches, by_thousands):
        np.testing.assert_allclose([found.mean[0], found.variance[0]], [0, 1], atol=1e-6)


# Observations


def test_a_tree_is_measured_leaf_by_leaf_and_images_are_left_alone():
    rng = np.random.default_rng(3)
    obs = {
        "state": rng.normal(5, 2, (30, 4)).astype(np.float32),
        "scan": rng.normal(-1, 3, (30, 2, 3)).astype(np.float32),
        "image": rng.integers(0, 256, (30, 8, 8, 3)).astype(np.uint8),
    }
    start = empty(jax.tree.map(lambda x: x[0], obs))
    moments = update(start, obs, whole(obs["state"]))
    assert jax.tree.structure(moments) == jax.tree.structure(start)
    assert jax.tree.map(jnp.shape, moments) == jax.tree.map(jnp.shape, start)
    units = moments.normalizer(epsilon=0.0)(obs)
    for name in ("state", "scan"):
        np.testing.assert_allclose(units[name].mean(axis=0), 0, atol=1e-5)
        np.testing.assert_allclose(units[name].std(axis=0), 1, rtol=1e-5)
    np.testing.assert_array_equal(units["image"], obs["image"])
    assert units["image"].dtype == jnp.uint8


def test_normalized_entries_are_those_of_the_formula_and_clipped():
    moments = Moments(jnp.uint32(9), jnp.array([1.0, 2.0]), jnp.array([4.0, 0.25]))
    x = jnp.array([[3.0, 2.5], [-100.0, 2.0]])
    np.testing.assert_allclose(moments.normalizer(0.5)(x), [[2 / 2.5, 0.5], [-101 / 2.5, 0]], rtol=1e-6)
    np.testing.assert_allclose(moments.normalizer(0.5, clip=3.0)(x), [[2 / 2.5, 0.5], [-3, 0]], rtol=1e-6)


def test_an_entry_that_never_changed_and_no_rows_at_all_are_left_in_their_own_units():
    rows = np.array([[7.0, 0.0, 1.0], [7.0, 0.0, 3.0]], np.float32)
    units = after([rows]).normalizer(1e-3)
    np.testing.assert_allclose(units(rows), [[0, 0, -1 / 1.001], [0, 0, 1 / 1.001]], rtol=1e-5)
    assert same(empty(jnp.zeros(3)).normalizer()(rows), jnp.asarray(rows))
    assert same(normalizer.identity(jnp.zeros(3))(rows), jnp.asarray(rows))


def test_agents_are_fitted_to_observations_that_are_dicts_and_to_their_goals():
    ring, rng = rings.empty(1, 12, Spec(2, 1)), np.random.default_rng(7)
    obs = {name: jnp.asarray(rng.normal(3, 2, (1, 12, 2)), jnp.float32) for name in ("a", "b")}
    goals = jnp.asarray(rng.normal(-5, 1, (12, 1)), jnp.float32)
    hindsight = Hindsight(goals, first=jnp.zeros(1, jnp.int32), steps=jnp.full(1, 11, jnp.int32))
    valid = jnp.arange(12)[None] != 4
    spec = Spec((Leaf("a", (2,)), Leaf("b", (2,))), 1)
    state = learner.create(spec, {}, {}, normalized=True)
    for known, told in ((None, {}), (hindsight, {"goal": goals[None]})):
        found = learner.fit(state, (dataclasses.replace(ring, obs=obs, valid=valid, hindsight=known),)).normalizer
        assert found.mean.keys() == (obs | told).keys()
        for name, rows in (obs | told).items():
            np.testing.assert_allclose(found.mean[name], rows[valid].mean(axis=0), rtol=1e-5)
            np.testing.assert_allclose(found.std[name], rows[valid].std(axis=0) + 1e-3, rtol=1e-5)


# Whole arrays


def test_a_million_rows_far_from_zero_have_exact_moments_in_float32():
    rng = np.random.default_rng(4)
    rows = rng.normal([1000, 0], [1, 1e-3], (1_000_000, 2)).astype(np.float32)
    found = jax.jit(of_rows)(rows[None], jnp.ones((1, len(rows)), bool))
    np.testing.assert_allclose(found.mean, rows.mean(axis=0, dtype=float), rtol=2e-7, atol=1e-9)
    np.testing.assert_allclose(found.variance, rows.var(axis=0, dtype=float), rtol=1e-4)


def test_weighted_rows_are_rows_that_stand_several_times():
    rng = np.random.default_rng(5)
    rows, times = rng.normal(3, 2, (40, 3)), rng.integers(0, 4, 40)
    mean, variance = normalizer.weighted(rows, times)
    assert mean.dtype == variance.dtype == np.float64
    np.testing.assert_array_equal(mean, np.average(rows, axis=0, weights=times))
    np.testing.assert_array_equal(variance, np.average((rows - mean) ** 2, axis=0, weights=times))
    np.testing.assert_allclose(variance, np.repeat(rows, times, axis=0).var(axis=0), rtol=1e-12)
    single = normalizer.weighted(jnp.asarray(rows, jnp.float32), jnp.asarray(times))
    np.testing.assert_allclose(single, [mean, variance], rtol=1e-5)


def test_columns_are_summed_piece_by_piece_in_float64(monkeypatch):
    monkeypatch.setattr(normalizer, "PIECE", 7)
    rows = np.random.default_rng(6).normal(4096, 1, (100, 2)).astype(np.float32)
    mean, variance = normalizer.of_columns(rows)
    np.testing.assert_allclose(mean, rows.mean(axis=0, dtype=float), rtol=1e-14)
    np.testing.assert_allclose(variance, rows.var(axis=0, dtype=float), rtol=1e-10)


def test_numpy_arrays_are_normalized_in_float64():
    units = Normalizer(np.array([1.0]), np.array([3.0]))(np.array([[2.0]], np.float32))
    assert isinstance(units, np.ndarray) and units.dtype == np.float64 and units[0, 0] == 1 / 3
