"""Facts about jaxrl.data.hdf5: small files in the layouts of D4RL, Minari and robomimic, read to the last number."""

import dataclasses
import sys

import h5py
import numpy as np
import pytest

from jaxrl.data import files
from jaxrl.errors import UserError
from jaxrl.runs.datasets import load_data
from jaxrl.runs.presets import preset
from tests import tiny


def written(folder, tree, name="data.hdf5"):
    """Writes arrays by their paths."""
    with h5py.File(folder / name, "w") as file:
        for path, array in tree.items():
            file[path] = array
    return folder / name


def d4rl(**changes):
    """Three episodes, of 2, 3 and 2 steps: the first ends by the task, the second by time, the third not at all."""
    tree = {
        "observations": np.array([[0, 1], [1, 1], [10, 1], [11, 1], [12, 1], [20, 1], [21, 1]], np.float32),
        "actions": np.array([[0.0], [0.1], [0.2], [0.3], [0.4], [0.5], [0.6]], np.float32),
        "rewards": np.array([1, 2, 3, 4, 5, 6, 7], np.float32),
        "terminals": np.array([0, 1, 0, 0, 0, 0, 0], bool),
        "timeouts": np.array([0, 0, 0, 0, 1, 0, 0], bool),
        "infos/qpos": np.zeros((7, 3)),
        "metadata/algorithm": "SAC",
    } | changes
    return {name: array for name, array in tree.items() if array is not None}


def minari(steps=(2, 3), **changes):
    """Episodes of T steps with T + 1 observations, the first ended by the task."""
    tree = {}
    for i, count in enumerate(steps):
        tree |= {
            f"episode_{i}/observations": 10.0 * i + np.arange(count + 1)[:, None] * np.ones(2),
            f"episode_{i}/actions": np.full((count, 1), 0.01 * (i + 1), np.float32),
            f"episode_{i}/rewards": np.arange(count) + 1.0,
            f"episode_{i}/terminations": np.arange(count) == (count - 1 if i == 0 else -1),
            f"episode_{i}/truncations": np.arange(count) == (count - 1 if i else -1),
            f"episode_{i}/infos/goal": np.zeros((count + 1, 2)),
        }
    tree |= changes
    return {name: array for name, array in tree.items() if array is not None}


def robomimic(following=True, dones=(0, 1), demos=(0, 1)):
    """Demonstrations of two steps with two observation keys, and the subsets that a mask names."""
    tree = {"mask/train": np.array([b"demo_0"])}
    for i in demos:
        base = f"data/demo_{i}"
        tree |= {
            f"{base}/obs/robot0_eef_pos": 100.0 * i + np.array([[0, 1, 2], [3, 4, 5]]),
            f"{base}/obs/object": 100.0 * i + np.array([[10, 11], [12, 13]]),
            f"{base}/actions": np.full((2, 2), 0.5 - 0.1 * i),
            f"{base}/rewards": np.array([0.0, 1.0]),
            f"{base}/dones": np.array(dones),
            f"{base}/states": np.zeros((2, 9)),
        }
        if following:
            tree |= {
                f"{base}/next_obs/robot0_eef_pos": 100.0 * i + np.array([[3, 4, 5], [6, 7, 8]]),
                f"{base}/next_obs/object": 100.0 * i + np.array([[12, 13], [14, 15]]),
            }
    return tree


# D4RL


def test_d4rl_without_next_observations_keeps_terminal_steps_and_drops_those_that_time_ended(tmp_path):
    dataset = files.load(written(tmp_path, d4rl()))
    np.testing.assert_array_equal(dataset.observations[:, 0], [0, 1, 1, 10, 11, 12, 20, 21])
    np.testing.assert_array_equal(dataset.terminals, [0, 0, 1, 0, 0, 1, 0, 1])
    np.testing.assert_array_equal(dataset.rewards, [1, 2, 0, 3, 4, 0, 6, 0])
    np.testing.assert_array_equal(dataset.masks, [1, 0, 1, 1, 1, 1, 1, 1])
    steps = ~dataset.terminals
    np.testing.assert_array_equal(dataset.actions[steps, 0], np.array([0, 0.1, 0.2, 0.3, 0.5], np.float32))
    np.testing.assert_array_equal(dataset.extra["unfinished"], [0, 0, 0, 0, 0, 0, 1, 1])
    assert set(dataset.extra) == {"unfinished"}


def test_d4rl_with_next_observations_keeps_every_step_and_its_true_end(tmp_path):
    following = np.array([[1, 1], [2, 1], [11, 1], [12, 1], [13, 1], [21, 1], [22, 1]], np.float32)
    dataset = files.load(written(tmp_path, d4rl(next_observations=following)))
    np.testing.assert_array_equal(dataset.observations[:, 0], [0, 1, 2, 10, 11, 12, 13, 20, 21, 22])
    np.testing.assert_array_equal(dataset.terminals, [0, 0, 1, 0, 0, 0, 1, 0, 0, 1])
    np.testing.assert_array_equal(dataset.rewards[~dataset.terminals], [1, 2, 3, 4, 5, 6, 7])
    np.testing.assert_array_equal(dataset.masks[~dataset.terminals], [1, 0, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(dataset.extra["unfinished"], np.arange(10) >= 7)


def test_a_d4rl_file_that_ends_with_an_end_has_no_unfinished_episode(tmp_path):
    ends = d4rl()["timeouts"] | (np.arange(7) == 6)
    assert "unfinished" not in files.load(written(tmp_path, d4rl(timeouts=ends))).extra


def test_rows_alone_without_a_step_are_dropped(tmp_path):
    # a timeout right after another, and a single row after the last end
    dataset = files.load(written(tmp_path, d4rl(timeouts=np.array([0, 0, 0, 0, 1, 1, 0], bool))))
    np.testing.assert_array_equal(dataset.observations[:, 0], [0, 1, 1, 10, 11, 12])
    assert "unfinished" not in dataset.extra


def test_antmaze_terminals_in_a_row_keep_their_steps_and_end_an_episode_each(tmp_path):
    terminals = np.array([0, 1, 1, 0, 0, 0, 0], bool)
    dataset = files.load(written(tmp_path, d4rl(terminals=terminals, timeouts=np.arange(7) == 6)))
    steps = ~dataset.terminals
    np.testing.assert_array_equal(dataset.rewards[steps], [1, 2, 3, 4, 5, 6])  # the step that time ended is not there
    np.testing.assert_array_equal(dataset.masks[steps], [1, 0, 0, 1, 1, 1])
    first, last = files.episodes(dataset)
    np.testing.assert_array_equal(last - first, [2, 1, 3])


def test_an_end_by_the_task_and_by_time_at_once_is_one_by_the_task(tmp_path):
    dataset = files.load(written(tmp_path, d4rl(terminals=np.array([0, 1, 0, 0, 1, 0, 0], bool))))
    np.testing.assert_array_equal(dataset.rewards[~dataset.terminals], [1, 2, 3, 4, 5, 6])
    np.testing.assert_array_equal(dataset.masks[~dataset.terminals], [1, 0, 1, 1, 0, 1])


def test_d4rl_columns_of_one_entry_and_of_other_dtypes_are_the_same_data(tmp_path):
    changes = {name: d4rl()[name].astype(np.float64)[:, None] for name in ("rewards", "terminals", "timeouts")}
    wide = files.load(written(tmp_path, d4rl(**changes)))
    assert wide.digest == files.load(written(tmp_path, d4rl(), "again.h5")).digest


# Minari


def test_minari_keeps_the_last_observation_of_every_episode(tmp_path):
    dataset = files.load(written(tmp_path, minari()))
    np.testing.assert_array_equal(dataset.observations[:, 1], [0, 1, 2, 10, 11, 12, 13])
    np.testing.assert_array_equal(dataset.terminals, [0, 0, 1, 0, 0, 0, 1])
    np.testing.assert_array_equal(dataset.rewards, [1, 2, 0, 1, 2, 3, 0])
    np.testing.assert_array_equal(dataset.masks, [1, 0, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(dataset.actions[:, 0], np.array([0.01, 0.01, 0, 0.02, 0.02, 0.02, 0], np.float32))
    assert dataset.parts == "" and dict(dataset.extra) == {}


def test_minari_episodes_are_ordered_by_number_and_empty_ones_are_left_out(tmp_path):
    dataset = files.load(written(tmp_path, minari(steps=(1, 0, *[1] * 9))))
    np.testing.assert_array_equal(dataset.observations[::2, 0], [0, *range(20, 110, 10)])


def test_minari_dictionaries_and_tuples_are_laid_side_by_side_by_name(tmp_path):
    tree = minari(steps=(2,), **{"episode_0/observations": None, "episode_0/actions": None})
    tree |= {
        "episode_0/observations/observation": np.array([[1, 2], [3, 4], [5, 6]]),
        "episode_0/observations/desired_goal/_index_10": np.array([7, 8, 9]),
        "episode_0/observations/desired_goal/_index_2": np.array([10, 11, 12]),
        "episode_0/actions/_index_0": np.array([0.1, 0.2]),
        "episode_0/actions/_index_1": np.array([[0.3], [0.4]]),
    }
    path = written(tmp_path, tree)
    dataset = files.load(path)
    np.testing.assert_array_equal(dataset.observations, [[10, 7, 1, 2], [11, 8, 3, 4], [12, 9, 5, 6]])
    np.testing.assert_array_equal(dataset.actions[:2], np.array([[0.1, 0.3], [0.2, 0.4]], np.float32))
    assert dataset.parts == "desired_goal/_index_2 [1], desired_goal/_index_10 [1], observation [2]"
    assert f"observations  {dataset.parts}\n" in files.format_report(files.describe(dataset))
    chosen = files.load(path, keys=("observation", "desired_goal/_index_2"))
    np.testing.assert_array_equal(chosen.observations, [[1, 2, 10], [3, 4, 11], [5, 6, 12]])
    assert files.load(path, keys=("desired_goal",)).parts == "desired_goal/_index_2 [1], desired_goal/_index_10 [1]"
    with pytest.raises(UserError, match=r"unknown observation key 'observatio': did you mean 'observation'\?"):
        files.load(path, keys=("observatio",))


# robomimic


def test_robomimic_ends_with_the_next_observation_of_the_last_step(tmp_path):
    dataset = files.load(written(tmp_path, robomimic()))
    first = [[10, 11, 0, 1, 2], [12, 13, 3, 4, 5], [14, 15, 6, 7, 8]]
    np.testing.assert_array_equal(dataset.observations, [*first, *(np.array(first) + 100)])
    np.testing.assert_array_equal(dataset.terminals, [0, 0, 1, 0, 0, 1])
    np.testing.assert_array_equal(dataset.rewards, [0, 1, 0, 0, 1, 0])
    np.testing.assert_array_equal(dataset.masks, [1, 0, 1, 1, 0, 1])
    assert dataset.parts == "object [2], robot0_eef_pos [3]"


def test_robomimic_without_next_obs_keeps_a_last_step_only_where_it_ended_the_task(tmp_path):
    ended = files.load(written(tmp_path, robomimic(following=False)))
    np.testing.assert_array_equal(ended.rewards, [0, 1, 0, 0, 1, 0])
    np.testing.assert_array_equal(ended.observations[2], ended.observations[1])
    cut = files.load(written(tmp_path, robomimic(following=False, dones=(0, 0)), "cut.hdf5"))
    np.testing.assert_array_equal(cut.terminals, [0, 1, 0, 1])
    np.testing.assert_array_equal(cut.observations[:2], [[10, 11, 0, 1, 2], [12, 13, 3, 4, 5]])


def test_robomimic_demonstrations_are_ordered_by_number(tmp_path):
    dataset = files.load(written(tmp_path, robomimic(demos=(2, 10, 1))), keys=("object",))
    np.testing.assert_array_equal(dataset.observations[::3, 0], [110, 210, 1010])


# Images


def pictures(count, first=0):
    return np.broadcast_to(first + np.arange(count)[:, None, None, None], (count, 4, 5, 3)).astype(np.uint8)


def test_a_group_with_images_is_a_dict_whose_images_stay_bytes(tmp_path):
    images = {
        f"data/demo_{i}/{obs}/view_image": pictures(2, 100 * i + after)
        for i in (0, 1)
        for obs, after in (("obs", 0), ("next_obs", 1))
    }
    dataset = files.load(written(tmp_path, robomimic() | images))
    assert {name: x.shape[1:] for name, x in dataset.observations.items()} == {
        "object": (2,),
        "robot0_eef_pos": (3,),
        "view_image": (4, 5, 3),
    }
    assert dataset.observations["view_image"].dtype == np.uint8
    np.testing.assert_array_equal(dataset.observations["view_image"][:, 0, 0, 0], [0, 1, 2, 100, 101, 102])
    np.testing.assert_array_equal(dataset.observations["object"][:, 0], [10, 12, 14, 110, 112, 114])
    chosen = files.load(tmp_path / "data.hdf5", ("object", "robot0_eef_pos"))
    assert chosen.observations.shape == (6, 5)  # vectors alone are side by side, as ever
    files.save(tmp_path / "out.npz", dataset)
    assert files.load(tmp_path / "out.npz").digest == dataset.digest


def test_minari_images_are_columns_too(tmp_path):
    tree = minari(**{f"episode_{i}/observations": None for i in (0, 1)})
    for i, count in enumerate((3, 4)):
        tree |= {
            f"episode_{i}/observations/camera": pictures(count),
            f"episode_{i}/observations/x": np.ones((count, 2)),
        }
    dataset = files.load(written(tmp_path, tree))
    assert {name: (x.shape, x.dtype.name) for name, x in dataset.observations.items()} == {
        "camera": ((7, 4, 5, 3), "uint8"),
        "x": ((7, 2), "float32"),
    }


@pytest.mark.parametrize("full", [False, True])
def test_observations_of_a_d4rl_file_may_be_images_or_a_group(tmp_path, full):
    following = {"next_observations/camera": pictures(7, 1), "next_observations/state": np.ones((7, 2))}
    tree = d4rl(observations=None) | (following if full else {})
    tree |= {"observations/camera": pictures(7), "observations/state": np.ones((7, 2))}
    dataset = files.load(written(tmp_path, tree))
    assert {name: x.dtype.name for name, x in dataset.observations.items()} == {"camera": "uint8", "state": "float32"}
    ids = [0, 1, 2, 2, 3, 4, 5, 5, 6, 7] if full else [0, 1, 1, 2, 3, 4, 5, 6]
    np.testing.assert_array_equal(dataset.observations["camera"][:, 0, 0, 0], ids)
    assert set(files.load(tmp_path / "data.hdf5", ("camera",)).observations) == {"camera"}
    alone = files.load(written(tmp_path, d4rl(observations=pictures(7)), "alone.hdf5"))
    assert alone.observations.shape == (8, 4, 5, 3) and alone.observations.dtype == np.uint8


# Any


def test_a_converted_file_is_the_same_data(tmp_path):
    dataset = files.load(written(tmp_path, robomimic()))
    files.save(tmp_path / "out.npz", dataset)
    assert files.load(tmp_path / "out.npz").digest == dataset.digest


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"states": np.zeros(3), "acts": np.zeros(3)},
            r"data\.hdf5: unknown HDF5 layout: found acts, states; known are D4RL \(obs.* Minari .* robomimic",
        ),
        ({f"k{i:02}": np.zeros(1) for i in range(15)}, r"found k00, k01, .*, k11 and 3 more; known are"),
        ({}, "unknown HDF5 layout: found no keys"),
        (d4rl(rewards=None), "unknown HDF5 layout: found actions, infos, metadata, observations, terminals, timeouts;"),
        (d4rl(timeouts=None), "neither 'timeouts' nor 'next_observations' does not tell where time limits ended"),
        (d4rl(rewards=np.zeros(6)), r"'rewards' has the shape \(6,\), there are 7 steps"),
        (d4rl(actions=np.zeros((6, 1))), "'actions' has 6 rows, there are 7 observations"),
        (d4rl(terminals=np.full(7, 0.5)), "column 'masks' must hold 0 and 1 only: row 0 is 0.5"),
        (d4rl(actions=np.full((7, 1), 1.5)), r"column 'actions' must lie in \[-1, 1\]: row 0, entry 0 is 1.5"),
        (
            d4rl(observations=np.zeros((7, 4, 4, 3))),
            r"'observations' must be \[rows, entries\], or images of dtype uint8",
        ),
        (
            d4rl(actions=np.zeros((7, 1), np.int64)),
            "column 'actions' has the dtype int64: discrete actions are not supp",
        ),
        (
            minari(**{"episode_1/rewards": None}),
            "episode_1: missing array 'rewards': found actions, infos, observations",
        ),
        (
            minari(**{"episode_0/observations": np.zeros((2, 2))}),
            "episode_0: 2 observations for 2 actions, one more is",
        ),
        (
            minari(**{"episode_1/observations": np.zeros((4, 3))}),
            "episodes differ: observations have 3 entries in one, 2 in the first",
        ),
        (minari(steps=(0,)), "the columns hold no rows"),
        ({"data/demo_0/actions": np.zeros((2, 2)), "data/demo_0/states": np.zeros(2)}, "data/demo_0: missing 'obs'"),
        (
            robomimic() | {"data/demo_0/obs/view_image": np.zeros((2, 8, 8, 3))},
            r"view_image has the shape \(2, 8, 8, 3\) and the dtype float64, only vectors and uint8 images are read: ",
        ),
        (
            robomimic() | {"data/demo_1/obs/extra": np.zeros((2, 1))},
            r"data/demo_1: obs is \(2, 6\) in all, next_obs \(2, 5\)",
        ),
        (robomimic() | {"data/demo_0/obs/short": np.zeros((1, 1))}, "data/demo_0/obs: arrays of 1, 2 rows"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, tree, message):
    with pytest.raises(UserError, match=message):
        files.load(written(tmp_path, tree))


def test_keys_are_refused_where_there_are_none_to_choose_from(tmp_path):
    for tree in (d4rl(), minari()):
        with pytest.raises(UserError, match=r"no (observation )?keys to choose from|one array"):
            files.load(written(tmp_path, tree), keys=("object",))
    files.save(tmp_path / "a.npz", files.load(written(tmp_path, minari())))
    with pytest.raises(UserError, match=r"an \.npz file has no observation keys"):
        files.load(tmp_path / "a.npz", keys=("object",))


def test_files_that_are_no_hdf5_or_damaged_are_named(tmp_path):
    path = tmp_path / "data.hdf5"
    path.write_text("junk")
    with pytest.raises(UserError, match=r"data\.hdf5: this is not an HDF5 file, or it is cut short"):
        files.load(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"the file is empty \(0 bytes\)"):
        files.load(path)
    whole = written(tmp_path, d4rl()).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"data\.hdf5: the file cannot be read: .*truncated"):
        files.load(path)
    with pytest.raises(UserError, match=r"no file .*: did you mean 'data\.hdf5'\?"):
        files.load(tmp_path / "dat.hdf5")


def test_without_h5py_a_line_says_how_to_get_it(tmp_path, monkeypatch):
    path = written(tmp_path, d4rl())
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match=r"read with h5py, which is not installed: pip install 'jaxrl\[data\]'"):
        files.load(path)


def test_training_takes_an_hdf5_file_as_it_is(tmp_path):
    actions = {f"episode_{i}/actions": np.zeros((count, 2)) for i, count in enumerate((2, 3))}
    path = written(tmp_path, minari(**actions))
    config = dataclasses.replace(preset("quick", "bc"), env=tiny.ENV, data=str(path))
    loaded = load_data(config, tiny.make(tiny.ENV))
    assert loaded.digest == files.load(path).digest
