"""OGBench's own simulators: sizes, rewards and when they are paid, goals, repeatable episodes, recorded data."""

import contextlib
import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from envs.ogbench_simulators import Simulator
from jaxrl import cli, system
from jaxrl.data import files
from jaxrl.errors import UserError
from jaxrl.rollout import host
from jaxrl.types import HostEnv, Spec, pytree
from tests import tiny

installed = importlib.util.find_spec("ogbench") is not None
needs_ogbench = pytest.mark.skipif(not installed, reason="jaxrl[ogbench] is not installed")

POINT, CUBE = "ogbench/pointmaze-medium-navigate", "ogbench/cube-single-play"


@pytest.fixture(autouse=True)
def two_workers(monkeypatch):
    monkeypatch.setattr(system, "cores", lambda: 2)


def built(env, picture=0):
    return env.builder(picture)()


# Names


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ogbench", None)
    with pytest.raises(UserError, match=r"needs the package 'ogbench': pip install 'jaxrl\[ogbench\]'"):
        envs.make(f"{CUBE}-v0")


@needs_ogbench
@pytest.mark.parametrize(
    ("name", "spec", "horizon", "tasks"),
    [
        (f"{POINT}-singletask-v0", Spec(2, 2), 1000, 0),
        (f"{POINT}-singletask-task4-v0", Spec(2, 2), 1000, 0),
        (f"{POINT}-v0", Spec(4, 2, 2), 1000, 5),
        ("ogbench/antmaze-giant-stitch-v0", Spec(58, 8, 29), 1000, 5),
        ("ogbench/antmaze-medium-explore-oraclerep-v0", Spec(31, 8, 2), 1000, 5),
        (f"{CUBE}-v0", Spec(56, 5, 28), 200, 5),
        (f"{CUBE}-oraclerep-v0", Spec(31, 5, 3), 200, 5),
        ("ogbench/puzzle-3x3-noisy-singletask-task1-v0", Spec(55, 5), 500, 0),
    ],
)
def test_sizes(name, spec, horizon, tasks):
    env = envs.make(name)
    assert (env.spec, env.horizon, env.tasks) == (spec, horizon, tasks)
    assert isinstance(env, HostEnv) and env == envs.make(name) and hash(env) == hash(envs.make(name))
    assert hasattr(env, "relabel") == (tasks == 0) and hasattr(env, "goal_of") == ("oraclerep" in name)


@needs_ogbench
@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("ogbench/cube-singel-play-v0", "ogbench/cube-single-play-v0"),
        ("ogbench/pointmaze-medium-v0", "ogbench/pointmaze-medium-stitch-v0"),
        ("ogbench/visual-cube-single-play-v0", "ogbench/cube-single-play-v0"),
        ("ogbench/scene-play-singletask-task6-v0", "ogbench/scene-play-singletask-task5-v0"),
    ],
)
def test_an_unknown_name_leads_to_the_nearest(name, near):
    with pytest.raises(UserError, match=f"did you mean '{near}'"):
        envs.make(name)


# Rewards and goals


@needs_ogbench
def test_the_maze_pays_as_it_relabels_by_the_state_before_the_step():
    env = envs.make(f"{POINT}-singletask-task5-v0")
    simulator = built(env)
    obs, _ = simulator.reset(seed=0)
    maze = simulator.env.unwrapped
    seen, rewards, over = [obs], [], False
    while not over:
        way = maze.get_oracle_subgoal(maze.get_xy(), maze.cur_goal_xy)[0] - obs
        obs, reward, over, truncated, info = simulator.step(way / np.linalg.norm(way))
        seen, rewards = [*seen, obs], [*rewards, reward]
        assert not truncated and info["success"] == over
    seen = np.array(seen, np.float32)
    paid, ended = env.relabel(seen[:-1], np.zeros((len(rewards), 2)), seen[1:])
    assert paid.tolist() == rewards == [-1.0] * (len(rewards) - 1) + [0.0]
    assert ended.tolist() == [False] * (len(rewards) - 1) + [True]
    # the goal was reached one step before it was paid for
    distance = np.linalg.norm(seen - maze.cur_goal_xy, axis=1)
    assert (np.flatnonzero(distance <= 1.0)[0], len(rewards)) == (len(seen) - 2, len(seen) - 1)


@needs_ogbench
def test_the_arm_pays_as_it_relabels_and_resets_are_repeatable():
    env = envs.make(f"{CUBE}-singletask-task3-v0")
    simulator = built(env)
    first, _ = simulator.reset(seed=3)
    random = np.random.default_rng(0).uniform(-1, 1, (6, 5))
    seen, rewards = [first], []
    for t, action in enumerate(random):
        if t == 4:  # by sleight of hand the cube is where it should be
            scene = simulator.env.unwrapped
            scene._data.joint("object_joint_0").qpos[:3] = scene._data.mocap_pos[0]
            seen[-1] = scene.compute_observation()
        obs, reward, *_ = simulator.step(action)
        seen, rewards = [*seen, obs], [*rewards, reward]
    paid, ended = env.relabel(np.array(seen[:-1], np.float32), random, None)
    assert paid.tolist() == rewards == [-1, -1, -1, -1, 0, rewards[5]] and ended[4] and not ended[:4].any()
    again, _ = simulator.reset(seed=3)
    step = simulator.step(random[0])[0]
    assert (again == first).all() and (step == seen[1]).all()
    assert (simulator.reset(seed=4)[0] != first).any()
    fresh = built(env)
    assert (fresh.reset(seed=3)[0] == first).all() and (fresh.step(random[0])[0] == seen[1]).all()


@needs_ogbench
@pytest.mark.parametrize("name", [f"{CUBE}-v0", "ogbench/antmaze-medium-navigate-v0"])
def test_goals_are_observed_and_repeatable(name):
    env = envs.make(name)
    simulator, goal = built(env), env.spec.goal

    def start(seed, task):
        np.random.seed(0)  # as a worker does: the mazes draw from it
        return simulator.reset(seed=seed, options={"task_id": task})[0]

    one, again, other, elsewhere = start(1, 2), start(1, 2), start(2, 2), start(1, 3)
    assert one.shape == (env.spec.observation,) and (one == again).all()
    assert (one[-goal:] != other[-goal:]).any() and (one[-goal:] != elsewhere[-goal:]).any()
    after = simulator.step(np.zeros(env.spec.action))[0]
    assert (after[-goal:] == elsewhere[-goal:]).all() and (after[:goal] != elsewhere[:goal]).any()


@needs_ogbench
@pytest.mark.parametrize("thing", ["scene", "puzzle-4x4", "antsoccer-arena"])
def test_goals_and_rewards_are_read_from_observations(thing):
    """What OGBench computes of its files' other columns is computed here of the observations."""
    from ogbench.relabel_utils import add_oracle_reps, relabel_dataset

    from envs.ogbench import _quiet, _simulator

    kind = "stitch" if "soccer" in thing else "play"
    env = envs.make(f"ogbench/{thing}-{kind}-oraclerep-v0")
    simulator = built(env)
    rows, states = [], []
    random = np.random.default_rng(0)
    for task in range(1, 6):
        states.append(simulator.reset(seed=task, options={"task_id": task})[0])
        scene = simulator.env.unwrapped
        pressed = {"button_states": scene._cur_button_states.copy()} if hasattr(scene, "_cur_button_states") else {}
        rows.append({"qpos": scene.unwrapped.data.qpos.copy()} | pressed)
        assert env.goal_of(states[-1][None, : -env.spec.goal]).shape == (1, env.spec.goal)
        states.append(simulator.step(random.uniform(-1, 1, env.spec.action))[0])
        pressed = {"button_states": scene._cur_button_states.copy()} if pressed else {}
        rows.append({"qpos": scene.unwrapped.data.qpos.copy()} | pressed)
    states = np.array(states, np.float32)[:, : -env.spec.goal]
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    expected = dict(columns)
    add_oracle_reps(env.simulator, _simulator(env.simulator, True).env, expected)
    np.testing.assert_allclose(env.goal_of(states), expected["oracle_reps"], atol=1e-5)
    single = envs.make(f"ogbench/{thing}-{kind}-singletask-task2-v0")
    with _quiet():
        relabel_dataset(single.simulator, _simulator(single.simulator, False).env, columns)
    rewards, ended = single.relabel(states, None, None)
    assert rewards.tolist() == columns["rewards"].tolist() and len(set(rewards)) >= (1 if "soccer" in thing else 2)
    assert (ended == (columns["masks"] == 0)).all()
    sparse = envs.make(f"ogbench/{thing}-{kind}-singletask-task2-v0?sparse=true")
    assert sparse.relabel(states, None, None)[0].tolist() == [0.0 if over else -1.0 for over in ended]


def test_a_sparse_reward_is_less_by_one_until_all_is_in_its_place():
    paid = iter([-3.0, -1.0, 0.0])
    simulator = types.SimpleNamespace(step=lambda action: (np.zeros(1), next(paid), False, False, {}))
    simulator.unwrapped = types.SimpleNamespace(action_space=None)
    simulator = Simulator(simulator, goal=False, sparse=True)
    assert [simulator.step(np.zeros(1))[1] for _ in range(3)] == [-1, -1, 0]


@needs_ogbench
def test_the_option_sparse_reaches_the_simulator_and_is_of_single_tasks_only():
    thing, rewards = "ogbench/puzzle-3x3-play", []
    for option in ("", "?sparse=false", "?sparse=true"):
        simulator = built(envs.make(f"{thing}-singletask-task3-v0{option}"))
        simulator.reset(seed=0)
        rewards.append(simulator.step(np.zeros(5))[1])
    assert rewards[0] == rewards[1] < -1 == rewards[2]
    with pytest.raises(UserError, match=f"'{thing}-v0': sparse rewards are available for single tasks only"):
        envs.make(f"{thing}-v0?sparse=true")
    with pytest.raises(UserError, match="option sparse is 'yes', must be"):
        envs.make(f"{thing}-singletask-v0?sparse=yes")


# Episodes and data


@pytree
class Still:
    """An agent that does nothing."""

    chunk: int = 50

    def act(self, state, obs, key, *, greedy=False):
        return jnp.zeros((len(obs), self.chunk, 2))


@needs_ogbench
def test_an_evaluation_goes_through_the_tasks():
    env = envs.make(f"{POINT}-v0")
    simulators = host.Simulators(env)
    with contextlib.closing(simulators):
        episodes = host.evaluate(simulators, Still(), (), jax.random.key(0), 6)
        obs = simulators.begin("more", np.arange(6), np.zeros(6, np.int64), np.arange(6))
    assert episodes.lengths.tolist() == [1000] * 6 and not episodes.success.any() and not episodes.broken.any()
    assert episodes.track.shape == (1001, 4) and (episodes.track[:, 2:] == episodes.track[0, 2:]).all()
    corners = np.round(obs / 4).astype(int).tolist()  # starts and goals of OGBench's five tasks, in cells of 4
    assert corners == [[0, 0, 5, 5], [0, 5, 5, 0], [2, 4, 1, 3], [4, 5, 0, 5], [5, 1, 0, 0], [0, 0, 5, 5]]


@needs_ogbench
def test_a_recorded_maze(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["collect", f"{POINT}-v0", "--steps=300", "--seed=1"]) == 0
    dataset = files.load("datasets/pointmaze-medium-navigate-v0.npz")
    assert dataset.digest in capsys.readouterr().out
    assert dataset.observations.shape == (301, 2) and dataset.terminals.nonzero()[0].tolist() == [300]
    assert (dataset.extra["qpos"] == dataset.observations).all()
    # a step is the action's by 0.2, where no wall is in the way, and it leads to other cells
    moved = np.diff(dataset.observations, axis=0)
    free = np.abs(moved - 0.2 * dataset.actions[:-1]).max(axis=1) < 1e-3
    assert free.mean() > 0.5
    assert len(np.unique(np.round(dataset.observations / 4), axis=0)) > 4
    monkeypatch.setattr(system, "cores", lambda: 1)
    twice = ["--seed=1", "--steps=1300", "--behaviour=navigate?noise=0"]
    assert cli.main(["collect", f"{POINT}-v0", "--out=calm.npz", *twice]) == 0
    monkeypatch.setattr(system, "cores", lambda: 3)
    assert cli.main(["collect", f"{POINT}-v0", "--out=again.npz", *twice]) == 0
    calm = files.load("calm.npz")
    assert calm.digest == files.load("again.npz").digest and calm.terminals.sum() == 2
    np.testing.assert_allclose(np.linalg.norm(calm.actions, axis=1), 1, atol=2e-3)


@needs_ogbench
def test_a_recorded_arm(tmp_path, monkeypatch):
    from ogbench import load_dataset

    monkeypatch.chdir(tmp_path)
    assert cli.main(["collect", f"{CUBE}-v0", "--steps=120"]) == 0
    path = tmp_path / "datasets" / "cube-single-play-v0.npz"
    theirs, ours = load_dataset(path, add_info=True), files.load(path)
    assert theirs["observations"].shape == (120, 28) and theirs["qpos"].shape == (120, 21)
    assert theirs["terminals"].nonzero()[0].tolist() == [119]
    cube = ours.observations[:, 19:22] / 10 + [0.425, 0, 0]
    np.testing.assert_allclose(cube, ours.extra["qpos"][:, 14:17], atol=1e-5)
    hand = ours.observations[:, 12:15] / 10 + [0.425, 0, 0]
    assert np.linalg.norm(hand - cube, axis=1).min() < 0.05  # it was reached for
    assert hand[:, 2].max() - hand[:, 2].min() > 0.1


@needs_ogbench
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ogbench/antmaze-medium-navigate-v0"], "its behavior is a trained policy"),
        ([f"{CUBE}-v0", "--behaviour=medium"], "unknown behaviour 'medium': known are noisy, play"),
        ([f"{POINT}-v0", "--behaviour=navigate?speed=1"], "its only option is noise, a number from 0 to 10"),
        ([f"{POINT}-v0", "--behaviour=navigate?noise=-1"], "its only option is noise, a number from 0 to 10"),
    ],
)
def test_what_no_script_does_is_refused(arguments, message, capsys):
    assert cli.main(["collect", *arguments]) == 2
    assert message in capsys.readouterr().err


@needs_ogbench
def test_a_run_without_data_says_how_to_get_them_and_finds_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    name = f"{POINT}-singletask-task3-v0"
    assert cli.main(["train", "bc", name]) == 2
    error = capsys.readouterr().err
    assert "`jaxrl collect ogbench/pointmaze-medium-navigate-v0`" in error
    assert "ogbench.download_datasets(['pointmaze-medium-navigate-v0'])" in error
    assert cli.main(["collect", name, "--steps=100"]) == 0
    small = [
        "--agent.flow.net.hidden",
        "8",
        "--agent.flow.steps=1",
        "--schedule.offline-updates=2",
        "--schedule.eval-episodes=2",
    ]
    with tiny.quick(), monkeypatch.context() as patch:
        patch.setattr(host, "render", unable)
        assert cli.main(["train", "bc", name, "--out=run", *small]) == 0
    assert "no pictures of the run: no screen" in capsys.readouterr().err
    assert '"data": "datasets/pointmaze-medium-navigate-v0.npz"' in (tmp_path / "run" / "config.json").read_text()


def unable(*arguments, **options):
    raise UserError("no screen")
