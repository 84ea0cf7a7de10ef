"""The command line: what it says to newcomers, to mistakes (one line, exit code 2, nothing written) and at the end."""

import contextlib
import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxrl import cli
from jaxrl.agents import AGENTS
from jaxrl.cli.flags import make as original_make
from jaxrl.data import files
from jaxrl.runs import boards, config, directory, logging
from jaxrl.runs.presets import preset
from tests import tiny


@pytest.fixture(autouse=True)
def quick():
    with tiny.quick():
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return tiny.finished(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def said(whole) -> tuple[list[str], str]:
    """The lines of stdout, and stderr, of a run in which neither is a terminal."""
    out, error = io.StringIO(), io.StringIO()
    with tiny.quick(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        assert cli.main([*tiny.flags(whole.parent / "data.npz"), f"--out={whole.parent / 'said'}"]) == 0
    return out.getvalue().splitlines(), error.getvalue()


def mistake(argv: list[str], capsys) -> str:
    """Returns the one line that a mistake is answered with; everything else about it is asserted."""
    before = tiny.tree(Path.cwd())
    assert cli.main(argv) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("jaxrl: ") and error.endswith("\n") and error.count("\n") == 1, error
    assert tiny.tree(Path.cwd()) == before
    return error.removeprefix("jaxrl: ").removesuffix("\n")


# Mistakes


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian", "unknown command 'trian': did you mean 'train'? known are collect, data, doctor, eval"),
        ("train fmqq", "unknown agent 'fmqq': did you mean 'fmq'? known are a2pr, awac, bc, "),
        ("train fmq pont", "unknown environment 'pont': did you mean 'point'? known are bandit"),
        (
            "train fmq point?dimension=3",
            "environment 'point?dimension=3': unknown option 'dimension': did you mean 'dim",
        ),
        ("train fmq no_such_module:make", "environment 'no_such_module:make': cannot import 'no_such_module'"),
        ("train fmq point extra", "unexpected argument 'extra'"),
        ("train --seed 1 fmq", "unexpected argument 'fmq': names must come before flags, and a switch takes no value"),
        (
            "train fql point --agent.normalize-q false",
            "unexpected argument 'false': names must come before flags, and a switch takes",
        ),
        ("train fmq point --sede 1", "unknown flag --sede: did you mean --seed? --help lists all"),
        ("train fmq point --agent.beam.widht=3", "unknown flag --agent.beam.widht: did you mean --agent.beam.width?"),
        ("train bc point --agent.eta 1", "unknown flag --agent.eta: did you mean"),
        ("train fmq point --preset papr", "unknown preset 'papr': did you mean 'paper'? known are paper, quick"),
        ("train fmq point --preset=papr", "unknown preset 'papr': did you mean 'paper'? known are paper, quick"),
        ("train fmq point --behaviour god", "unknown behaviour level 'god': did you mean 'good'? known are bad, good"),
        ("train fmq point --seed 1.5", "Error parsing --seed: invalid literal for int() with base 10: '1.5'"),
        ("train fmq point --seed", "Missing value for argument '--seed'. Expected 1 values."),
        ("train fmq point --seed -1", "seed = -1: must be at least 0"),
        ("train fmq point --seed 4294967296", "seed = 4294967296: must be at least 0 and below 2^32"),
        (
            "train fmq point --schedule.eval-seed 4294967295",
            "schedule.eval_seed = 4294967295: must be at least 0 and be",
        ),
        ("sweep bc point --seed 4294967290 --seeds 9", "seed = 4294967290: must be at least 0 and below 2^32 - 8"),
        ("sweep bc point --draw-seed -1", "draw_seed = -1: must be at least 0"),
        ("collect point --seed 4294967296", "seed = 4294967296: must be at least 0 and below 2^32"),
        ("data mix ok.npz ok.npz --seed -1 --out new.npz", "seed = -1: must be at least 0"),
        ("train fmq point --restart", "--restart: applies to --resume only"),
        (
            "train fmq point --agent.adam.lr abc",
            "Error parsing --agent.adam.lr: could not convert string to float: 'abc'",
        ),
        ("train fmq point --agent.adam.lr nan", "FMQ.adam.lr = nan: must be finite"),
        ("train fmq point --agent.windows.discount 1.5", "FMQ.windows.discount = 1.5: must be in [0, 1]"),
        (
            "train fmq point --agent.actor.net.hidden a",
            "Error parsing --agent.actor.net.hidden: invalid literal for int() with base 10: 'a'",
        ),
        (
            "train fmq point --agent.critic.agg max",
            "invalid choice 'max' for argument '--agent.critic.agg'. Expected one",
        ),
        ("train fmq point --schedule.envs 0", "schedule.envs = 0: must be at least 1"),
        ("train fmq point --data-steps 0", "data_steps = 0: must be at least 1"),
        ("train fmq point --data missing.npz", "no file missing.npz: did you mean 'nan.npz'?"),
        ("train fmq point --data cut.npz", "cut.npz: the file is cut short: copy it again"),
        ("train fmq point --data junk.npz", "junk.npz: this is not an .npz file"),
        ("train fmq point --data shape.npz", "shape.npz: column 'actions' has 400 rows, 'observations' has 420"),
        ("train fmq point --data nan.npz", "nan.npz: column 'observations' must be finite in float32: row 3 holds nan"),
        ("train fmq point --data large.npz", "large.npz: column 'actions' must lie in [-1, 1]: row 7, entry 1 is 1.5"),
        ("train fmq point --data wide.npz", "dataset wide.npz: observations have 3 entries, the environment has 2"),
        ("train fmq bandit --data ok.npz", "dataset ok.npz: observations have 2 entries, the environment has 1"),
        (
            "train fmq point --out folder",
            "run directory folder exists: continue it with --resume folder, or name another",
        ),
        ("train fmq point --out ok.npz/run", "cannot write ok.npz/run: /"),
        ("train --resume nothing", "nothing is not a run directory: config.json is missing"),
        ("train --resume folder", "folder is not a run directory: config.json is missing"),
        ("train --resume ok.npz", "ok.npz is not a run directory: config.json is missing"),
        ("train --resume cut", "cut is not a run directory: config.json cannot be read (Expecting"),
        ("train --resume folder --seed 1", "--resume: a run resumes with its own configuration, --seed does not apply"),
        ("train --resume=folder --seed=1", "--resume: a run resumes with its own configuration, --seed does not apply"),
        ("train fmq --resume folder", "--resume: a run resumes with its own configuration, fmq does not apply"),
        ("eval", "eval: name a run directory, for example `jaxrl eval runs/NAME`"),
        ("eval nothing", "nothing is not a run directory: config.json is missing"),
        ("render nothing", "nothing is not a run directory: config.json is missing"),
        ("replay nothing", "nothing is not a run directory: config.json is missing"),
        ("replay nothing --epochs 0", "epochs = 0: must be at least 1"),
        ("collect", "collect: name an environment, for example `jaxrl collect maze-medium`"),
        ("collect pont", "unknown environment 'pont': did you mean 'point'?"),
        ("collect point --behaviour god", "unknown behaviour level 'god': did you mean 'good'?"),
        ("collect point --steps 0", "steps = 0: must be at least 1"),
        ("collect point --out data.txt", "--out data.txt: the name of a dataset file ends in .npz"),
        ("collect point --out ok.npz", "ok.npz exists: name another file with --out"),
        ("data", "data: name a command and a file, for example `jaxrl data describe FILE`"),
        ("data describe missing.npz", "no file missing.npz: did you mean 'nan.npz'?"),
        ("data describe ok.npz --env pont", "unknown environment 'pont': did you mean 'point'?"),
        ("doctor --env pont", "unknown environment 'pont': did you mean 'point'?"),
        ("list all", "unexpected argument 'all': names must come before flags, and a switch takes no value"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(whole, tmp_path, monkeypatch, capsys, line, message):
    monkeypatch.chdir(tmp_path)
    columns = files.to_columns(files.load(shutil.copy(whole.parent / "data.npz", "ok.npz")))
    obs, actions = columns["observations"], columns["actions"]
    np.savez("wide.npz", **columns | {"observations": np.pad(obs, ((0, 0), (0, 1)))})
    np.savez("shape.npz", **columns | {"actions": actions[:400]})
    np.savez("nan.npz", **columns | {"observations": np.where(np.arange(840).reshape(420, 2) == 7, np.nan, obs)})
    np.savez("large.npz", **columns | {"actions": np.where(np.arange(840).reshape(420, 2) == 15, 1.5, actions)})
    Path("cut.npz").write_bytes(Path("ok.npz").read_bytes()[:1000])
    Path("junk.npz").write_text("junk")
    Path("folder").mkdir()
    Path("folder", "notes.txt").write_text("a user's own")
    Path("cut").mkdir()
    Path("cut", "config.json").write_text("{")
    assert mistake(line.split(), capsys).startswith(message)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder in which nobody can write")
def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    message = "cannot write /proc/run: /proc: No such file or directory"
    assert mistake(["train", "fmq", "point", "--out=/proc/run"], capsys) == message


def test_a_file_system_that_refuses_is_named(tmp_path, monkeypatch, capsys):
    def refuse(*arguments):
        raise PermissionError(13, "Permission denied", "some/file")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jaxrl.cli.flags.made", refuse)
    assert mistake(["doctor", "--env=point"], capsys) == "some/file: Permission denied"


def test_what_nobody_foresaw_is_a_line_and_its_trace_is_shown_when_asked_for(monkeypatch, capsys):
    def broken(name):
        raise TypeError("an odd\nmistake")

    monkeypatch.setattr("jaxrl.cli.flags.made", broken)
    assert cli.main(["doctor", "--env=point"]) == 70
    line = capsys.readouterr().err
    assert re.fullmatch(
        r"jaxrl: internal error, TypeError in test_cli.py:\d+: an odd mistake; --debug shows the trace\n", line
    )
    assert cli.main(["doctor", "--env=point", "--debug"]) == 70
    trace = capsys.readouterr().err
    assert trace.startswith("Traceback (most recent call last)") and trace.endswith(line)


def test_an_environment_that_exits_is_a_mistake(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("leaves_in_make.py").write_text("import sys\ndef make(): sys.exit(0)\n")
    Path("leaves_at_import.py").write_text("import sys\nsys.exit('bye')\n")
    monkeypatch.setattr("jaxrl.cli.flags.make", original_make)
    for name, code in (("leaves_in_make", "0"), ("leaves_at_import", "'bye'")):
        for command in (["train", "bc"], ["doctor", "--env"], ["collect"]):
            assert cli.main([*command, f"{name}:make"]) == 2
            assert f"its module called sys.exit({code})" in capsys.readouterr().err


def test_weights_and_biases_must_be_installed(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(boards.importlib.util, "find_spec", lambda name: None)
    argv = [*tiny.flags(whole.parent / "data.npz"), "--wandb"]
    assert mistake(argv, capsys) == "wandb is not installed: pip install 'jaxrl[wandb]'"


def test_a_run_whose_data_have_changed_is_refused(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(shutil.copytree(whole.parent, tmp_path / "copy"))
    dataset = files.load("data.npz")
    changed = dataset.actions.copy()
    changed[0, 0] = -changed[0, 0]
    files.save("other.npz", dataclasses.replace(dataset, actions=changed))
    values = json.loads(Path("whole/config.json").read_text())
    Path("whole/config.json").write_text(json.dumps(values | {"data": "other.npz"}))
    for command in (["train", "--resume=whole"], ["replay", "whole"]):
        message = f"dataset other.npz has changed since whole began: its sha256 was {dataset.digest}"
        assert mistake(command, capsys) == message


def test_another_agents_or_environments_checkpoint_is_refused(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(shutil.copytree(whole.parent, tmp_path / "copy"))
    assert re.fullmatch(
        r"checkpoint whole/checkpoints/7 does not fit this agent and environment: "
        r"agent/anchor/params/MLP_0/Dense_0/kernel is \(\d+, 8\) there and \(\d+, 8\) here",
        mistake(["eval", "whole", "--env=point?dimensions=3"], capsys),
    )
    values = json.loads(Path("whole/config.json").read_text())
    Path("whole/config.json").write_text(json.dumps(values | {"agent_name": "bc"}))
    assert mistake(["eval", "whole"], capsys).startswith("unknown field of BC 'actor'")
    other = config.to_dict(preset("quick", "bc")) | {"data": values["data"], "env": values["env"]}
    Path("whole/config.json").write_text(json.dumps(other))
    for command in (["eval", "whole"], ["train", "--resume=whole"]):
        assert mistake(command, capsys).startswith("checkpoint whole/checkpoints/7 does not fit this agent and env")


def test_damaged_configurations_are_refused(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    for text, message in (
        ("[1]", "run is not a run directory: config.json is not a JSON object"),
        ('{"agent_name": "fmq"}', "run/config.json is damaged: 'agent' is missing"),
        ('{"agent_name": "fqm"}', "unknown agent 'fqm': did you mean 'fql'? known are " + ", ".join(sorted(AGENTS))),
    ):
        Path("run/config.json").write_text(text)
        assert mistake(["eval", "run"], capsys) == message
    shutil.copy(whole / "config.json", "run")
    assert mistake(["eval", "run"], capsys) == "run has no checkpoint that can be read"
    assert mistake(["train", "--resume=run"], capsys) == "run is not a run directory: manifest.json is missing"


# What a run says


def test_the_last_line_is_the_result(said, whole):
    lines, _ = said
    assert lines[-1].startswith("result: ")
    result = json.loads(lines[-1].removeprefix("result: "))
    assert set(result) == {
        *("agent", "env", "seed", "run", "seconds"),
        *("offline_success", "offline_interval", "online_success", "online_interval"),
    }
    assert (result["agent"], result["env"], result["seed"]) == ("fmq", tiny.ENV, 0)
    assert result["run"] == str(whole.parent / "said")
    final = tiny.rows(whole)[-1]
    assert result["online_success"] == final["eval/success"]
    assert result["online_interval"] == [final["eval/success_low"], final["eval/success_high"]]
    assert json.loads((whole / "result.json").read_text()) | {"run": 0, "seconds": 0} == result | {
        "run": 0,
        "seconds": 0,
    }


def test_without_a_terminal_there_is_one_line_per_evaluated_epoch_and_nothing_else(said, whole):
    lines, error = said
    assert error == ""
    evaluated = [row for row in tiny.rows(whole) if "eval/success" in row]
    assert [row["epoch"] for row in evaluated] == [2, 4, 6, 7]
    assert lines[:4] == [logging.evaluation_line(row) for row in evaluated]
    assert lines[4:-1] == [
        "             success   95 % interval",
        "offline         0.00   [0.00, 0.49]",
        "online          0.00   [0.00, 0.49]",
        f"pictures, metrics and checkpoints are in {whole.parent / 'said'}",
    ]


def test_a_run_directory_holds_what_it_promises(whole):
    tops = {
        "config.json",
        "manifest.json",
        "metrics.jsonl",
        "timings.jsonl",
        "result.json",
        "curves.png",
        "rollout.gif",
    }
    assert {path.name for path in whole.iterdir()} == tops | {"checkpoints", "checkpoints.json", "lock", "tensorboard"}
    written = json.loads((whole / "config.json").read_text())
    assert json.loads(json.dumps(config.to_dict(directory.read_config(whole)))) == written
    assert (written["schedule"]["online_steps"], written["agent"]["actor"]["net"]["hidden"]) == (48, [8])
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["dataset_digest"] == files.load(whole.parent / "data.npz").digest
    assert manifest["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert [row["epoch"] for row in map(json.loads, (whole / "timings.jsonl").read_text().splitlines())] == [
        *range(1, 8)
    ]
    with Image.open(whole / "rollout.gif") as animation:
        assert animation.size == (320, 320)
    with Image.open(whole / "curves.png") as picture:
        assert picture.size == (1080, 432)  # two panels


def test_a_recorded_behaviour_is_judged_too_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # as many rows as tiny.write_data writes, so that the programs are there already
    assert cli.main(["train", "fmq", tiny.ENV, *tiny.AGENT, *tiny.SCHEDULE, "--data-steps=400", "--out=run"]) == 0
    file, (out, error) = "datasets/point-horizon-20-medium-400-s0.npz", capsys.readouterr()
    result = json.loads(out.splitlines()[-1].removeprefix("result: "))
    assert error == f"recording 400 steps of the behaviour 'medium' as {file}\n"
    row = tiny.rows(Path("run"))[0]
    assert (row["epoch"], row["phase"]) == (0, "behaviour")
    assert result["behaviour_success"] == row["eval/success"]
    assert files.load(file).terminals.sum() == 20


# Other commands


def test_replay_finds_a_changed_digit(whole, tmp_path, capsys):
    path = Path(shutil.copytree(whole, tmp_path / "run"))
    assert cli.main(["replay", str(path), "--epochs=7"]) == 0
    assert capsys.readouterr().out == "identical\n"
    rows = tiny.rows(path)
    was = repr(rows[5]["critic/q"])
    changed = was[:-3] + str((int(was[-3]) + 1) % 10) + was[-2:]
    text = (path / "metrics.jsonl").read_text()
    (path / "metrics.jsonl").write_text(text.replace(was, changed))
    assert cli.main(["replay", str(path), "--epochs=5"]) == 0
    assert capsys.readouterr().out == "identical\n"
    assert cli.main(["replay", str(path), "--epochs=6"]) == 1
    assert (
        capsys.readouterr().out == f"different: epoch 6, critic/q: {changed} in the record, {was} in the repetition\n"
    )


def test_replay_goes_no_further_than_the_run_did(whole, tmp_path, capsys):
    path = Path(shutil.copytree(whole, tmp_path / "run"))
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (path / "metrics.jsonl").write_text("".join(lines[:2]))
    assert cli.main(["replay", str(path)]) == 0
    (path / "metrics.jsonl").write_text("")
    capsys.readouterr()
    assert mistake(["replay", str(path)], capsys) == f"{path} has no epoch to repeat yet"


def test_eval_repeats_the_runs_last_evaluation_and_takes_other_settings(whole, capsys):
    def result(*flags: str) -> dict:
        assert cli.main(["eval", str(whole), "--episodes=4", *flags]) == 0
        (line,) = capsys.readouterr().out.splitlines()
        return json.loads(line.removeprefix("result: "))

    final, same = tiny.rows(whole)[-1], result()
    assert {name: value for name, value in same.items() if name.startswith("eval/")} == {
        name: value for name, value in final.items() if name.startswith("eval/")
    }
    assert (same["run"], same["env"], same["episodes"], same["seed"]) == (str(whole), tiny.ENV, 4, 12345)
    assert result("--agent.test-sampler=beam_search")["eval/length"] == 20
    assert result("--env=point?horizon=12")["eval/length"] == 12  # another environment of the same sizes


def test_render_draws_the_episode(whole, tmp_path, capsys):
    out = tmp_path / "episode.gif"
    assert cli.main(["render", str(whole), f"--out={out}"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    with Image.open(out) as animation:
        durations = []
        for frame in range(animation.n_frames):
            animation.seek(frame)
            durations.append(animation.info["duration"])
    assert sum(durations) == 40 * (21 + 12)  # 20 steps and what they began with at 25 per second, then half a second
    assert mistake(["render", str(whole), "--out=episode.png"], capsys).startswith("--out episode.png: the name of an")


def test_collect_records_what_data_describe_describes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["collect", tiny.ENV, "--behaviour=good", "--steps=50", "--seed=2"]) == 0
    report = capsys.readouterr().out
    assert re.search(r"^episodes +3 \(63 rows, 60 steps\)$", report, re.MULTILINE)
    file = "datasets/point-horizon-20-good-50-s2.npz"
    assert tiny.tree(tmp_path) == ["datasets", file]
    assert cli.main(["data", "describe", file, "--env", tiny.ENV]) == 0
    described, measured = capsys.readouterr().out.split("\n\nreturn quantiles")
    assert described + "\n" == report and "of 60 steps (seed 0)" in measured


def test_the_doctor_finds_nothing_wrong_here_and_a_fault_where_there_is_one(monkeypatch, capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "ok    a compiled program gives the right number" in out and "FAIL" not in out
    assert cli.main(["doctor", "--env=point"]) == 0
    assert all(line.startswith("ok    ") for line in capsys.readouterr().out.splitlines())
    monkeypatch.setattr("jaxrl.cli.flags.made", lambda name: object())
    assert cli.main(["doctor", "--env=mine"]) == 1
    assert "FAIL  has spec, horizon, reset and step: add spec, horizon, reset, step" in capsys.readouterr().out


def test_list_names_everything(capsys):
    assert cli.main(["list"]) == 0
    out = capsys.readouterr().out
    for name in ("bc", "fmq", "point", "maze-medium", "brax/NAME", "package.module:make", "medium", "paper"):
        assert re.search(rf"\b{re.escape(name)}\b", out)


# Help


def test_help_is_complete_and_a_success(capsys):
    assert cli.main(["--help"]) == cli.main(["-h"]) == 0
    out = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert re.search(rf"^  {command} +\w", out, re.MULTILINE)
        assert cli.main([command, "--help"]) == 0
        about = capsys.readouterr()
        assert about.out.count("usage: jaxrl ") == 1 and about.err == ""
        assert f"usage: jaxrl {command}" in about.out
    assert cli.main([]) == 2


def test_the_help_of_train_says_what_a_newcomer_needs(capsys):
    assert cli.main(["train", "bc", "--help"]) == 0
    text = capsys.readouterr().out
    for fact in (
        ", ".join(AGENTS),
        "jaxrl list",
        "push?horizon=50",
        "my_package.my_module:make",
        "--resume runs/NAME",
        "result: {",
    ):
        assert fact in text
    for code in ("0 ", "2 ", "75 ", "130 "):
        assert re.search(rf"^ +(exit code )?{code}", text, re.MULTILINE)
    assert (
        "--agent.flow.net.hidden" in text and "--agent.critic.heads" not in text
    )  # the flags of the agent that was named


def test_help_can_be_cut_short_by_a_pipe():
    line = f"{sys.executable} -m jaxrl.cli train --help | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        done.stdout == "Train an agent on a dataset, then online in the environment if configured. Or resume a run.\n"
    )


SMALL = (
    f"train bc {tiny.ENV} --data-steps=100 --agent.windows.chunk=2 --agent.windows.batch=16 --agent.flow.net.hidden 8"
)
SMALL += " --schedule.online-steps=0 --schedule.offline-updates=20 --schedule.updates-per-epoch=10"
SMALL += " --schedule.eval-episodes=2 --out=run"


@pytest.mark.parametrize(
    "streams", ["| head -n 1", ">&-", "2>&-", ">/dev/full", ">&- 2>&-", "2>&1 | true", "2>/dev/full"]
)
def test_a_run_goes_on_to_its_end_without_its_output(tmp_path, monkeypatch, streams):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
    line = f"{sys.executable} -m jaxrl.cli {SMALL.replace('?', chr(92) + '?')} {streams}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [row["epoch"] for row in tiny.rows(tmp_path / "run")] == [0, 1, 2]
    assert (tmp_path / "run" / "result.json").exists()
    lost = "jaxrl: stdout cannot be written ([Errno 28] No space left on device): going on without it"
    assert done.stderr.splitlines()[1:] == ([lost] if streams == ">/dev/full" else [])


INTERRUPTED = """
import builtins, os, signal, sys
original = builtins.__import__
def interrupting(name, *arguments, **more):
    if name == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGINT)
    return original(name, *arguments, **more)
builtins.__import__ = interrupting
sys.argv = ["jaxrl", "train", "bc", "point"]
from jaxrl.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize("module", ["jax", "tyro", "orbax.checkpoint", "envs"])
def test_ctrl_c_during_the_imports_is_a_line(tmp_path, module):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED.replace("sys.argv[1]", repr(module))],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "jaxrl: stopped at once\n")
    assert list(tmp_path.iterdir()) == []


def test_a_closed_pipe_is_no_error():
    line = f"{sys.executable} -m jaxrl.cli list | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_and_unknown_commands_import_nothing_heavy():
    code = "import sys, jaxrl.cli; print(sorted({'orbax', 'matplotlib', 'scipy', 'mujoco', 'brax'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
