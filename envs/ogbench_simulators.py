"""OGBench's simulators, as built in worker processes. Imports no JAX."""

import contextlib
import os
import sys
import tempfile
import warnings
from collections.abc import Generator
from typing import Any

import numpy as np

from jaxrl.errors import UserError


class Simulator:
    """An OGBench environment with the goal, if any, appended to observations, and with reproducible resets.

    Before each episode OGBench takes random actions sampled from an unseeded action space; here it gets the episode's
    seed.
    """

    def __init__(self, env: Any, goal: bool, sparse: bool = False) -> None:
        """Takes Gymnasium's environment, whether goals are observed, and whether rewards are sparse (-1 or 0)."""
        self.env, self.conditioned, self.sparse, self.goal = env, goal, sparse, np.zeros(0)
        self.space = env.unwrapped.action_space
        kind = type(env.unwrapped)
        if isinstance(getattr(kind, "action_space", None), property):  # returns a new space on every access
            env.unwrapped.__class__ = type(kind.__name__, (kind,), {"action_space": self.space})

    def reset(self, seed: int, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Returns the first observation of an episode."""
        self.space.seed(seed)
        obs, info = self.env.reset(seed=seed, options=options)
        if self.conditioned:
            self.goal = info["goal"]
        return self.observed(obs), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Returns (observation, reward, terminated, truncated, info) after one action."""
        obs, reward, *rest = self.env.step(action)
        return self.observed(obs), np.sign(reward) if self.sparse else reward, *rest

    def render(self) -> np.ndarray:
        """Returns an image [height, width, 3] of the scene."""
        return self.env.render()

    def observed(self, obs: np.ndarray) -> np.ndarray:
        """Returns the observation followed by the goal."""
        return np.concatenate([obs, self.goal])


@contextlib.contextmanager
def _temporary_files() -> Generator[None]:
    """Removes temporary files written in the context: OGBench leaves one behind for every maze."""
    before = tempfile.tempdir
    try:
        with tempfile.TemporaryDirectory() as tempfile.tempdir:
            yield
    finally:
        tempfile.tempdir = before


def build(
    simulator: str, goal: bool, oracle: bool, picture: int = 0, sparse: bool = False, **options: Any
) -> Simulator:
    """Returns the simulator with this Gymnasium name; `picture` is the render size in pixels."""
    if picture and sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")  # headless rendering; must be set before MuJoCo is imported
    if oracle:
        options["use_oracle_rep"] = True
    if picture:
        options |= {"width": picture, "height": picture}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its packages on import, and on machines without a display
        try:
            import gymnasium
            import ogbench  # noqa: F401  (registers its environments)

            with _temporary_files():
                env = Simulator(gymnasium.make(simulator, disable_env_checker=True, **options), goal, sparse)
            if picture:
                env.reset(seed=0)
                env.render()
            return env
        except ModuleNotFoundError:
            raise
        except Exception as error:
            gl = os.environ.get("MUJOCO_GL")
            raise UserError(
                f"{simulator} cannot be {'rendered' if picture else 'built'} here, MUJOCO_GL being {gl}: "
                f"{type(error).__name__}: {error}"
                + ("; install EGL, or set MUJOCO_GL to glfw or osmesa" if picture else "")
            ) from error
