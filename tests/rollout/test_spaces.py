"""Facts about jaxrl.rollout.spaces: which actions of simulators are refused, and where."""

import contextlib
import dataclasses
import functools
from typing import ClassVar

import numpy as np
import pytest

from envs.checker import check
from jaxrl.errors import UserError
from jaxrl.rollout import host, spaces
from jaxrl.rollout.workers import Pool, SimulatorFailed, Slot
from jaxrl.types import Spec
from tests import walk


class Box:
    """A space of vectors, as Gymnasium's."""

    def __init__(self, low, high, dtype=np.float32):
        self.low, self.high = np.array([low], dtype), np.array([high], dtype)

    def __repr__(self):
        return f"Box({self.low[0]}, {self.high[0]})"


class Discrete:
    """A space of n choices."""

    dtype, shape = np.dtype(np.int64), ()

    def __repr__(self):
        return "Discrete(3)"


class Described(walk.Walk):
    """The walk, with a space of its actions."""

    def __init__(self, space=None):
        super().__init__()
        self.action_space = space


@dataclasses.dataclass(frozen=True, eq=False)
class DescribedEnv:
    space: object
    spec: ClassVar[Spec] = Spec(3, 1)
    horizon: ClassVar[int] = walk.HORIZON
    tasks: int = 2

    def builder(self, picture=0):
        return functools.partial(Described, self.space)


@pytest.mark.parametrize(
    ("space", "says"),
    [
        (Box(-1, 1), ""),
        (Box(-2, 2), ""),
        (Box(0, 4, np.int64), "its actions are Box(0, 4): discrete actions are not supported"),
        (Discrete(), "its actions are Discrete(3): discrete actions are not supported"),
    ],
)
def test_the_checker_names_actions_that_do_not_fit(space, says):
    failed = [str(finding) for finding in check(DescribedEnv(space)) if not finding.ok]
    assert len(failed) == (1 if says else 0)
    assert all(line.startswith(f"FAIL  actions are continuous, in [-1, 1]: {says}") for line in failed)


@pytest.mark.parametrize(
    ("space", "taken"),
    [
        (Box(-2, 2), [-2, 0, 1, 2]),
        (Box(0, 1), [0, 0.5, 0.75, 1]),
        (Box(-1, 1), [-1, 0, 0.5, 1]),
        (None, [-1, 0, 0.5, 1]),
        (Box(-np.inf, np.inf), [-1, 0, 0.5, 1]),
    ],
)
def test_actions_are_scaled_to_the_space_that_a_simulator_describes(space, taken):
    slot = Slot(Described(space), 8)
    slot.reset(0, 1)
    received = []
    slot.simulator.step = lambda action: received.append(float(action[0])) or (np.zeros(3), 0.0, False, False, {})
    slot.execute(np.array([[-1], [0], [0.5], [1]], np.float32), 0)
    assert received == taken


@pytest.mark.parametrize(
    ("flag", "fits"), [(True, True), (np.bool_(False), True), (0.0, True), (0.5, False), ("", False)]
)
def test_flags_of_a_step_are_true_or_false(flag, fits):
    slot = Slot(walk.Walk(), 8)
    slot.reset(0, 1)
    slot.simulator.step = lambda action: (np.zeros(3), 0.0, flag, False, {})
    with (
        contextlib.nullcontext() if fits else pytest.raises(UserError, match=r"terminated = .*, must be True or False")
    ):
        slot.execute(np.zeros((1, 1), np.float32), 0)


def test_observations_of_another_size_than_the_spec_says_are_named():
    host.check_sizes(np.zeros((2, 3), np.float32), Spec(3, 1))
    with pytest.raises(UserError, match=r"observation is float32\[4\], its spec says float32\[3\]"):
        host.check_sizes(np.zeros((2, 4), np.float32), Spec(3, 1))
    with pytest.raises(UserError, match=r"observation\['a'\] is float32\[1\], its spec says absent"):
        host.check_sizes({"a": np.zeros((2, 1), np.float32)}, Spec(3, 1))


def test_the_checker_says_how_actions_are_scaled():
    lines = [str(finding) for finding in check(DescribedEnv(Box(0, 4)))]
    assert "ok    actions are continuous, in [-1, 1]: scaled to its action_space, [0, 4]" in lines
    assert "ok    actions are continuous, in [-1, 1]" in map(str, check(DescribedEnv(Box(-1, 1))))


def test_a_simulator_of_discrete_actions_is_refused_before_its_first_episode():
    slots = np.arange(1)
    with Pool(functools.partial(Described, Discrete()), 8, workers=1) as pool:
        with pytest.raises(
            SimulatorFailed, match=r"cannot be used: its actions are Discrete\(3\): discrete actions are"
        ):
            pool.reset("walk", slots, slots, slots)
    assert spaces.discrete(walk.Walk()) == ""  # it describes none
