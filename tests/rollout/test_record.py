"""A recorded dataset is what the behaviour did: its actions and what followed, whole episodes, the same every time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs.point import Bandit, Point
from jaxrl.data import files
from jaxrl.errors import UserError
from jaxrl.rollout import record
from jaxrl.types import EnvState, Spec
from tests import tiny


@pytest.fixture(autouse=True)
def quick():
    with tiny.quick():
        yield


@dataclasses.dataclass(frozen=True)
class Wave:
    """A behaviour that depends on observation, memory (how often it acted) and level, and on nothing else."""

    phase: float

    def start(self, state: EnvState, key: jax.Array) -> jax.Array:
        return jnp.zeros(())

    def act(self, memory: jax.Array, state: EnvState, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return memory + 1, jnp.sin(3 * state.obs + memory + self.phase)


@dataclasses.dataclass(frozen=True, eq=False)
class Waved(Point):
    horizon: int = 7
    speed: float = 0.1

    def behaviour(self, level: str) -> Wave:
        assert self.exploring  # it is the variant for data that acts
        return Wave(float(level))


@dataclasses.dataclass(frozen=True, eq=False)
class Ends(Point):
    """A point that cannot be explored, whose episodes end at the goal."""

    horizon: int = 30
    tolerance: float = 0.75
    explore = None


@pytest.mark.parametrize(
    ("steps", "horizon", "expected"),
    [
        (1, 50, (50, 1)),
        (50, 50, (50, 1)),
        (51, 50, (50, 2)),
        (200_000, 200, (800, 250)),
        (1_000_000, 200, (4000, 250)),
        (1_000_000, 1, (3907, 256)),
        (1_000_000, 1000, (4000, 250)),
    ],
)
def test_environments_record_whole_episodes_side_by_side_and_no_more_than_needed(steps, horizon, expected):
    each, lanes = record.lanes_of(steps, horizon)
    assert (each, lanes) == expected
    assert each % horizon == 0 and lanes <= record.LANES
    assert steps <= each * lanes < steps + each


@pytest.mark.parametrize("steps", [1, 70, 3000])
def test_episodes_last_for_the_horizon_and_are_of_the_behaviour(steps):
    env = Waved()
    dataset = record.record(env, "0.5", steps, seed=3)
    first, last = files.episodes(dataset)
    assert set(last - first) == {env.horizon}
    each, lanes = record.lanes_of(steps, env.horizon)
    assert len(first) == each * lanes // env.horizon

    clock = (np.arange(len(dataset.terminals)) - np.repeat(first, last - first + 1))[:, None]
    taken = ~dataset.terminals
    np.testing.assert_allclose(
        dataset.actions[taken], np.sin(3 * dataset.observations + clock + 0.5)[taken], rtol=0, atol=2e-6
    )
    moved = np.clip(dataset.observations[:-1] + np.float32(env.speed) * dataset.actions[:-1], -1, 1)
    np.testing.assert_allclose(dataset.observations[1:][taken[:-1]], moved[taken[:-1]], rtol=0, atol=1e-6)
    # rewards and masks are of the step that leaves the row, for the task although it does not end the episode
    reward, _ = env.relabel(dataset.observations[:-1], dataset.actions[:-1], dataset.observations[1:])
    np.testing.assert_array_equal(dataset.rewards[:-1][taken[:-1]], np.asarray(reward)[taken[:-1]])
    assert dataset.masks.all()


def test_episodes_start_all_over_the_box():
    dataset = record.record(Waved(), "0", 3000, seed=0)
    begins = dataset.observations[files.episodes(dataset)[0]]
    counts, _, _ = np.histogram2d(*begins.T, bins=2, range=[[-1, 1], [-1, 1]])
    assert (counts > 70).all()  # 429 starts, 107 expected in each quarter
    assert len(np.unique(begins, axis=0)) > 0.8 * len(begins)


def test_an_episode_that_ends_by_itself_is_marked_and_the_last_is_cut_by_the_clock():
    dataset = record.record(Ends(), "good", 600, seed=0)
    first, last = files.episodes(dataset)
    assert (last - first).sum() == 600
    ended = dataset.masks[last - 1] == 0
    assert dataset.masks[~dataset.terminals].sum() == 600 - ended.sum()
    distance = np.abs(dataset.observations[last] - 0.8).max(axis=1)
    np.testing.assert_array_equal(ended, distance <= Ends().tolerance)
    assert (dataset.rewards[last - 1] == np.where(ended, 0, -1)).all()
    assert 8 <= (~ended).sum() <= 20  # at most one under way in each of the 20 environments
    assert ended.sum() > 40
    # a start in [-1, 0]^2 follows each end
    assert (dataset.observations[first] <= 0).all()


def test_the_bandits_episodes_are_one_step_each():
    dataset = record.record(Bandit(), "good", 1000, seed=0)
    np.testing.assert_array_equal(dataset.terminals, np.arange(len(dataset.terminals)) % 2 == 1)
    actions = dataset.actions[~dataset.terminals][:, 0]
    assert (dataset.masks[~dataset.terminals] == 0).all() and len(actions) >= 1000
    assert (np.abs(np.abs(actions) - 0.6) <= 0.2 + 1e-6).all()
    assert 0.45 < (actions > 0).mean() < 0.55


def test_equal_seeds_give_equal_data_and_others_do_not():
    arguments = record.arguments(Point(), "mixed", 500)
    one, other = (record.to_dataset(record.recording(*arguments, jax.random.key(seed))).digest for seed in (1, 2))
    assert record.record(Point(), "mixed", 500, seed=1).digest == one != other


def test_any_environment_can_act_at_random_and_no_more():
    class Bare:
        spec, horizon = Spec(2, 2), 5
        reset, step = Point(horizon=5).reset, Point(horizon=5).step

    dataset = record.record(Bare(), "random", 5000, seed=0)
    actions = dataset.actions[~dataset.terminals]
    assert np.abs(actions).max() <= 1
    np.testing.assert_allclose(actions.mean(axis=0), 0, atol=0.03)  # 3.7 standard errors
    np.testing.assert_allclose(actions.var(axis=0), 1 / 3, atol=0.015)
    with pytest.raises(UserError, match=r"^behaviour = 'good': Bare has no scripted behaviour, only 'random'"):
        record.record(Bare(), "good", 10, seed=0)
