"""Facts about `jaxrl data`: describe, convert, mix, top, and what they say to mistakes."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from jaxrl import cli
from jaxrl.data import files, quality
from tests import tiny


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a dataset without rewards, one with, and HDF5 files."""
    monkeypatch.chdir(tmp_path)
    plain = files.load(tiny.write_data(Path("plain.npz")))
    rewards = np.repeat(np.arange(20.0), 21)
    files.save("rewards.npz", files.from_columns(files.to_columns(plain) | {"rewards": rewards}))
    with h5py.File("minari.hdf5", "w") as file:
        file["episode_0/observations/where"] = plain.observations[:21]
        file["episode_0/observations/age"] = np.arange(21)
        file["episode_0/actions"] = plain.actions[:20]
        for name in ("rewards", "terminations", "truncations"):
            file[f"episode_0/{name}"] = np.zeros(20)
    with h5py.File("other.hdf5", "w") as file:
        file["states"] = np.zeros(3)
    Path("junk.hdf5").write_text("junk")
    Path("shards").mkdir()
    files.save("shards/a.npz", plain)
    return tmp_path


def lines_of(capsys, *arguments):
    assert cli.main(["data", *map(str, arguments)]) == 0
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_describe_gives_the_measures_and_the_figure(folder, capsys):
    asked = (
        "describe rewards.npz --reference rewards.npz --random-return 0 --best-return 380 --queries 50 --neighbours 3"
    )
    lines = lines_of(capsys, *asked.split(), "--figure", "figure.png")
    assert "trajectory quality TQ 0.5000 0 is a return of 0, 1 of 380" in lines
    assert any(line.startswith("coverage SACo 1.0000 of the reference's") for line in lines)
    assert lines[-1].endswith("50 of 400 steps (seed 0), each with the 3 nearest of other episodes")
    assert Path("figure.png").read_bytes()[:4] == b"\x89PNG"


def test_describe_judges_returns_by_the_environment_and_says_where_there_are_none(folder, capsys):
    remark = "returns not measured: no rewards, they come from the task that --env names"
    assert remark in lines_of(capsys, "describe", "plain.npz")
    judged = files.relabelled(files.load("plain.npz"), tiny.make(tiny.ENV).relabel)
    lines = lines_of(capsys, "describe", "plain.npz", "--env", tiny.ENV)
    expected = [" ".join(line.split()) for line in quality.format_report(quality.measure(judged)).splitlines()]
    assert lines[-len(expected) :] == expected and expected[0].startswith("return quantiles")


def test_convert_writes_what_was_read_with_the_keys_that_were_chosen(folder, capsys):
    lines = lines_of(capsys, "convert", "minari.hdf5", "out.npz")
    assert "episodes 1 (21 rows, 20 steps)" in lines
    assert files.load("out.npz").digest == files.load("minari.hdf5").digest
    lines_of(capsys, "convert", "minari.hdf5", "where.npz", "--keys", "where")
    np.testing.assert_array_equal(files.load("where.npz").observations, files.load("plain.npz").observations[:21])


def test_mix_and_top_write_whole_episodes(folder, capsys):
    lines_of(capsys, "top", "rewards.npz", "--fraction", "0.1", "--out", "top.npz")
    np.testing.assert_array_equal(files.load("top.npz").rewards[::21], [18, 19])
    lines_of(capsys, *"mix top.npz rewards.npz --ratio 0.5 --steps 200 --seed 1 --out mix.npz".split())
    mixed = files.load("mix.npz")
    assert (~mixed.terminals).sum() == 200 and (mixed.rewards[::21] >= 18).sum() >= 5
    lines_of(capsys, "top", "plain.npz", "--env", tiny.ENV, "--out", "judged.npz")
    assert files.load("judged.npz").rewards is not None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("descrbe plain.npz", "unknown data command 'descrbe': did you mean 'describe'? known are convert, describe"),
        ("describe", "data describe: name the files, `jaxrl data describe FILE`"),
        ("describe plain.npz rewards.npz", "unexpected argument 'rewards.npz'"),
        ("describe minar.hdf5", "no file minar.hdf5: did you mean 'minari.hdf5'?"),
        ("describe other.hdf5", "other.hdf5: unknown HDF5 layout: found states; known are D4RL"),
        ("describe junk.hdf5", "junk.hdf5: this is not an HDF5 file"),
        ("describe plain.npz --refrence x", "unknown flag --refrence: did you mean --reference?"),
        ("describe plain.npz --reference rewads.npz", "no file rewads.npz: did you mean 'rewards.npz'?"),
        ("describe plain.npz --random-return 0", "--random-return and --best-return: trajectory quality requires both"),
        ("describe plain.npz --random-return 0 --best-return 1", "dataset plain.npz: has no rewards that could be"),
        ("describe rewards.npz --random-return 1 --best-return 1", "the returns of the random and of the best policy"),
        ("describe plain.npz --queries 0", "queries = 0: must be at least 1"),
        ("describe plain.npz --figure f.doc", "--figure f.doc: must end in .png, .pdf or .svg"),
        ("describe plain.npz --figure no/f.png", "--figure no/f.png: no folder no"),
        (
            "describe plain.npz --env bandit",
            "--env bandit: expects observations of size 1 and actions of size 1, in plain",
        ),
        ("describe shards --queries 3", "--queries: applies to a single file, not to a folder"),
        ("convert minari.hdf5", "data convert: name the files, `jaxrl data convert FILE OUT.npz`"),
        ("convert minari.hdf5 out.txt", "out.txt: the name of a dataset file ends in .npz"),
        ("convert minari.hdf5 plain.npz", "plain.npz exists: name another file"),
        ("convert minari.hdf5 no/out.npz", "cannot write no/out.npz: no folder no"),
        (
            "convert minari.hdf5 out.npz --keys wher",
            "minari.hdf5: unknown observation key 'wher': did you mean 'where'?",
        ),
        ("mix plain.npz rewards.npz", "--out: name the file to write"),
        ("mix plain.npz rewards.npz --out out.npz", "dataset plain.npz: has no rewards, the other has: relabel both"),
        ("mix plain.npz plain.npz --ratio 2 --out out.npz", "ratio = 2: must be in [0, 1]"),
        ("top plain.npz --out out.npz", "dataset plain.npz: has no rewards to compare episodes by"),
        ("top rewards.npz --fraction 0 --out out.npz", "fraction = 0: must be in (0, 1]"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(folder, capsys, line, message):
    before = sorted(folder.rglob("*"))
    assert cli.main(["data", *line.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"jaxrl: {message}") and error.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("verb", ["describe", "convert", "mix", "top"])
def test_every_command_explains_itself(capsys, verb):
    assert cli.main(["data", verb, "--help"]) == 0
    assert f"usage: jaxrl data {verb} " in capsys.readouterr().out
