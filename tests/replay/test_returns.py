"""Facts about jaxrl.replay.returns, in rings that were filled step by step, and in datasets."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.data.files import Dataset
from jaxrl.replay import ring as rings
from jaxrl.replay.loading import from_dataset
from jaxrl.replay.returns import STRETCH, returns_to_go
from jaxrl.replay.ring import Ring, Steps
from tests.known import NARROW

pytestmark = pytest.mark.usefixtures("quick")

add = jax.jit(rings.add)


EPISODES = {  # rewards of its steps, how it ended, returns to go at discount 1/2
    "reached": ([0.0, 0.0, 8.0], "terminated", [2.0, 4.0, 8.0]),
    "constant, but ended": ([-1.0, -1.0], "terminated", [-1.5, -1.0]),
    "never reached": ([-3.0, -3.0, -3.0], "truncated", [-6.0, -6.0, -6.0]),
    "cut amid mixed rewards": ([1.0, 2.0, 4.0], "truncated", [3.0, 4.0, 4.0]),
    "one step, cut": ([5.0], "truncated", [10.0]),
    "ended as the clock ran out": ([2.0, 2.0], "both", [3.0, 2.0]),
    "broken": ([1.0, 1.0, 1.0], "broken", [math.nan, math.nan, math.nan]),
}


def played(ring: Ring, rewards: list[float], how: str = "") -> Ring:
    """Returns a ring of one lane after an episode of these rewards, or a part of it that is still under way."""
    for i, reward in enumerate(rewards):
        last = i == len(rewards) - 1 and how != ""
        said = {
            "terminated": last and how in ("terminated", "both"),
            "truncated": last and how in ("truncated", "both"),
            "valid": not (last and how == "broken"),
            "taken": True,
        }
        flags = {name: jnp.array([[flag]]) for name, flag in said.items()}
        ended = jnp.array([last])
        ring = add(ring, Steps(jnp.zeros((1, 2, 1)), jnp.zeros((1, 1, 1)), jnp.array([[reward]]), **flags, ended=ended))
    return ring


def found(ring: Ring, discount=0.5) -> np.ndarray:
    """Returns the returns to go of a lane's rows, the oldest first, the head's last."""
    aged = (int(ring.head[0]) - int(ring.count[0]) + np.arange(int(ring.count[0]) + 1)) % ring.valid.shape[1]
    return np.asarray(returns_to_go(ring, discount))[0, aged]


@pytest.mark.parametrize("names", [*([name] for name in EPISODES), list(EPISODES), list(EPISODES)[::-1]])
def test_returns_are_of_their_own_episode_and_go_on_forever_where_the_clock_cut_what_never_changed(names):
    ring, wanted = rings.empty(1, 40, NARROW), []
    for name in names:
        rewards, how, returns = EPISODES[name]
        ring, wanted = played(ring, rewards, how), [*wanted, *returns, math.nan]
    np.testing.assert_allclose(found(ring), [*wanted, math.nan], rtol=1e-6)


def test_nothing_is_known_of_an_episode_that_is_under_way_until_it_is_over():
    ring = played(played(rings.empty(1, 40, NARROW), [1.0, 4.0], "truncated"), [2.0, 2.0])
    np.testing.assert_allclose(found(ring), [3, 4, *[math.nan] * 4], rtol=1e-6)
    ring = played(ring, [16.0], "terminated")
    np.testing.assert_allclose(found(ring), [3, 4, math.nan, 7, 10, 16, math.nan, math.nan], rtol=1e-6)


@pytest.mark.parametrize("before", range(9))
def test_an_episode_may_lie_around_the_end_of_the_rows_and_the_head_hides_what_was_there(before):
    ring = played(rings.empty(1, 9, NARROW), [-7.0] * before, "truncated" if before else "")
    for name in ("never reached", "reached"):  # with their last rows as many as there are
        ring = played(ring, *EPISODES[name][:2])
    np.testing.assert_allclose(found(ring), [*[-6] * 3, math.nan, 2, 4, 8, math.nan, math.nan][-len(found(ring)) :])


def test_an_episode_whose_first_rows_are_overwritten_is_what_is_left():
    ring = played(rings.empty(1, 6, NARROW), [9.0, 9.0, 9.0, 1.0, 1.0, 1.0], "truncated")
    np.testing.assert_allclose(found(ring), [9.875, 1.75, 1.5, 1, math.nan, math.nan], rtol=1e-6)
    np.testing.assert_allclose(found(played(ring, [5.0])), [2, 2, 2, math.nan, math.nan, math.nan], rtol=1e-6)


def by_hand(ring: Ring, discount: float) -> np.ndarray:
    """Returns the same as `returns_to_go`, row by row in float64."""
    wanted = np.full(ring.valid.shape, np.nan)
    rewards, valid, terminated, truncated = map(np.asarray, (ring.rewards, ring.valid, ring.terminated, ring.truncated))
    for lane in range(len(wanted)):
        episode: list[int] = []
        for age in range(int(ring.count[lane])):
            row = (int(ring.head[lane]) - int(ring.count[lane]) + age) % wanted.shape[1]
            if not valid[lane, row]:
                episode = []
                continue
            episode.append(row)
            if terminated[lane, row] or truncated[lane, row]:
                earned = rewards[lane, episode].astype(np.float64)
                total = earned[0] / (1 - discount) if len(set(earned)) == 1 and not terminated[lane, row] else 0.0
                for at, reward in zip(episode[::-1], earned[::-1], strict=True):
                    total = wanted[lane, at] = reward + discount * total
                episode = []
    return wanted


@pytest.mark.parametrize("rows", [STRETCH - 1, STRETCH, 2 * STRETCH + 50])
def test_the_rows_of_several_lanes_are_worth_what_the_definition_says(rows):
    rng, lanes = np.random.default_rng(rows), 3
    shape = (lanes, rows)
    fields = {"terminated": rng.random(shape) < 0.03, "truncated": rng.random(shape) < 0.06}
    ring = dataclasses.replace(
        rings.empty(lanes, rows, NARROW),
        rewards=jnp.asarray(rng.choice([-1.0, 2.0], shape, p=[0.96, 0.04]), jnp.float32),
        valid=jnp.asarray(rng.random(shape) < 0.97),
        head=jnp.array([rows - 1, 5, rows // 2]),
        count=jnp.array([rows - 1, 5, rows - 1]),
        **{name: jnp.asarray(flag) for name, flag in fields.items()},
    )
    ring = dataclasses.replace(ring, valid=ring.valid.at[1, 5:].set(False))  # never written
    wanted = by_hand(ring, 0.9)
    np.testing.assert_allclose(returns_to_go(ring, 0.9), wanted, rtol=1e-5, atol=1e-5)
    assert np.isnan(wanted).any() and np.isclose(wanted, -10).sum() > 20 and np.nanmax(wanted) > -6


def dataset_of(rewards: np.ndarray, ended: np.ndarray) -> Ring:
    """Returns a dataset of one episode, whose last row closes it."""
    rows = len(rewards)
    data = Dataset(np.zeros((rows, 1), np.float32), np.zeros((rows, 1), np.float32), np.arange(rows) == rows - 1)
    return from_dataset(data, rewards, ended)


def test_an_antmaze_that_never_sees_its_goal_is_worth_five_hundred_below_nothing():
    returns = returns_to_go(dataset_of(np.full(1001, -5.0, np.float32), np.zeros(1001, bool)), 0.99)
    np.testing.assert_allclose(returns[0, :1000], np.full(1000, -500), rtol=1e-5)


def test_a_long_return_is_the_sum_that_defines_it_also_where_nothing_is_discounted():
    rewards = np.random.default_rng(0).normal(size=(301,)).astype(np.float32)
    ring = dataset_of(rewards, np.zeros(301, bool))
    for discount in (1.0, 0.9, 0.0):
        wanted = [rewards[t:300] @ discount ** np.arange(300 - t) for t in range(300)]
        np.testing.assert_allclose(returns_to_go(ring, discount)[0, :300], wanted, rtol=1e-4, atol=1e-5)
    alike = dataset_of(np.ones(4), np.zeros(4, bool))
    np.testing.assert_allclose(returns_to_go(alike, 1.0)[0], [3, 2, 1, math.nan, math.nan])


def test_what_follows_a_row_that_solved_the_task_is_an_episode_of_its_own():
    ring = dataset_of(np.array([-1.0, 0.0, -1.0, -1.0, 9.0]), np.arange(5) == 1)
    np.testing.assert_allclose(returns_to_go(ring, 0.5)[0, :4], [-1, 0, -2, -2])
