"""Executors in runs and sweeps: from the flags of the command line to what is collected and evaluated."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs.point import Point
from jaxrl import cli, system
from jaxrl.replay.ring import windows
from jaxrl.rollout.executors import Execution
from jaxrl.runs import directory
from jaxrl.sweeps.population import Programs, keys_of, stacked
from jaxrl.training import loop
from jaxrl.training.schedule import Schedule, phases
from jaxrl.types import Scalar, count_of, pytree
from tests import tiny
from tests.rollout.test_host import BC, SCHEDULE, train


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(system, "cores", lambda: 2)
    with tiny.quick():
        yield


def result_of(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("result: "))


# Runs. The agent predicts two actions at a time


def test_simulators_are_trained_and_evaluated_as_the_flags_say(tmp_path, capsys):
    run, flags = tmp_path / "run", ["--execution.kind=real_time", "--execution.execute=1", "--execution.delay=1"]
    assert train(tmp_path, *flags, f"--out={run}") == 0
    assert directory.read_config(run).execution == Execution("real_time", 1, 1)
    rows = tiny.rows(run)
    # a decision is a step: none waits for a chunk's end, and budgets are met exactly
    assert [row["steps"] for row in rows] == [0, 0, 12, 36, 60, 84]
    assert [row["updates"] for row in rows] == [10, 20, 20, 26, 32, 38]
    leaves = tiny.carry(run, 6)
    assert leaves[".world.replay.valid"].sum() == 84
    assert cli.main(["replay", str(run), "--epochs=6"]) == 0
    capsys.readouterr()
    assert cli.main(["eval", str(run), "--episodes=4"]) == 0
    result = result_of(capsys)
    assert result["eval/return"] == [row for row in rows if "eval/return" in row][-1]["eval/return"]
    assert cli.main(["eval", str(run), "--episodes=4", "--execution.kind=open_loop"]) == 0
    assert result_of(capsys)["episodes"] == 4
    assert cli.main(["render", str(run), f"--out={tmp_path / 'walk.gif'}"]) == 0


def point(folder: Path, *flags: str) -> int:
    return cli.main(["train", "bc", "point?horizon=20", f"--data={folder / 'data.npz'}", *BC, *SCHEDULE, *flags])


def test_runs_on_the_device_are_trained_and_evaluated_as_the_flags_say(tmp_path, capsys):
    tiny.write_data(tmp_path / "data.npz")
    ensemble = ["--execution.kind=ensemble", "--execution.execute=1", "--execution.decay=-0.5"]
    assert point(tmp_path, *ensemble, f"--out={tmp_path / 'run'}") == 0
    assert point(tmp_path, f"--out={tmp_path / 'open'}") == 0
    rows, others = tiny.rows(tmp_path / "run"), tiny.rows(tmp_path / "open")
    assert [row["steps"] for row in rows] == [0, 0, 12, 36, 60, 84]
    leaves = tiny.carry(tmp_path / "run", 6)
    assert leaves[".world.rollout.memory.chunks"].shape == (3, 1, 2, 2)
    # before anything is collected both are the same
    assert rows[0] == others[0] | {"digest": rows[0]["digest"]} and rows[3] != others[3]
    assert cli.main(["replay", str(tmp_path / "run"), "--epochs=6"]) == 0
    capsys.readouterr()
    assert cli.main(["eval", str(tmp_path / "run"), "--episodes=4"]) == 0
    own = result_of(capsys)
    assert own["eval/return"] == [row for row in rows if "eval/return" in row][-1]["eval/return"]
    # a kind that is named begins with its own defaults, not with the run's numbers
    assert cli.main(["eval", str(tmp_path / "run"), "--episodes=4", "--execution.kind=adaptive"]) == 0
    capsys.readouterr()
    assert point(tmp_path, *ensemble, f"--out={tmp_path / 'plan'}", "--plan") == 0
    assert not (tmp_path / "plan").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--execution.kind=receding", "--execution.execute=3"], "execution.execute = 3: must be at most 2"),
        (["--execution.execute=1"], "execution.execute = 1: has no effect with execution.kind = 'open_loop'"),
        (["--execution.kind=real_time", "--execution.delay=-1"], "execution.delay = -1: must be at least 0"),
        (["--execution.kind=real_times"], "real_time"),
    ],
)
def test_flags_that_do_not_fit_are_refused_before_anything_is_built(tmp_path, capsys, flags, said):
    tiny.write_data(tmp_path / "data.npz")
    assert point(tmp_path, *flags, f"--out={tmp_path / 'run'}") == 2
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


# Sweeps


@pytree
class Drifting:
    """An agent that acts around a weight, which its updates change."""

    chunk: int = 4
    rate: Scalar = 0.1

    def init(self, key, spec):
        return jax.random.normal(key, (spec.action,))

    def sample(self, data, key):
        return windows(data, key, 8, self.chunk)

    def update(self, state, batch, key, data=()):
        return state + self.rate * batch.actions.mean(axis=(0, 1)), {"weight": state.mean()}

    def act(self, state, obs, key, *, greedy=False):
        noise = jax.random.uniform(key, (count_of(obs), self.chunk, len(state)), minval=-1)
        return 0.5 * jnp.tanh(state)[None, None] + 0.5 * noise


@pytest.mark.parametrize("execution", [Execution("ensemble", 1, decay=0.3), Execution("adaptive", 2, threshold=0.2)])
def test_members_of_a_sweep_are_the_runs_alone_bit_for_bit(execution):
    env, execution = Point(horizon=8), loop.on_device(execution)
    schedule = Schedule(offline_updates=0, online_steps=96, warmup_steps=0, envs=4, steps_per_epoch=48, utd=0.25)
    agents, seeds = [Drifting(rate=0.1), Drifting(rate=0.5)], [3, 4]
    programs = Programs(env, "map")
    everyone, keys = programs.place(stacked(agents)), programs.place(keys_of(seeds))
    (phase,) = phases(schedule, agents[0], length=execution.length(4))
    assert phase.iterations * 4 * execution.length(4) == 48
    population = programs.begin(everyone, schedule=schedule, keys=keys, execution=execution)
    for _ in range(phase.epochs):
        population, metrics = programs.epoch(
            everyone, phase=phase, population=population, dataset=None, execution=execution
        )
    key = jax.random.key(0)
    judged = programs.evaluate(
        everyone, episodes=3, states=population.carry.agent, key=programs.share(key), execution=execution
    )
    for i, agent in enumerate(map(loop.on_device, agents)):
        carry = loop.jitted_begin(agent, env, schedule, jax.random.key(seeds[i]), execution)
        for _ in range(phase.epochs):
            carry, row = loop.jitted_epoch(agent, env, phase, carry, None, execution)
        assert int(row["digest"]) == int(metrics["digest"][i]) and int(carry.steps) == 96
        episodes = loop.jitted_evaluate(agent, env, 3, carry.agent, key, execution)
        np.testing.assert_array_equal(episodes.returns, judged.returns[i])


def test_a_whole_run_as_one_program_is_executed_so_too():
    env, execution, agent = Point(horizon=9), Execution("receding", 1), loop.on_device(Drifting())
    schedule = Schedule(offline_updates=0, online_steps=48, warmup_steps=0, envs=4, steps_per_epoch=48, utd=0.25)
    carry, _ = jax.jit(lambda agent: loop.run(agent, env, schedule, jax.random.key(0), None, execution))(agent)
    again = loop.jitted_begin(agent, env, schedule, jax.random.key(0), execution)
    (phase,) = phases(schedule, agent, length=1)
    again, _ = loop.jitted_epoch(agent, env, phase, again, None, execution)
    assert int(loop.digest(carry)) == int(loop.digest(again)) and int(carry.steps) == 48
