"""Whether a simulator's actions fit, by the space in which it describes them as Gymnasium does. Imports no JAX."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np

CONTINUOUS = "an action is a vector of continuous numbers in [-1, 1]"


@runtime_checkable
class Described(Protocol):
    """A simulator that describes its actions."""

    @property
    def action_space(self) -> Any:
        """A space of Gymnasium's: with a dtype, and with bounds `low` and `high` where it is a box."""
        ...


@runtime_checkable
class Box(Protocol):
    """A space with bounds."""

    @property
    def low(self) -> np.ndarray:
        """The least action [A]."""
        ...

    @property
    def high(self) -> np.ndarray:
        """The greatest action [A]."""
        ...


def discrete(simulator: Any) -> str:
    """Returns why a simulator's actions are refused as discrete; empty where they are not, or none are described."""
    if not isinstance(simulator, Described):
        return ""
    space = simulator.action_space
    if isinstance(space, Box) and np.issubdtype(space.low.dtype, np.floating):
        return ""
    return f"its actions are {space}: discrete actions are not supported, {CONTINUOUS}"


def unlike(builder: Callable[[], Any]) -> str:
    """Returns what about the actions of the simulator that is built does not fit; empty where all fits."""
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
