"""Who takes part in a sweep: combinations, pairs, draws, groups and their cohorts; and what cannot be swept."""

import dataclasses
import json
import math

import numpy as np
import pytest

from jaxrl.agents.bc import BC
from jaxrl.agents.fql import FQL
from jaxrl.agents.parts import Adam, Windows
from jaxrl.errors import UserError
from jaxrl.runs.config import Config, has_dataset
from jaxrl.sweeps import space as members
from jaxrl.sweeps import sweep
from jaxrl.sweeps.space import Draw, Settings, Space

BASE = Config(FQL(Windows(backup=5)), seed=5)


def values(space: Space) -> list[tuple]:
    """Returns the values of every member, and its seed."""
    return [(*member.values.values(), member.config.seed) for member in space.members()]


def test_a_grid_is_crossed_and_the_seeds_of_a_setting_lie_side_by_side():
    space = Space(BASE, {"agent.alpha": (0.3, 1.0), "agent.adam.lr": (1e-4, 3e-4)}, seeds=2)
    assert values(space) == [(e, lr, s) for e in (0.3, 1.0) for lr in (1e-4, 3e-4) for s in (5, 6)]
    last = space.members()[-1]
    assert (last.index, last.setting, last.name) == (7, 3, "007")
    assert last.config == dataclasses.replace(BASE, agent=FQL(Windows(backup=5), alpha=1.0, adam=Adam(3e-4)), seed=6)


def test_pairs_go_side_by_side_and_are_crossed_with_the_rest():
    grid = {"agent.alpha": (0.3, 1.0), "agent.adam.lr": (1e-4, 3e-4), "agent.windows.discount": (0.9, 0.99, 0.999)}
    space = Space(BASE, grid, paired=("agent.alpha", "agent.adam.lr"))
    assert values(space) == [(d, e, lr, 5) for d in (0.9, 0.99, 0.999) for e, lr in ((0.3, 1e-4), (1.0, 3e-4))]


def test_draws_follow_their_law_and_their_seed():
    drawn = {"agent.adam.lr": Draw("log", 1e-5, 1e-2), "agent.alpha": Draw("uniform", 1.0, 3.0)}
    space = Space(BASE, drawn=drawn, draws=2000, draw_seed=1)
    lr, eta, _ = np.array(values(space)).T
    assert 1e-5 <= lr.min() and lr.max() <= 1e-2 and 1 <= eta.min() and eta.max() <= 3
    assert abs(np.log10(lr).mean() + 3.5) < 4 * 3 / math.sqrt(12 * 2000)  # standard errors
    assert abs(eta.mean() - 2) < 4 * 2 / math.sqrt(12 * 2000)
    assert values(space) == values(dataclasses.replace(space))
    assert values(space) != values(dataclasses.replace(space, draw_seed=2))
    assert all(float(f"{value:.4g}") == value for value in lr)


def test_draws_are_made_for_every_combination_of_the_grid():
    space = Space(
        BASE, {"agent.windows.discount": (0.9, 0.99)}, drawn={"agent.adam.lr": Draw("log", 1e-5, 1e-2)}, draws=3
    )
    rows = values(space)
    assert [row[0] for row in rows] == [0.9] * 3 + [0.99] * 3
    assert [row[1] for row in rows[:3]] == [row[1] for row in rows[3:]]


def test_scalars_and_seeds_are_one_group_and_all_else_makes_groups():
    grid = {"agent.alpha": (0.3, 1.0), "agent.windows.chunk": (2, 5), "env": ("maze-medium", "push")}
    groups = members.groups(Space(BASE, grid, seeds=3).members())
    assert [len(group) for group in groups] == [6] * 4
    assert [(g[0].config.agent.chunk, g[0].config.env) for g in groups] == [
        (2, "maze-medium"),
        (2, "push"),
        (5, "maze-medium"),
        (5, "push"),
    ]


def test_another_dataset_is_another_group():
    groups = members.groups(Space(BASE, {"data": (None, "x.npz"), "agent.alpha": (0.3, 1.0)}).members())
    assert [[member.config.data for member in group] for group in groups] == [[None] * 2, ["x.npz"] * 2]


def test_runs_with_and_without_a_dataset_are_groups_of_their_own():
    """Updates offline are of a dataset; online alone, there is none."""
    groups = members.groups(Space(BASE, {"schedule.offline_updates": (0, 1000)}).members())
    assert [has_dataset(group[0].config) for group in groups] == [False, True]


@pytest.mark.parametrize(
    ("count", "most", "lots", "sizes"),
    [
        (96, 96, 1, [96]),
        (96, 40, 1, [32, 32, 32]),
        (13, 5, 1, [4, 4, 5]),
        (8, 8, 4, [2, 2, 2, 2]),
        (3, 8, 4, [1, 1, 1]),
    ],
)
def test_cohorts_are_even_and_keep_to_their_size(count, most, lots, sizes):
    parts = members.cohorts(list(range(count)), most, lots)
    assert [len(part) for part in parts] == sizes
    assert [member for part in parts for member in part] == list(range(count))


@pytest.mark.parametrize(
    ("path", "scalar"),
    [("agent.adam.lr", True), ("agent.critic.heads", False), ("agent.windows.chunk", False), ("reward_scale", False)],
)
def test_scalars_are_the_leaves_of_the_agent(path, scalar):
    assert members.is_scalar(BASE, path) is scalar


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": {"agent.adam.lrr": (1,)}}, "unknown field 'agent.adam.lrr': did you mean 'agent.adam.lr'?"),
        ({"grid": {"seed": (1, 2)}}, "seed: cannot be swept: use --seeds for the number"),
        ({"grid": {"schedule.eval_seed": (1, 2)}}, "schedule.eval_seed: cannot be swept"),
        ({"grid": {"agent.adam.lr": ()}}, "agent.adam.lr: has no values"),
        ({"grid": {"agent.adam.lr": (1.0, 1.0)}}, "agent.adam.lr = 1.0 1.0: has duplicate values"),
        ({"grid": {"agent.adam.lr": (1.0, -1.0)}}, "FQL.adam.lr = -1.0: must be"),
        ({"seeds": 0}, "seeds = 0: must be at least 1"),
        ({"draws": 2}, "draws = 2: drawn fields require --draws"),
        ({"drawn": {"agent.adam.lr": Draw("log", 1e-5, 1e-3)}}, "draws = 0: drawn fields require --draws"),
        ({"drawn": {"agent.adam.lr": Draw("log", 0, 1)}, "draws": 2}, "agent.adam.lr = log:0:1: needs 0 < LOW < HIGH"),
        (
            {"drawn": {"agent.adam.lr": Draw("uniform", 1, 1)}, "draws": 2},
            "agent.adam.lr = uniform:1:1: needs LOW < HIGH",
        ),
        (
            {"drawn": {"agent.windows.chunk": Draw("uniform", 1, 5)}, "draws": 2},
            "agent.windows.chunk = uniform:...: only Scalars",
        ),
        ({"grid": {"agent.adam.lr": (1e-3, 1e-4)}, "paired": ("agent.alpha",)}, "unknown swept field 'agent.alpha'"),
        (
            {
                "grid": {"agent.adam.lr": (1e-3, 1e-4), "agent.alpha": (1.0,)},
                "paired": ("agent.adam.lr", "agent.alpha"),
            },
            "paired: paired fields need equal numbers of values: agent.adam.lr has 2, agent.alpha has 1",
        ),
    ],
)
def test_what_cannot_be_swept_is_named(change, message):
    with pytest.raises(UserError) as raised:
        Space(BASE, **change).members()
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_members_per_program": 0}, "max_members_per_program = 0"),
        ({"rungs": (0.5, 0.25)}, "rungs = 0.5 0.25: must be ascending"),
        ({"rungs": (0.5, 1.0)}, "rungs = 0.5 1.0: must be ascending, between 0 and 1"),
        ({"keep": 1.0}, "keep = 1.0: must lie between"),
        ({"patience": math.nan}, "patience = nan: must be at least 0"),
    ],
)
def test_settings_out_of_range_are_named(change, message):
    with pytest.raises(UserError, match=message):
        Settings(**change).check()


def test_what_was_asked_for_survives_json():
    grid = {"agent.flow.net.hidden": ((8,), (16, 16)), "agent.adam.lr": (1e-3, 1e-4), "data": ("a.npz",)}
    space = Space(Config(BC()), grid, ("agent.flow.net.hidden", "agent.adam.lr"), seeds=2)
    asked = json.loads(json.dumps(sweep.asked_for(space, Settings(rungs=(0.5,)))))
    assert sweep.space_of(asked) == space
    drawn = Space(BASE, drawn={"agent.adam.lr": Draw("log", 1e-4, 1.0)}, draws=3, draw_seed=7)
    asked = json.loads(json.dumps(sweep.asked_for(drawn, Settings())))
    assert sweep.space_of(asked).members() == drawn.members()
