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


def unlike(builder: Callable[[], Any]) -> str:
    """Returns an error message if the built simulator's actions are unsupported; empty if supported."""
    simulator = builder()
    if (problem := discrete(simulator)) or not isinstance(simulator, Described):
        return problem
    low, high = simulator.action_space.low, simulator.action_space.high
    if (low == -1).all() and (high == 1).all():
        return ""
    return (
        f"its actions lie in [{low.min():g}, {high.max():g}], {CONTINUOUS}: scale them, as "
        "gymnasium.wrappers.RescaleAction(env, -1, 1) does"
    )
