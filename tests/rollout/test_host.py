"""Simulators in worker processes: chunks in them, episodes that are evaluated, epochs, and workers that die."""

import contextlib
import dataclasses
import functools
import json
import os
import signal
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from envs.checker import check
from jaxrl import cli, system
from jaxrl.data import files
from jaxrl.errors import UserError
from jaxrl.replay import ring
from jaxrl.rollout import host
from jaxrl.rollout import workers as pool
from jaxrl.rollout.executors import OPEN_LOOP
from jaxrl.runs import checkpoint
from jaxrl.runs.signals import SAVED
from jaxrl.training import loop as training
from jaxrl.training.host_loop import decide, jitted_resume
from jaxrl.types import Env, HostEnv, Leaf, Spec, pytree
from tests import tiny, walk


@dataclasses.dataclass(frozen=True)
class WalkEnv:
    """What the command line is given: `tests.rollout.test_host:make`. Trouble is not part of its identity."""

    trouble: str = dataclasses.field(default="", compare=False)
    fuse: str = dataclasses.field(default="", compare=False)
    blind: bool = dataclasses.field(default=False, compare=False)
    tasks: int = 2
    spec: ClassVar[Spec] = Spec(observation=3, action=1)
    horizon: ClassVar[int] = walk.HORIZON

    def builder(self, picture=0):
        return functools.partial(walk.Blind if self.blind else walk.Walk, self.trouble, self.fuse, picture)


@dataclasses.dataclass(frozen=True)
class SensedEnv(WalkEnv):
    """One that observes a dict."""

    spec: ClassVar[Spec] = Spec((Leaf("place", (2,)), Leaf("pixels", (2, 1, 1), "uint8")), action=1)

    def builder(self, picture=0):
        return functools.partial(walk.Sensed, self.trouble, self.fuse, picture)


@pytree
class Seeing:
    """An agent that walks towards the target that a dict shows it."""

    chunk: int = 3

    def act(self, state, obs, key, *, greedy=False):
        assert obs["pixels"].dtype == jnp.uint8 and obs["place"].dtype == jnp.float32
        return jnp.sign(obs["place"][:, 1])[:, None, None] * jnp.ones((1, self.chunk, 1))


@dataclasses.dataclass(frozen=True)
class Wrong:
    """One that says the wrong sizes."""

    spec: Spec
    horizon: int = 3
    tasks: int = 0

    def builder(self, picture=0):
        return walk.Walk


def make(trouble: str = "", fuse: str = "", tasks: int = 2) -> WalkEnv:
    return WalkEnv(trouble, fuse, tasks=tasks)


@pytree
class Constant:
    """An agent that always walks in one direction, its state."""

    chunk: int = 3

    def act(self, state, obs, key, *, greedy=False):
        return jnp.full((len(obs), self.chunk, 1), state)


@pytree
class Random:
    """An agent whose actions are drawn anew for each decision."""

    chunk: int = 3

    def act(self, state, obs, key, *, greedy=False):
        return jax.random.uniform(key, (len(obs), self.chunk, 1), minval=-1, maxval=1)


@pytree
class Once:
    """An agent that walks in the first decision of an episode only: it counts them in its memory."""

    chunk: int = 6

    def start(self, state, obs, key):
        return jnp.zeros(len(obs), jnp.int32)

    def decide(self, state, memory, obs, key, *, greedy=False):
        chunk = jnp.broadcast_to((memory == 0)[:, None, None], (len(obs), self.chunk, 1)).astype(jnp.float32)
        return memory + 1, chunk, {"decision": memory}


def pool_of(env: WalkEnv, workers: int = 2) -> pool.Pool:
    return pool.Pool(env.builder(), env.horizon, workers)


SLOTS = np.arange(3)


def reset(workers: pool.Pool, tasks=(1, 2, 1)) -> np.ndarray:
    return workers.reset("walk", SLOTS, 10 + SLOTS, np.array(tasks))


def chunks(*actions: float, slots: int = 3) -> np.ndarray:
    return np.tile(np.array(actions, np.float32)[None, :, None], (slots, 1, 1))


# A chunk in a simulator


def test_a_chunk_stops_where_its_episode_ends():
    with pool_of(WalkEnv()) as workers:
        first = reset(workers)
        steps = workers.execute("walk", SLOTS, chunks(*[1] * 7))
        rest = workers.execute("walk", SLOTS[1:2], chunks(1, 1, 1, slots=1))
    # from about 0 the end at 0.55 is reached with the sixth step of 0.1; slot 1 has its own at -0.55
    assert steps["taken"].tolist() == [[True] * 6 + [False], [True] * 7, [True] * 6 + [False]]
    assert steps["terminated"].nonzero()[0].tolist() == [0, 2] and steps["terminated"].nonzero()[1].tolist() == [5, 5]
    assert steps["rewards"].tolist() == [[-1] * 5 + [0, 0], [-1] * 7, [-1] * 5 + [0, 0]]
    assert steps["ended"].tolist() == [True, False, True] and steps["success"].tolist() == [True, False, True]
    walked = first[:, 0, None] + walk.STEP * np.minimum(np.arange(8), np.array([6, 7, 6])[:, None])
    np.testing.assert_allclose(steps["obs"][:, :, 0], walked, atol=1e-6)
    assert (steps["actions"] == 1).all() and not steps["truncated"].any()
    # the clock stops it after 8 steps in all, one of this chunk
    assert rest["taken"].tolist() == rest["truncated"].tolist() == [[True, False, False]]
    assert rest["ended"].tolist() == [True] and not rest["terminated"].any() and not rest["success"].any()


def test_termination_outranks_the_clock():
    with pool.Pool(WalkEnv().builder(), 6, 1) as workers:
        reset(workers)
        steps = workers.execute("walk", SLOTS, chunks(*[1] * 6))
    assert steps["terminated"][:, -1].tolist() == [True, False, True]
    assert steps["truncated"][:, -1].tolist() == [False, True, False]


def test_a_number_that_is_not_finite_ends_the_episode_and_is_seen_by_nobody():
    with pool_of(WalkEnv("nan")) as workers:
        first = reset(workers)
        steps = workers.execute("walk", SLOTS, chunks(*[1] * 6))
    bad = np.array([int(np.ceil((0.3 - x) / walk.STEP)) for x in first[:, 0]]) - 1  # the first step beyond 0.3
    assert np.isfinite(steps["obs"]).all() and steps["ended"].all() and not steps["success"].any()
    for slot, t in enumerate(bad):
        assert steps["taken"][slot].tolist() == [i <= t for i in range(6)]
        assert not steps["valid"][slot, t] and steps["valid"][slot, :t].all() and steps["rewards"][slot, t] == 0
        assert (steps["obs"][slot, t + 1 :] == steps["obs"][slot, t]).all()


def test_a_reset_that_is_not_finite_is_an_episode_of_one_invalid_step():
    with pool_of(WalkEnv("unsettled")) as workers:
        first = reset(workers)
        steps = workers.execute("walk", SLOTS, chunks(*[1] * 3))
    bad = (first == 0).all(axis=1)
    assert 0 < bad.sum() < len(bad) and np.isfinite(steps["obs"]).all()
    assert (steps["taken"].sum(axis=1) == np.where(bad, 1, 3)).all() and (steps["ended"] == bad).all()
    assert (steps["valid"][:, 0] == ~bad).all() and not steps["rewards"][bad].any()


def test_results_do_not_depend_on_who_computes_them():
    def played(workers):
        with pool_of(WalkEnv(), workers) as some:
            obs = reset(some)
            parts = [some.execute("walk", SLOTS[::-1], chunks(0.3, -0.2)) for _ in range(2)]
        return obs, parts

    one, three = played(1), played(3)
    assert (one[0] == three[0]).all()
    for a, b in zip(one[1], three[1], strict=True):
        assert all((a[name] == b[name]).all() for name in a)
    noise = np.concatenate([part["obs"][:, 1:, 2] for part in one[1]], axis=1)
    assert len(np.unique(noise)) == noise.size  # NumPy's global stream goes on, apart in each


def test_workers_do_without_jax_and_one_thread_each():
    with pool_of(WalkEnv()) as workers:
        reset(workers)
        assert list(workers.map(walk.imported, ["jax", "numpy", "jaxrl.rollout.workers"])) == [False, True, True]
        assert list(workers.map(os.getenv, ["OMP_NUM_THREADS"])) == [os.environ.get("OMP_NUM_THREADS", "1")]


def test_jobs_come_back_in_order():
    with pool.Pool(workers=2) as workers:
        assert list(workers.map(walk.slow_square, range(7))) == [n**2 for n in range(7)]


def test_a_worker_that_is_killed_is_named_and_the_others_end():
    with pool_of(WalkEnv()) as workers:
        reset(workers)
        processes = list(workers.processes)
        processes[1].send_signal(signal.SIGTERM)  # for the process that started it
        workers.execute("walk", SLOTS, chunks(0))
        processes[1].kill()
        with pytest.raises(pool.WorkerDied) as caught:
            workers.execute("walk", SLOTS, chunks(0))
        assert str(caught.value).startswith(f"worker 1 of 2 (process {processes[1].pid}) died, exit code -9 (SIGKILL)")
        assert [process.poll() is not None for process in processes] == [True, True]
        assert np.isfinite(reset(workers)).all()  # new ones


def test_a_simulator_that_raises_is_quoted(capfd):
    with pool_of(WalkEnv("raise")) as workers:
        reset(workers)
        with pytest.raises(pool.SimulatorFailed, match="RuntimeError: the walker fell"):
            workers.execute("walk", SLOTS, chunks(*[1] * 6))
    assert 'raise RuntimeError("the walker fell")' in capfd.readouterr().err
    with pool.Pool(functools.partial(walk.Walk, "", 3), 8, 1) as workers, pytest.raises(pool.SimulatorFailed):
        reset(workers)


# Evaluation


def evaluated(agent, state, episodes=20, workers=2, seed=0, env=None):
    simulators = host.Simulators(env or WalkEnv(), workers)
    with contextlib.closing(simulators):
        return host.evaluate(simulators, agent, state, jax.random.key(seed), episodes)


def test_each_episode_is_played_to_its_end_once():
    right, left = evaluated(Constant(), 1.0), evaluated(Constant(), -1.0)
    first_task = np.arange(20) % 2 == 0
    assert right.success.tolist() == first_task.tolist() and left.success.tolist() == (~first_task).tolist()
    assert right.lengths.tolist() == np.where(first_task, 6, 8).tolist()
    assert right.returns.tolist() == np.where(first_task, -5, -8).tolist()
    assert not right.broken.any()
    # the same starts for both agents, and the first episode's way in full
    assert right.track.shape == (7, 3) and left.track.shape == (9, 3)
    assert right.track[0, 0] == left.track[0, 0]
    np.testing.assert_allclose(np.diff(right.track[:, 0]), walk.STEP, atol=1e-6)


def test_the_memory_of_an_agent_starts_anew_with_each_episode():
    episodes = evaluated(Once(), 0.0)  # 20 of them in 8 slots
    first_task = np.arange(20) % 2 == 0
    assert episodes.success.tolist() == first_task.tolist()
    assert episodes.lengths.tolist() == np.where(first_task, 6, 8).tolist()


def test_a_broken_episode_is_counted():
    episodes = evaluated(Constant(), 1.0, env=WalkEnv("nan"))
    assert episodes.broken.all() and not episodes.success.any()


def test_an_evaluation_depends_on_its_seed_alone():
    one, other = evaluated(Random(), 0.0), evaluated(Random(), 0.0, workers=5)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (evaluated(Random(), 0.0, seed=1).track[0] != one.track[0]).any()


def test_pictures_show_the_first_episode():
    frames = host.render(WalkEnv(), Constant(), 1.0, jax.random.key(0), size=8)
    assert len(frames) == 6 and frames[0].size == (8, 8)
    x = evaluated(Constant(), 1.0).track[1:, 0]
    assert [frame.getpixel((0, 0))[0] for frame in frames] == [int(255 * min(abs(v), 1)) for v in x]
    with pytest.raises(UserError, match=r"no render\(\)"):
        host.render(WalkEnv(blind=True), Constant(), 1.0, jax.random.key(0))


# Observations that are dicts


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_hand_over_dicts_key_by_key(workers):
    with pool_of(SensedEnv(), workers) as some:
        first = reset(some)
        steps = some.execute("walk", SLOTS[::-1], chunks(*[1] * 7))
    assert {name: (x.shape, str(x.dtype)) for name, x in first.items()} == {
        "place": ((3, 2), "float32"),
        "pixels": ((3, 2, 1, 1), "uint8"),
    }
    place, pixels = (steps["obs"][name][::-1] for name in ("place", "pixels"))
    walked = first["place"][:, 0, None] + walk.STEP * np.minimum(np.arange(8), np.array([6, 7, 6])[:, None])
    np.testing.assert_allclose(place[:, :, 0], walked, atol=1e-6)
    assert pixels.shape == (3, 8, 2, 1, 1) and (np.abs(pixels[..., 0, 0, 0] - 100 * np.abs(walked)) < 1.001).all()


def test_a_dict_with_a_number_that_is_not_finite_ends_the_episode():
    with pool_of(SensedEnv("nan")) as some:
        reset(some)
        steps = some.execute("walk", SLOTS, chunks(*[1] * 6))
    assert np.isfinite(steps["obs"]["place"]).all() and steps["ended"].all() and not steps["valid"].all(axis=1).any()


def test_agents_are_evaluated_and_collect_on_dicts():
    episodes = evaluated(Seeing(), (), env=SensedEnv())
    assert episodes.success.all() and (episodes.lengths == 6).all()
    assert episodes.track["place"].shape == (7, 2) and episodes.track["pixels"].shape == (7, 2, 1, 1)
    simulators, random = host.Simulators(SensedEnv(), 2), np.random.default_rng(0)
    with contextlib.closing(simulators):
        simulators.flight = host.reset_all(simulators, random, 3)
        keys = jax.random.split(jax.random.key(0), (4, 2))
        steps = [decide(simulators, Seeing(), OPEN_LOOP, (), random, *pair)[1] for pair in keys]
        place = simulators.flight.obs["place"]
    # two chunks of three steps to the end, then a new episode, and once more
    assert [step.ended.tolist() for step in steps] == [[False] * 3, [True] * 3] * 2
    assert (np.abs(steps[1].obs["place"][:, -1, 0]) > 0.55).all() and (np.abs(place[:, 0]) < 0.05).all()


# Going on


def test_an_episode_that_was_cut_off_ends_as_by_the_clock():
    def steps(x: float, ended: bool) -> ring.Steps:
        flags = np.zeros((2, 2), bool)
        return ring.Steps(
            obs=np.array([[[x], [x + 1], [x + 2]]] * 2, np.float32),
            actions=np.zeros((2, 2, 1), np.float32),
            rewards=np.ones((2, 2), np.float32),
            terminated=flags | np.array([[False, ended], [False, False]]),
            truncated=flags,
            valid=~flags,
            taken=~flags,
            ended=np.array([ended, False]),
        )

    replay = jax.jit(ring.add)(ring.empty(2, 12, Spec(1, 1)), steps(0, True))  # the second lane's episode is under way
    counters = (jnp.zeros((), jnp.int32) for _ in range(3))
    carry = training.Carry((), jax.random.key(0), training.World(None, replay), *counters)
    resumed = jitted_resume(carry).world.replay
    assert resumed.head.tolist() == [3, 3] and resumed.count.tolist() == [3, 3]
    assert resumed.truncated[:, 1].tolist() == [False, True]
    more = jax.jit(ring.add)(resumed, steps(7, False))
    windows = jax.jit(ring.window_at, static_argnums=3)(more, jnp.array([0, 1, 1]), jnp.array([1, 1, 3]), 3)
    assert windows.next_obs[:, 0].tolist() == [2, 2, 9]
    assert windows.valid.sum(axis=1).tolist() == [1, 1, 2] and windows.terminated.tolist() == [True, False, False]


BC = "--agent.windows.chunk=2 --agent.windows.batch=8 --agent.flow.net.hidden 8 --agent.flow.steps=2".split()
SCHEDULE = (
    "--schedule.offline-updates=20 --schedule.updates-per-epoch=10 --schedule.eval-every=2 --schedule.eval-episodes=4 "
    "--schedule.online-steps=72 --schedule.steps-per-epoch=24 --schedule.warmup-steps=12 --schedule.envs=3 "
    "--schedule.utd=0.25"
).split()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(system, "cores", lambda: 2)
    with tiny.quick():
        yield


def write_data(path: Path) -> Path:
    """Writes 10 episodes of random walks."""
    random = np.random.default_rng(0)
    actions = random.uniform(-1, 1, (10, 9, 1)).astype(np.float32)
    x = np.concatenate([np.zeros((10, 1, 1)), walk.STEP * np.cumsum(actions, axis=1)[:, :-1]], axis=1)
    rest = np.broadcast_to([walk.TARGET, 0.5], (10, 9, 2))
    columns = {
        "observations": np.concatenate([x, rest], axis=-1).reshape(-1, 3),
        "actions": actions.reshape(-1, 1),
        "terminals": np.tile(np.arange(9) == 8, 10),
        "rewards": -np.ones(90, np.float32),
    }
    files.save(path, files.from_columns(columns))
    return path


def train(folder: Path, *more: str, env: str = "tests.rollout.test_host:make") -> int:
    data = folder / "data.npz"
    if not data.exists():
        write_data(data)
    return cli.main(["train", "bc", env, f"--data={data}", *BC, *SCHEDULE, *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of two epochs offline, a warm-up and three epochs online."""
    folder = tmp_path_factory.mktemp("host")
    with tiny.quick(), tiny.compilations() as compiled:
        assert train(folder, f"--out={folder / 'run'}") == 0
    (folder / "compiled.json").write_text(json.dumps(compiled[:-1]))
    return folder / "run"


def test_a_run_goes_through_all_phases(finished):
    rows = tiny.rows(finished)
    assert [row["phase"] for row in rows] == ["offline"] * 2 + ["warmup"] + ["online"] * 3
    assert [row["updates"] for row in rows] == [10, 20, 20, 26, 32, 38]
    # a step that waits for its chunk's end is not taken, so there are at most 24 in an epoch
    taken = np.diff([row["steps"] for row in rows])
    assert rows[0]["steps"] == 0 and (taken[2:] > 18).all() and (taken[2:] <= 24).all()
    assert all(row["collect/broken"] == 0 and row["collect/episodes"] > 0 for row in rows[3:])
    assert ["eval/success" in row for row in rows] == [False, True, False, True, False, True]
    assert all(np.isfinite(row["actor/flow_loss"]) for row in rows if row["phase"] != "warmup")
    assert (finished / "rollout.gif").exists() and (finished / "curves.png").exists()


def test_the_replay_holds_what_the_simulators_did(finished):
    leaves = tiny.carry(finished, 6)
    field = {name: leaves[f".world.replay.{name}"] for name in ("obs", "actions", "valid", "count", "rewards")}
    assert leaves[".steps"] == field["valid"].sum() and (field["count"] > 0).all()
    for lane in range(3):
        rows = np.flatnonzero(field["valid"][lane])
        x, action = field["obs"][lane, :, 0], np.clip(field["actions"][lane, :, 0], -1, 1)
        np.testing.assert_allclose(x[rows + 1], x[rows] + walk.STEP * action[rows], atol=1e-5)
        there = np.abs(x[rows + 1]) >= walk.TARGET - 1e-6
        assert set(field["rewards"][lane, rows][~there]) == {-1.0}
    assert set(np.unique(field["obs"][..., 1])) <= {np.float32(walk.TARGET), np.float32(-walk.TARGET), 0}


def test_a_run_is_repeated_bit_for_bit(finished, tmp_path, capsys):
    assert cli.main(["replay", str(finished), "--epochs=6"]) == 0
    assert capsys.readouterr().out == "identical\n"


def test_a_run_that_was_stopped_begins_new_episodes(finished, tmp_path, capsys):
    run = tmp_path / "run"
    stopped = []

    class StopOnline:
        def __enter__(self):
            return self

        def __exit__(self, *raised):
            pass

        @property
        def requested(self):
            stopped.append(1)
            return len(stopped) == 4  # after the first epoch online

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxrl.cli.runs.StopRequests", StopOnline)
        assert train(finished.parent, f"--out={run}") == SAVED
        assert cli.main(["train", "--resume", str(run)]) == 0
    was, now = tiny.rows(finished), tiny.rows(run)
    assert now[:4] == was[:4] and [row["updates"] for row in now] == [row["updates"] for row in was]
    assert now[4]["digest"] != was[4]["digest"] and now[5]["steps"] > was[4]["steps"]


@pytest.mark.parametrize("broken", [3, 4])
def test_a_run_whose_worker_dies_is_saved_and_goes_on(finished, tmp_path, capsys, broken):
    """It dies in the second iteration of an epoch: of the first one online, or of the second."""
    fuse, run = tmp_path / "fuse", tmp_path / "run"
    env = f"tests.rollout.test_host:make?trouble=kill&fuse={fuse}"
    # nobody walks as far as 0.3 before the simulators are pushed there
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "advance", lighting(fuse, host.advance, 2 + (broken - 3) * 4 + 2))
        assert train(finished.parent, "--checkpoint-every=9", f"--out={run}", env=env) == SAVED
    error = capsys.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in error if line.startswith("worker")] == ["worker 0 of 2"]
    assert error[-1] == f"stopped and saved; go on with: jaxrl train --resume {run}"
    last = tiny.rows(run)[-1]
    assert checkpoint.epochs(run / "checkpoints")[-1] == last["epoch"] == broken
    saved, more = tiny.carry(run, broken), broken == 4
    # of the broken epoch too, unless it is the first of its phase
    assert (
        saved[".steps"] - last["steps"] == 6 * more and saved[".updates"] - last["updates"] == 1 * more
    )  # of 1.5 per iteration
    assert cli.main(["train", "--resume", str(run)]) == 0
    assert tiny.rows(run)[-1]["epoch"] == 6 and not fuse.exists()


def lighting(fuse: Path, advance, iteration: int):
    """Returns `advance` that walks until a worker dies, in an iteration counted from the first that collects."""
    calls = []

    def lit(simulators, chunks, random):
        calls.append(1)
        if len(calls) == iteration:
            fuse.touch()
            simulators.pool.execute("training", np.arange(1), np.ones((1, 8, 1), np.float32))
        return advance(simulators, chunks, random)

    return lit


def test_a_worker_that_dies_in_an_evaluation_stops_the_run_as_well(finished, tmp_path, capsys):
    env = f"tests.rollout.test_host:make?trouble=kill&fuse={tmp_path / 'fuse'}"
    (tmp_path / "fuse").touch()
    walks = Constant(chunk=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "jitted_act_greedily", lambda *given: ((), walks.act(1.0, given[4], given[5])))
        assert train(finished.parent, f"--out={tmp_path / 'run'}", env=env) == SAVED
    assert "worker" in capsys.readouterr().err
    assert [row["epoch"] for row in tiny.rows(tmp_path / "run")] == [1]
    assert cli.main(["train", "--resume", str(tmp_path / "run")]) == 0


def test_commands_on_a_finished_run(finished, tmp_path, capsys):
    assert cli.main(["eval", str(finished), "--episodes=4"]) == 0
    result = json.loads(capsys.readouterr().out.removeprefix("result: "))
    last = [row for row in tiny.rows(finished) if "eval/success" in row][-1]
    assert {name: result[name] for name in last if name.startswith("eval/")} == {
        name: value for name, value in last.items() if name.startswith("eval/")
    }
    assert cli.main(["render", str(finished), f"--out={tmp_path / 'walk.gif'}"]) == 0
    assert (tmp_path / "walk.gif").stat().st_size > 0


def test_the_programs_are_compiled_once_per_phase(finished):
    compiled = json.loads((finished.parent / "compiled.json").read_text())
    # what learns compiles in the warm-up and again in the first epoch online, what acts once, what evaluates once
    for program, counts in (("learn", [0, 0, 1, 1, 0, 0]), ("act", [0, 0, 1, 0, 0, 0]), ("epoch", [1, 0, 0, 0, 0, 0])):
        assert [line.count(f"jit({program})") for line in compiled] == counts
    assert [line.count("jit(act_greedily)") for line in compiled] == [0, 1, 0, 0, 0, 0]
    assert compiled[5] == []


def test_the_plan_counts_what_is_on_the_device(finished, capsys):
    schedule = ["--schedule.offline-updates=0", "--schedule.warmup-steps=0"]
    assert train(finished.parent, *schedule, "--plan") == 0
    planned = dict(line.rsplit(maxsplit=2)[:2] for line in capsys.readouterr().out.splitlines())
    assert planned["environments"] == "0.0" and float(planned["process peak, including compilation"]) > 0


@pytest.mark.parametrize(
    ("env", "found"),
    [
        (WalkEnv(), []),
        (WalkEnv("nan"), ["all numbers are finite: a step gave a non-finite number"]),
        (WalkEnv("raise"), ["simulators run in a worker process: SimulatorFailed: a simulator failed: RuntimeError"]),
        (Wrong(Spec(2, 1)), ["observations have the size of spec: their shape is (3,)"]),
    ],
)
def test_the_checker_looks_at_simulators_too(env, found):
    failed = [str(finding) for finding in check(env) if not finding.ok]
    assert [line.startswith(f"FAIL  {start}") for line, start in zip(failed, found, strict=True)] == [True] * len(found)


def test_what_lacks_a_dataset_says_so(capsys):
    assert cli.main(["train", "bc", "tests.rollout.test_host:make"]) == 2
    assert "name a dataset file with --data" in capsys.readouterr().err


def test_an_environment_is_of_one_kind_or_the_other():
    assert isinstance(WalkEnv(), HostEnv) and not isinstance(WalkEnv(), Env)
    assert isinstance(envs.make("point"), Env) and not isinstance(envs.make("point"), HostEnv)
    with pytest.raises(UserError, match=r"lacks tasks; .* spec, horizon, tasks and builder"):
        envs.make("tests.rollout.test_host:lacking")


class lacking:  # noqa: N801  (made by its name)
    spec, horizon = Spec(1, 1), 3

    def builder(self, picture=0):
        return walk.Walk
