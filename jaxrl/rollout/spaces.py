"""Checks of a simulator's Gymnasium action space. Imports no JAX."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np

CONTINUOUS = "an action is a vector of continuous numbers in [-1, 1]"


@runtime_checkable
class Described(Protocol):
    """A simulator with an action space."""

    @property
    def action_space(self) -> Any:
        """A Gymnasium space: with a dtype, and with bounds `low` and `high` if it is a box."""
        ...


@runtime_checkable
class Box(Protocol):
    """A space with bounds."""

    @property
    def low(self) -> np.ndarray:
        """The lower bounds [A]."""
        ...

    @property
    def high(self) -> np.ndarray:
        """The upper bounds [A]."""
        ...


def discrete(simulator: Any) -> str:
    """Returns an error message if a simulator's actions are discrete; empty if not, or without an action space."""
    if not isinstance(simulator, Described):
        return ""
    space = simulator.action_space
    if isinstance(space, Box) and np.issubdtype(space.low.dtype, np.floating):
        return ""
    return f"its actions are {space}: discrete actions are not supported, {CONTINUOUS}"


def bounds(simulator: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the bounds (low, high) [A] to which actions in [-1, 1] are scaled; None if the simulator takes these.

    A simulator without an action space, or with infinite bounds, takes them as they are.
    """
    if not isinstance(simulator, Described) or not isinstance(simulator.action_space, Box):
        return None
    low, high = (np.ravel(x).astype(np.float32) for x in (simulator.action_space.low, simulator.action_space.high))
    if not np.isfinite([low, high]).all() or ((low == -1).all() and (high == 1).all()):
        return None
    return low, high


def scaled(action: np.ndarray, limits: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Returns an action [A] in [-1, 1] as one between these bounds."""
    low, high = limits
    return np.clip(low + (action + 1) * (high - low) / 2, low, high)


def described(builder: Callable[[], Any]) -> tuple[str, str]:
    """Returns (problem, note) on the built simulator's actions: why they are unsupported, or how they are scaled."""
    simulator = builder()
    limits = bounds(simulator)
    note = "" if limits is None else f"scaled to its action_space, [{limits[0].min():g}, {limits[1].max():g}]"
    return discrete(simulator), note
