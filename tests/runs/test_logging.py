"""Axes and identities: where a row is in TensorBoard and Weights & Biases, and in which of their runs."""

import json
import sys
import types
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from jaxrl.errors import UserError
from jaxrl.runs.boards import publish
from jaxrl.runs.logging import Log

ROWS = [
    {"epoch": 1, "phase": "offline", "updates": 100, "steps": 0, "actor/bc": 0.5},
    {"epoch": 2, "phase": "online", "updates": 110, "steps": 640, "actor/bc": float("nan")},
]


def events(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns the points of every curve that a run wrote for TensorBoard."""
    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted((path / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:  # records of length, checksum, content, checksum
            length = int.from_bytes(data[:8], "little")
            event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_tensorboards_axis_is_updates_and_steps(tmp_path):
    log = Log(tmp_path)
    for row in ROWS:
        log.row(row)
    log.close()
    assert events(tmp_path) == {
        "actor/bc": [(100, 0.5)],
        "epoch": [(100, 1.0), (750, 2.0)],
        "updates": [(100, 100.0), (750, 110.0)],
        "steps": [(100, 0.0), (750, 640.0)],
    }


class FakeWandb(types.ModuleType):
    """Remembers what it was asked for, as if it were Weights & Biases."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.asked, self.rows = [], []

    def init(self, **asked):
        self.asked.append(asked)
        return types.SimpleNamespace(log=lambda row, step: self.rows.append((step, row)), finish=lambda: None)


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_a_folder_is_a_run_of_its_own_in_weights_and_biases_whatever_its_name(tmp_path, wandb, monkeypatch):
    paths = [tmp_path / place / "run: a/b?#".replace("/", "-") for place in ("x", "y")]
    for path in (*paths, paths[0]):
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps({"seed": 3}))
        log = Log(path, wandb=True)
        log.row(ROWS[1])
        log.close()
    ids = [asked["id"] for asked in wandb.asked]
    assert ids[0] == ids[2] != ids[1] and all(each.isalnum() for each in ids)
    assert all(asked["config"] == {"seed": 3} and asked["resume"] == "allow" for asked in wandb.asked)
    assert wandb.rows[0] == (750, {"epoch": 2, "updates": 110, "steps": 640})


@pytest.mark.parametrize(
    ("given", "variable", "project"), [(True, None, "jaxrl"), (True, "mine", "mine"), ("ours", "mine", "ours")]
)
def test_the_project_is_chosen_by_flag_or_environment(tmp_path, wandb, monkeypatch, given, variable, project):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    if variable:
        monkeypatch.setenv("WANDB_PROJECT", variable)
    (tmp_path / "config.json").write_text("{}")
    Log(tmp_path, given).close()
    assert wandb.asked[0]["project"] == project


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    log = Log(tmp_path)

    def full():
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(log.boards.board, "flush", full)
        with pytest.raises(UserError, match=rf"^cannot write {tmp_path}/tensorboard: No space left on device$"):
            log.row(ROWS[0])
    log.close()


def test_a_finished_run_is_published_once(tmp_path, wandb):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS).replace("NaN", "null"))
    for _ in range(2):
        publish(tmp_path)
        publish(tmp_path, "ours", group="sweep")
    assert set(events(tmp_path)["steps"]) == {(100, 0.0), (750, 640.0)}
    assert [(asked["project"], asked["group"]) for asked in wandb.asked] == [("ours", "sweep")]
    assert [step for step, _ in wandb.rows] == [100, 750]


def test_a_run_stays_in_its_project(tmp_path, wandb):
    (tmp_path / "config.json").write_text("{}")
    Log(tmp_path, "ours").close()
    Log(tmp_path, True).close()
    with pytest.raises(UserError, match="--wandb-project theirs: this run's is 'ours'"):
        Log(tmp_path, "theirs")
