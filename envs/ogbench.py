"""OGBench's simulators (Park et al., "OGBench: Benchmarking Offline Goal-Conditioned RL", 2024), by their datasets.

    ogbench/cube-single-play-singletask-v0          the default task, with the task's reward
    ogbench/cube-single-play-singletask-task2-v0    another of the five
    ogbench/cube-single-play-v0                     goal-conditioned: a goal is a full observation, appended to it
    ogbench/cube-single-play-oraclerep-v0           a goal is a compact representation, such as the cube's position

They step on the CPU, in worker processes (`jaxrl.rollout.host`). One is built in this process, to get sizes and tasks.
"""

import contextlib
import dataclasses
import difflib
import functools
import re
import warnings
from collections.abc import Callable, Generator
from typing import Any

import numpy as np

from envs import ogbench_scripts, ogbench_simulators, read_options
from jaxrl.errors import UserError, unknown
from jaxrl.types import Spec

KINDS = {  # types of datasets, by the first word of the environment's name
    "pointmaze": ("navigate", "stitch"),
    "antmaze": ("navigate", "stitch", "explore"),
    "humanoidmaze": ("navigate", "stitch"),
    "antsoccer": ("navigate", "stitch"),
    "cube": ("play", "noisy"),
    "scene": ("play", "noisy"),
    "puzzle": ("play", "noisy"),
}
SCRIPTS = {"pointmaze": ("navigate", "stitch"), "cube": ("play", "noisy"), "scene": ("play", "noisy")} | {
    "puzzle": ("play", "noisy")
}
ARM, CUBE, BUTTON = 19, 9, 4  # entries of an observation: of the arm, then of each cube, then of each button
JOINTS = 14  # entries of qpos before those of the cubes
CENTRE, SCALE, DRAWER, WINDOW = np.array([0.425, 0, 0]), 10, 18, 15  # of positions in observations


@dataclasses.dataclass(frozen=True)
class OGBench:
    """An OGBench environment whose episodes cycle through its five tasks, with the goal observed."""

    name: str
    """OGBench's name."""
    simulator: str
    """Gymnasium's name."""
    dataset: str
    """The name of its dataset, without .npz."""
    oracle: bool
    """Whether goals are OGBench's oracle representations rather than observations."""
    spec: Spec
    horizon: int
    tasks: int
    """Number of tasks that the episodes cycle through; 0 for a single task."""
    sparse: bool = False
    """Whether the reward is -1 until the whole task is solved, rather than -1 per unsolved object."""

    def builder(self, picture: int = 0) -> Callable[[], ogbench_simulators.Simulator]:
        """Returns a factory of simulators; `picture` is the render size in pixels."""
        goal = bool(self.spec.goal)
        return functools.partial(ogbench_simulators.build, self.simulator, goal, self.oracle, picture, self.sparse)

    def recording(self, behaviour: str | None, steps: int) -> tuple[ogbench_scripts.Script, int]:
        """Returns the script of a behavior, and the number of its episodes for at least `steps` steps.

        The behavior is one of OGBench's dataset types, by default the environment's own, with options after a question
        mark: `play?noise=0.2`. Raises UserError if there is no such script.
        """
        *thing, own, version = self.dataset.split("-")
        kind, _, query = (behaviour or own).partition("?")
        family = "maze" if thing[0] == "pointmaze" else "arm"
        known = SCRIPTS.get(thing[0])
        if known is None:
            raise UserError(
                f"ogbench/{self.name}: its behavior is a trained policy, there are scripts for {', '.join(SCRIPTS)}"
            )
        if kind not in known:
            raise unknown("behaviour", kind, known)
        noise = {"noise": ogbench_scripts.NOISE[family]} | read_options(query)
        if list(noise) != ["noise"] or not isinstance(noise["noise"], int | float) or not 0 <= noise["noise"] < 10:
            raise UserError(f"behaviour {behaviour!r}: its only option is noise, a number from 0 to 10")
        rows = min(ogbench_scripts.ROWS.get(kind, 1001), steps + 1)
        script = ogbench_scripts.Script("-".join([*thing, version]), kind, float(noise["noise"]), rows)
        return script, -(-steps // (rows - 1))


class OracleGoals(OGBench):
    """An environment with OGBench's oracle goal representations."""

    def goal_of(self, states: np.ndarray) -> np.ndarray:
        """Returns the goals [N, G] of states [N, S], computed by OGBench's function."""
        from ogbench.relabel_utils import add_oracle_reps

        env = _simulator(self.simulator, self.oracle).env
        columns = _columns(self.simulator, env, states)
        add_oracle_reps(self.simulator, env, columns)
        return columns["oracle_reps"]


class SingleTask(OGBench):
    """A single task, with its own reward."""

    def relabel(self, obs: np.ndarray, actions: np.ndarray, next_obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (rewards, terminated) [N] of steps, computed by OGBench's function.

        As in the single-task simulators, these depend on the state before the step: a step from a state in which the
        task is solved gets reward 0 and terminates, any other gets -1 per unsolved object.
        """
        from ogbench.relabel_utils import relabel_dataset

        env = _simulator(self.simulator, self.oracle).env
        columns = _columns(self.simulator, env, obs)
        with _quiet():
            relabel_dataset(self.simulator, env, columns)
        rewards = columns["rewards"]
        return np.sign(rewards) if self.sparse else rewards, columns["masks"] == 0


def make(name: str, sparse: bool = False) -> OGBench:
    """Returns OGBench's environment with this name. Raises UserError if OGBench has none.

    `sparse` (single tasks) makes rewards -1 until the task is solved and then 0, as in Q-chunking's experiments.
    """
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown OGBench environment {name!r}: did you mean 'ogbench/{near}'?")
    words = name.split("-")
    task = next((word for word in words if re.fullmatch(r"task\d", word)), None)
    dataset = [word for word in words if word not in ("singletask", "oraclerep", task)]
    simulator = "-".join(word for word in words if word not in ("oraclerep", dataset[-2]))
    oracle, single = "oraclerep" in words, "singletask" in words
    if sparse and not single:
        raise UserError(f"environment 'ogbench/{name}': sparse rewards are available for single tasks only")
    probe = _simulator(simulator, oracle)
    with _quiet():
        obs, info = probe.env.reset(seed=0)
    goal = 0 if single else len(info["goal"])
    kind = SingleTask if single else OracleGoals if oracle else OGBench
    return kind(
        name=name,
        simulator=simulator,
        dataset="-".join(dataset),
        oracle=oracle,
        spec=Spec(len(obs) + goal, probe.space.shape[0], goal),
        horizon=probe.env.spec.max_episode_steps,
        tasks=probe.env.unwrapped.num_tasks if goal else 0,
        sparse=sparse,
    )


def names() -> list[str]:
    """Returns the names of all environments with vector observations; excludes images and the discrete Powderworld."""
    with _quiet():
        import ogbench  # noqa: F401  (first, so that the error names it if it is not installed)

        import gymnasium  # isort: skip

        ids = [name for name, spec in gymnasium.registry.items() if str(spec.entry_point).startswith("ogbench.")]
    result = []
    for words in (simulator.split("-") for simulator in ids):
        for kind in KINDS.get(words[0], ()):
            at = words.index("singletask") if "singletask" in words else -1
            result.append("-".join([*words[:at], kind, *words[at:]]))
            if at == -1:
                result.append("-".join([*words[:at], kind, "oraclerep", *words[at:]]))
    return result


def _columns(simulator: str, env: Any, states: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the columns of OGBench's files that determine success, computed from the observations only."""
    if simulator.startswith("antsoccer"):
        return {"qpos": states[:, :22]}
    if "maze" in simulator:
        return {"qpos": states[:, :2]}
    cubes, buttons = (getattr(env.unwrapped, f"_num_{thing}", 0) for thing in ("cubes", "buttons"))
    qpos = np.zeros((len(states), JOINTS + 7 * cubes + buttons + 2))
    for i in range(cubes):
        at = ARM + CUBE * i
        qpos[:, JOINTS + 7 * i : JOINTS + 7 * i + 3] = states[:, at : at + 3] / SCALE + CENTRE
    rest = states[:, ARM + CUBE * cubes :]
    pressed = [rest[:, BUTTON * i + 1] > 0.5 for i in range(buttons)]
    if simulator.startswith("scene"):
        qpos[:, -2], qpos[:, -1] = rest[:, BUTTON * buttons] / DRAWER, rest[:, BUTTON * buttons + 2] / WINDOW
    return {"qpos": qpos, "button_states": np.stack(pressed, axis=1).astype(np.int64) if pressed else np.zeros(0)}


@functools.lru_cache(maxsize=1)
def _simulator(simulator: str, oracle: bool) -> ogbench_simulators.Simulator:
    with _quiet():
        return ogbench_simulators.build(simulator, False, oracle)


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Suppresses warnings of OGBench's packages, and restores NumPy's global random state, which it uses."""
    random = np.random.get_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        np.random.set_state(random)
