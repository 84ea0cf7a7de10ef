"""Scripted behaviors of OGBench, recorded in the columns of its data files. Runs in worker processes, without JAX.

The arm is moved by OGBench's oracles toward a sequence of random targets; the point of the mazes follows shortest paths
between random cells. Every episode depends only on its own seeds.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from envs.ogbench_simulators import Simulator, build
from jaxrl.errors import UserError

ROWS = {"stitch": 201}  # of an episode; 1001 elsewhere
NOISE = {"maze": 0.5, "arm": 0.1}
SPREAD = np.array([1, 1, 1, 3, 10])  # of the noise on the arm's actions: position, yaw, gripper
STACKED = {"single": (0, 0), "double": (0, 0.25), "triple": (0.05, 0.35), "quadruple": (0.1, 0.5), "octuple": (0, 0.35)}
STITCH = 4  # length of a "stitch" path in cells
TRIES = 100


@dataclasses.dataclass(frozen=True)
class Script:
    """A behavior to record: `script((seed, episode))` returns the episode's columns."""

    simulator: str
    kind: str
    noise: float
    rows: int

    @property
    def dataset(self) -> str:
        """The recorded dataset's name in OGBench's naming scheme."""
        *thing, version = self.simulator.split("-")
        return "-".join([*thing, self.kind, version])

    def __call__(self, job: tuple[int, int]) -> dict[str, np.ndarray]:
        """Returns the columns of an episode."""
        play, env = stage(self)
        for attempt in range(TRIES):
            seeds = np.random.SeedSequence([*job, attempt]).generate_state(2)
            np.random.seed(seeds[0])  # used by the oracles and the mazes
            columns = _columns(play(self, env, int(seeds[1])))
            if not self.simulator.startswith("scene") or _cube_is_in_sight(columns["qpos"]):
                return columns
        raise UserError(f"{self.simulator}: the cube was out of sight in each of {TRIES} episodes")


@functools.lru_cache(maxsize=1)
def stage(script: Script) -> tuple[Callable[..., list[dict[str, Any]]], Simulator]:
    """Returns the function that plays an episode, and its simulator; cached in the worker."""
    options: dict[str, Any] = {"terminate_at_goal": False, "max_episode_steps": script.rows}
    if "maze" in script.simulator:
        return play_point, build(script.simulator, False, False, **options)
    return play_arm, build(script.simulator, False, False, mode="data_collection", **options)


def play_arm(script: Script, simulator: Simulator, seed: int) -> list[dict[str, Any]]:
    """Returns the rows of an episode in which oracles repeatedly move objects to random targets.

    "play" follows plans with smooth noise; "noisy" decides at each step, with action noise of an episode-dependent
    scale and occasional random actions.
    """
    random, noisy = np.random, script.kind == "noisy"
    name, size = script.simulator.split("-")[:2]
    stacked = random.uniform(*STACKED.get(size, (0.5, 0.5)))
    spread = random.uniform(0, script.noise) * SPREAD
    erratic = 0.0 if not noisy else 0.2 if name == "puzzle" else 0.1
    obs, info = simulator.reset(seed)
    oracles, rows, over = oracles_of(script, simulator), [], False
    oracle = oracles[info["privileged/target_task"]]
    oracle.reset(obs, info)
    while not over:
        action = oracle.select_action(obs, info)
        if noisy:
            action = action + spread * random.standard_normal(5)
            action = random.uniform(-1, 1, 5) if random.uniform() < erratic else action
        over, obs, info = _step(simulator, rows, obs, action)
        if oracle.done:
            obs, info = simulator.env.unwrapped.set_new_target(p_stack=stacked)
            oracle = oracles[info["privileged/target_task"]]
            oracle.reset(obs, info)
    return rows


def oracles_of(script: Script, simulator: Simulator) -> dict[str, Any]:
    """Returns OGBench's oracle for each object to move."""
    name, style = script.simulator.split("-")[0], "markov" if script.kind == "noisy" else "plan"
    things = {"cube": ["cube"], "puzzle": ["button"], "scene": ["cube", "button", "drawer", "window"]}[name]
    options: dict[str, Any] = (
        {"min_norm": 0.4} if style == "markov" else {"noise": script.noise, "noise_smoothing": 0.5}
    )
    if name == "puzzle":
        options["gripper_always_closed"] = True
    oracles = {}
    for thing in things:
        module = importlib.import_module(f"ogbench.manipspace.oracles.{style}.{thing}_{style}")
        extra = {"max_step": 100} if (name, thing, style) == ("scene", "cube", "markov") else {}
        oracles[thing] = getattr(module, f"{thing.title()}{style.title()}Oracle")(env=simulator.env, **options, **extra)
    return oracles


def play_point(script: Script, simulator: Simulator, seed: int) -> list[dict[str, Any]]:
    """Returns the rows of an episode of a point that moves through the maze, with action noise.

    "navigate" moves from corner to corner; "stitch" moves once to a cell four cells away, and stays.
    """
    maze, random = simulator.env.unwrapped, np.random
    cells = [tuple(cell) for cell in np.argwhere(maze.maze_map == 0)]
    start = cells[random.randint(len(cells))]
    goals = corners(maze.maze_map) if script.kind == "navigate" else _cells_away(maze, start, cells)
    task = {"init_ij": start, "goal_ij": goals[random.randint(len(goals))]}
    obs, _ = simulator.reset(seed, {"task_info": task})
    following: dict[tuple, np.ndarray] = {}  # (cell, goal's cell): the center of the next cell on the path
    rows, over = [], False
    while not over:
        here, goal = maze.get_xy(), maze.cur_goal_xy
        at = (maze.xy_to_ij(here), maze.xy_to_ij(goal))
        if at not in following:
            following[at] = maze.get_oracle_subgoal(here, goal)[0]
        way = following[at] - here
        action = way / (np.linalg.norm(way) + 1e-6) + script.noise * random.standard_normal(2)
        over, obs, info = _step(simulator, rows, obs, action)
        if info["success"] and script.kind == "navigate":
            maze.set_goal(goal_xy=maze.add_noise(maze.ij_to_xy(goals[random.randint(len(goals))])))
    return rows


def corners(walls: np.ndarray) -> list[tuple]:
    """Returns the free cells of a maze except straight corridors: turns, junctions and dead ends."""
    found = []
    for i, j in np.argwhere(walls == 0):
        up, down, left, right = (walls[a, b] == 0 for a, b in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)))
        if (up, left) != (down, right) or up == left:
            found.append((i, j))
    return found


def _cells_away(maze: Any, start: tuple, cells: list[tuple]) -> list[tuple]:
    """Returns the cells that are STITCH steps from `start`, or only `start` if there are none."""
    xy = np.array(maze.ij_to_xy(start))
    _, distance = maze.get_oracle_subgoal(xy, xy)
    return [cell for cell in cells if distance[cell] == STITCH] or [start]


def _step(
    simulator: Simulator, rows: list[dict[str, Any]], obs: np.ndarray, action: np.ndarray
) -> tuple[bool, Any, Any]:
    """Takes a step, appends its row, and returns (over, observation, info)."""
    action = np.clip(action, -1, 1)
    after, _, terminated, truncated, info = simulator.step(action)
    row = {"observations": obs, "actions": action, "terminals": terminated or truncated}
    past = {name: info[f"prev_{name}"] for name in ("qpos", "qvel", "button_states") if f"prev_{name}" in info}
    rows.append(row | past)
    return terminated or truncated, after, info


def _columns(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Returns the columns of an episode's rows, with the dtypes of OGBench's files."""
    kinds = {"terminals": bool, "button_states": np.int64}
    return {name: np.array([row[name] for row in rows], kinds.get(name, np.float32)) for name in rows[0]}


def _cube_is_in_sight(qpos: np.ndarray) -> bool:
    """Returns whether the scene's cube stayed on the reachable part of the table, or in the drawer."""
    y, z = qpos[:, 15], qpos[:, 16]
    return not ((y >= 0.29) | ((y <= -0.3) & ((z < 0.06) | (z > 0.08)))).any()
