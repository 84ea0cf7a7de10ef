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
import jax.numpy as jnp
import pytest

from jaxrl import cli, report, system
from jaxrl.errors import UserError
from jaxrl.runs import checkpoint, directory, driver, lock, memory
from jaxrl.runs.datasets import load_data
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


def test_a_run_stopped_after_every_epoch_equals_one_that_was_not(whole, tmp_path):
    drive(whole, tmp_path / "before", StopAfter(100))  # whose programs are there, unless other tests cleared them
    with tiny.compiled() as names:
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
    assert not {"jit(epoch)", "jit(evaluate)"} & set(names)  # what was restored runs in the programs that are there


@pytest.mark.parametrize(
    ("moment", "epoch"),
    [
        ("before the row", 1),
        ("before the row", 5),
        ("before the checkpoint", 2),
        ("before the checkpoint", 4),
        ("within the checkpoint", 1),
        ("within the checkpoint", 6),
    ],
)
def test_a_run_killed_at_any_moment_equals_one_that_was_not(whole, tmp_path, epoch, moment):
    """It leaves an epoch unwritten; or its row, and no checkpoint; or half a checkpoint."""
    path = tmp_path / "run"
    with pytest.raises(StopRequested):
        drive(whole, path, StopAfter(epoch))
    if moment != "before the row":
        row = (whole / "metrics.jsonl").read_text().splitlines()[epoch]
        with (path / "metrics.jsonl").open("a") as file:
            file.write(row + "\n")
    if moment == "within the checkpoint":
        (path / "checkpoints" / f"{epoch + 1}.orbax-checkpoint-tmp").mkdir()
        (path / "checkpoints" / str(epoch + 1)).mkdir()
    drive(whole, path, StopAfter(99))
    tiny.assert_same_run(path, whole)
    assert sorted(p.name for p in (path / "checkpoints").iterdir()) == ["6", "6.json", "7", "7.json"]


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
    assert lines[0].startswith("checkpoint of epoch 7 is damaged (") and lines[0].endswith("trying that of epoch 6")
    aside = path / "checkpoints" / "7.damaged"
    assert aside.exists() == (harm in ("flip a bit", "truncate", "delete"))
    assert lines[1:-1] == ([f"the damaged checkpoint is now {aside}"] if aside.exists() else [])
    assert lines[-1].startswith(f"{path}: going on after epoch 6; damaged and later rows are now in metrics.jsonl.drop")
    assert (path / "metrics.jsonl.dropped").read_text() == (whole / "metrics.jsonl").read_text().splitlines(True)[-1]
    tiny.assert_same_run(path, whole)


def test_where_no_checkpoint_is_whole_a_run_begins_again_if_asked_and_nothing_is_lost(whole, tmp_path, capsys):
    path = copy(whole, tmp_path / "run")
    for name in ("6.json", "7.json"):
        (path / "checkpoints" / name).write_text("{")
    assert cli.main(["eval", str(path)]) == 2
    assert "has no checkpoint that can be read" in capsys.readouterr().err.splitlines()[-1]
    before = (path / "metrics.jsonl").read_text()
    assert cli.main(["train", f"--resume={path}"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"jaxrl: {path}/checkpoints has no checkpoint that can be read") and "--restart" in line
    assert (path / "metrics.jsonl").read_text() == before
    assert cli.main(["train", f"--resume={path}", "--restart"]) == 0
    tiny.assert_same_run(path, whole)
    assert (path / "metrics.jsonl.dropped").read_text() == before
    assert (path / "checkpoints.dropped" / "7").exists()


def test_checkpoints_that_are_gone_are_missed(whole, tmp_path, capsys):
    path = copy(whole, tmp_path / "run")
    (path / "checkpoints").rename(tmp_path / "unmounted")
    before = (path / "metrics.jsonl").read_text()
    for there in (False, True):  # a dangling link, an empty place
        (path / "checkpoints").mkdir() if there else (path / "checkpoints").symlink_to(tmp_path / "nowhere")
        assert cli.main(["train", f"--resume={path}"]) == 2
        assert "there were some: is its disk there?" in capsys.readouterr().err
        assert (path / "metrics.jsonl").read_text() == before
        (path / "checkpoints").rmdir() if there else (path / "checkpoints").unlink()
    (tmp_path / "unmounted").rename(path / "checkpoints")
    drive(whole, path, StopAfter(99))
    tiny.assert_same_run(path, whole)


def test_a_damaged_row_loses_no_other(whole, tmp_path, capsys):
    path = tmp_path / "run"
    with pytest.raises(StopRequested):
        drive(whole, path, StopAfter(5))
    lines = (path / "metrics.jsonl").read_text().splitlines(True)
    damaged = lines[2].replace('"epoch"', '"epoch')
    (path / "metrics.jsonl").write_text("".join([*lines[:2], damaged, *lines[3:]]))
    drive(whole, path, StopAfter(99))
    assert [row["epoch"] for row in tiny.rows(path)] == [1, 2, 4, 5, 6, 7]
    assert (path / "metrics.jsonl.dropped").read_text() == damaged
    error = capsys.readouterr().err
    assert "rows are now in metrics.jsonl.dropped" in error and "lacks 1 of 7 epochs" in error
    with pytest.raises(UserError, match="has no row of epoch 3"):
        driver.replay(directory.read_config(path), tiny.make(tiny.ENV), path, 7)


def test_files_of_the_users_own_stay(whole, tmp_path):
    path = tmp_path / "run"
    with pytest.raises(StopRequested):
        drive(whole, path, StopAfter(5))
    kept = ("best", "notes.txt", "5-copy", "x.json", "4.json.bak")
    for name in kept:
        (path / "checkpoints" / name).write_text("mine")
    (path / "checkpoints" / "folder").mkdir()
    drive(whole, path, StopAfter(99))
    left = {entry.name for entry in (path / "checkpoints").iterdir()}
    assert left == {"6", "6.json", "7", "7.json", "folder", *kept}


def test_a_run_has_one_writer(whole, tmp_path, environ, capsys):
    path = copy(whole, tmp_path / "run")
    program = "import sys, time; from pathlib import Path; from jaxrl.runs.lock import only_writer\n"
    program += "with only_writer(Path(sys.argv[1])): print('held', flush=True); time.sleep(1000)"
    line = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        assert cli.main(["train", f"--resume={path}"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"jaxrl: {path} is being written by process {other.pid} on ")
        assert error.count("\n") == 1
        other.kill()  # which leaves its lock file, and no lock
    drive(whole, path, StopAfter(99))
    with lock.only_writer(path), pytest.raises(UserError, match="by this process already"):
        drive(whole, path, StopAfter(99))


@pytest.mark.parametrize("left", [[], ["lock"], ["lock", "manifest.json", "config.json.partial"]])
def test_a_folder_whose_making_was_cut_short_is_made_anew(whole, tmp_path, left):
    path = tmp_path / "run"
    path.mkdir()
    for name in left:
        (path / name).write_text("{")
    directory.check_new(path)
    with directory.created(path, directory.read_config(whole), None):
        assert directory.read_config(path) == directory.read_config(whole)
    with pytest.raises(UserError, match="exists: continue it"):
        directory.check_new(path)


def test_a_folder_that_moves_ends_its_run(whole, tmp_path, capsys):
    path, moved = tmp_path / "run", tmp_path / "moved"

    class Mover:
        @property
        def requested(self) -> bool:
            path.rename(moved)
            return False

    with pytest.raises(UserError, match=r"run was moved or removed while it was written: resume it where it is now"):
        drive(whole, path, Mover())
    assert not (path / "metrics.jsonl").exists()
    drive(whole, moved, StopAfter(99))
    tiny.assert_same_run(moved, whole)


def test_a_run_that_diverges_says_so_and_keeps_its_last_finite_checkpoint(whole, tmp_path, monkeypatch, capsys):
    epoch, path = driver.Run.epoch, tmp_path / "run"

    def broken(run, carry, index):
        carry, row = epoch(run, carry, index)
        if index == 3:
            params = jax.tree.map(lambda x: x * jnp.inf, carry.agent.params)
            carry = dataclasses.replace(carry, agent=dataclasses.replace(carry.agent, params=params))
        return carry, row

    with monkeypatch.context() as patch:
        patch.setattr(driver.Run, "epoch", broken)
        assert cli.main([*tiny.flags(whole.parent / "data.npz"), f"--out={path}"]) == 3
    out, error = capsys.readouterr()
    rest = "training ends; the last checkpoint, of epoch 3, is finite"
    assert error == f"the agent's state is NaN or infinite after epoch 4: {rest}\n"
    assert json.loads(out.splitlines()[-1].removeprefix("result: "))["status"] == "diverged"
    assert checkpoint.epochs(path / "checkpoints") == [2, 3]
    assert report.read([path]).settings[0].members[0].status == "diverged"
    drive(whole, path, StopAfter(99))
    tiny.assert_same_run(path, whole)


def test_what_numbers_depend_on_is_recorded_and_its_change_is_said(whole, tmp_path, capsys):
    path = copy(whole, tmp_path / "run")
    known = json.loads((path / "manifest.json").read_text())
    assert known["cores"] == system.cores() and known["xla_flags"] == os.environ.get("XLA_FLAGS", "")
    versions = known["versions"] | {"jax": "0.0.1"}
    (path / "manifest.json").write_text(json.dumps(known | {"cores": 99, "versions": versions, "xla_flags": "--a=b"}))
    drive(whole, path, StopAfter(99))
    assert capsys.readouterr().err == (
        f"{path}: numbers may differ in their last bits: versions was jax 0.0.1 and is jax {jax.__version__}, "
        f"cores was 99 and is {system.cores()}, xla_flags was --a=b and is {os.environ.get('XLA_FLAGS') or 'not set'}\n"
    )


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


def test_an_epoch_moves_nothing_between_host_and_device(whole):
    config = directory.read_config(whole)
    env = tiny.make(config.env)
    run = driver.prepare(config, env, load_data(config, env))
    carry = run.first()
    for index, row in enumerate(tiny.rows(whole)):
        phase, before = run.timeline.at(index)
        if before == 0:
            carry = driver.on_devices(loop.jitted_enter(run.agent, phase, carry))
        data = run.dataset(index)
        with jax.transfer_guard("disallow"):
            carry, metrics = loop.jitted_epoch(run.agent, env, phase, carry, data, run.execution)
        assert int(metrics["digest"]) == row["digest"]


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


def test_the_plan_is_what_is_held_and_the_largest_programs_scratch(whole):
    config = directory.read_config(whole)
    config = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, online_steps=0))
    env = tiny.make(config.env)
    before = memory.peak_rss()
    said = memory.plan(config, env).splitlines()
    lines = {line[:42].strip(): float(line[42:].split()[0]) * 2**20 for line in said}
    held, working = memory.held(config, env), max(map(memory.temporary, memory.programs(config, env)))
    rounding = {"abs": 0.06 * 2**20}
    assert {name: lines[name] for name in held} == pytest.approx(held, **rounding)
    assert lines["working memory"] == pytest.approx(working, **rounding) and working > 0
    assert lines["total on the device"] == pytest.approx(sum(held.values()) + working, **rounding)
    peak = lines["process peak, including compilation"]
    before_compiling = peak - sum(held.values()) - working - held["dataset"]
    assert before - 2**20 < before_compiling < memory.peak_rss() + 2**20  # a process that was larger before stays so


def test_scratch_is_what_a_program_needs_besides_its_arguments():
    x = jax.ShapeDtypeStruct((1000, 1000), "float32")
    assert memory.temporary(jax.jit(lambda x: x + 1).lower(x).compile()) == 4_000_000  # its result
    assert memory.temporary(jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()) == 0  # in place
    assert memory.temporary(jax.jit(lambda x: jax.numpy.sin(x @ x).sum()).lower(x).compile()) >= 4_000_000  # products


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
            assert error.splitlines()[-3:] == ["", "saving at the end of this epoch; once more to stop at once", resume]
        assert count(path / "metrics.jsonl") < tiny.EPOCHS
    process = launch(again, environ)
    out, error = process.communicate()
    assert process.returncode == 0
    assert "rows are now in" in error or error == ""  # unless the kill came between a row and its checkpoint
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


COUNTED = """
import sys
import jax
from jaxrl import cli
found = []
jax.monitoring.register_event_listener(lambda event, **about: found.append(event.rsplit("/", 1)[1]))
assert cli.main(["eval", sys.argv[1], "--episodes=4"]) == 0
print(found.count("cache_hits"), found.count("cache_misses"))
"""


def test_a_second_process_finds_its_programs_on_disk(whole, environ, tmp_path):
    counts = []
    for _ in range(2):
        line = [sys.executable, "-c", COUNTED, str(whole)]
        process = subprocess.run(
            line, env=environ | {"XDG_CACHE_HOME": str(tmp_path)}, capture_output=True, text=True, check=True
        )
        counts.append([int(word) for word in process.stdout.splitlines()[-1].split()])
    (_, missed), (hits, missed_again) = counts
    assert missed > 0 and (hits, missed_again) == (missed, 0)
