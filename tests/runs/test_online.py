"""A run that learns online alone has no dataset, unless it asks for one; every command works on it."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrl import cli
from jaxrl.agents.fql import FQL
from jaxrl.agents.parts import Critic, FlowPolicy, Net, OneStepPolicy, Windows
from jaxrl.agents.prdc import PRDC
from jaxrl.errors import UserError
from jaxrl.replay.weighting import Weighting
from jaxrl.runs import driver, memory
from jaxrl.runs.config import Config, has_dataset, records
from jaxrl.runs.datasets import load_data
from jaxrl.runs.signals import StopRequested
from jaxrl.training.schedule import Schedule
from tests import tiny

SCHEDULE = Schedule(
    offline_updates=0,
    online_steps=48,
    warmup_steps=16,
    utd=0.25,
    envs=4,
    steps_per_epoch=16,
    eval_every=2,
    eval_episodes=4,
)
NET = Net((8,))
AGENT = FQL(Windows(2, 2, 16), FlowPolicy(NET), OneStepPolicy(NET), Critic(NET))
CONFIG = Config(AGENT, env=tiny.ENV, schedule=SCHEDULE)
EPOCHS = 4


@pytest.fixture(autouse=True)
def quick():
    with tiny.quick():
        yield


class Stop:
    """A request to stop after every epoch, or none."""

    def __init__(self, requested: bool) -> None:
        self.requested = requested


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed, the only thing in the folder that it ran in."""
    folder = tmp_path_factory.mktemp("online")
    with pytest.MonkeyPatch.context() as patch, tiny.quick():
        patch.chdir(folder)
        driver.start(CONFIG, tiny.make(tiny.ENV), Path("run"), Stop(False))
    return folder / "run"


def changed(**fields) -> Config:
    return dataclasses.replace(CONFIG, schedule=dataclasses.replace(SCHEDULE, **fields))


@pytest.mark.parametrize(
    ("config", "has", "recorded"),
    [
        (CONFIG, False, False),
        (changed(online_data="replay"), False, False),
        (changed(online_data="both"), True, True),
        (changed(offline_updates=10), True, True),
        (changed(offline_updates=10, online_data="replay"), True, True),
        (changed(offline_updates=10, online_steps=0), True, True),
        (dataclasses.replace(CONFIG, data="x.npz"), True, False),
    ],
)
def test_a_run_has_a_dataset_where_a_phase_learns_from_it(config, has, recorded):
    assert (has_dataset(config), records(config)) == (has, recorded)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            dataclasses.replace(changed(online_data="replay"), data="x.npz"),
            "data = 'x.npz': this run does not learn from a dataset",
        ),
        (dataclasses.replace(CONFIG, weighting=Weighting("advantage")), "weighting.kind = 'advantage': this run"),
        (dataclasses.replace(CONFIG, agent=PRDC()), "phase 'online': PRDC looks up the dataset in every update"),
        (changed(online_steps=0), "there is nothing to do"),
    ],
)
def test_what_needs_a_dataset_is_refused_without_one(config, message):
    with pytest.raises(UserError, match=message):
        config.check()


def test_nothing_is_recorded_and_nothing_is_mixed_in(whole):
    assert [path.name for path in whole.parent.iterdir()] == ["run"]
    assert json.loads((whole / "manifest.json").read_text())["dataset_digest"] is None
    rows = tiny.rows(whole)
    assert [row["phase"] for row in rows] == ["warmup"] + ["online"] * 3
    assert [row["updates"] for row in rows] == [0, 4, 8, 12]
    assert set(json.loads((whole / "result.json").read_text())) >= {"online_success"}
    assert "behaviour_success" not in json.loads((whole / "result.json").read_text())
    env = tiny.make(tiny.ENV)
    run = driver.prepare(CONFIG, env, load_data(CONFIG, env))
    assert run.data is None and run.recorded is None


def test_its_batches_come_from_its_own_environments(whole):
    """What the replay holds is where the environments have been: each row moves by a tenth of its action."""
    leaves = tiny.carry(whole, EPOCHS)
    valid = leaves[".world.replay.valid"]
    assert leaves[".steps"] == valid.sum() > 0
    lane, row = np.nonzero(valid)
    obs, actions = leaves[".world.replay.obs"], leaves[".world.replay.actions"]
    moved = np.clip(obs[lane, row] + 0.1 * np.clip(actions[lane, row], -1, 1), -1, 1)
    np.testing.assert_allclose(obs[lane, row + 1], moved, atol=1e-5)


def test_stopped_after_each_epoch_it_is_the_same_run(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    env = tiny.make(tiny.ENV)
    for i in range(EPOCHS - 1):
        with pytest.raises(StopRequested):
            (driver.resume if i else driver.start)(CONFIG, env, Path("run"), Stop(True))
    driver.resume(CONFIG, env, Path("run"), Stop(False))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    one, other = (tiny.carry(folder, EPOCHS) for folder in (tmp_path / "run", whole))
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_commands_on_it(whole, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["replay", str(whole), "--epochs=4"]) == 0
    assert capsys.readouterr().out == "identical\n"
    assert cli.main(["eval", str(whole), "--episodes=4"]) == 0
    found = json.loads(capsys.readouterr().out.removeprefix("result: "))
    assert found["eval/success"] == tiny.rows(whole)[-1]["eval/success"]
    assert cli.main(["render", str(whole), f"--out={tmp_path / 'a.gif'}"]) == 0
    assert cli.main(["report", str(whole), f"--out={tmp_path / 'report'}"]) == 0
    assert "no dataset" not in (tmp_path / "report" / "report.html").read_text()  # one environment, one kind of data
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gif", "report"]


def test_the_plan_of_a_run_without_a_dataset(whole):
    env = tiny.make(tiny.ENV)
    planned = memory.held(CONFIG, env)
    carry = driver.prepare(CONFIG, env, None).first()
    assert planned == {
        "agent": memory.size(carry.agent),
        "dataset": 0,
        "replay": memory.size(carry.world.replay),
        "environments": memory.size(carry.world.rollout),
    }
    lines = dict(line.rsplit(maxsplit=2)[:2] for line in memory.plan(CONFIG, env).splitlines())
    assert lines["dataset"] == "0.0" and {"replay", "working memory", "total on the device"} <= lines.keys()


def test_a_run_that_began_with_a_dataset_does_not_go_on_without_one(whole, tmp_path):
    """As a run of an earlier version would, which recorded a behaviour in any case."""
    path = tmp_path / "run"
    path.mkdir()
    (path / "manifest.json").write_text(json.dumps({"dataset_digest": "d1"}))
    with pytest.raises(UserError, match="began with a dataset, whose sha256 was d1, but has none now"):
        driver.resume(CONFIG, tiny.make(tiny.ENV), path, Stop(False))


def test_a_dataset_that_is_asked_for_is_used(tmp_path):
    """Named, it is learned from from the first online update on; and from nothing else, the replay alone."""
    data = tiny.write_data(tmp_path / "data.npz")
    config = dataclasses.replace(CONFIG, data=str(data))
    env = tiny.make(tiny.ENV)
    run = driver.prepare(config, env, load_data(config, env))
    assert run.recorded is None and [phase.data for phase in run.timeline.phases] == ["none", "both"]
    carry, _ = run.epoch(run.first(), 0)
    carry, row = run.epoch(carry, 1)
    alone = driver.prepare(changed(offline_updates=10, online_data="replay"), env, None)
    assert [phase.data for phase in alone.timeline.phases] == ["dataset", "none", "replay"]
    assert row["updates"] == 4 and jax.tree.leaves(run.data)[0].shape[1] == 20 * 21 + 1
