"""Point mazes with real MJX physics: OGBench's layouts, start and goal cells, wall size, success test and rewards.

There are two bodies. `maze-*` is a ball of radius 0.7 on two slide joints, driven by motors against damping, so it has
momentum, and the velocity is observed. `pointmaze-*` follows OGBench's point: each action displaces the ball by up to
0.2 before five simulator steps of 0.02 push it out of walls; only the position is observed, the horizon is OGBench's
1000, and success is evaluated before the step, as in OGBench's single-task environments. It is compatible with data
files of OGBench's `pointmaze-*`.

A ball touches at most the four cells around it. Before each step, four boxes are moved to these cells, or out of the
way for free cells, so the cost is independent of the maze's size.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from PIL import Image, ImageDraw
from scipy.sparse import csgraph

from envs.quiet import mjx
from jaxrl.errors import UserError, unknown
from jaxrl.types import EnvState, PyTree, Spec

UNIT = 4.0  # length of a cell, as in OGBench
RADIUS = 0.7
TOLERANCE = 1.0  # distance to the goal that counts as success

LAYOUTS = {  # `#` wall; umaze is D4RL's, the others OGBench's
    "umaze": ("#####", "#...#", "###.#", "#...#", "#####"),
    "medium": (
        "########",
        "#..##..#",
        "#..#...#",
        "##...###",
        "#..#...#",
        "#.#..#.#",
        "#...#..#",
        "########",
    ),
    "large": (
        "############",
        "#....#.....#",
        "#.##.#.#.#.#",
        "#......#...#",
        "#.####.###.#",
        "#..#.#.....#",
        "##.#.#.#.###",
        "#..#...#...#",
        "############",
    ),
    "giant": (
        "################",
        "#.#......##....#",
        "#.#.##.#.#..##.#",
        "#...#..#...#...#",
        "#.###.######.#.#",
        "#...#...#....#.#",
        "###.#.#..#.#.###",
        "#...#..#...#...#",
        "#.#.#.######.#.#",
        "#.###...#...##.#",
        "#.....#...#....#",
        "################",
    ),
}

TASKS = {  # ((row, column) of the start, of the goal), tasks 1 to 5
    "umaze": (((1, 1), (3, 1)), ((3, 1), (1, 1)), ((1, 3), (3, 1)), ((3, 3), (1, 1)), ((2, 3), (1, 1))),
    "medium": (((1, 1), (6, 6)), ((6, 1), (1, 6)), ((5, 3), (4, 2)), ((6, 5), (6, 1)), ((2, 6), (1, 1))),
    "large": (((1, 1), (7, 10)), ((5, 4), (7, 1)), ((7, 4), (1, 10)), ((3, 8), (5, 4)), ((1, 1), (5, 4))),
    "giant": (((1, 1), (10, 14)), ((1, 14), (10, 1)), ((8, 14), (1, 1)), ((8, 3), (5, 12)), ((5, 9), (3, 8))),
}

HORIZONS = {"umaze": 100, "medium": 200, "large": 300, "giant": 500}  # of the ball: two to three times the longest path


@dataclasses.dataclass(frozen=True)
class Body:
    """The dynamics of the moving body."""

    step: float  # s, of the simulator
    substeps: int
    damping: float
    force: float  # N at action 1
    shift: float  # displacement at action 1, before the simulator runs
    integrator: str


BALL = Body(step=0.05, substeps=2, damping=2.0, force=10.0, shift=0.0, integrator="Euler")  # at most 5 units/s
POINT = Body(step=0.02, substeps=5, damping=0.0, force=0.0, shift=0.2, integrator="RK4")  # OGBench's
SPEED = 5.0


def mjcf(body: Body, boxes: np.ndarray | None = None) -> str:
    """Returns the maze's MJCF: four movable boxes around the ball, or fixed ones at `boxes` [W, 2]."""
    half = UNIT / 2
    wall = f'<geom type="box" size="{half} {half} {half}" condim="1" contype="0" conaffinity="1"'
    if boxes is None:
        walls = "".join(f'<body mocap="true" pos="0 0 -{10 * (i + 2)}">{wall}/></body>' for i in range(4))
    else:
        walls = "".join(f'{wall} pos="{x} {y} {half}"/>' for x, y in boxes)
    return f"""
    <mujoco>
      <option timestep="{body.step}" integrator="{body.integrator}" iterations="1" ls_iterations="4">
        <flag eulerdamp="disable"/>
      </option>
      <worldbody>
        {walls}
        <body pos="0 0 {RADIUS}">
          <joint name="x" type="slide" axis="1 0 0" damping="{body.damping}"/>
          <joint name="y" type="slide" axis="0 1 0" damping="{body.damping}"/>
          <geom type="sphere" size="{RADIUS}" mass="1" condim="1" contype="1" conaffinity="0"/>
        </body>
      </worldbody>
      <actuator>
        <motor joint="x" gear="{body.force}" ctrlrange="-1 1"/>
        <motor joint="y" gear="{body.force}" ctrlrange="-1 1"/>
      </actuator>
    </mujoco>"""


@dataclasses.dataclass(frozen=True, eq=False)
class Maze:
    """A point maze. Single-task: fixed start and goal cell, reward -1 per step and 0 at the goal, where it terminates.

    Goal-conditioned: one of the five tasks per episode, the goal's position appended to the observation.
    """

    layout: Literal["umaze", "medium", "large", "giant"] = "medium"
    body: Literal["ball", "point"] = "ball"
    task: int = 1
    goal_conditioned: bool = False
    horizon: int = 200
    exploring: bool = False  # start anywhere, never terminate

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise unknown("maze layout", self.layout, LAYOUTS)
        if self.body not in ("ball", "point"):
            raise unknown("maze body", self.body, ("ball", "point"))
        if not 1 <= self.task <= len(TASKS[self.layout]):
            raise UserError(f"maze task = {self.task}: must be in [1, {len(TASKS[self.layout])}]")
        if self.horizon < 1:
            raise UserError(f"maze horizon = {self.horizon}: must be at least 1")

    # Geometry

    @functools.cached_property
    def grid(self) -> np.ndarray:
        """Walls as a boolean array [rows, columns]."""
        return np.array([[c == "#" for c in row] for row in LAYOUTS[self.layout]])

    @functools.cached_property
    def free(self) -> np.ndarray:
        """Centers of the free cells, [F, 2]."""
        rows, columns = np.nonzero(~self.grid)
        return np.stack([columns, rows], axis=1) * UNIT - UNIT

    @functools.cached_property
    def walls(self) -> np.ndarray:
        """Centers of the wall cells, [W, 2]."""
        rows, columns = np.nonzero(self.grid)
        return np.stack([columns, rows], axis=1) * UNIT - UNIT

    @functools.cached_property
    def next_cell(self) -> np.ndarray:
        """The free cell after `here` on a shortest path to `there`, both indices into `free`: [there, here]."""
        distance = np.abs(self.free[:, None] - self.free[None]).sum(axis=-1)
        _, before = csgraph.shortest_path(distance == UNIT, unweighted=True, return_predecessors=True)
        return np.where(before < 0, np.arange(len(self.free))[None], before)

    def centre(self, cell: tuple[int, int]) -> np.ndarray:
        """Returns the position [2] of a (row, column)."""
        return np.array([cell[1], cell[0]]) * UNIT - UNIT

    def cell(self, position: jax.Array) -> jax.Array:
        """Returns the index into `free` of the free cell nearest to a position [2]."""
        return jnp.argmin(jnp.square(self.free - position[None]).sum(axis=-1))

    # The environment

    @functools.cached_property
    def dynamics(self) -> Body:
        """The body's numbers."""
        return BALL if self.body == "ball" else POINT

    @functools.cached_property
    def model(self) -> tuple[Any, Any]:
        """The simulator's model, and data to fill in."""
        with jax.ensure_compile_time_eval():
            mjcf_model = mujoco.MjModel.from_xml_string(mjcf(self.dynamics))  # ty: ignore[missing-attribute]
            model = mjx.put_model(mjcf_model, impl="jax")
            return model, mjx.make_data(model)

    @property
    def spec(self) -> Spec:
        """Sizes: position (and velocity) and goal."""
        goal = 2 if self.goal_conditioned else 0
        return Spec(observation=(4 if self.body == "ball" else 2) + goal, action=2, goal=goal)

    def reset(self, key: jax.Array) -> EnvState:
        """Returns a fresh episode; start (and goal, if goal-conditioned) have noise of up to a quarter cell."""
        key_task, key_start, key_goal, key_cell = jax.random.split(key, 4)
        task = jax.random.randint(key_task, (), 0, 5) if self.goal_conditioned else self.task - 1
        ends = jnp.array([[self.centre(cell) for cell in pair] for pair in TASKS[self.layout]])[task]
        start, goal = ends[0], ends[1]
        if self.exploring:
            start = jax.random.choice(key_cell, jnp.asarray(self.free, jnp.float32))
        start = start + jax.random.uniform(key_start, (2,), minval=-1, maxval=1) * UNIT / 4
        if self.goal_conditioned:
            goal = goal + jax.random.uniform(key_goal, (2,), minval=-1, maxval=1) * UNIT / 4
        physics = {"qpos": start, "qvel": jnp.zeros(2), "qacc_warmstart": jnp.zeros(2)}
        no = jnp.zeros((), bool)
        return EnvState(
            physics=physics,
            obs=self.observe(physics, goal),
            reward=jnp.zeros(()),
            terminated=no,
            truncated=no,
            success=no,
            steps=jnp.zeros((), jnp.int32),
            info={"goal": goal},
        )

    def step(self, state: EnvState, action: jax.Array) -> EnvState:
        """Returns the maze after one action [2]."""
        goal = state.info["goal"]
        physics = self.simulate(state.physics, jnp.clip(action, -1, 1))
        judged = physics if self.body == "ball" else state.physics
        solved = jnp.linalg.norm(judged["qpos"] - goal) <= TOLERANCE
        steps = state.steps + 1
        terminated = solved & (not self.exploring)
        return EnvState(
            physics=physics,
            obs=self.observe(physics, goal),
            reward=solved.astype(jnp.float32) - 1.0,
            terminated=terminated,
            truncated=(steps >= self.horizon) & ~terminated,
            success=state.success | solved,
            steps=steps,
            info=state.info,
        )

    def simulate(self, physics: dict[str, jax.Array], action: jax.Array) -> dict[str, jax.Array]:
        """Returns positions and velocities after one action: MJX with the walls around the ball in place."""
        model, data = self.model
        if self.body == "point":
            physics = physics | {"qpos": physics["qpos"] + POINT.shift * action, "qvel": jnp.zeros(2)}
        data = data.replace(ctrl=action, mocap_pos=self.walls_around(physics["qpos"]), **physics)
        data, _ = jax.lax.scan(lambda d, _: (mjx.step(model, d), None), data, None, length=self.dynamics.substeps)
        return {name: getattr(data, name) for name in physics}

    def walls_around(self, position: jax.Array) -> jax.Array:
        """Returns centers [4, 3] for the boxes: the four cells around a position, below the floor for free cells."""
        corner = jnp.floor(position / UNIT + 1).astype(int)  # (column, row) of the cell below and left
        cells = corner[None] + jnp.array([[0, 0], [1, 0], [0, 1], [1, 1]])
        wall = jnp.asarray(self.grid)[cells[:, 1], cells[:, 0]]
        height = jnp.where(wall, UNIT / 2, -10.0 * UNIT)
        return jnp.concatenate([cells * UNIT - UNIT, height[:, None]], axis=1)

    def observe(self, physics: dict[str, jax.Array], goal: jax.Array) -> jax.Array:
        """Returns the observation: the ball's scaled position and velocity, or the point's raw position."""
        parts = [self.scaled(physics["qpos"])]
        if self.body == "ball":
            parts.append(physics["qvel"] / SPEED)
        if self.goal_conditioned:
            parts.append(self.scaled(goal))
        return jnp.concatenate(parts)

    def scaled(self, position: jax.Array) -> jax.Array:
        """Returns a position in the units of observations."""
        return (position - self.middle) / (2 * UNIT) if self.body == "ball" else position

    def unscaled(self, position: np.ndarray) -> np.ndarray:
        """Returns the position given by an observation's first two entries."""
        return position * (2 * UNIT) + self.middle if self.body == "ball" else position

    @functools.cached_property
    def middle(self) -> np.ndarray:
        """The maze's center [2]."""
        return (np.array(self.grid.shape[::-1]) - 3) * UNIT / 2

    # Data collection and rendering

    def explore(self) -> "Maze":
        """Returns the maze for data collection: starts anywhere, no termination at the goal."""
        return dataclasses.replace(self, exploring=True)

    def behaviour(self, level: str) -> "Navigator":
        """Returns the scripted policy of a level, see LEVELS."""
        if level not in LEVELS:
            raise unknown("behaviour", level, LEVELS)
        return Navigator(self, *LEVELS[level])

    def relabel(self, obs: np.ndarray, actions: np.ndarray, next_obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (reward, terminated) [N] of transitions for this task, as `step` would give them."""
        judged = next_obs if self.body == "ball" else obs
        if self.goal_conditioned:
            goal = self.unscaled(obs[:, -2:])
        else:
            goal = self.centre(TASKS[self.layout][self.task - 1][1])[None]
        solved = np.linalg.norm(self.unscaled(judged[:, :2]) - goal, axis=-1) <= TOLERANCE
        return solved - np.float32(1), solved

    def goal_of(self, states: np.ndarray) -> np.ndarray:
        """Returns the goals [N, 2] reached in states [N, S]: their positions, in the units of observations."""
        return states[:, :2]

    def draw(self, obs: np.ndarray, size: int) -> Image.Image:
        """Returns the maze from above, `size` pixels high, with the goal as a ring and the ball."""
        rows, columns = self.grid.shape
        scale = size / rows
        image = Image.new("RGB", (round(columns * scale), size), "white")
        pen = ImageDraw.Draw(image)
        for row, column in np.argwhere(self.grid):
            x, y = column * scale, size - (row + 1) * scale
            pen.rectangle((x, y, x + scale, y + scale), fill="dimgray")

        def disc(position: np.ndarray, radius: float, **style: Any) -> None:
            x, y = (position / UNIT + 1.5) * scale
            reach = radius / UNIT * scale
            pen.ellipse((x - reach, size - y - reach, x + reach, size - y + reach), **style)

        goal = obs[-2:] if self.goal_conditioned else None
        at = self.centre(TASKS[self.layout][self.task - 1][1]) if goal is None else self.unscaled(goal)
        disc(at, TOLERANCE, outline="crimson", width=max(1, size // 100))
        disc(self.unscaled(np.asarray(obs[:2])), RADIUS, fill="steelblue")
        return image


LEVELS = {  # probability that a goal is the task's rather than a random cell, noise of the actions
    "good": (1.0, 0.3),
    "medium": (0.0, 0.5),
    "bad": (0.0, 1.5),
    "random": (0.0, 100.0),
    "mixed": (0.1, 0.5),
}


@dataclasses.dataclass(frozen=True)
class Navigator:
    """Moves from cell to cell along a shortest path to a goal, with noise, and draws a new goal on arrival."""

    maze: Maze
    aim: float
    noise: float

    def start(self, state: EnvState, key: jax.Array) -> PyTree:
        """Returns the goal's index into the maze's free cells."""
        key_cell, key_aim = jax.random.split(key)
        anywhere = jax.random.randint(key_cell, (), 0, len(self.maze.free))
        return jnp.where(jax.random.uniform(key_aim) < self.aim, self.maze.cell(state.info["goal"]), anywhere)

    def act(self, memory: PyTree, state: EnvState, key: jax.Array) -> tuple[PyTree, jax.Array]:
        """Returns the current goal, and one action [2] toward the next cell on the path."""
        key_noise, key_goal = jax.random.split(key)
        position, velocity = state.physics["qpos"], state.physics["qvel"]
        here = self.maze.cell(position)
        free = jnp.asarray(self.maze.free, jnp.float32)
        arrived = jnp.linalg.norm(free[memory] - position) <= TOLERANCE
        memory = jnp.where(arrived, self.start(state, key_goal), memory)
        offset = free[jnp.asarray(self.maze.next_cell)[memory, here]] - position
        if self.maze.body == "ball":
            push = offset - 0.5 * velocity
        else:
            push = offset / (jnp.linalg.norm(offset) + 1e-6)
        return memory, jnp.clip(push + self.noise * jax.random.normal(key_noise, (2,)), -1, 1)


def make_maze(name: str, **options: Any) -> Maze:
    """Returns the maze called `maze-LAYOUT` (the ball) or `pointmaze-LAYOUT` (OGBench's point)."""
    family, layout = name.split("-", 1)
    if layout not in LAYOUTS:
        raise unknown("environment", name, [f"{family}-{known}" for known in LAYOUTS])
    body = "ball" if family == "maze" else "point"
    horizon = HORIZONS[layout] if body == "ball" else 1000
    settings: dict[str, Any] = {"layout": layout, "body": body, "horizon": horizon}
    return Maze(**(settings | options))
