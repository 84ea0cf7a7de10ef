"""An agent of one's own trains like those that jaxrl ships, with its annotations as strings and phases of its own."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import cli
from jaxrl.agents import AGENTS
from jaxrl.errors import UserError
from jaxrl.runs import driver
from jaxrl.runs.config import Config, from_dict, to_dict
from jaxrl.runs.presets import PRESETS
from jaxrl.runs.signals import StopRequested
from jaxrl.sweeps import space
from jaxrl.training import loop
from jaxrl.training.schedule import Schedule
from jaxrl.types import Spec
from tests import tiny
from tests.own import Own

SCHEDULE = Schedule(offline_updates=8, online_steps=0, updates_per_epoch=4, envs=4, eval_every=2, eval_episodes=4)
EPOCHS = 6


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """Has the agent in the table of agents, and a preset of it."""
    monkeypatch.setitem(AGENTS, "own", Own)
    monkeypatch.setitem(PRESETS["quick"], "own", Config(Own(), env=tiny.ENV, schedule=SCHEDULE))
    with tiny.quick():
        yield


def config(folder: Path, **fields) -> Config:
    return Config(Own(**fields), env=tiny.ENV, schedule=SCHEDULE, data=str(folder / "data.npz"))


class Stop:
    """A request to stop after every epoch, or none."""

    def __init__(self, requested: bool) -> None:
        self.requested = requested


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed, beside its data."""
    folder = tmp_path_factory.mktemp("own")
    tiny.write_data(folder / "data.npz")
    with pytest.MonkeyPatch.context() as patch, tiny.quick():
        patch.setitem(AGENTS, "own", Own)
        driver.start(config(folder), tiny.make(tiny.ENV), folder / "run", Stop(False))
    return folder / "run"


def test_annotations_that_are_strings_tell_sizes_from_numbers():
    """Sizes and choices shape the program, numbers are leaves, wherever the module's annotations are strings."""
    leaves, structure = jax.tree.flatten(Own())
    assert leaves == [1e-3, 3e-4]
    assert jax.tree.structure(Own(rate=2.0)) == structure != jax.tree.structure(Own(batch_size=4))
    assert jax.tree.structure(Own(measured="all")) != structure
    agent = loop.on_device(Own())
    assert agent.batch_size == 8 and agent.rate.dtype == jnp.float32 and agent.adam.lr.dtype == jnp.float32
    state = agent.init(jax.random.key(0), Spec(2, 1))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state)) and state.spec == Spec(2, 1)


def test_its_numbers_are_checked_swept_saved_and_read_like_any_others():
    one = Config(Own(rate=0.5, actor=dataclasses.replace(Own().actor, net=dataclasses.replace(Own().actor.net))))
    assert from_dict(json.loads(json.dumps(to_dict(one)))) == one
    scalars = {path for path, _ in space.fields(one) if space.is_scalar(one, path)}
    assert scalars == {"agent.rate", "agent.adam.lr"}
    with pytest.raises(UserError, match=r"Own\.batch_size = 0: must be at least 1"):
        Config(Own(batch_size=0)).check()
    with pytest.raises(UserError, match=r"Own\.rate = nan: must be finite"):
        Config(Own(rate=float("nan"))).check()


def test_the_command_line_reads_its_flags(whole, tmp_path, capsys):
    argv = f"train own --data={whole.parent / 'data.npz'} --agent.batch-size=4 --agent.actor.net.hidden 4,4".split()
    assert cli.main([*argv, "--agent.rate=0.5", "--agent.measured=all", "--plan"]) == 0
    assert "total on the device" in capsys.readouterr().out
    assert cli.main([*argv, "--agent.batch-sizes=4"]) == 2
    assert "did you mean --agent.batch-size?" in capsys.readouterr().err


def test_its_phases_follow_each_other_and_each_is_entered_once(whole):
    rows = tiny.rows(whole)
    assert [row["phase"] for row in rows] == ["pretrain"] * 2 + ["collect"] * 2 + ["distill"] * 2
    assert [row["updates"] for row in rows] == [4, 8, 8, 8, 16, 24]
    assert ["eval/success" in row for row in rows] == [False, True, False, False, False, True]
    leaves = tiny.carry(whole, EPOCHS)
    assert leaves[".agent.begun"] == 3 and leaves[".agent.step"] == 24
    assert leaves[".steps"] == rows[3]["steps"] == rows[5]["steps"] == leaves[".world.replay.valid"].sum() > 0
    assert {name.split("_")[0] for name in json.loads((whole / "result.json").read_text()) if "success" in name} == {
        "pretrain",
        "distill",
    }
    assert (whole / "curves.png").stat().st_size > 1000


def test_what_was_not_measured_does_not_count(whole):
    """Every second update measures the loss; the number of the update is known of all of them."""
    rows = [row for row in tiny.rows(whole) if row["phase"] != "collect"]
    assert all(row["own/loss"] > 0 for row in rows)
    assert [row["own/step"] for row in rows] == [2.5, 6.5, 12.5, 20.5]


def test_stopped_after_each_epoch_it_is_the_same_run(whole, tmp_path):
    path, env = tmp_path / "run", tiny.make(tiny.ENV)
    for _ in range(EPOCHS - 1):
        with pytest.raises(StopRequested):
            (driver.resume if path.exists() else driver.start)(config(whole.parent), env, path, Stop(True))
    driver.resume(config(whole.parent), env, path, Stop(False))
    assert (path / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    one, other = (tiny.carry(folder, EPOCHS) for folder in (path, whole))
    assert all(np.array_equal(one[name], other[name]) for name in one) and one[".agent.begun"] == 3
    assert cli.main(["replay", str(path), f"--epochs={EPOCHS}"]) == 0


def test_a_metric_that_no_update_measures_is_null(whole, tmp_path):
    driver.start(config(whole.parent, measured="none"), tiny.make(tiny.ENV), tmp_path / "run", Stop(False))
    rows = tiny.rows(tmp_path / "run")
    assert {row["own/loss"] for row in rows if row["phase"] != "collect"} == {None}
