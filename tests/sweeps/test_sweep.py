"""`jaxrl sweep` from end to end, small: members as if alone, stopped and resumed, halved, shared by processes."""

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrl import cli
from jaxrl.cli import sweep as command
from jaxrl.runs import directory, jsonlines
from jaxrl.runs.evaluation import newest_state
from jaxrl.runs.jsonlines import write_json
from jaxrl.sweeps import processes as machines
from jaxrl.sweeps import sweep
from jaxrl.sweeps.cohort import CohortRunner
from jaxrl.sweeps.processes import Machine, Watch
from jaxrl.sweeps.space import Settings
from jaxrl.training import loop
from tests import tiny

RUN = (
    "--agent.windows.chunk=2 --agent.windows.batch=16 --agent.flow.net.hidden 8 --schedule.offline-updates=40 "
    "--schedule.updates-per-epoch=10 --schedule.eval-every=2 --schedule.eval-episodes=4"
).split()
AXES = "--agent.adam.lr 1e-3 3e38 1e-2 --seeds 2 --checkpoint-seconds=0".split()
EPOCHS, MEMBERS = 4, 6


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with tiny.quick():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("sweeps") / "data.npz")


def flags(data: Path, out: Path, *more: str) -> list[str]:
    return ["sweep", "bc", tiny.ENV, f"--data={data}", *RUN, *AXES, f"--out={out}", *more]


def run(argv: list[str]) -> tuple[int, str, str]:
    """Returns the exit code of a command, and what it wrote on stdout and on stderr."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = cli.main(argv)
    return code, out.getvalue(), error.getvalue()


@pytest.fixture(scope="module")
def whole(data) -> Path:
    """The folder of a sweep that nothing disturbed."""
    path = data.parent / "whole"
    code, out, error = run(flags(data, path, "--layout=map"))
    assert code == 0, error
    (path.parent / "out").write_text(out)
    (path.parent / "error").write_text(error)
    return path


def results(path: Path) -> list[dict]:
    return [json.loads((path / "members" / f"{i:03d}" / "result.json").read_text()) for i in range(MEMBERS)]


def metrics(path: Path) -> list[bytes]:
    return [(path / "members" / f"{i:03d}" / "metrics.jsonl").read_bytes() for i in range(MEMBERS)]


def assert_same(a: Path, b: Path) -> None:
    """Asserts that two sweeps have the same metrics, results and agents, bit for bit."""
    assert metrics(a) == metrics(b)
    assert results(a) == results(b)
    for i in range(MEMBERS):
        jax.tree.map(np.testing.assert_array_equal, *(state(path / "members" / f"{i:03d}") for path in (a, b)))


def state(member: Path):
    """Returns the state of a member's agent, from its checkpoint."""
    config = directory.read_config(member)
    return newest_state(config, loop.on_device(config.agent), tiny.make(config.env), member)


def test_members_are_the_runs_alone_bit_for_bit(whole, data, tmp_path):
    """Those of a program that has them one after the other, on the CPU."""
    code, *_ = run(
        ["train", "bc", tiny.ENV, f"--data={data}", *RUN, "--agent.adam.lr=1e-2", "--seed=1", f"--out={tmp_path / 'x'}"]
    )
    assert code == 0
    assert (tmp_path / "x" / "metrics.jsonl").read_bytes() == metrics(whole)[5]
    alone, member = (directory.read_config(path) for path in (tmp_path / "x", whole / "members" / "005"))
    assert alone == member


def test_what_became_of_each_member_is_written(whole):
    found = results(whole)
    assert [(r["values"]["agent.adam.lr"], r["seed"]) for r in found] == [
        (v, s) for v in (1e-3, 3e38, 1e-2) for s in (0, 1)
    ]
    assert [r["status"] for r in found] == ["finished"] * 2 + ["diverged"] * 2 + ["finished"] * 2
    assert [r["updates"] for r in found] == [40, 40, 0, 0, 40, 40]
    for i in (0, 1, 4, 5):
        rows = jsonlines.rows(whole / "members" / f"{i:03d}" / "metrics.jsonl")
        assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
        assert found[i]["success"] == rows[-1]["eval/success"]
        assert found[i]["judged"]["seed"] == 12346 and found[i]["judged"]["episodes"] == 4
    assert found[2]["judged"] is None
    assert "member 002 diverged in epoch 1: {'agent.adam.lr': 3e+38}" in (whole.parent / "error").read_text()


def test_it_ends_in_a_report_and_a_line_for_scripts(whole):
    last = json.loads((whole.parent / "out").read_text().splitlines()[-1].removeprefix("result: "))
    assert (last["sweep"], last["members"], last["finished"], last["diverged"]) == (str(whole), 6, 4, 2)
    assert last["best"]["values"]["agent.adam.lr"] in (1e-3, 1e-2) and last["best"]["seeds"] == 2
    assert (whole / "report" / "report.html").stat().st_size > 10_000
    assert not (whole / "cohorts" / "0" / "checkpoints").exists()


def test_a_member_is_a_folder_that_other_commands_take(whole):
    path = str(whole / "members" / "004")
    code, out, _ = run(["eval", path, "--episodes=4"])
    said = json.loads(out.removeprefix("result: "))
    assert code == 0
    assert (said["eval/success"], said["eval/return"]) == (results(whole)[4]["success"], results(whole)[4]["return"])
    code, _, error = run(["train", "--resume", path])
    assert (code, error) == (
        2,
        f"jaxrl: --resume {path}: is a member of a sweep, use jaxrl sweep --resume on the sweep\n",
    )


def test_a_sweep_has_one_writer_and_each_process_its_own_part(data, whole, tmp_path):
    path = shutil.copytree(whole, tmp_path / "run")
    for name, machine in (("lock", Machine()), ("processes/1.lock", Machine(1, 2))):
        with sweep.alone(path, machine):
            assert (path / name).exists()
            with pytest.raises(sweep.UserError, match="is being written by"), sweep.alone(path, machine):
                pass
    with sweep.alone(path, Machine(0, 2)), sweep.alone(path, Machine(1, 2)):
        code, _, error = run(["sweep", f"--resume={path}"])
        assert (code, error) == (2, f"jaxrl: {path} is being written by this process already\n")
    (path / "cohorts/0/checkpoints").mkdir()
    (path / "cohorts/0/checkpoints/notes").write_text("a user's own")
    assert run(["sweep", f"--resume={path}"])[0] == 0
    assert (path / "cohorts/0/checkpoints/notes").exists()


def test_checkpoints_of_a_sweep_that_are_gone_are_missed(data, tmp_path, monkeypatch):
    path, epoch = tmp_path / "run", CohortRunner.epoch

    def stopped(self, population, index):
        os.kill(os.getpid(), signal.SIGTERM)
        return epoch(self, population, index)

    with monkeypatch.context() as patch:
        patch.setattr(CohortRunner, "epoch", stopped)
        assert run(flags(data, path, "--layout=map"))[0] == 75
    (path / "cohorts/0/checkpoints").rename(tmp_path / "unmounted")
    before = metrics(path)
    code, _, error = run(["sweep", f"--resume={path}"])
    assert code == 2 and error.splitlines()[-1].startswith(
        f"jaxrl: {path}/cohorts/0/checkpoints has no checkpoint that"
    )
    assert metrics(path) == before


def test_a_group_is_compiled_once_for_all_its_programs(data, tmp_path):
    """Three programs of two members each; the epoch, as in a single run, twice where phases differ, here once."""
    argv = flags(data, tmp_path / "parts", "--layout=map", "--max-members-per-program=2")
    jax.clear_caches()
    with tiny.compiled() as names:
        assert run(argv)[0] == 0
    assert names.count("jit(epoch)") == names.count("jit(begin)") == names.count("jit(evaluate)") == 1
    assert len(json.loads((tmp_path / "parts" / "sweep.json").read_text())["cohorts"]) == 3


@pytest.mark.parametrize("layout", ["map", "vmap"])
def test_a_sweep_that_was_stopped_and_killed_goes_on_bit_for_bit(data, whole, tmp_path, monkeypatch, layout):
    undisturbed = whole
    if layout == "vmap":
        undisturbed = tmp_path / "undisturbed"
        assert run(flags(data, undisturbed, "--layout=vmap"))[0] == 0
    path, epoch, calls = tmp_path / "run", CohortRunner.epoch, []

    def disturbed(self, population, index):
        calls.append(index)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        if len(calls) == 4:
            raise KeyboardInterrupt  # as a second Ctrl-C: nothing of this epoch is saved
        return epoch(self, population, index)

    monkeypatch.setattr(CohortRunner, "epoch", disturbed)
    code, _, error = run(flags(data, path, f"--layout={layout}"))
    assert code == 75
    assert error.splitlines()[-1] == f"stopped and saved; go on with: jaxrl sweep --resume {path}"
    assert run(flags(data, path, f"--layout={layout}"))[0] == 130  # the same command goes on
    assert run(["sweep", f"--resume={path}"])[0] == 0
    assert calls == [0, 1, 2, 3, 3]
    assert_same(path, undisturbed)
    assert run(["sweep", f"--resume={path}"])[0] == 0  # nothing is left to do
    assert calls == [0, 1, 2, 3, 3]


ONLINE = (
    "--agent.windows.chunk=2 --agent.windows.batch=16 --agent.flow.net.hidden 8 --schedule.online-steps=32 "
    "--schedule.updates-per-epoch=10 --schedule.steps-per-epoch=16 --schedule.warmup-steps=16 --schedule.envs=4 "
    "--schedule.utd=0.25 --schedule.eval-episodes=4 --agent.adam.lr=1e-2 --checkpoint-seconds=0 --layout=map"
).split()


def test_a_sweep_can_have_members_with_and_without_a_dataset(tmp_path, monkeypatch):
    """Those that learn online alone have none and record nothing; stopped after each epoch, they are the same runs."""
    monkeypatch.chdir(tmp_path)
    argv = ["sweep", "bc", tiny.ENV, *ONLINE, "--schedule.offline-updates", "0", "10", "--data-steps=100"]
    assert run([*argv, "--plan"])[1].splitlines()[-1].startswith("2 members in 2 programs, 2 compiled")
    assert list(tmp_path.glob("datasets/*")) == []
    code, _, error = run([*argv, "--out=whole"])
    assert code == 0, error
    known = json.loads(Path("whole/sweep.json").read_text())["cohorts"]
    manifest = json.loads(Path("whole/manifest.json").read_text())
    assert known[0]["dataset_digest"] is None and known[1]["dataset_digest"] == manifest["dataset_digest"]
    phases = [[row["phase"] for row in jsonlines.rows(Path(f"whole/members/{i:03d}/metrics.jsonl"))] for i in (0, 1)]
    assert phases == [["warmup", *["online"] * 2], ["behaviour", "offline", "warmup", *["online"] * 2]]
    assert len(list(tmp_path.glob("datasets/*.npz"))) == 1

    epoch = CohortRunner.epoch

    def stopped(self, population, index):
        os.kill(os.getpid(), signal.SIGTERM)
        return epoch(self, population, index)

    with monkeypatch.context() as patch:
        patch.setattr(CohortRunner, "epoch", stopped)
        assert run([*argv, "--out=run"])[0] == 75
    assert run(["sweep", "--resume=run"])[0] == 0
    for i in (0, 1):
        one, other = (Path(f"{name}/members/{i:03d}/metrics.jsonl").read_bytes() for name in ("whole", "run"))
        assert one == other
    code, out, _ = run(["eval", "whole/members/000", "--episodes=4"])
    assert (code, "eval/success" in out) == (0, True)
    page = Path("whole/report/report.html").read_text()
    assert "no dataset" in page and "medium 100" in page


def test_a_sweep_without_any_dataset_has_no_digest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["sweep", "bc", tiny.ENV, *ONLINE, "--schedule.offline-updates=0", "--seeds=8", "--layout=auto"]
    assert run([*argv, "--out=x"])[0] == 0
    assert json.loads(Path("x/manifest.json").read_text())["dataset_digest"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("layout", ["map", "vmap"])
def test_halving_drops_the_worst_settings_and_says_what_they_spent(data, whole, tmp_path, layout):
    path = tmp_path / "halved"
    assert run(flags(data, path, f"--layout={layout}", "--rungs", "0.5", "--keep=0.34"))[0] == 0
    found = results(path)
    finished = [r["member"] for r in found if r["status"] == "finished"]
    assert finished in ([0, 1], [4, 5])  # one of the settings that did not diverge
    dropped = [r for r in found if r["status"] == "dropped"]
    assert [r["updates"] for r in dropped] == [20, 20] and [r["judged"] for r in dropped] == [None, None]
    assert [found[i]["status"] for i in (2, 3)] == ["diverged"] * 2
    for i in finished:
        rows, known = (jsonlines.rows(p / "members" / f"{i:03d}" / "metrics.jsonl") for p in (path, whole))
        assert [row["epoch"] for row in rows] == [row["epoch"] for row in known]
        for row, other in zip(rows, known, strict=True):
            assert row.keys() == other.keys()
            for name in row.keys() - {"digest", "phase"}:
                np.testing.assert_allclose(row[name], other[name], rtol=1e-3, atol=1e-6, err_msg=name)


def test_the_folder_of_another_sweep_is_refused(data, whole, tmp_path):
    code, _, error = run([word.replace("1e-2", "1e-4") for word in flags(data, whole)])
    assert code == 2
    assert error == (
        f"jaxrl: {whole} belongs to another sweep: grid.agent.adam.lr is [0.001, 3e+38, 0.01] there and "
        "[0.001, 3e+38, 0.0001] here; name another --out\n"
    )
    code, _, error = run(flags(data, data.parent))
    assert (code, error) == (
        2,
        f"jaxrl: {data.parent} exists and is not the folder of a sweep: name another with --out\n",
    )
    code, _, error = run(["sweep", f"--resume={tmp_path}"])
    assert (code, error) == (2, f"jaxrl: {tmp_path} is not the folder of a sweep: sweep.json is missing\n")


@pytest.mark.parametrize("file", ["manifest.json", "sweep.json"])
def test_a_folder_whose_making_was_cut_short_is_made_anew(data, whole, tmp_path, monkeypatch, file):
    path, write = tmp_path / "run", jsonlines.write

    def killed(at, text):
        if at.name == file:
            at.with_name(f"{file}.partial").write_text(text[:10])
            raise KeyboardInterrupt
        write(at, text)

    with monkeypatch.context() as patch:
        patch.setattr(jsonlines, "write", killed)
        assert run(flags(data, path, "--layout=map"))[0] == 130
    assert run(flags(data, path, "--layout=map"))[0] == 0
    assert_same(path, whole)


def test_data_that_have_changed_are_refused(data, tmp_path, monkeypatch):
    copy, path = shutil.copy(data, tmp_path / "copy.npz"), tmp_path / "run"

    def stop(self, population, index):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CohortRunner, "epoch", stop)
        assert run(flags(copy, path, "--layout=map"))[0] == 130
    columns = dict(np.load(copy))
    np.savez(copy, **columns | {"actions": -columns["actions"]})
    code, _, error = run(["sweep", f"--resume={path}"])
    assert code == 2
    assert f"dataset {copy} has changed since {path} began" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--agent.adam.lrate 1 2",
            "--agent.adam.lrate 1 2: not a sweepable field: did you mean --agent.adam.lr?",
        ),
        ("--agent.adam.lrr 1", "unknown flag --agent.adam.lrr: did you mean --agent.adam.lr? --help lists all"),
        (
            "--agent.adam.lr log:1e-5 --draws 3",
            "agent.adam.lr = log:1e-5: a distribution is a single value, log:LOW:HIGH with two",
        ),
        ("--agent.adam.lr 1 x", "Error parsing --agent.adam.lr: could not convert string to float: 'x'"),
        ("--agent.adam.lr 1 2 --agent.adam.lr 3 4", "--agent.adam.lr: given twice"),
        ("--rungs 0.5 x", "Error parsing --rungs"),
        ("--devices 64", "devices = 64: there are"),
        (
            "--resume here --agent.adam.lr 1 2",
            "--resume: a sweep resumes with its own configuration, bc does not apply",
        ),
        ("--seed 1 2", "seed: cannot be swept"),
        ("--process 0", "--process 0: applies to several processes only: name their number with --processes"),
        ("--coordinator a:1", "--coordinator a:1: applies to several processes only"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, error = run(["sweep", "bc", tiny.ENV, *words.split()])
    assert (code, out) == (2, "")
    assert error.startswith(f"jaxrl: {message}") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_words_become_values_as_train_reads_them(data, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(command, "_sweep", lambda space, options, path: seen.append(space) or 0)
    line = "sweep fql --agent.flow.net.hidden 8,8 16, --agent.normalize-q true False --reward-shift -1 2.5"
    more = "--env point push --agent.critic.net.hidden 4 4 --paired reward-shift env"
    assert cli.main([*line.split(), *more.split()]) == 0
    (space,) = seen
    assert space.grid == {
        "agent.flow.net.hidden": ((8, 8), (16,)),
        "agent.normalize_q": (True, False),
        "reward_shift": (-1.0, 2.5),
        "env": ("point", "push"),
    }
    assert space.base.agent.critic.net.hidden == (4, 4)
    assert space.paired == ("reward_shift", "env")


def test_the_forecast_names_programs_members_memory_and_time(data, tmp_path):
    code, out, _ = run([*flags(data, tmp_path / "x", "--layout=map"), "--plan", "--max-members-per-program=4"])
    assert code == 0
    head, row, last = out.splitlines()
    assert head.split()[:4] == ["program", "members", "each", "layout"]
    assert row.split()[:4] == ["0-1", "6", "3", "map"]
    assert last.startswith("6 members in 2 programs, 1 compiled: about ")
    assert not (tmp_path / "x").exists()


def test_a_batch_script_repeats_the_command_and_queues_itself_again(capsys):
    line = "sweep fmq maze-medium --agent.eta 0.3 1.0 --seeds 16 --print-slurm --slurm.nodes 2 --slurm.gpus 4"
    assert cli.main([*line.split(), "--slurm.hours=1.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"#SBATCH --nodes=2", "#SBATCH --gpus-per-node=4", "#SBATCH --time=1:30:00"} <= set(lines)
    assert "srun jaxrl sweep fmq maze-medium --agent.eta 0.3 1.0 --seeds 16" in lines
    assert 'if [ "$code" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi' in lines


# Several processes


def port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def launch(argv: list[str], number: int, at: int, cache: Path) -> subprocess.Popen:
    environ = os.environ | {
        "XDG_CACHE_HOME": str(cache),
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    }
    more = [f"--coordinator=127.0.0.1:{at}", "--processes=2", f"--process={number}", "--patience=5"]
    line = [sys.executable, "-m", "jaxrl.cli", *argv, *more]
    return subprocess.Popen(line, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_share_a_sweep_and_one_takes_it_over_when_the_other_is_lost(data, whole, tmp_path):
    """The second process is killed amid its run; the first saves, stops, and is resumed alone."""
    path, at = tmp_path / "shared", port()
    argv = flags(data, path, "--layout=map")
    processes = [launch(argv, number, at, tmp_path) for number in (0, 1)]
    rows = path / "members" / "003" / "config.json"  # of the second process, whose members are 3, 4 and 5
    while not rows.exists():
        assert processes[1].poll() is None, processes[1].communicate()
        time.sleep(0.01)
    processes[1].kill()
    _, error = processes[0].communicate()
    assert processes[0].returncode == 75
    assert "process 1 of 2 was not heard of for 5 s: saving and stopping" in error
    processes[1].communicate()
    assert run(["sweep", f"--resume={path}"])[0] == 0
    assert metrics(path) == metrics(whole)
    assert [r | {"program": 0} for r in results(path)] == results(whole)


def test_processes_that_disagree_all_say_in_what(data, tmp_path):
    at, argv = port(), flags(data, tmp_path / "x")
    processes = [launch(argv, 0, at, tmp_path), launch([*argv, "--draw-seed=3"], 1, at, tmp_path)]
    for process in processes:
        _, error = process.communicate()
        assert (process.returncode, error) == (2, "jaxrl: processes 0 and 1 disagree: draw_seed = 0 and 3\n")
    assert not (tmp_path / "x").exists()


def test_a_process_that_nobody_comes_to_meet_says_so(data, tmp_path, monkeypatch):
    monkeypatch.setattr(machines, "TOGETHER", 2)
    more = [f"--coordinator=127.0.0.1:{port()}", "--processes=2", "--process=0"]
    code, _, error = run([*flags(data, tmp_path / "x"), *more])
    assert code == 2
    assert error == "jaxrl: processes cannot connect: not all connected within 2 s, or one was lost\n"
    assert not (tmp_path / "x").exists()


def test_settings_of_every_agent_are_checked_before_jax_begins():
    """Which devices are a process's own is known once it has met the others; what is asked for is checked before."""
    program = (
        "from jax._src import xla_bridge\n"
        "from jaxrl.runs.presets import PRESETS, VARIANTS, preset\n"
        "for name, agents in PRESETS.items():\n"
        "    for agent in agents:\n"
        "        for variant in (None, *VARIANTS.get(agent, ())):\n"
        "            preset(name, agent, variant).check()\n"
        "            assert not xla_bridge.backends_are_initialized(), agent\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("environ", "several"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "a", "SLURM_PROCID": "0"}, False),
        ({"SLURM_NTASKS": "4"}, False),  # the batch script itself, outside srun
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "a", "SLURM_PROCID": "0"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "0"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ],
)
def test_a_scheduler_says_that_there_are_several_processes(environ, several, monkeypatch):
    monkeypatch.setattr(os, "environ", environ)
    assert machines.asked_by_environment() is several


def test_signs_of_life_tell_who_is_lost(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watch = Watch(tmp_path, Machine(0, 3, "b"), patience=10)

    def sign(process: int, beats: int, state: str = "running", meeting: str = "b") -> None:
        write_json(tmp_path / f"{process}.json", {"meeting": meeting, "state": state, "beats": beats})

    sign(1, 1, "stopped", meeting="a")  # left by an earlier start
    sign(2, 1)
    assert watch.lost() is None
    now[0] = 9.0
    sign(1, 1)
    assert watch.lost() is None
    now[0] = 11.0
    assert watch.lost() == "process 2 of 3 was not heard of for 10 s"
    sign(2, 2, "finished")
    assert watch.lost() is None
    now[0] = 18.0
    sign(1, 2, "stopped")
    assert watch.lost() == "process 1 of 3 has stopped"
    sign(1, 3, "finished")
    now[0] = 1e6
    assert watch.lost() is None


def test_difference_names_the_first_field_in_which_two_objects_differ():
    a = {"x": {"y": 1, "z": [1, 2]}, "w": None}
    assert machines.difference(a, {"x": {"y": 1, "z": [1, 2]}, "w": None}) is None
    assert machines.difference(a, {"x": {"y": 1, "z": [2, 1]}, "w": None}) == "x.z"
    assert machines.difference(a, {"x": {"y": 1, "z": [1, 2]}}) == "w"


def test_no_devices_but_those_that_are_there():
    with pytest.raises(sweep.UserError, match="devices = 99: there are"):
        Settings(devices=99).local()
