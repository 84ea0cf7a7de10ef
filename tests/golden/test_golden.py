"""The recordings of the official implementations are replayed, and a replay that is wrong or incomplete is told."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import golden

pytestmark = pytest.mark.usefixtures("quick")

FOLDER = Path(golden.__file__).parent
FILES = sorted(FOLDER.glob("*.npz"))
SMALL = FOLDER / "bc_chunk.npz"
ARRAY = "expected/sample/actions"


def changed(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    """Returns the path of a copy of the small file with some arrays in place of its own, or more of them."""
    with np.load(SMALL) as file:
        content = {name: file[name] for name in file.files}
    np.savez(path, **(content | arrays))
    return path


def expected(path: Path) -> set[str]:
    """Returns the names of all that a file expects, arrays and single numbers."""
    with np.load(path) as file:
        scalars = json.loads(str(file["scalars"])) if "scalars" in file else {}
        return {name for name in {*file.files, *scalars} if name.startswith("expected/")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recorded_number_is_computed_again(path):
    outcome = golden.replay(path)
    assert outcome.passed, str(outcome)
    assert outcome.quantities >= len(expected(path)) > 3


def test_every_method_has_a_recording_and_every_recording_a_method():
    found = {prefix for prefix in golden.METHODS for path in FILES if path.name.startswith(prefix)}
    assert found == set(golden.METHODS)


def test_a_number_that_is_wrong_fails_and_is_named(tmp_path):
    with np.load(SMALL) as file:
        wrong = file[ARRAY].copy()
    wrong.flat[3] += 1e-3 * np.abs(wrong).max()
    outcome = golden.replay(changed(tmp_path / "bc_wrong.npz", {ARRAY: wrong}))
    assert not outcome.passed and outcome.where == ARRAY and outcome.worst == pytest.approx(1e-3, rel=0.1)
    assert str(outcome).startswith("bc_wrong.npz") and str(outcome).endswith(f"FAIL: {ARRAY}")


def test_a_number_that_nobody_computes_fails_and_is_named(tmp_path):
    outcome = golden.replay(changed(tmp_path / "bc_more.npz", {"expected/step0/secret": np.zeros(3)}))
    assert not outcome.passed and outcome.missing == ("expected/step0/secret",) and outcome.worst < golden.TOLERANCE
    assert str(outcome).endswith("FAIL: 1 not computed, such as expected/step0/secret")


def test_a_file_that_cannot_be_replayed_fails_with_its_reason_and_does_not_end_the_run(tmp_path):
    (tmp_path / "bc_torn.npz").write_bytes(SMALL.read_bytes()[:100])
    with np.load(SMALL) as file:
        arrays = {name: file[name] for name in file.files if not name.startswith("params/")}
    np.savez(tmp_path / "bc_without_parameters.npz", **arrays)
    shutil.copy(SMALL, tmp_path / "bc_whole.npz")
    torn, whole, bare = (golden.replay(tmp_path / f"bc_{name}.npz") for name in ("torn", "whole", "without_parameters"))
    assert (torn.passed, whole.passed, bare.passed) == (False, True, False)
    assert "cannot be replayed: BadZipFile" in str(torn) and "cannot be replayed: KeyError: 'params/" in str(bare)


def test_trajectory_weighting_is_replayed_at_the_temperature_of_the_file(tmp_path):
    """A hotter file expects other probabilities, which its own temperature explains and no other does."""
    source = FOLDER / "trajweight_default.npz"
    with np.load(source) as file:
        content = {name: file[name] for name in file.files}
    settings = json.loads(str(content["hparams"]))
    hotter = json.dumps(settings | {"temperature": 10 * settings["temperature"]})
    np.savez(tmp_path / "trajweight_hot.npz", **(content | {"hparams": np.array(hotter)}))
    outcome = golden.replay(tmp_path / "trajweight_hot.npz")
    assert not outcome.passed and outcome.where.startswith("expected/exact/") and not outcome.reason


def test_goals_are_the_observations_where_a_file_has_no_other(tmp_path):
    """So they were recorded: representations of goals are then the observations themselves."""
    with np.load(FOLDER / "dataset_dqc.npz") as file:
        content = {name: file[name] for name in file.files}
    same = bool(np.array_equal(content["dataset/oracle_reps"], content["dataset/observations"]))
    del content["dataset/oracle_reps"]
    if not same:
        rows = content["inputs/goal_idxs"]
        content["expected/batch/high_value_goals"] = content["dataset/observations"][rows]
    np.savez(tmp_path / "dataset_dqc_bare.npz", **content)
    outcome = golden.replay(tmp_path / "dataset_dqc_bare.npz")
    assert outcome.passed, str(outcome)


def test_a_file_that_expects_nothing_has_not_passed():
    assert not golden.Outcome("bc_empty.npz", 0, 0.0, "").passed
    assert golden.Outcome("bc_one.npz", 1, 0.0, "").passed


@pytest.mark.parametrize(
    ("got", "expected", "error"),
    [
        ([1.0, 2.0], [1.0, 2.1], 0.1 / 2.1),
        ([1e-3], [0.0], 1e-2),  # small numbers are compared absolutely
        ([1.0, 2.0], [1.0], np.inf),
        ([np.nan], [1.0], np.inf),
    ],
)
def test_errors_are_relative_to_the_largest_number_of_an_array(got, expected, error):
    assert golden.error(got, expected) == pytest.approx(error)


def test_a_file_of_an_unknown_method_is_told_apart_from_one_that_fails(tmp_path):
    path = tmp_path / "mystery_method.npz"
    path.write_bytes(b"")
    outcome = golden.replay(path)
    assert not outcome.known and not outcome.passed and str(outcome).endswith("unknown method")


def command(folder: Path) -> subprocess.CompletedProcess:
    """Returns what became of `python -m tests.golden FOLDER`."""
    return subprocess.run(
        [sys.executable, "-m", "tests.golden", str(folder)], cwd=FOLDER.parent.parent, capture_output=True, text=True
    )


def test_the_command_counts_what_passed_failed_and_is_unknown(tmp_path):
    shutil.copy(SMALL, tmp_path)
    changed(tmp_path / "bc_more.npz", {"expected/step0/secret": np.zeros(3)})
    (tmp_path / "mystery_method.npz").write_bytes(b"")
    done = command(tmp_path)
    *lines, last = done.stdout.splitlines()
    assert (done.returncode, last) == (1, "golden: 1 passed, 1 failed, 1 unknown"), done.stderr
    assert [line.split()[0] for line in lines] == ["bc_chunk.npz", "bc_more.npz", "mystery_method.npz"]


def test_the_command_does_not_fail_for_a_file_of_an_unknown_method(tmp_path):
    (tmp_path / "mystery_method.npz").write_bytes(b"")
    done = command(tmp_path)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "golden: 0 passed, 0 failed, 1 unknown"), done.stderr


def test_the_command_refuses_a_folder_without_recordings(tmp_path):
    done = command(tmp_path)
    assert (done.returncode, done.stdout) == (2, "") and "no .npz file" in done.stderr
