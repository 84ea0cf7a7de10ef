"""Facts about the mazes: their physics against two other simulators, their walls, their tasks and their behaviours."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

from envs.maze import LAYOUTS, RADIUS, TASKS, TOLERANCE, UNIT, make_maze, mjcf
from jaxrl.errors import UserError
from jaxrl.rollout import device as ro

pytestmark = pytest.mark.simulator

SLICE = Path(__file__).parents[1] / "data" / "pointmaze-medium-navigate-v0-slice.npz"


def physics_at(position):
    return {"qpos": jnp.asarray(position, jnp.float32), "qvel": jnp.zeros(2), "qacc_warmstart": jnp.zeros(2)}


@pytest.mark.parametrize("name", ["maze-medium", "pointmaze-medium"])
def test_agrees_with_cpu_mujoco_on_a_maze_whose_walls_stand_still(name):
    """Open loop over 60 actions to 1e-3 of a unit, walls touched on the way: boxes that follow the ball are enough."""
    maze = make_maze(name)
    model = mujoco.MjModel.from_xml_string(mjcf(maze.dynamics, maze.walls))
    data = mujoco.MjData(model)
    simulate = jax.jit(maze.simulate)
    rng = np.random.default_rng(0)
    touched = 0
    for start in maze.free[::5]:
        mujoco.mj_resetData(model, data)
        data.qpos[:] = start
        physics = physics_at(start)
        for action in np.repeat(rng.uniform(-1, 1, (6, 2)), 10, axis=0):
            data.ctrl[:] = action
            if maze.body == "point":
                data.qpos[:] += 0.2 * action
                data.qvel[:] = 0
            mujoco.mj_step(model, data, nstep=maze.dynamics.substeps)
            physics = simulate(physics, jnp.asarray(action, jnp.float32))
            touched += data.ncon > 0
            np.testing.assert_allclose(physics["qpos"], data.qpos, atol=1e-3)
    assert touched > 30


def test_pointmaze_repeats_transitions_that_ogbench_recorded():
    """One step from each recorded state: to 2e-3 where OGBench's point was pushed by a wall, to 1e-5 elsewhere."""
    recorded = np.load(SLICE)
    obs, actions, last = recorded["observations"], recorded["actions"], recorded["terminals"].astype(bool)
    row = np.flatnonzero(~last)
    maze = make_maze("pointmaze-medium")
    after = jax.jit(jax.vmap(lambda q, a: maze.simulate(physics_at(q), a)["qpos"]))(obs[row], actions[row])
    error = np.abs(np.asarray(after) - obs[row + 1]).max(axis=1)
    pushed = np.abs(obs[row] + 0.2 * actions[row] - obs[row + 1]).max(axis=1) > 1e-4
    assert pushed.sum() > 5
    assert error[pushed].max() < 2e-3
    assert error[~pushed].max() < 1e-5


@pytest.mark.parametrize("name", ["maze-medium", "maze-giant"])
def test_no_wall_is_crossed_in_a_hundred_thousand_random_steps(name):
    """Every position lies in a free cell, reached from the one before without passing through a wall."""
    maze = make_maze(name)
    count, length = 500, 200

    def rolled(key):
        key_cell, key_actions = jax.random.split(key)
        starts = jax.random.choice(key_cell, jnp.asarray(maze.free, jnp.float32), (count,))
        # a direction is kept for ten steps, so that walls are hit at full speed
        actions = jnp.repeat(jax.random.uniform(key_actions, (length // 10, count, 2), minval=-1.5, maxval=1.5), 10, 0)
        step = jax.vmap(maze.simulate)
        first = jax.vmap(physics_at)(starts)
        return jax.lax.scan(lambda p, a: (lambda q: (q, q["qpos"]))(step(p, jnp.clip(a, -1, 1))), first, actions)[1]

    positions = np.asarray(jax.jit(rolled)(jax.random.key(0)))
    assert np.isfinite(positions).all()
    column, row = np.moveaxis(np.floor(positions / UNIT + 1.5).astype(int), -1, 0)
    assert not maze.grid[row, column].any()
    down, right = np.diff(row, axis=0), np.diff(column, axis=0)
    assert max(np.abs(down).max(), np.abs(right).max()) == 1
    corner = (down != 0) & (right != 0)  # past a corner, which must be open on one side at least
    assert not (maze.grid[row[1:], column[:-1]] & maze.grid[row[:-1], column[1:]])[corner].any()


def test_layouts_are_closed_and_every_task_can_be_solved():
    """Borders are walls; both ends of each task are free and joined, which `next_cell` shows by arriving."""
    for layout in LAYOUTS:
        maze = make_maze(f"maze-{layout}")
        for border in (maze.grid[0], maze.grid[-1], maze.grid[:, 0], maze.grid[:, -1]):
            assert border.all()
        for start, goal in TASKS[layout]:
            here, there = (int(maze.cell(maze.centre(cell))) for cell in (start, goal))
            np.testing.assert_array_equal(maze.free[here], maze.centre(start))
            for _ in range(len(maze.free)):
                here = maze.next_cell[there, here]
            assert here == there


def test_medium_layout_and_first_task_are_ogbenchs():
    """The counts and places that OGBench's own medium maze has."""
    maze = make_maze("pointmaze-medium")
    assert maze.grid.shape == (8, 8) and len(maze.free) == 26
    np.testing.assert_array_equal(maze.centre(TASKS["medium"][0][1]), [20, 20])
    assert maze.horizon == 1000 and TOLERANCE == 1.0


def test_walls_around_a_ball_are_the_walls_that_it_can_touch():
    """Every wall within the ball's radius is among the four boxes, anywhere in the maze."""
    maze = make_maze("maze-large")
    rng = np.random.default_rng(1)
    positions = maze.free[rng.integers(len(maze.free), size=300)] + rng.uniform(-2, 2, (300, 2))
    boxes = np.asarray(jax.vmap(maze.walls_around)(jnp.asarray(positions, jnp.float32)))
    for position, four in zip(positions, boxes, strict=True):
        gap = np.maximum(np.abs(maze.walls - position) - UNIT / 2, 0)
        near = maze.walls[np.linalg.norm(gap, axis=1) < RADIUS]
        placed = {tuple(box[:2]) for box in four if box[2] > 0}
        assert {tuple(wall) for wall in near} <= placed


@pytest.mark.parametrize("name", ["maze-medium", "pointmaze-medium"])
def test_success_reward_and_termination_are_judged_on_the_right_state(name):
    """The ball's step is judged where it arrives, the point's where it left, as in OGBench's single-task mazes."""
    maze = make_maze(name)
    state = maze.reset(jax.random.key(0))
    goal = np.asarray(state.info["goal"])
    near = dataclasses.replace(state, physics=physics_at(goal - np.array([1.02, 0.0])))
    towards = jnp.array([1.0, 0.0])
    step = jax.jit(maze.step)
    first = step(near, towards)
    second = step(first, towards)
    expected = [False, True] if name.startswith("point") else [True, True]
    assert [bool(first.terminated), bool(second.terminated)] == expected
    assert [float(first.reward), float(second.reward)] == [float(hit) - 1 for hit in expected]
    assert not first.truncated and bool(second.success)


def test_the_clock_truncates_and_does_not_terminate():
    """At the horizon an episode is truncated, and only then."""
    maze = make_maze("maze-medium", horizon=3)
    state, step = maze.reset(jax.random.key(0)), jax.jit(maze.step)
    seen = []
    for _ in range(3):
        state = step(state, jnp.zeros(2))
        seen.append((bool(state.terminated), bool(state.truncated)))
    assert seen == [(False, False), (False, False), (False, True)]


def test_relabel_gives_what_step_gives():
    """Rewards and terminations from observations alone equal those of the environment, goal-conditioned too."""
    for options in ({"task": 3}, {"goal_conditioned": True}):
        maze = make_maze("maze-medium", **options)
        policy = ro.scripted(maze.behaviour("good"))

        def rolled(key, maze=maze, policy=policy):
            rollout = ro.start(maze, policy, key, 32)
            bank = ro.resets(maze, key, 32)

            def body(carry, k):
                carry, steps, _ = ro.advance(maze, policy, carry, bank, k)
                return carry, steps

            return jax.lax.scan(body, rollout, jax.random.split(key, 120))[1]

        steps = jax.tree.map(np.asarray, jax.jit(rolled)(jax.random.key(1)))
        before, after = (
            steps.obs[:, :, 0].reshape(-1, steps.obs.shape[-1]),
            steps.obs[:, :, 1].reshape(-1, steps.obs.shape[-1]),
        )
        reward, terminated = maze.relabel(before, steps.actions.reshape(-1, 2), after)
        np.testing.assert_array_equal(terminated, steps.terminated.ravel())
        np.testing.assert_array_equal(reward, steps.rewards.ravel())
        assert terminated.sum() > 10


def test_behaviours_are_ordered_and_the_task_is_hard_without_a_goal():
    """On the default task the levels succeed as often as their names promise."""
    maze = make_maze("maze-medium")
    success = {}
    for level in ("good", "medium", "random"):
        policy = ro.scripted(maze.behaviour(level))
        episodes = jax.jit(lambda key, policy=policy: ro.evaluate(maze, policy, key, 200))(jax.random.key(3))
        success[level] = float(episodes.success.mean())
    assert success["good"] > 0.98
    assert 0.05 < success["medium"] < 0.35
    assert success["random"] < 0.01


def test_bad_options_are_named():
    """A task or a layout that does not exist is refused with what is allowed."""
    with pytest.raises(UserError, match=r"maze task = 9: must be in \[1, 5\]"):
        make_maze("maze-medium", task=9)
    with pytest.raises(UserError, match="did you mean 'maze-medium'"):
        make_maze("maze-medum")
