"""A run that was stopped, killed or damaged goes on as if nothing had been: bit for bit, replay and simulator too."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from jaxrl import cli
from jaxrl.runs import checkpoint, directory, driver, memory
from jaxrl.runs.datasets import load_data
from jaxrl.runs.logging import Log
from jaxrl.runs.signals import StopRequested
from jaxrl.training import loop
from tests import tiny


@pytest.fixture(autouse=True)
def quick():
    with tiny.quick():
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run's directory, driven to its end without a break. Its data lie beside it."""
    return tiny.finished(tmp_path_factory.getbasetemp())


def copy(path: Path, to: Path) -> Path:
    """Returns a copy of a run; its data stay where they are."""
    return Path(shutil.copytree(path, to))


class StopAfter:
    """A request to stop that is there after so many epochs, for as long as nobody asks again."""

    def __init__(self, epochs: int) -> None:
        self.left = epochs

    @property
    def requested(self) -> bool:
        self.left -= 1
        return self.left <= 0


def drive(whole: Path, path: Path, stop: object) -> dict:
    """Starts the run in a new folder, or goes on with it there."""
    config = directory.read_config(whole)
    return (driver.resume if path.exists() else driver.start)(config, tiny.make(config.env), path, stop)


class Killed(BaseException):
    """The process is gone."""


def test_a_run_stopped_after_every_epoch_equals_one_that_was_not(whole, tmp_path, caplog):
    drive(whole, tmp_path / "before", StopAfter(100))  # whose programs are there, unless other tests cleared them
    with jax.log_compiles():
        for epoch in range(1, tiny.EPOCHS):
            with pytest.raises(StopRequested):
                drive(whole, tmp_path / "run", StopAfter(1))
            assert len(tiny.rows(tmp_path / "run")) == epoch
            assert checkpoint.epochs(tmp_path / "run" / "checkpoints")[-1] == epoch
        result = drive(whole, tmp_path / "run", StopAfter(1))
    tiny.assert_same_run(tmp_path / "run", whole)
    recorded = json.loads((whole / "result.json").read_text())
    apart = {"run", "seconds"}
    assert {k: v for k, v in result.items() if k not in apart} == {k: v for k, v in recorded.items() if k not in apart}
    # what was restored runs in the programs that are there already
    assert "Compiling jit(epoch)" not in caplog.text and "Compiling jit(evaluate)" not in caplog.text


@pytest.mark.parametrize(
    ("moment", "epoch"),
    [
        ("before the row", 0),
        ("before the row", 5),
        ("before the checkpoint", 2),
        ("before the checkpoint", 4),
        ("within the checkpoint", 1),
        ("within the checkpoint", 6),
    ],
)
def test_a_run_killed_at_any_moment_equals_one_that_was_not(whole, tmp_path, monkeypatch, epoch, moment):
    def die(*arguments):
        raise Killed

    def die_later(folder, number, carry):
        if number > epoch:
            (folder / f"{number}.orbax-checkpoint-tmp").mkdir(parents=True)
            (folder / str(number)).mkdir()
            raise Killed
        save(folder, number, carry)

    save, row = checkpoint.save, Log.row
    with monkeypatch.context() as patch:
        if moment == "before the row":
            patch.setattr(Log, "row", lambda log, new: row(log, new) if new["epoch"] <= epoch else die())
        elif moment == "before the checkpoint":
            patch.setattr(checkpoint, "save", lambda *a: save(*a) if a[1] <= epoch else die())
        else:
            patch.setattr(checkpoint, "save", die_later)
        with pytest.raises(Killed):
            drive(whole, tmp_path / "run", StopAfter(99))
    drive(whole, tmp_path / "run", StopAfter(99))
    tiny.assert_same_run(tmp_path / "run", whole)
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["6", "6.json", "7", "7.json"]


def test_epochs_between_checkpoints_are_repeated(whole, tmp_path):
    config = dataclasses.replace(directory.read_config(whole), checkpoint_every=3)
    path, env = tmp_path / "run", tiny.make(tiny.ENV)
    with pytest.raises(StopRequested):
        driver.start(config, env, path, StopAfter(5))
    (path / "checkpoints" / "5.json").unlink()
    driver.resume(config, env, path, StopAfter(99))
    tiny.assert_same_run(path, whole)


@pytest.mark.parametrize("harm", ["flip a bit", "truncate", "delete", "delete the list", "delete the folder"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(whole, tmp_path, capsys, harm):
    path = copy(whole, tmp_path / "run")
    newest = path / "checkpoints" / "7"
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = largest.read_bytes()
    if harm == "flip a bit":
        largest.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    elif harm == "truncate":
        largest.write_bytes(content[: len(content) // 2])
    elif harm == "delete":
        largest.unlink()
    elif harm == "delete the list":
        newest.with_suffix(".json").unlink()
    else:
        shutil.rmtree(newest)
    drive(whole, path, StopAfter(99))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("checkpoint of epoch 7 is damaged (") and lines[0].endswith("trying that of epoch 6")
    tiny.assert_same_run(path, whole)


def test_where_no_checkpoint_is_whole_a_run_begins_again(whole, tmp_path, capsys):
    path = copy(whole, tmp_path / "run")
    for name in ("6.json", "7.json"):
        (path / "checkpoints" / name).write_text("{")
    assert cli.main(["eval", str(path)]) == 2
    assert "has no checkpoint that can be read" in capsys.readouterr().err.splitlines()[-1]
    drive(whole, path, StopAfter(99))
    tiny.assert_same_run(path, whole)


def test_the_online_phase_is_in_the_checkpoint(whole):
    leaves = tiny.carry(whole)
    assert leaves[".steps"] == 48 and leaves[".updates"] == 52 and leaves[".epoch"] == 7
    assert leaves[".world.replay.count"].sum() >= 48
    assert leaves[".world.rollout.states.steps"].shape == (4,)
    anchor, actor = (
        leaves[f".agent.{part}['params']['MLP_0']['Dense_0']['kernel']"] for part in ("anchor", "params['actor']")
    )
    assert anchor.shape == actor.shape and (anchor != actor).any()


# Recompilation and transfers


def test_nothing_compiles_after_the_first_epochs_of_a_phase(whole):
    compiled = json.loads((whole.parent / "compiled.json").read_text())
    epoch, evaluate = "jit(epoch)", "jit(evaluate)"
    # The first epoch of a phase compiles itself, the first that is evaluated the evaluation, and all others nothing.
    assert [line.count(epoch) for line in compiled] == [1, 0, 0, 0, 1, 0, 0, 0]
    assert [line.count(evaluate) for line in compiled] == [0, 1, 0, 0, 0, 1, 0, 0]
    assert [compiled[i] for i in (2, 3, 6)] == [[], [], []]


def test_an_epoch_moves_nothing_between_host_and_device(whole, tmp_path, monkeypatch):
    calls = []

    def guarded(*arguments):
        calls.append(arguments)
        with jax.transfer_guard("disallow"):
            return compiled(*arguments)

    compiled = loop.jitted_epoch
    monkeypatch.setattr(loop, "jitted_epoch", guarded)
    drive(whole, tmp_path / "run", StopAfter(99))
    assert len(calls) == tiny.EPOCHS
    tiny.assert_same_run(tmp_path / "run", whole)


# Memory


def test_the_plan_is_what_the_run_holds(whole):
    config = directory.read_config(whole)
    env = tiny.make(config.env)
    planned = memory.held(config, env)
    run = driver.prepare(config, env, load_data(config, env))
    carry = run.first()
    for index in range(tiny.EPOCHS):
        carry, _ = run.epoch(carry, index)
    held = {
        "agent": carry.agent,
        "dataset": run.data,
        "replay": carry.world.replay,
        "environments": carry.world.rollout,
    }
    assert planned == {name: memory.size(tree) for name, tree in held.items()}
    assert sum(planned.values()) == pytest.approx(sum(x.nbytes for x in jax.tree.leaves((carry, run.data))), rel=0.01)


def test_planning_a_recording_counts_its_rows_and_allocates_nothing(whole, monkeypatch):
    config = dataclasses.replace(directory.read_config(whole), data=None, data_steps=10_000_000_000)
    live = sum(x.nbytes for x in jax.live_arrays())
    amounts = memory.held(config, tiny.make(config.env))
    # 10^10 steps in episodes of 20 steps and 21 rows; a row is 5 floats and 3 flags
    assert amounts["dataset"] == pytest.approx(10**10 * 21 / 20 * 23)
    assert sum(x.nbytes for x in jax.live_arrays()) <= live + 1000


def test_a_run_that_cannot_fit_is_refused_before_anything_is_written(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "available", lambda: 3 * 2**30)
    large = [
        "train",
        "fmq",
        tiny.ENV,
        *tiny.AGENT,
        *tiny.SCHEDULE,
        "--data-steps=400000000",
        "--schedule.replay=200000000",
    ]
    for more in ([], ["--plan"]):
        assert cli.main([*large, "--schedule.online-steps=100000000", *more]) == 2
        out, error = capsys.readouterr()
        advice = "lower data_steps (9.0 GiB) or schedule.replay (4.3 GiB)"
        assert error == f"jaxrl: this run needs 13.3 GiB, there are 3.0 GiB: {advice}\n"
        assert out == "" and tiny.tree(tmp_path) == []


def test_the_plan_of_the_device_is_what_is_held_and_the_largest_programs_scratch(whole, capsys, monkeypatch):
    config = directory.read_config(whole)
    monkeypatch.setattr(memory, "programs", lambda *_: iter([10 * 2**20, 30 * 2**20]))
    monkeypatch.setattr(memory, "temporary", lambda amount: amount)
    monkeypatch.setattr(memory, "peak_rss", lambda: 500 * 2**20)
    lines = dict(line.rsplit(maxsplit=2)[:2] for line in memory.plan(config, tiny.make(config.env)).splitlines())
    held = sum(memory.held(config, tiny.make(config.env)).values()) / 2**20
    assert float(lines["total on the device"]) == pytest.approx(held + 30, abs=0.06)
    assert float(lines["process at its peak, having compiled all"]) == pytest.approx(held + 530, abs=0.1)


# Signals, sent to processes of their own


@pytest.fixture(scope="module")
def environ(tmp_path_factory) -> dict[str, str]:
    """The environment of the processes: one cache of compiled programs, and the settings of `tiny.quick`."""
    return os.environ | {
        "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")),
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
    }


def launch(argv: list[str], environ: dict[str, str], **more) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | more
    return subprocess.Popen([sys.executable, "-m", "jaxrl.cli", *argv], env=environ, **pipes)


def wait_for(condition, process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def count(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_processes_stopped_by_signals_and_killed_continue_exactly(whole, tmp_path, environ):
    path = tmp_path / "run"
    argv, again = [*tiny.flags(whole.parent / "data.npz"), f"--out={path}"], ["train", "--resume", str(path)]
    for number, epochs in ((signal.SIGTERM, 1), (signal.SIGKILL, 3), (signal.SIGINT, 5)):
        process = launch(again if path.exists() else argv, environ)
        wait_for(lambda epochs=epochs: count(path / "metrics.jsonl") >= epochs, process)
        process.send_signal(number)
        _, error = process.communicate()
        if number == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL
        else:
            assert process.returncode == 75
            resume = f"stopped and saved; go on with: jaxrl train --resume {path}"
            assert error.splitlines() == ["", "saving at the end of this epoch; once more to stop at once", resume]
        assert count(path / "metrics.jsonl") < tiny.EPOCHS
    process = launch(again, environ)
    out, error = process.communicate()
    assert (process.returncode, error) == (0, "")
    assert json.loads(out.splitlines()[-1].removeprefix("result: "))["run"] == str(path)
    tiny.assert_same_run(path, whole)


def test_a_second_ctrl_c_stops_at_once_inside_a_compiled_call(whole, tmp_path, environ):
    path, said = tmp_path / "run", tmp_path / "stderr"
    endless = ["--schedule.online-steps=8000000", "--schedule.steps-per-epoch=8000000", "--schedule.replay=1000"]
    argv = [*tiny.flags(whole.parent / "data.npz"), *endless, f"--out={path}"]
    with said.open("w") as stderr:
        process = launch(argv, environ | {"JAX_LOG_COMPILES": "true"}, stdout=subprocess.DEVNULL, stderr=stderr)
        wait_for(lambda: said.read_text().count("Finished XLA compilation of jit(epoch)") == 2, process)
        process.send_signal(signal.SIGINT)
        wait_for(lambda: "once more to stop at once" in said.read_text(), process)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
    assert said.read_text().endswith("\nstopped at once; the last checkpoint is whole\n")
    assert checkpoint.epochs(path / "checkpoints") == [tiny.OFFLINE - 1, tiny.OFFLINE]
    assert checkpoint.damage(path / "checkpoints", tiny.OFFLINE) is None


def test_a_second_process_finds_its_programs_on_disk(whole, environ, tmp_path):
    environ = environ | {"XDG_CACHE_HOME": str(tmp_path), "JAX_DEBUG_LOG_MODULES": "jax._src.compiler"}
    for found in (False, True):
        process = launch(["eval", str(whole), "--episodes=4"], environ)
        _, error = process.communicate()
        assert process.returncode == 0
        assert ("Persistent compilation cache hit for 'jit_evaluate'" in error) is found
        assert len(list((tmp_path / "jaxrl" / "xla").glob("jit_evaluate-*-cache"))) == 1
