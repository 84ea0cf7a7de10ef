"""Facts about jaxrl.replay.loading: what of a dataset fits an environment, and which rewards and goals it is given."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from jaxrl.agents import BC
from jaxrl.data.files import Dataset
from jaxrl.errors import UserError
from jaxrl.replay import loading
from jaxrl.replay.ring import windows
from jaxrl.runs import driver
from jaxrl.runs.config import Config
from jaxrl.runs.datasets import load_data
from jaxrl.training.schedule import Schedule
from jaxrl.types import Requirements, requirements
from tests import tiny


def data(*lengths: int, entries: int = 2, rewards: np.ndarray | None = None, **extra: np.ndarray) -> Dataset:
    """Returns episodes of so many rows, whose row i holds i everywhere."""
    ids = np.arange(sum(lengths), dtype=np.float32)
    actions = np.stack([ids / 1000, -ids / 1000], 1)
    ends = np.isin(ids + 1, np.cumsum(lengths))
    return Dataset(np.repeat(ids[:, None], entries, 1), actions, ends, rewards, extra=extra)


def check_fits(dataset: Dataset, env: object) -> None:
    loading.check_fits(loading.sizes_of(dataset), env)


# Rewards


class Plain:
    """An environment that cannot relabel."""

    spec = envs.make("point").spec


def test_rewards_are_scaled_then_shifted_where_they_count():
    dataset = data(4, 4, rewards=np.array([-1, 0, -1, 9, -1, -1, 0, 9], np.float32))
    ring = loading.to_ring(dataset, Plain(), scale=2.0, shift=3.0)
    np.testing.assert_array_equal(ring.rewards[0, :8], [1, 3, 1, 0, 1, 1, 3, 0])  # not at an episode's last row
    batch = windows((ring,), jax.random.key(0), 50, 5)
    np.testing.assert_array_equal(batch.rewards[batch.valid == 0], 0)


def test_rewards_of_the_environments_own_relabelling_are_shifted_too():
    near = np.where(np.arange(8) % 4 == 2, 0.8, -0.5).astype(np.float32)  # at the goal in an episode's third row
    dataset = dataclasses.replace(data(4, 4), observations=np.repeat(near[:, None], 2, 1))
    ring = loading.to_ring(dataset, envs.make("point"), shift=1.0)
    np.testing.assert_array_equal(ring.rewards[0, :8], [0, 1, 0, 0, 0, 1, 0, 0])
    np.testing.assert_array_equal(ring.terminated[0, :8], [0, 1, 0, 0, 0, 1, 0, 0])


def test_rewards_of_the_environment_enter_the_replay_shifted_and_are_reported_as_they_are(tmp_path):
    schedule = Schedule(
        offline_updates=0, online_steps=160, warmup_steps=80, envs=4, replay=400, utd=0.1, steps_per_epoch=80
    )
    agent = BC(chunk=2, hidden=(8,), batch_size=16, flow_steps=2)
    config = Config(
        agent, tiny.ENV, schedule, str(tiny.write_data(tmp_path / "data.npz")), reward_scale=0.5, reward_shift=2.0
    )
    with tiny.quick():
        env = tiny.make(tiny.ENV)
        run = driver.prepare(config, env, load_data(config, env))
        assert {float(r) for r in np.unique(run.data.rewards[run.data.valid])} <= {1.5, 2.0}
        carry = run.first()
        for index in range(2):
            carry, row = run.epoch(carry, index)
            replay = carry.world.replay
            assert {float(r) for r in np.unique(replay.rewards[replay.valid])} <= {1.5, 2.0}
            assert int(replay.valid.sum()) == 80 * (index + 1)
            episodes, solved = float(row["collect/episodes"]), float(row["collect/success"])
            assert episodes >= 4 and row["collect/return"] <= -1 and (solved > 0 or row["collect/return"] == -20)
    assert row["eval/return"] <= -1 and row["eval/return"] >= -20


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("reward_scale", 0.0, "reward_scale = 0.0: must be above 0"),
        ("reward_scale", float("nan"), "reward_scale = nan: must be finite"),
        ("reward_shift", float("inf"), "reward_shift = inf: must be finite"),
    ],
)
def test_a_scale_or_shift_out_of_range_is_refused(field, value, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(Config(BC()), **{field: value}).check()


def test_a_dataset_without_rewards_needs_an_environment_that_supplies_them():
    check_fits(data(4), envs.make("point"))
    with pytest.raises(UserError, match="has no rewards, and the environment cannot relabel it"):
        check_fits(data(4), Plain())


# Lengths


@pytest.mark.parametrize("goal", ["", "?goal_conditioned=true"])
def test_windows_longer_than_every_episode_are_refused(goal):
    dataset, env = data(4, 6, 3), envs.make(f"point{goal}")
    for chunk in (1, 5):
        driver.prepare(Config(BC(chunk=chunk)), env, dataset)
    with pytest.raises(UserError, match="its longest episode has 5 steps, the agent's windows have 6: lower agent"):
        driver.prepare(Config(BC(chunk=6)), env, dataset)


def test_the_windows_of_an_agent_are_what_it_requires_else_its_chunk():
    @dataclasses.dataclass
    class Plain:
        chunk: int

    @dataclasses.dataclass
    class Backing(Plain):
        backup: int

        def requires(self) -> Requirements:
            return Requirements(window=self.backup)

    assert (requirements(Plain(3)).window, requirements(Backing(5, 25)).window) == (3, 25)


# Goals


def test_goals_that_are_whole_observations_are_not_stored_again():
    env = envs.make("point?goal_conditioned=true")
    laid = loading.to_ring(data(11, 11, entries=2), env)
    assert laid.hindsight is not None and laid.hindsight.goals is None
    assert sorted(x.size for x in jax.tree.leaves(laid) if x.dtype == jnp.float32) == [23, 46, 46]
    np.testing.assert_array_equal(laid.hindsight.first, [0, 11])
    np.testing.assert_array_equal(laid.hindsight.steps, [10, 10])


class Sizes:
    """An environment of three state entries and two goal entries, as far as data are concerned."""

    spec = dataclasses.replace(envs.make("point").spec, observation=5, action=2, goal=2)


class Told(Sizes):
    """One that says what its states are as goals."""

    def goal_of(self, states):
        return states[:, 1:] * 10


def goals_in(dataset: Dataset, env: Sizes) -> np.ndarray:
    check_fits(dataset, env)
    laid = loading.to_ring(dataset, env)
    assert laid.hindsight is not None and laid.hindsight.goals is not None
    assert laid.obs.shape == (1, 23, 3)
    np.testing.assert_array_equal(laid.obs[0, :22, 0], np.arange(22))
    return np.asarray(laid.hindsight.goals)[:22]


@pytest.mark.parametrize("entries", [3, 5])  # states alone, or with the goal that was pursued
def test_goals_are_what_the_environment_says_or_else_what_the_file_says(entries):
    reps = np.stack([np.arange(22.0), -np.arange(22.0)], axis=1)
    dataset = data(11, 11, entries=entries, oracle_reps=reps)
    np.testing.assert_array_equal(goals_in(dataset, Sizes()), reps)
    np.testing.assert_array_equal(goals_in(dataset, Told()), np.repeat(10 * np.arange(22)[:, None], 2, 1))


def test_a_dataset_that_says_nothing_of_goals_is_refused():
    for dataset in (data(11, entries=3), data(11, entries=3, oracle_reps=np.zeros((11, 4)))):
        with pytest.raises(UserError, match=r"'oracle_reps' \[rows, 2\], and the environment no goal_of"):
            check_fits(dataset, Sizes())


def test_observations_of_another_size_are_refused_with_both_sizes_that_fit():
    with pytest.raises(UserError, match="observations have 4 entries, the environment has 5, 3 without the goal"):
        check_fits(data(11, entries=4), Told())


@pytest.mark.parametrize("body", ["maze", "pointmaze"])
@pytest.mark.simulator
def test_a_maze_says_its_states_as_goals_the_way_it_shows_goals(body):
    env = envs.make(f"{body}-medium?goal_conditioned=true")
    state = jax.jit(env.reset)(jax.random.key(0))
    shown = np.asarray(env.observe(state.physics, state.physics["qpos"]))
    np.testing.assert_array_equal(env.goal_of(shown[None, : env.spec.observation - 2])[0], shown[-2:])
