"""Facts about jaxrl.replay.loading: what of a dataset fits an environment, and which rewards and goals it is given."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from jaxrl.agents import BC
from jaxrl.agents.parts import Windows
from jaxrl.data.files import Dataset
from jaxrl.errors import UserError
from jaxrl.replay import loading
from jaxrl.replay.ring import windows
from jaxrl.replay.weighting import Weighting
from jaxrl.runs import driver
from jaxrl.runs.config import Config
from jaxrl.runs.datasets import load_data
from jaxrl.training.schedule import Schedule
from jaxrl.types import Leaf, Spec
from tests import tiny
from tests.known import with_fields


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
    agent = with_fields(BC(), chunk=2, backup=2, hidden=(8,), batch=16, steps=2)
    config = Config(
        agent,
        env=tiny.ENV,
        schedule=schedule,
        data=str(tiny.write_data(tmp_path / "data.npz")),
        reward_scale=0.5,
        reward_shift=2.0,
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
        driver.prepare(Config(BC(Windows(chunk, chunk))), env, dataset)
    with pytest.raises(UserError, match="its longest episode has 5 steps, the agent's windows have 6: lower agent"):
        driver.prepare(Config(BC(Windows(6, 6))), env, dataset)


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


# Dicts of vectors and images


LEAVES = (Leaf("state", (2,)), Leaf("camera", (2, 3, 3), "uint8"))


class Seeing:
    """An environment that observes a vector and an image, as far as data are concerned."""

    spec = Spec(LEAVES, action=2)


class Pixels:
    """One that observes a camera, and whose goals are pictures."""

    spec = Spec((Leaf("camera", (2, 3, 3), "uint8"), Leaf("goal", (2, 3, 3), "uint8")), action=2, goal=18)


class Reaching:
    """One whose goals are two numbers."""

    spec = Spec((*LEAVES, Leaf("goal", (2,))), action=2, goal=2)


class ToldReaching(Reaching):
    """One that says what its states are as goals."""

    def goal_of(self, states):
        return 10 * states["state"]


def seen(*lengths: int, **changes) -> Dataset:
    """Returns episodes of so many rows, whose row i holds i everywhere."""
    plain = data(*lengths)
    ids = np.arange(sum(lengths))
    image = np.broadcast_to(ids[:, None, None, None], (len(ids), 2, 3, 3)).astype(np.uint8)
    observations = {"state": plain.observations, "camera": image, "unseen": ids[:, None].astype(np.float32)}
    zero = np.zeros(len(ids), np.float32)
    return dataclasses.replace(plain, observations=observations, rewards=zero, **changes)


def test_a_dict_of_observations_is_laid_out_with_its_dtypes_and_without_what_is_not_observed():
    dataset = seen(4, 5)
    check_fits(dataset, Seeing())
    ring = loading.to_ring(dataset, Seeing())
    assert {name: (x.shape, x.dtype.name) for name, x in ring.obs.items()} == {
        "state": ((1, 10, 2), "float32"),
        "camera": ((1, 10, 2, 3, 3), "uint8"),
    }
    batch = windows((ring,), jax.random.key(0), 50, 2)
    np.testing.assert_array_equal(batch.obs["camera"][:, 0, 0, 0], batch.obs["state"][:, 0].astype(int))
    abstract = loading.abstract_ring(loading.sizes_of(dataset), Seeing())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(lambda x: (x.shape, x.dtype), ring)


@pytest.mark.parametrize("env", [Reaching(), ToldReaching()])
def test_goals_of_dicts_are_drawn_in_hindsight(env):
    reps = np.repeat(10.0 * np.arange(22)[:, None], 2, axis=1)
    dataset = seen(11, 11, extra={"oracle_reps": reps})
    dataset.observations["goal"] = np.full((22, 2), 7e5, np.float32)  # what was pursued, which does not count
    check_fits(dataset, env)
    laid = loading.to_ring(dataset, env)
    assert laid.hindsight is not None and set(laid.obs) == {"state", "camera"}
    np.testing.assert_array_equal(laid.hindsight.goals[:22], reps)
    batch = windows((laid,), jax.random.key(0), 50, 2)
    assert set(batch.obs) == set(batch.next_obs) == {"state", "camera", "goal"}
    assert set(np.unique(batch.obs["goal"])) <= set(10.0 * np.arange(22))
    abstract = loading.abstract_ring(loading.sizes_of(dataset), env)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(lambda x: (x.shape, x.dtype), laid)


def test_a_file_of_images_alone_is_the_only_array_that_is_observed_and_its_own_goals():
    dataset = dataclasses.replace(seen(11), observations=seen(11).observations["camera"])
    check_fits(dataset, Pixels())
    laid = loading.to_ring(dataset, Pixels())
    assert laid.hindsight is not None and laid.hindsight.goals is None
    batch = windows((laid,), jax.random.key(0), 50, 2)
    assert batch.obs["camera"].dtype == batch.obs["goal"].dtype == jnp.uint8
    assert batch.obs["goal"].shape == (50, 2, 3, 3)


@pytest.mark.parametrize(
    ("dataset", "env", "message"),
    [
        (
            data(4, entries=3),
            Seeing(),
            "has no column 'observations/state', which the environment observes: found obse",
        ),
        (
            dataclasses.replace(seen(4), observations={"state": np.zeros((4, 3), np.float32)}),
            Seeing(),
            r"a row of column 'observations/state' is float32\[3\], the environment has float32\[2\]",
        ),
        (
            dataclasses.replace(seen(4), observations=np.zeros((4, 18), np.float32)),
            Pixels(),
            r"a row of column 'observations' is float32\[18\], the environment has uint8\[2, 3, 3\]",
        ),
        (
            seen(4),
            Plain(),
            r"observations are observations/camera \[2, 3, 3\]; observations/state \[2\]; .* needed: the ",
        ),
        (
            dataclasses.replace(seen(4), observations=seen(4).observations["camera"]),
            Plain(),
            r"observations are observations \[2, 3, 3\], vectors of numbers are needed: the environment has 2",
        ),
        (seen(4), Reaching(), r"no column 'oracle_reps' \[rows, 2\], and the environment no goal_of"),
    ],
)
def test_arrays_that_an_environment_does_not_observe_so_are_named(dataset, env, message):
    with pytest.raises(UserError, match=message):
        check_fits(dataset, env)


def test_trajectories_are_weighted_by_the_vectors_of_a_dict():
    dataset = seen(4, 5, 6)
    rewards = np.random.default_rng(0).normal(size=15).astype(np.float32)
    dataset = dataclasses.replace(dataset, rewards=rewards)
    side_by_side = dataclasses.replace(dataset, observations=dataset.observations["state"])
    law, names = Weighting("advantage"), ("state", "camera")
    chosen = dataclasses.replace(dataset, observations={name: dataset.observations[name] for name in names})
    jax.tree.map(np.testing.assert_array_equal, loading.weigh(chosen, law), loading.weigh(side_by_side, law))
    pictures = dataclasses.replace(dataset, observations={"camera": dataset.observations["camera"]})
    assert loading.weigh(pictures, Weighting("return")) is not None
    with pytest.raises(UserError, match="regresses returns on observations, which are images alone"):
        loading.weigh(pictures, law)


# Further columns


def test_further_columns_are_kept_where_an_agent_asks_for_them():
    ids = np.arange(9)
    dataset = seen(4, 5, extra={"log_density": -1.0 * ids, "chain": np.stack([ids, ids + 7], 1), "other": ids})
    columns = ("log_density", "chain")
    ring = loading.to_ring(dataset, Seeing(), columns=columns)
    assert {name: (x.shape, x.dtype.name) for name, x in ring.extra.items()} == {
        "log_density": ((1, 10), "float32"),
        "chain": ((1, 10, 2), "int32"),
    }
    batch = windows((ring,), jax.random.key(0), 50, 2)
    np.testing.assert_array_equal(batch.extra["chain"][:, 1], batch.obs["state"][:, 0].astype(int) + 7)
    np.testing.assert_array_equal(batch.extra["log_density"], -batch.obs["state"][:, 0])
    abstract = loading.abstract_ring(loading.sizes_of(dataset), Seeing(), columns=columns)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(lambda x: (x.shape, x.dtype), ring)


@pytest.mark.parametrize("name", ["log_densty", "rewards", "observations/state"])
def test_a_column_that_is_not_there_is_named(name):
    dataset = seen(4, extra={"log_density": np.zeros(4)})
    for made in (loading.to_ring, lambda data, env, **how: loading.abstract_ring(loading.sizes_of(data), env, **how)):
        with pytest.raises(
            UserError, match=f"a column that it lacks: unknown column '{name}': .*known are log_density"
        ):
            made(dataset, Seeing(), columns=(name,))
