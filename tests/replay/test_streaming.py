"""Facts about jaxrl.replay.streaming: which file an epoch sees, what is refused, and a run that streams its data."""

import dataclasses
import gc
import itertools
import shutil
import threading
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrl import cli
from jaxrl.agents import BC
from jaxrl.agents.parts import Windows
from jaxrl.data import files
from jaxrl.errors import UserError
from jaxrl.replay import loading as task
from jaxrl.replay import streaming
from jaxrl.runs import driver, memory
from jaxrl.runs.config import Config
from jaxrl.runs.datasets import in_memory, load_data
from jaxrl.runs.jsonlines import read_json
from jaxrl.runs.signals import StopRequested
from jaxrl.training.schedule import Schedule
from tests import tiny
from tests.known import with_fields

EPISODES = (6, 9, 4)  # of the files
STEPS = 20
ENV = "point?horizon=20"
EPOCHS = 7


@pytest.fixture(autouse=True)
def quick():
    with tiny.quick():
        yield


def columns(first: int, episodes: int, steps: int = STEPS) -> dict[str, np.ndarray]:
    """Returns episodes of `point`, in which the first entry of each observation tells its row."""
    rows = np.arange(first, first + episodes * (steps + 1), dtype=np.float32)
    random = np.random.default_rng(first)
    return {
        "observations": np.stack([rows / 1000, random.uniform(-1, 1, len(rows))], axis=1).astype(np.float32),
        "actions": random.uniform(-1, 1, (len(rows), 2)).astype(np.float32),
        "terminals": np.tile(np.arange(steps + 1) == steps, episodes),
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of three files of different sizes, and of one validation split."""
    folder = tmp_path / "data"
    folder.mkdir()
    for i, episodes in enumerate(EPISODES):
        np.savez_compressed(folder / f"part-{i}.npz", **columns(1000 * (i + 1), episodes))
    np.savez(folder / "part-0-val.npz", **columns(0, 2))
    return folder


def found(folder: Path) -> streaming.Shards:
    shards = streaming.find(str(folder))
    assert shards is not None
    return shards


def names(shards: streaming.Shards) -> list[str]:
    return [shard.path.name for shard in shards.shards]


def content(ring) -> int:
    """Returns which file is in a ring."""
    return int(ring.obs[0, 0, 0]) - 1


def loading() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("shard")]


def wait_for_threads() -> None:
    for thread in loading():
        thread.join(timeout=30)
    assert loading() == []


# Which files, in which order


def test_a_pass_sees_every_file_once_in_an_order_of_its_own():
    passes = [[streaming.order(3, 5 * p + place, 5) for place in range(5)] for p in range(40)]
    assert all(sorted(order) == list(range(5)) for order in passes)
    assert len({tuple(order) for order in passes}) > 20
    assert passes[0] != [streaming.order(4, place, 5) for place in range(5)]
    firsts = np.bincount([order[0] for order in passes], minlength=5)
    assert firsts.min() >= 2


def test_files_are_found_in_a_folder_or_by_a_pattern(folder, monkeypatch):
    every = ["part-0.npz", "part-1.npz", "part-2.npz"]
    assert names(found(folder)) == every
    assert names(found(folder / "*[01]*.npz")) == every[:2]
    monkeypatch.setenv("HOME", str(folder.parent))
    assert names(found(Path("~/data"))) == every
    assert streaming.find(str(folder / "part-0.npz")) is None
    assert streaming.find(str(folder / "nothing.npz")) is None  # for the reader of a single file to refuse
    (folder / "odd[1].npz").write_bytes((folder / "part-0.npz").read_bytes())
    assert streaming.find(str(folder / "odd[1].npz")) is None


@pytest.mark.parametrize("pattern", ["empty", "data/*.npy", "data/*-val.npz"])
def test_no_file_at_all_is_refused(folder, pattern):
    (folder.parent / "empty").mkdir()
    with pytest.raises(UserError, match=r"no .npz files in .* \(those called \*-val.npz are validation splits\)"):
        streaming.find(str(folder.parent / pattern))


# What is known before anything is loaded


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_sizes_are_those_of_the_loaded_file(tmp_path, save):
    path = tmp_path / "a.npz"
    data = columns(0, 3)
    data["terminals"][5] = True
    save(path, **data, oracle_reps=np.zeros((63, 4, 2)))
    assert streaming.peek(path).sizes == task.sizes_of(files.load(path))
    assert streaming.peek(path).sizes.longest == 20


def test_the_sizes_of_all_are_those_of_the_largest(folder):
    sizes = found(folder).sizes
    assert (sizes.rows, sizes.episodes, sizes.longest) == (9 * 21, 9, 20)


def test_the_digest_tells_one_bit_and_the_names_but_not_the_folder(folder, tmp_path):
    digests = [found(folder).digest, found(folder.rename(tmp_path / "moved")).digest]
    path = tmp_path / "moved" / "part-1.npz"
    data = dict(np.load(path))
    data["actions"].view(np.uint32)[7, 1] ^= 1
    np.savez_compressed(path, **data)
    digests.append(found(tmp_path / "moved").digest)
    path.rename(path.with_name("part-3.npz"))
    digests.append(found(tmp_path / "moved").digest)
    assert digests[0] == digests[1] and len(set(digests)) == 3


def replaced(path: Path, **changed: np.ndarray | None) -> None:
    """Writes a file again with some columns changed, added or, where None, left out."""
    data = {**np.load(path), **changed}
    np.savez(path, **{name: column for name, column in data.items() if column is not None})


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


open_end = np.arange(189) % 21 == 19
HARMS = {
    "an entry more": (lambda p: replaced(p, observations=np.zeros((189, 3))), r"'observations' is \(3,\), in .*part-0"),
    "one more column": (lambda p: replaced(p, masks=np.ones(189)), r"'masks' is \(\), in .*part-0.npz it is none"),
    "no actions": (lambda p: replaced(p, actions=None), "missing column 'actions'"),
    "fewer rows": (lambda p: replaced(p, actions=np.zeros((188, 2))), r"'actions' has the shape \(188, 2\)"),
    "rank": (
        lambda p: replaced(p, actions=np.zeros((189, 2, 1))),
        r"'actions' must be \[rows, entries\]: its shape is \(189, 2, 1\)",
    ),
    "integers": (lambda p: replaced(p, actions=np.zeros((189, 2), int)), "'actions' has the dtype int64: discrete"),
    "no end": (lambda p: replaced(p, terminals=np.zeros(189)), "the last row must end an episode"),
    "open end": (lambda p: replaced(p, terminals=open_end), "the last row must end an episode"),
    "no rows": (lambda p: np.savez(p, **columns(0, 0)), "the last row must end an episode"),
    "full layout": (lambda p: replaced(p, next_observations=np.zeros((189, 2))), "must be compact"),
    "objects": (lambda p: replaced(p, terminals=np.array([{}] * 189)), "cannot be read"),
    "cut short": (cut, "cannot be read"),
    "empty": (lambda p: p.write_bytes(b""), "cannot be read"),
    "no zip": (lambda p: p.write_bytes(b"hello" * 100), "cannot be read"),
}


@pytest.mark.parametrize(("harm", "message"), HARMS.values(), ids=HARMS)
def test_a_file_unlike_the_others_is_named_before_anything_is_loaded(folder, harm, message):
    harm(folder / "part-1.npz")
    with pytest.raises(UserError, match=rf"part-1.npz.*{message}"):
        streaming.find(str(folder))


def test_files_of_dicts_and_images_are_alike_in_shapes_and_dtypes(tmp_path):
    def seen(first: int, dtype: type) -> dict[str, np.ndarray]:
        plain = columns(first, 2)
        image = np.zeros((42, 2, 2, 3), dtype)
        named = {"observations/state": plain["observations"].astype(np.float64), "observations/camera": image}
        return {name: x for name, x in (plain | named).items() if name != "observations"}

    for i, dtype in enumerate((np.uint8, np.uint8, np.float32)):
        np.savez(tmp_path / f"part-{i}.npz", **seen(1000 * i, dtype))
    shards = streaming.find(str(tmp_path / "*[01].npz"))
    assert shards is not None
    sizes, loaded = shards.sizes, task.sizes_of(files.load(tmp_path / "part-0.npz"))
    assert sizes.row("observations/camera") == jax.ShapeDtypeStruct((2, 2, 3), np.uint8)
    assert all(sizes.row(name) == loaded.row(name) for name in ("observations/state", "actions"))
    with pytest.raises(
        UserError, match=r"part-2.npz: column 'observations/camera' is float32, in .*part-0.npz it is ui"
    ):
        streaming.find(str(tmp_path))


# One file per epoch


def streamed(folder: Path, seed: int = 0, epochs: int = EPOCHS) -> streaming.Stream:
    config = dataclasses.replace(CONFIG, order_seed=seed, data=str(folder))
    env = tiny.make(ENV)
    made = in_memory(config, env, load_data(config, env), epochs)
    assert isinstance(made, streaming.Stream)
    return made


CONFIG = Config(
    with_fields(BC(), chunk=2, backup=2, hidden=(8,), batch=16, steps=2),
    env=ENV,
    schedule=Schedule(offline_updates=70, updates_per_epoch=10, online_steps=0, eval_every=7, eval_episodes=2),
)


def test_an_epoch_gets_the_file_that_its_number_says_laid_out_like_all_others(folder):
    data = streamed(folder, seed=5)
    rings = [data.at(epoch) for epoch in range(EPOCHS)]
    assert [content(ring) for ring in rings] == [streaming.order(5, epoch, 3) for epoch in range(EPOCHS)]
    assert len({str(jax.tree.map(lambda x: (x.shape, x.dtype), ring)) for ring in rings}) == 1
    assert {int(ring.count[0]) for ring in rings} == {21 * episodes for episodes in EPISODES}
    again = streamed(folder, seed=5).at(4)  # a run that goes on there
    assert jax.tree.all(jax.tree.map(np.array_equal, again, rings[4]))


def test_windows_of_a_file_with_room_to_spare_are_those_without(folder):
    dataset = files.load(folder / "part-2.npz")
    for name in (ENV, f"{ENV}&goal_conditioned=true"):
        env = tiny.make(name)
        rings = [task.to_ring(dataset, env, room=room) for room in ((0, 0), (300, 11))]
        draw = jax.jit(BC(Windows(20, 20, 200)).sample)
        one, other = (draw((ring,), jax.random.key(0)) for ring in rings)
        assert jax.tree.all(jax.tree.map(np.array_equal, one, other))
        assert rings[1].obs.shape == (1, 301, 2)


def test_two_files_are_in_memory_at_most_and_the_next_is_on_its_way(folder):
    data = streamed(folder)
    place, alive = data.place, []

    def counted(dataset):
        gc.collect()
        alive.append(sum(x.shape == (1, 190, 2) for x in jax.live_arrays()))  # observations and actions
        return place(dataset)

    data.place = counted
    for epoch in range(EPOCHS):
        assert content(data.at(epoch)) == streaming.order(0, epoch, 3)
        wait_for_threads()
        assert len(data.held) == len({streaming.order(0, e, 3) for e in (epoch, epoch + 1) if e < EPOCHS})
    assert alive[0] == 0 and max(alive) <= 2
    visited = [streaming.order(0, epoch, 3) for epoch in range(EPOCHS)]
    assert len(alive) == 1 + sum(a != b for a, b in itertools.pairwise(visited))


def test_a_single_file_is_loaded_once(folder):
    data = streamed(folder / "part-1*")
    place, placed = data.place, []
    data.place = lambda dataset: placed.append(dataset) or place(dataset)
    assert data.at(0) is data.at(1) is data.at(6)
    wait_for_threads()
    assert len(placed) == 1


def flip(path: Path) -> None:
    """Changes a byte of the compressed observations."""
    with zipfile.ZipFile(path) as archive:
        at = archive.getinfo("observations.npy").header_offset + 500
    data = path.read_bytes()
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


LATE = {
    "missing": (Path.unlink, "no file .*part-{}.npz: did you mean"),
    "damaged": (flip, "part-{}.npz: column 'observations' cannot be read"),
    "changed": (lambda p: np.savez_compressed(p, **columns(9000, 4)), "part-{}.npz has changed since the run began"),
    "infinite": (lambda p: replaced(p, actions=np.full_like(np.load(p)["actions"], np.inf)), "part-{}.npz: .*finite"),
}


@pytest.mark.parametrize(("harm", "message"), LATE.values(), ids=LATE)
def test_a_file_that_goes_bad_during_the_run_is_named_by_the_epoch_that_needs_it(folder, harm, message):
    data = streamed(folder)
    data.at(0)
    wait_for_threads()
    last = streaming.order(0, 2, 3)
    harm(folder / f"part-{last}.npz")
    data.at(1)
    wait_for_threads()
    with pytest.raises(UserError, match=message.format(last)):
        data.at(2)
    wait_for_threads()


# A run


class StopAfter:
    """A request to stop that is there after so many epochs."""

    def __init__(self, epochs: int) -> None:
        self.left = epochs

    @property
    def requested(self) -> bool:
        self.left -= 1
        return self.left <= 0


def drive(config: Config, path: Path, epochs: int = 99) -> dict:
    """Starts a run, or goes on with it, for so many epochs."""
    return (driver.resume if path.exists() else driver.start)(config, tiny.make(config.env), path, StopAfter(epochs))


def test_a_run_interrupted_in_any_way_equals_one_that_was_not_and_compiles_once(folder, tmp_path, monkeypatch):
    agent = with_fields(CONFIG.agent, hidden=(7,))  # of no other test
    config = dataclasses.replace(CONFIG, agent=agent, data=str(folder))
    traces, learn = [], BC.learn

    def counted(agent, state, batch, draws):
        traces.append(agent)
        return learn(agent, state, batch, draws)

    monkeypatch.setattr(BC, "learn", counted)
    with pytest.raises(StopRequested):
        drive(config, tmp_path / "run", epochs=2)
    assert len(traces) > 0
    traces.clear()
    drive(config, tmp_path / "whole")
    assert not traces  # all files, and both runs, share the program of the first epoch
    gone = folder / f"part-{streaming.order(0, 4, 3)}.npz"
    at = streaming.Stream.at

    def away(data: streaming.Stream, epoch: int):
        if epoch == 3:  # and the next, which is on its way then, needs it
            gone.rename(folder / "away")
        return at(data, epoch)

    with monkeypatch.context() as patch, pytest.raises(UserError, match=gone.name):
        patch.setattr(streaming.Stream, "at", away)
        drive(config, tmp_path / "run")
    wait_for_threads()
    assert len(tiny.rows(tmp_path / "run")) == 4
    (folder / "away").rename(gone)
    drive(config, tmp_path / "run")
    tiny.assert_same_run(tmp_path / "run", tmp_path / "whole")
    wait_for_threads()
    assert driver.replay(config, tiny.make(ENV), tmp_path / "whole", EPOCHS) is None


def test_goals_are_drawn_from_streamed_files_too(folder, tmp_path):
    config = dataclasses.replace(CONFIG, env=f"{ENV}&goal_conditioned=true", data=str(folder))
    assert 0 <= drive(config, tmp_path / "run")["offline_success"] <= 1
    env = tiny.make(config.env)
    run = driver.prepare(config, env, load_data(config, env))
    assert isinstance(run.data, streaming.Stream)
    batch = config.agent.sample((run.data.at(0),), jax.random.key(0))
    assert batch.obs.shape == (16, 4)
    assert (np.floor(batch.obs[:, 0]) == np.floor(batch.obs[:, 2])).all()  # of one file
    abstract = memory.abstract_data(config, env)[0]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), run.data.at(0)) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract
    )


def test_a_changed_file_is_refused_when_the_run_goes_on(folder, tmp_path):
    config = dataclasses.replace(CONFIG, data=str(folder))
    with pytest.raises(StopRequested):
        drive(config, tmp_path / "run", epochs=1)
    assert read_json(tmp_path / "run" / "manifest.json", "")["dataset_digest"] == found(folder).digest
    replaced(folder / "part-2.npz", actions=np.zeros((84, 2)))
    with pytest.raises(UserError, match=r"data has changed since .*run began"):
        drive(config, tmp_path / "run")


def test_a_file_without_an_episode_as_long_as_the_windows_is_named(folder, tmp_path):
    np.savez(folder / "part-9.npz", **columns(0, 30, steps=5))
    config = dataclasses.replace(CONFIG, agent=with_fields(CONFIG.agent, chunk=6, backup=6), data=str(folder))
    with pytest.raises(UserError, match=r"part-9.npz: its longest episode has 5 steps, the agent's windows have 6"):
        drive(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_plan_counts_two_files_of_the_largest_size(folder):
    config, env = dataclasses.replace(CONFIG, data=str(folder)), tiny.make(ENV)
    data = streamed(folder)
    data.at(0)
    wait_for_threads()
    rings = [future.result() for future in data.held.values()]
    assert memory.held(config, env)["dataset"] == sum(memory.size(ring) for ring in rings)
    one = dataclasses.replace(config, data=str(folder / "part-1*"))
    assert memory.held(one, env)["dataset"] == memory.size(rings[0])


def test_the_command_line_lists_a_folder_and_trains_on_it(folder, tmp_path, capsys):
    assert cli.main(["data", "describe", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:5]] == [
        ["file", "rows", "episodes", "longest"],
        ["part-0.npz", "126", "6", "20"],
        ["part-1.npz", "189", "9", "20"],
        ["part-2.npz", "84", "4", "20"],
        ["all", "3", "399", "19", "20"],
    ]
    assert lines[-1] == f"sha256 {found(folder).digest}"
    assert cli.main(["data", "describe", str(folder), "--env", ENV]) == 2
    assert "applies to a single file" in capsys.readouterr().err
    shutil.rmtree(folder)
    assert cli.main(["train", "bc", ENV, f"--data={folder}/*.npz", f"--out={tmp_path / 'run'}"]) == 2
    assert "no .npz files in" in capsys.readouterr().err
