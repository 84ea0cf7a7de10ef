"""Facts about jaxrl.replay.hindsight: the law of starts and goals, and the windows towards them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import ranges
from jaxrl.data.files import Dataset
from jaxrl.errors import UserError
from jaxrl.ops import losses
from jaxrl.replay import hindsight as goals
from jaxrl.replay import ring
from jaxrl.replay.hindsight import Goals, Hindsight
from jaxrl.replay.loading import from_dataset
from jaxrl.training import loop

DISCOUNT, LENGTH = 0.9, 5

draw = jax.jit(goals.draw, static_argnums=(2, 3))
starts = jax.jit(goals.starts, static_argnums=(2, 3))
ahead = jax.jit(goals.ahead)
window_at = jax.jit(goals.window_at, static_argnums=5)


def hindsight(*steps: int, first: int = 0) -> Hindsight:
    """Returns episodes of so many steps, one after the other."""
    begin = first + np.cumsum([0, *(n + 1 for n in steps[:-1])])
    return Hindsight(None, jnp.asarray(begin, jnp.int32), jnp.asarray(steps, jnp.int32))


def data(*lengths: int, entries: int = 1) -> Dataset:
    """Returns episodes of so many rows, whose row i holds i everywhere."""
    ids = np.arange(sum(lengths), dtype=np.float32)
    actions = np.stack([ids / 1000, -ids / 1000], 1)
    return Dataset(np.repeat(ids[:, None], entries, 1), actions, np.isin(ids + 1, np.cumsum(lengths)))


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """Returns by how many standard deviations counts are further from their expectation than they should be."""
    return float((np.sum((counts - expected) ** 2 / expected) - len(counts)) / np.sqrt(2 * len(counts)))


# Windows


def towards(law: Goals, *distances: int):
    """Returns the windows from row 3 of an episode of 20 rows to goals so far ahead."""
    rows = jnp.arange(20.0)[:, None]
    start = jnp.full(len(distances), 3)
    return window_at(rows, rows, hindsight(19), start, start + jnp.asarray(distances), LENGTH, law)


def test_the_target_is_the_discounted_step_at_the_goal_or_the_bootstrap_after_all_steps():
    batch = towards(goals.DEFAULT, 0, 3, 4, 5, -1, 12)
    target = losses.td_target(batch.rewards, batch.steps, batch.terminated, jnp.full(6, 0.5), DISCOUNT)
    bootstrap = 0.5 * DISCOUNT**LENGTH
    np.testing.assert_allclose(target, [1, 0.729, 0.9**4, bootstrap, bootstrap, bootstrap], rtol=1e-6)
    np.testing.assert_array_equal(batch.terminated, [True, True, True, False, False, False])
    np.testing.assert_array_equal(batch.steps, [0, 3, 4, 5, 5, 5])
    np.testing.assert_array_equal(batch.obs, [[3, 3], [3, 6], [3, 7], [3, 8], [3, 2], [3, 15]])
    np.testing.assert_array_equal(batch.next_obs, [[3, 3], [6, 6], [7, 7], [8, 8], [8, 2], [8, 15]])
    np.testing.assert_array_equal(batch.actions[..., 0], np.tile(3 + np.arange(5), (6, 1)))
    np.testing.assert_array_equal(batch.valid, np.ones((6, 5)))


def test_negative_rewards_count_the_steps_before_the_goal():
    batch = towards(Goals(negative=True), 0, 3, 5)
    np.testing.assert_array_equal(batch.rewards, [[0] * 5, [-1, -1, -1, 0, 0], [-1] * 5])
    target = losses.td_target(batch.rewards, batch.steps, batch.terminated, jnp.full(3, -2.0), DISCOUNT)
    np.testing.assert_allclose(target, [0, -(1 + 0.9 + 0.81), -(1 - 0.9**5) / 0.1 - 2 * 0.9**5], rtol=1e-6)


# Observations that are dicts, and history


def test_the_goal_of_a_dict_is_a_key_of_its_own():
    rows = np.arange(20)
    obs = {"state": jnp.asarray(rows[:, None], jnp.float32), "image": jnp.asarray(rows[:, None, None, None], jnp.uint8)}
    said = Hindsight(jnp.stack([10.0 * rows, -rows], axis=1), jnp.array([0]), jnp.array([19]))
    start, goal = jnp.array([3, 3]), jnp.array([6, 12])
    batch = window_at(obs, jnp.asarray(rows[:, None], jnp.float32), said, start, goal, LENGTH, goals.DEFAULT)
    for seen, row in ((batch.obs, [3, 3]), (batch.next_obs, [6, 8])):
        np.testing.assert_array_equal(seen["state"][:, 0], row)
        np.testing.assert_array_equal(seen["image"][:, 0, 0, 0], row)
        np.testing.assert_array_equal(seen["goal"], [[60, -6], [120, -12]])
        assert seen["image"].dtype == jnp.uint8
    np.testing.assert_array_equal(batch.terminated, [True, False])


def test_images_that_are_their_own_goals_are_not_stored_again():
    images = {"pixels": jnp.arange(20, dtype=jnp.uint8).reshape(20, 1, 1, 1)}
    args = hindsight(19), jnp.array([3]), jnp.array([6]), LENGTH, goals.DEFAULT
    batch = window_at(images, jnp.zeros((20, 1)), *args)
    assert batch.obs["goal"].dtype == jnp.uint8
    assert (int(batch.obs["goal"].ravel()[0]), int(batch.next_obs["pixels"].ravel()[0])) == (6, 6)


@pytest.mark.parametrize("negative", [False, True])
def test_the_steps_before_a_window_have_its_goal_and_the_rewards_for_it(negative):
    dataset, law = data(6, 15, 9), Goals(0.0, 0.0, negative=negative)
    laid = from_dataset(dataset, np.zeros(30), np.zeros(30, bool), goals=dataset.observations)
    batch = jax.jit(ring.windows, static_argnums=(2, 3), static_argnames="history")(
        (laid,), jax.random.key(0), 4000, LENGTH, law, history=4
    )
    start, goal = (np.asarray(batch.obs[:, i], int) for i in (0, 1))
    first = np.array([0, 6, 21])[np.searchsorted([0, 6, 21], start, side="right") - 1]
    row = start[:, None] + np.arange(-4, 0)
    there = row >= first[:, None]
    assert there.any(axis=0).all() and not there.all(axis=1).all() and (there & (row == goal[:, None])).any()
    before = jax.tree.map(np.asarray, batch.history)
    np.testing.assert_array_equal(before.valid, there)
    np.testing.assert_array_equal(before.obs, np.stack([row, goal[:, None] + 0 * row], axis=-1) * there[..., None])
    np.testing.assert_allclose(before.actions, np.stack([row, -row], -1) / 1000 * there[..., None], atol=1e-7)
    met = (row == goal[:, None]) & there
    np.testing.assert_array_equal(before.rewards, np.where(met, 0, -1) * there if negative else met)


def test_windows_in_hindsight_have_the_further_columns_of_their_first_step():
    dataset = dataclasses.replace(data(6, 15), extra={"mark": np.arange(21) * 3})
    nothing = np.zeros(21, bool)
    laid = from_dataset(dataset, nothing, nothing, goals=dataset.observations, columns=("mark",))
    batch = jax.jit(ring.windows, static_argnums=(2, 3))((laid,), jax.random.key(0), 200, LENGTH)
    np.testing.assert_array_equal(batch.extra["mark"], 3 * batch.obs[:, 0].astype(int))


# The law


def test_starts_are_uniform_over_rows_whose_window_stays_in_its_episode():
    lengths, count = (3, 9, 4, 30, 5, 16), 40_000
    start, last = (np.asarray(x) for x in starts(hindsight(*lengths, first=7), jax.random.key(0), count, LENGTH))
    first = 7 + np.cumsum([0, *(n + 1 for n in lengths[:-1])])
    admissible = np.concatenate([np.arange(f, f + n - LENGTH + 1) for f, n in zip(first, lengths, strict=True)])
    found, counts = np.unique(start, return_counts=True)
    np.testing.assert_array_equal(found, admissible)
    assert abs(chi_square(counts, np.full(len(found), count / len(found)))) < 4
    np.testing.assert_array_equal(last, (first + lengths)[np.searchsorted(first, start, side="right") - 1])
    assert (start + LENGTH <= last).all()


def test_goals_are_current_future_and_random_in_their_proportions():
    episodes, each, count = 50, 25, 60_000
    start, goal = (
        np.asarray(x) for x in draw(hindsight(*[each] * episodes), jax.random.key(1), count, LENGTH, goals.DEFAULT)
    )
    places = episodes * (each - LENGTH + 1)
    other = start // (each + 1) != goal // (each + 1)
    for happened, expected in (
        (start == goal, 0.2 + 0.3 / places),
        (~other & (goal != start), 0.5 + 0.3 * (1 / episodes - 1 / places)),
        (other, 0.3 * (1 - 1 / episodes)),
    ):
        assert abs(happened.mean() - expected) < 3 * np.sqrt(expected * (1 - expected) / count)
    assert (goal[other] % (each + 1) <= each - LENGTH).all()  # they too are rows where a window may start


def test_a_future_goal_is_uniform_over_the_rest_of_the_episode_but_for_its_ends():
    count, left = 40_000, 9
    found, counts = np.unique(ahead(jax.random.key(2), jnp.full(count, left), goals.DEFAULT), return_counts=True)
    np.testing.assert_array_equal(found, np.arange(1, left + 1))
    expected = np.full(left, count / (left - 1))
    expected[[0, -1]] /= 2
    assert abs(chi_square(counts, expected)) < 4
    np.testing.assert_array_equal(ahead(jax.random.key(2), jnp.ones(50, int), goals.DEFAULT), np.ones(50))


def test_a_geometric_goal_lies_as_far_ahead_as_the_discount_says_and_never_beyond_the_episode():
    law, count, left = Goals(future_law="geometric", geometric_discount=0.9), 40_000, 15
    found = np.asarray(ahead(jax.random.key(3), jnp.full(count, left), law))
    assert (found.min(), found.max()) == (1, left)
    assert abs(found.mean() - (1 - 0.9**left) / 0.1) < 4 * found.std() / np.sqrt(count)
    assert abs(np.mean(found == 1) - 0.1) < 4 * np.sqrt(0.09 / count)
    at_once = ahead(jax.random.key(3), jnp.full(9, left), dataclasses.replace(law, geometric_discount=0.0))
    np.testing.assert_array_equal(at_once, np.ones(9))


def test_rows_beyond_what_a_float_can_count_are_told_apart():
    start, goal = draw(hindsight(9, first=2**26 + 1), jax.random.key(4), 4000, 2, Goals(current=0.0, future=1.0))
    assert np.unique(start - 2**26).tolist() == list(range(1, 9))
    assert np.unique(goal - 2**26).tolist() == list(range(2, 11))
    assert (goal > start).all()


def test_probabilities_are_numbers_of_the_program():
    traces = []

    @jax.jit
    def frequencies(law):
        traces.append(law)
        start, goal = goals.draw(hindsight(*[25] * 50), jax.random.key(5), 20_000, LENGTH, law)
        return (start == goal).mean(), ((goal > start) & (goal <= start // 26 * 26 + 25)).mean()

    shares = ((1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.3, 0.7))
    found = [frequencies(loop.on_device(Goals(current, future))) for current, future in shares]
    assert len(traces) == 1
    np.testing.assert_allclose(found, [(1, 0), (0, 1), (0, 0.01), (0.3, 0.7)], atol=0.015)


@pytest.mark.parametrize(
    ("law", "message"),
    [
        (Goals(current=-0.1), "Goals.current = -0.1: must be in [0, 1]"),
        (Goals(future=1.5), "Goals.future = 1.5: must be in [0, 1]"),
        (Goals(current=0.6, future=0.6), "Goals.current = 0.6 and Goals.future = 0.6: must add up to at most 1"),
        (Goals(geometric_discount=1.0), "Goals.geometric_discount = 1: must be below 1"),
        (Goals(current=jnp.array([0.2, 1.2])), "Goals.current = [0.2 1.2]: must be in [0, 1]"),
    ],
)
def test_probabilities_out_of_range_are_refused(law, message):
    with pytest.raises(UserError) as error:
        ranges.check(law)
    assert str(error.value).startswith(message)


def test_every_law_that_adds_up_is_accepted():
    for law in (Goals(), Goals(0.0, 0.0), Goals(1.0, 0.0), Goals(0.7, 0.3), Goals(jnp.float32(0.9), jnp.float32(0.1))):
        ranges.check(law)


# Rings


def test_data_in_hindsight_and_replay_act_as_one_buffer():
    dataset = data(11, 11)
    nothing = np.zeros(22, bool)
    offline = from_dataset(dataset, nothing, nothing, goals=dataset.observations)
    replay = from_dataset(data(22, entries=2), np.full(22, 7.0), nothing)
    replay = dataclasses.replace(replay, obs=replay.obs + 100)
    batch = jax.jit(ring.windows, static_argnums=(2, 3))((offline, replay), jax.random.key(0), 2000, 3, Goals(0.0, 1.0))
    old = np.asarray(batch.obs[:, 0]) < 100
    assert abs(old.mean() - 0.5) < 0.05
    goal = batch.obs[old, 1]
    assert (goal > batch.obs[old, 0]).all() and (goal < 22).all()
    np.testing.assert_array_equal(batch.obs[~old, 0], batch.obs[~old, 1])  # what the environment showed
    np.testing.assert_array_equal(batch.rewards[~old], 7 * batch.valid[~old])
    np.testing.assert_array_equal(batch.terminated[~old], False)
    np.testing.assert_array_equal(batch.rewards[old].sum(axis=1), batch.terminated[old])


def test_drawing_windows_copies_no_data():
    dataset = data(*[1001] * 100)
    nothing = np.zeros(len(dataset.terminals), bool)
    offline = from_dataset(dataset, nothing, nothing, goals=dataset.observations)
    program = jax.jit(ring.windows, static_argnums=(2, 3)).lower((offline,), jax.random.key(0), 64, 5).compile()
    assert program.memory_analysis().temp_size_in_bytes < offline.obs.nbytes / 10
