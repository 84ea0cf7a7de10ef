"""A simulator on the CPU without Gymnasium: a point on a line that walks to one of two ends. Imports no JAX."""

import os
import signal
import sys
from pathlib import Path

import numpy as np

STEP, TARGET, HORIZON = 0.1, 0.55, 8


class Walk:
    """Observes (position, target, a number from NumPy's global stream); an action moves it by up to 0.1.

    Task 1 is at 0.55, task 2 at -0.55, where the episode ends; every step before costs 1. `trouble` happens beyond 0.3.
    """

    def __init__(self, trouble: str = "", fuse: str = "", picture: int = 0) -> None:
        self.trouble, self.fuse, self.picture = trouble, Path(fuse), picture

    def reset(self, seed, options=None):
        self.x = np.random.default_rng(seed).uniform(-0.04, 0.04)
        self.target = -TARGET if options and options["task_id"] == 2 else TARGET
        obs = self.observed()
        return obs * np.nan if self.trouble == "unsettled" and self.target < 0 else obs, {}

    def step(self, action):
        self.x += STEP * np.clip(float(action[0]), -1, 1)
        there = bool(abs(self.x) >= abs(self.target) and self.x * self.target > 0)
        if abs(self.x) > 0.3:
            self.make_trouble()
        return self.observed(), 0.0 if there else -1.0, there, False, {"success": there}

    def observed(self):
        return np.array([self.x, self.target, np.random.uniform()])

    def make_trouble(self):
        if self.trouble == "nan":
            self.x = np.nan
        elif self.trouble == "raise":
            raise RuntimeError("the walker fell")
        elif self.trouble == "kill" and self.fuse.exists():
            self.fuse.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    def render(self):
        return np.full((self.picture, self.picture, 3), int(255 * min(abs(self.x), 1)), np.uint8)


class Sensed(Walk):
    """One that observes a dict: where it is and its target in double precision, and two pixels of the position."""

    def observed(self):
        pixels = np.full((2, 1, 1), np.nan_to_num(100 * abs(self.x)), np.uint8)
        return {"place": np.array([self.x, self.target]), "pixels": pixels}


class Dense(Walk):
    """One whose reward is how far a step moves towards the target."""

    def step(self, action):
        before = self.x
        obs, _, *rest = super().step(action)
        return obs, (self.x - before) * np.sign(self.target), *rest


class Blind(Walk):
    """One that cannot be rendered."""

    render = None


def imported(name: str) -> bool:
    return name in sys.modules


def slow_square(number: float) -> float:
    import time

    time.sleep(0.05 if number < 2 else 0)
    return number**2
