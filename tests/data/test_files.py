"""Facts about jaxrl.data.files: round trips, layouts, refusals, a slice of a real OGBench file, hand-worked reports."""

import dataclasses
import errno
import hashlib
import json
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from jaxrl.data import files
from jaxrl.errors import UserError

SLICE = Path(__file__).parents[1] / "data" / "pointmaze-medium-navigate-v0-slice.npz"


def tiny():
    """Two episodes, of 2 and of 3 steps; the rewards and masks of their last rows are noise that must not count."""
    return {
        "observations": np.array([[0, 5], [1, 5], [2, 5], [10, 5], [11, 5], [12, 5], [13, 5]], np.float32),
        "actions": np.array([[-1], [0.5], [0.9], [1], [1], [0.25], [-1]], np.float32),
        "terminals": np.array([0, 0, 1, 0, 0, 0, 1], bool),
        "rewards": np.array([1, 2, 99, -4, 0, 1, 99], np.float32),
        "masks": np.array([1, 0, 0, 1, 1, 1, 0], np.float32),
        "button_states": np.arange(14).reshape(7, 2),
    }


def full():
    """The steps of `tiny`, one row each, in the layout with next observations."""
    columns, step = tiny(), ~tiny()["terminals"]
    rows = {name: column[step] for name, column in columns.items()}
    after = np.flatnonzero(step) + 1
    return rows | {"next_observations": columns["observations"][after], "terminals": columns["terminals"][after]}


def written(folder, **changes):
    """Writes `tiny` with some columns replaced, or left out where None, as any other program might."""
    path = folder / "data.npz"
    np.savez(path, **{name: column for name, column in (tiny() | changes).items() if column is not None})
    return path


def with_value(name, where, value, dtype=np.float32):
    """A column of `tiny` in another dtype, with one value changed."""
    column = tiny()[name].astype(dtype)
    column[where] = value
    return {name: column}


def assert_same(one, other):
    ours, theirs = files.to_columns(one), files.to_columns(other)
    assert ours.keys() == theirs.keys()
    for name, column in ours.items():
        assert column.dtype == theirs[name].dtype
        assert column.tobytes() == theirs[name].tobytes(), name


def test_a_round_trip_is_bit_exact(tmp_path):
    generator = np.random.default_rng(0)
    columns = tiny() | {
        "observations": generator.normal(size=(7, 3)).astype(np.float32),
        "actions": np.array([[-0.0], [1e-40], [1], [-1], [0.1], [0], [0]], np.float32),  # signed zero, subnormal
        "qpos": generator.normal(size=(7, 2, 2)),  # float64 and rank 3 stay so
    }
    dataset = files.from_columns(columns)
    files.save(tmp_path / "a.npz", dataset)
    loaded = files.load(tmp_path / "a.npz")
    assert_same(dataset, loaded)
    assert loaded.extra["qpos"].dtype == np.float64 and loaded.extra["button_states"].dtype == np.int64
    assert loaded.digest == dataset.digest
    assert loaded.path == str(tmp_path / "a.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_other_dtypes_of_the_same_values_load_as_the_same_data(tmp_path):
    dataset = files.from_columns(tiny())
    wide = {name: column.astype(">f8") for name, column in tiny().items() if name != "button_states"}
    assert_same(files.load(written(tmp_path, **wide)), dataset)
    assert files.load(written(tmp_path, terminals=tiny()["terminals"].astype(np.int8))).digest == dataset.digest


def test_rewards_masks_and_extras_may_be_absent(tmp_path):
    dataset = files.load(written(tmp_path, rewards=None, masks=None, button_states=None))
    assert (dataset.rewards, dataset.masks, dict(dataset.extra)) == (None, None, {})


def test_the_digest_is_of_names_dtypes_shapes_and_bytes():
    def digest(**changes):
        return files.from_columns(tiny() | changes).digest

    columns = {"actions": tiny()["actions"], "observations": tiny()["observations"], "terminals": tiny()["terminals"]}
    types = {"actions": "<f4 (7, 1)", "observations": "<f4 (7, 2)", "terminals": "|b1 (7,)"}
    by_hand = b"".join(f"{name} {types[name]}\n".encode() + columns[name].tobytes() for name in sorted(columns))
    assert files.from_columns(columns).digest == hashlib.sha256(by_hand).hexdigest()

    others = [
        digest(rewards=tiny()["rewards"] + 1),
        digest(button_states=tiny()["button_states"].astype(np.int32)),
        digest(button_states=tiny()["button_states"].reshape(7, 2, 1)),
        digest(qvel=tiny()["rewards"]),
    ]
    assert len({digest(), *others}) == 5
    assert files.from_columns(dict(reversed(tiny().items())), "elsewhere").digest == digest()


def test_rounding_beyond_the_bounds_is_clipped(tmp_path):
    path = written(tmp_path, **with_value("actions", (3, 0), 1 + 9e-6))
    assert files.load(path).actions[3, 0] == 1.0


def test_the_full_layout_becomes_compact():
    dataset = files.from_columns(full())
    np.testing.assert_array_equal(dataset.observations, tiny()["observations"])
    np.testing.assert_array_equal(dataset.terminals, tiny()["terminals"])
    np.testing.assert_array_equal(dataset.actions[:, 0], np.array([-1, 0.5, 0, 1, 1, 0.25, 0], np.float32))
    np.testing.assert_array_equal(dataset.rewards, [1, 2, 0, -4, 0, 1, 0])
    np.testing.assert_array_equal(dataset.masks, [1, 0, 0, 1, 1, 1, 1])
    np.testing.assert_array_equal(dataset.extra["button_states"][:, 0], [0, 2, 2, 6, 8, 10, 10])


def test_in_the_full_layout_a_gap_ends_an_episode_too():
    columns = full()
    columns["terminals"] = np.array([0, 0, 0, 0, 1], bool)  # the first episode's end is not marked
    np.testing.assert_array_equal(files.from_columns(columns).terminals, tiny()["terminals"])
    columns["terminals"] = np.array([0, 1, 0, 0, 0], bool)  # nor is the file's end
    np.testing.assert_array_equal(files.from_columns(columns).terminals, tiny()["terminals"])


def test_in_the_full_layout_a_marked_end_stays_where_the_next_episode_starts_there():
    columns = full()
    columns["observations"][2:] -= 8  # the second episode starts where the first one ended, at 2
    columns["next_observations"][2:] -= 8
    np.testing.assert_array_equal(files.from_columns(columns).terminals, tiny()["terminals"])


@pytest.mark.parametrize("name", ["actions", "observations", "terminals"])
def test_a_missing_column_is_named_with_those_found(tmp_path, name):
    found = ", ".join(sorted(tiny().keys() - {name}))
    with pytest.raises(UserError) as refused:
        files.load(written(tmp_path, **{name: None}))
    assert str(refused.value) == f"{tmp_path / 'data.npz'}: missing column {name!r}: found {found}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observations": np.zeros(7)}, "column 'observations' must be [rows, entries]: its shape is (7,)"),
        ({"actions": np.zeros((7, 0))}, "column 'actions' must be [rows, entries]: its shape is (7, 0)"),
        ({"terminals": np.ones((7, 1))}, "column 'terminals' must be [rows]: its shape is (7, 1)"),
        ({"masks": np.ones((7, 1))}, "column 'masks' must be [rows]: its shape is (7, 1)"),
        ({"qpos": np.float32(1)}, "column 'qpos' must be [rows, ...]: its shape is ()"),
        ({"actions": np.zeros((6, 1))}, "column 'actions' has 6 rows, 'observations' has 7"),
        ({"qpos": np.zeros((8, 2))}, "column 'qpos' has 8 rows, 'observations' has 7"),
        ({"actions": np.full((7, 1), "left")}, "column 'actions' must be numeric: its dtype is <U4"),
        ({"qpos": np.zeros(7, complex)}, "column 'qpos' must be numeric: its dtype is complex128"),
        (
            with_value("observations", (3, 1), np.nan),
            "column 'observations' must be finite in float32: row 3 holds nan",
        ),
        (with_value("rewards", 5, -np.inf), "column 'rewards' must be finite in float32: row 5 holds -inf"),
        (
            with_value("rewards", 5, 1e300, np.float64),
            "column 'rewards' must be finite in float32: row 5 holds 1e+300",
        ),
        (
            {"qvel": np.array([0, 1, 2, np.nan, 4, 5, np.nan])},
            "column 'qvel' must be finite in float64: row 3 holds nan",
        ),
        (with_value("actions", (4, 0), 1.5), "column 'actions' must lie in [-1, 1]: row 4, entry 0 is 1.5"),
        (with_value("actions", (4, 0), -1.0001), "column 'actions' must lie in [-1, 1]: row 4, entry 0 is -1.0001"),
        (with_value("terminals", 2, 0.5), "column 'terminals' must hold 0 and 1 only: row 2 is 0.5"),
        (with_value("masks", 1, -1), "column 'masks' must hold 0 and 1 only: row 1 is -1"),
        (
            {"terminals": np.zeros(7)},
            "no episode ends: column 'terminals' is false in all 7 rows, "
            "it must be true in the last row of each episode",
        ),
        (with_value("terminals", 6, 0), "the last row (6) must end an episode: its 'terminals' is false"),
        (
            with_value("terminals", 1, 1),
            "row 2 is an episode of one row: an episode needs at least two, a step and the observation it leads to "
            "('terminals' is true in the last row of an episode only)",
        ),
        ({"next_observations": np.zeros((7, 3))}, "column 'next_observations' has 3 entries, 'observations' has 2"),
        (
            {"next_observations": np.zeros((7, 2))},
            "rows are not in time order: 'next_observations' equals the following row's observation at 0 of the 5 "
            "steps inside episodes",
        ),
        ({name: column[:0] for name, column in tiny().items()}, "the columns hold no rows"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_columns_are_refused(tmp_path, changes, message):
    path = written(tmp_path, **changes)
    with pytest.raises(UserError) as refused:
        files.load(path)
    assert str(refused.value) == f"{path}: {message}"


def test_objects_are_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "went_off",))

    path = tmp_path / "data.npz"
    np.savez(path, **tiny(), note=np.array([Bomb()], dtype=object))
    with pytest.raises(UserError, match="column 'note' cannot be read: Object arrays cannot be loaded"):
        files.load(path)
    assert not (tmp_path / "went_off").exists()


def test_a_missing_file_names_the_nearest_one(tmp_path):
    for name in ("cube-single-play-v0.npz", "cube-single-play-v0-val.npz", "puzzle-3x3-play-v0.npz"):
        (tmp_path / name).touch()
    asked = tmp_path / "cube-singel-play-v0.npz"
    with pytest.raises(UserError) as refused:
        files.load(asked)
    assert str(refused.value) == f"no file {asked}: did you mean 'cube-single-play-v0.npz'?"
    with pytest.raises(UserError, match=r"did you mean '.*\.npz'\?$"):
        files.load(tmp_path / "zzz")


def test_a_missing_file_in_an_empty_or_missing_folder_says_so(tmp_path):
    with pytest.raises(UserError, match=r"no file .*a\.npz: its folder holds no \.npz file"):
        files.load(tmp_path / "a.npz")
    with pytest.raises(UserError, match=r"^no folder .*nowhere$"):
        files.load(tmp_path / "nowhere" / "a.npz")
    with pytest.raises(UserError, match=r"is a folder: a dataset is one \.npz file"):
        files.load(tmp_path)


def test_a_file_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    def forbidden(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    path = written(tmp_path)
    monkeypatch.setattr(zipfile, "is_zipfile", forbidden)
    with pytest.raises(UserError, match=r"^cannot read .*data\.npz: Permission denied$"):
        files.load(path)


def test_damaged_files_are_refused(tmp_path):
    whole = SLICE.read_bytes()
    path = tmp_path / "data.npz"
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"data\.npz: the file is empty \(0 bytes\)$"):
        files.load(path)
    path.write_bytes(b"<html>404 Not Found</html>")
    with pytest.raises(UserError, match=r"data\.npz: this is not an \.npz file$"):
        files.load(path)
    for size in (100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"data\.npz: the file is cut short: copy it again$"):
            files.load(path)


def test_a_flipped_bit_is_noticed(tmp_path):
    path = written(tmp_path)
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("rewards.npy").header_offset
    damaged = bytearray(path.read_bytes())
    name_size, extra_size = struct.unpack("<HH", damaged[offset + 26 : offset + 30])
    damaged[offset + 30 + name_size + extra_size + 128] ^= 1  # the first byte after the .npy header
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="column 'rewards' cannot be read: Bad CRC-32"):
        files.load(path)


def test_a_zip_of_something_else_is_refused(tmp_path):
    path = tmp_path / "data.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no arrays")
    with pytest.raises(UserError, match=r"missing column 'observations': found readme\.txt$"):
        files.load(path)
    np.savez(path)
    with pytest.raises(UserError, match=r"missing column 'observations': found no columns$"):
        files.load(path)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, r"no space left to write .*a\.npz: it needs up to 0\.0 MB"),
        (errno.EIO, r"cannot write .*a\.npz: "),
    ],
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, code, message):
    path = tmp_path / "a.npz"
    files.save(path, files.from_columns(tiny()))
    before = path.read_bytes()

    def fails(stream, **columns):
        stream.write(b"PK half of it")
        raise OSError(code, "the disk says no")

    monkeypatch.setattr(np, "savez_compressed", fails)
    with pytest.raises(UserError, match=message):
        files.save(path, files.from_columns(tiny() | {"qvel": np.ones(7)}))
    assert path.read_bytes() == before
    assert [other.name for other in tmp_path.iterdir()] == ["a.npz"]


def test_save_refuses_what_load_would_refuse(tmp_path):
    dataset = files.from_columns(tiny())
    with pytest.raises(UserError, match=r"the name of a dataset file ends in \.npz"):
        files.save(tmp_path / "a.hdf5", dataset)
    with pytest.raises(UserError, match=r"no folder .*nowhere$"):
        files.save(tmp_path / "nowhere" / "a.npz", dataset)
    with pytest.raises(UserError, match="column 'rewards' has 3 rows"):
        files.save(tmp_path / "a.npz", dataclasses.replace(dataset, rewards=np.zeros(3)))
    with pytest.raises(UserError, match="extra column 'next_observations' has a reserved name"):
        files.save(tmp_path / "a.npz", dataclasses.replace(dataset, extra={"next_observations": np.zeros((7, 2))}))
    assert list(tmp_path.iterdir()) == []


def test_a_slice_of_a_real_ogbench_file(tmp_path):
    dataset = files.load(SLICE)
    first, last = files.episodes(dataset)
    np.testing.assert_array_equal(first, [0, 1001, 2002])
    np.testing.assert_array_equal(last, [1000, 2001, 3002])
    assert dataset.rewards is None and dataset.masks is None
    assert sorted(dataset.extra) == ["qpos", "qvel"]
    # A point maze is observed by its position, moves by at most 0.2 a step, and starts anywhere anew.
    np.testing.assert_array_equal(dataset.observations, dataset.extra["qpos"])
    moves = np.abs(np.diff(dataset.observations, axis=0)).max(axis=1)
    assert moves[~dataset.terminals[:-1]].max() < 0.2001
    assert moves[dataset.terminals[:-1]].min() > 1
    np.testing.assert_array_equal(dataset.observations[0], np.array([19.692158, -0.8353969], np.float32))
    np.testing.assert_array_equal(dataset.actions[1000], np.array([-0.8249402, -1.0], np.float32))
    assert dataset.digest == "ab5d1cf1ec62432377431fe8f867d97e0a51c84e6f6600f86c8053fe1f43d9b7"

    files.save(tmp_path / "copy.npz", dataset)
    assert files.load(tmp_path / "copy.npz").digest == dataset.digest
    shutil.copy(tmp_path / "copy.npz", tmp_path / "again.npz")
    report = files.describe(files.load(tmp_path / "again.npz"))
    assert (report["episodes"], report["rows"]) == (3, 3003)
    assert report["ends"] == {"terminated": 0, "time_limit": 3, "earlier": 0}
    assert report["actions"]["at_bound"] == pytest.approx([812 / 3000, 892 / 3000])
    assert report["returns"] is None and report["rewards"].startswith("none in the file")


def test_describe_by_hand():
    report = files.describe(files.from_columns(tiny(), "runs/tiny.npz"))
    assert report == {
        "path": "runs/tiny.npz",
        "digest": files.from_columns(tiny()).digest,
        "episodes": 2,
        "rows": 7,
        "steps": 5,
        "length": {"min": 2, "median": 2.5, "max": 3},
        "ends": {"terminated": 1, "time_limit": 1, "earlier": 0},
        "rewards": "from the file: row t holds the reward of the step from row t to row t + 1",
        "returns": {"min": -3.0, "mean": 0.0, "max": 3.0},  # 1 + 2 and -4 + 0 + 1
        "observations": {"size": 2, "min": [0.0, 5.0], "mean": [7.0, 5.0], "max": [13.0, 5.0]},
        "actions": {"size": 1, "min": [-1.0], "mean": [0.35], "max": [1.0], "at_bound": [0.6]},
        "extra": {"button_states": "int64 [7, 2]"},
    }
    assert json.loads(json.dumps(report)) == report


def test_describe_with_the_environment_s_own_rewards():
    seen = {}

    def relabel(obs, actions, next_obs):
        seen.update(obs=obs[:, 0], actions=actions[:, 0], next_obs=next_obs[:, 0])
        solved = next_obs[:, 0] == 12
        return solved - 1.0, solved

    dataset = files.from_columns(tiny())
    report = files.describe(dataset, relabel)
    np.testing.assert_array_equal(seen["obs"], [0, 1, 10, 11, 12])  # the steps, never across an episode's end
    np.testing.assert_array_equal(seen["next_obs"], [1, 2, 11, 12, 13])
    np.testing.assert_array_equal(seen["actions"], [-1, 0.5, 1, 1, 0.25])
    assert report["rewards"] == "relabelled by the environment, as its own step gives them"
    assert report["returns"] == {"min": -2.0, "mean": -2.0, "max": -2.0}
    assert report["ends"] == {"terminated": 0, "time_limit": 2, "earlier": 1}  # 11 -> 12 is not its episode's last step
    assert report["digest"] == dataset.digest  # of the file's data

    relabelled = files.relabelled(dataset, relabel)
    np.testing.assert_array_equal(relabelled.rewards, [-1, -1, 0, -1, 0, -1, 0])
    np.testing.assert_array_equal(relabelled.masks, [1, 1, 1, 1, 0, 1, 1])


def test_the_report_reads_as_a_table():
    columns = tiny() | {"masks": np.array([0, 0, 1, 1, 1, 1, 1], np.float32)}
    dataset = files.from_columns(columns, "tiny.npz")
    assert files.format_report(files.describe(dataset)).splitlines() == [
        "dataset               tiny.npz",
        f"sha256                {dataset.digest}",
        "episodes              2 (7 rows, 5 steps)",
        "steps each            min 2, median 2.5, max 3",
        "ended by              task 1, time limit 1",
        "                      the task is also over at 1 steps before an episode's last",
        "rewards               from the file: row t holds the reward of the step from row t to row t + 1",
        "returns               min -3, mean 0, max 3",
        "column button_states  int64 [7, 2]",
        "",
        "range                    min      mean       max",
        "observations [2]           0     6.000        13  1 constant",
        "actions [1]               -1     0.350         1  60.0 % at a bound",
        "  action 0                -1     0.350         1  60.0 % at a bound",
    ]


# Images, and observations of several arrays


def seen():
    """The columns of `tiny` with a vector, a number and an image in place of the observations."""
    columns = {name: column for name, column in tiny().items() if name != "observations"}
    ids = tiny()["observations"][:, 0]
    image = np.broadcast_to(ids[:, None, None, None], (7, 2, 4, 3)).astype(np.uint8)
    state, clock = tiny()["observations"].astype(np.float64), ids.astype(np.int64)
    return columns | {"observations/state": state, "observations/clock": clock, "observations/camera": image}


def test_observations_of_several_arrays_are_a_dict_whose_images_stay_bytes(tmp_path):
    np.savez(tmp_path / "a.npz", **seen())
    dataset = files.load(tmp_path / "a.npz")
    found = {name: (x.shape, x.dtype.name) for name, x in dataset.observations.items()}
    assert found == {"state": ((7, 2), "float32"), "clock": ((7,), "float32"), "camera": ((7, 2, 4, 3), "uint8")}
    np.testing.assert_array_equal(dataset.observations["camera"][:, 1, 3, 2], tiny()["observations"][:, 0])
    assert set(dataset.extra) == {"button_states"}
    files.save(tmp_path / "b.npz", dataset)
    assert_same(files.load(tmp_path / "b.npz"), dataset)
    assert set(np.load(tmp_path / "b.npz").files) == set(seen())


def test_images_alone_are_one_array(tmp_path):
    image = seen()["observations/camera"]
    dataset = files.load(written(tmp_path, observations=image))
    assert dataset.observations.dtype == np.uint8
    np.testing.assert_array_equal(dataset.observations, image)
    few = files.load(written(tmp_path, observations=image[:, 0, 0]))
    assert few.observations.dtype == np.float32  # bytes that are no images are numbers


def test_the_full_layout_of_several_arrays_becomes_compact():
    columns, step = seen(), ~tiny()["terminals"]
    rows, after = {name: column[step] for name, column in columns.items()}, np.flatnonzero(step) + 1
    following = {f"next_{name}": columns[name][after] for name in columns if name.startswith("observations/")}
    dataset = files.from_columns(rows | following | {"terminals": columns["terminals"][after]})
    wanted = files.from_columns(columns)
    np.testing.assert_array_equal(dataset.terminals, wanted.terminals)
    for name, column in wanted.observations.items():
        np.testing.assert_array_equal(dataset.observations[name], column)
        assert dataset.observations[name].dtype == column.dtype
    other = {name: column for name, column in following.items() if name != "next_observations/clock"}
    with pytest.raises(UserError, match=r"missing column 'next_observations/clock': there is 'next_observations/cam"):
        files.from_columns(rows | other)


def test_keys_choose_among_several_arrays(tmp_path):
    np.savez(tmp_path / "a.npz", **seen())
    assert set(files.load(tmp_path / "a.npz", ("camera", "clock")).observations) == {"camera", "clock"}
    with pytest.raises(UserError, match=r"unknown observation key 'camra': did you mean 'camera'\?"):
        files.load(tmp_path / "a.npz", ("camra",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observations": np.zeros((7, 2))}, "column 'observations' stands beside 'observations/camera'"),
        (
            {"observations/state": np.zeros((6, 2))},
            "column 'observations/state' has 6 rows, 'observations/camera' has 7",
        ),
        (
            {"observations/state": np.zeros((7, 0))},
            r"'observations/state' must be \[rows, ...\]: its shape is \(7, 0\)",
        ),
        (
            {"next_observations/eye": np.zeros((7, 2))},
            "'next_observations/eye' has no column 'observations/eye' to follow",
        ),
    ],
)
def test_several_arrays_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        files.from_columns(seen() | changes)


def test_the_report_has_a_row_for_each_array(tmp_path):
    report = files.describe(files.from_columns(seen()))
    json.dumps(report)
    arrays = report["observations"]["arrays"]
    assert arrays["state"]["max"] == [13, 5] and arrays["camera"]["image"] == [2, 4, 3]
    assert (arrays["camera"]["min"], arrays["camera"]["max"]) == ([0], [13])
    rows = {line.split("  ")[0]: line.split() for line in files.format_report(report).splitlines()[-6:]}
    assert rows["observations/state [2]"][-2:] == ["1", "constant"]
    assert rows["observations/camera [2, 4, 3]"][-4:] == ["0", "7.000", "13", "pixels"]


def test_an_environment_relabels_dicts():
    def relabel(obs, actions, following):
        return following["clock"] - obs["clock"], following["camera"][:, 0, 0, 0] == 13

    dataset = files.relabelled(files.from_columns(seen()), relabel)
    np.testing.assert_array_equal(dataset.rewards[~dataset.terminals], np.ones(5))
    np.testing.assert_array_equal(dataset.masks, [1, 1, 1, 1, 1, 0, 1])


def test_vectors_are_the_arrays_side_by_side_without_images():
    found = files.vectors(files.from_columns(seen()).observations)
    np.testing.assert_array_equal(
        found, np.concatenate([seen()["observations/clock"][:, None], seen()["observations/state"]], 1)
    )
    array = files.from_columns(tiny()).observations
    assert files.vectors(array) is array or np.shares_memory(files.vectors(array), array)
    assert files.vectors(seen()["observations/camera"]).shape == (7, 0)


# Discrete actions


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.zeros((7, 1), np.int64), "column 'actions' has the dtype int64: discrete actions are not supported"),
        (np.zeros(7, np.int32), "column 'actions' has the dtype int32: discrete actions are not supported"),
        (np.zeros((7, 2), bool), "column 'actions' has the dtype bool: discrete actions are not supported"),
        (
            np.array([[0], [1], [0], [0], [1], [1], [0.0]]),
            "column 'actions' holds 0 and 1 only, as discrete actions do: discrete actions are not supported, an "
            r"action is a vector of continuous numbers in \[-1, 1\]; if these are continuous, scale them",
        ),
        (
            np.array([[0], [3], [0], [0], [1], [1], [0.0]]),
            "column 'actions' holds whole numbers only, row 1, entry 0 is 3: discrete actions are not supported",
        ),
    ],
)
def test_discrete_actions_are_refused(actions, message):
    with pytest.raises(UserError, match=message):
        files.from_columns(tiny() | {"actions": actions})


@pytest.mark.parametrize(
    "actions",
    [
        np.zeros((7, 1)),
        np.array([[-1], [1], [0], [-1], [1], [1], [0.0]]),
        np.array([[1], [1], [0], [1], [1], [1], [0.0]]),  # 0 where no step was taken
        np.array([[0, 1], [1, 0], [0, 0], [1, 1], [1, 0], [0, 1], [0, 0.0]]),
    ],
)
def test_continuous_actions_at_whole_numbers_are_not(actions):
    np.testing.assert_array_equal(files.from_columns(tiny() | {"actions": actions}).actions, actions)
