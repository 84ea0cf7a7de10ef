"""Members as one program: each is the run alone, none harms another, devices change nothing."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from jaxrl.agents.parts import Adam, Critic, DeterministicPolicy, Net, Transitions
from jaxrl.agents.td3 import TD3
from jaxrl.agents.td3bc import TD3BC
from jaxrl.replay import ring as rings
from jaxrl.sweeps import population
from jaxrl.sweeps.population import RUNNING, Lift, Programs, keys_of, stacked
from jaxrl.training import loop
from jaxrl.training.schedule import Schedule, phases

pytestmark = pytest.mark.usefixtures("quick")

NET = Net((8,), "relu", "none", "torch")
AGENT = TD3BC(TD3(DeterministicPolicy(NET), Critic(NET, agg="min"), transitions=Transitions(16), normalize=True))
SCHEDULE = Schedule(
    offline_updates=0, online_data="both", online_steps=20, utd=0.3, warmup_steps=0, envs=4, steps_per_epoch=8
)  # 1.2 updates per iteration, in epochs of 2, 2 and 1 iterations
LEARNING_RATES = (1e-3, 3e-4, 3e38, 1e-2)  # the third member diverges at once
SEEDS = (0, 1, 2, 0)
ENV = envs.make("point")


def dataset() -> rings.Ring:
    """Returns a dataset of 40 random steps of one episode."""
    random = np.random.default_rng(0)
    ring = rings.empty(1, 41, ENV.spec)
    return dataclasses.replace(
        ring,
        obs=jnp.asarray(random.normal(size=ring.obs.shape), jnp.float32),
        actions=jnp.asarray(random.uniform(-1, 1, ring.actions.shape), jnp.float32),
        rewards=-jnp.ones_like(ring.rewards),
        valid=ring.valid.at[:, :-1].set(True),
        head=ring.head + 40,
        count=ring.count + 40,
    )


def agents() -> list[TD3BC]:
    settings = (dataclasses.replace(AGENT.td3, critic_adam=Adam(lr)) for lr in LEARNING_RATES)
    return [TD3BC(td3) for td3 in settings]


def together(layout, devices=None):
    """Returns the members after all epochs, and their metrics of each, [M]."""
    programs = Programs(ENV, layout, devices)
    everyone, data = programs.place(stacked(agents())), programs.share(dataset())
    runner = programs.begin(everyone, schedule=SCHEDULE, keys=programs.place(keys_of(SEEDS)))
    history = []
    for phase in phases(SCHEDULE, AGENT):
        runner = programs.enter(everyone, phase=phase, population=runner)
        for before in range(phase.epochs):
            given = {"phase": phase, "dataset": data, "index": np.int32(phase.start + before)}
            runner, metrics = programs.epoch(everyone, population=runner, **given)
            history.append(jax.device_get(metrics))
    return jax.device_get(population.Population(numbers(runner.carry), runner.stopped)), history


def numbers(tree):
    """Returns a tree with its random keys as numbers."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tree)


def alone(index: int):
    """Returns the carry of a member that runs alone, as `jaxrl train` drives it, and its metrics."""
    agent = loop.on_device(agents()[index])
    carry = loop.jitted_begin(agent, ENV, SCHEDULE, jax.random.key(SEEDS[index]))
    history = []
    for phase in phases(SCHEDULE, AGENT):
        carry = loop.jitted_enter(agent, phase, carry)
        for _ in range(phase.epochs):
            carry, metrics = loop.jitted_epoch(agent, ENV, phase, carry, dataset())
            history.append(jax.device_get(metrics))
    return jax.device_get(numbers(carry)), history


@pytest.fixture(scope="module")
def mapped():
    return together("map")


@pytest.fixture(scope="module")
def vmapped():
    return together("vmap")


@pytest.fixture(scope="module")
def single():
    return {index: alone(index) for index in (0, 1)}


@pytest.mark.parametrize("index", [0, 1])
def test_a_member_is_the_run_alone(mapped, vmapped, single, index):
    """Its keys, counters and everything drawn at random are the same bits; what is computed, to rounding."""
    carry, history = single[index]
    for members, metrics in (mapped, vmapped):
        member = jax.tree.map(lambda x: x[index], members.carry)
        assert np.array_equal(member.key, carry.key)
        assert (member.updates, member.steps, member.epoch) == (carry.updates, carry.steps, carry.epoch)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), member, carry)
        for epoch, row in zip(history, metrics, strict=True):
            assert epoch.keys() == row.keys()
            for name in epoch.keys() - {"digest"}:
                np.testing.assert_allclose(row[name][index], epoch[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_one_after_the_other_they_are_the_runs_alone_bit_for_bit(mapped, single):
    members, metrics = mapped
    for index, (carry, history) in single.items():
        same = jax.tree.map(lambda x, y, i=index: np.array_equal(x[i], y), members.carry, carry)
        assert all(jax.tree.leaves(same))
        assert [row["digest"][index] for row in metrics] == [row["digest"] for row in history]


def test_members_of_equal_seed_begin_with_equal_parameters():
    keys = Programs(ENV, "vmap").place(keys_of(SEEDS))
    runner = Programs(ENV, "vmap").begin(stacked(agents()), schedule=SCHEDULE, keys=keys)
    first, last, other = (jax.tree.map(lambda x, i=i: x[i], runner.carry.agent.params) for i in (0, 3, 1))
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, first, last)))
    assert not all(jax.tree.leaves(jax.tree.map(jnp.array_equal, first, other)))


@pytest.mark.parametrize("layout", ["mapped", "vmapped"])
def test_a_member_that_diverges_is_frozen_as_it_was_before(layout, request):
    members, _ = request.getfixturevalue(layout)
    assert members.stopped.tolist() == [RUNNING, RUNNING, 1, RUNNING]
    first = jax.device_get(loop.jitted_begin(loop.on_device(AGENT), ENV, SCHEDULE, jax.random.key(SEEDS[2])))
    frozen = jax.tree.map(lambda x: x[2], members.carry.agent)
    jax.tree.map(np.testing.assert_array_equal, frozen.params, first.agent.params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(members.carry.agent))


def test_diverged_members_are_not_computed_one_after_the_other(mapped):
    """From the second epoch on their metrics are zeros, which nothing computed."""
    _, history = mapped
    assert all(row["digest"][2] == 0 for row in history[1:])


@pytest.mark.parametrize("layout", ["vmap", "map"])
def test_members_learn_without_a_dataset(layout):
    schedule = dataclasses.replace(SCHEDULE, online_data="auto")
    programs, everyone = Programs(ENV, layout), stacked(agents()[:2])
    members = programs.begin(everyone, schedule=schedule, keys=programs.place(keys_of(SEEDS[:2])))
    (phase,) = phases(schedule, AGENT)
    before = jax.device_get(members.carry.agent.params)
    members, metrics = programs.epoch(everyone, phase=phase, population=members, dataset=None)
    assert members.stopped.tolist() == [RUNNING, RUNNING] and np.isfinite(metrics["critic/loss"]).all()
    assert members.carry.updates.tolist() == [int(phase.iterations * phase.updates)] * 2
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, jax.device_get(members.carry.agent.params))
    assert all(jax.tree.leaves(moved["critic"]))


@pytest.mark.parametrize("layout", ["vmap", "map"])
def test_evaluation_gives_every_member_the_same_episodes(layout):
    programs = Programs(ENV, layout)
    everyone = stacked([AGENT, AGENT])
    runner = programs.begin(everyone, schedule=SCHEDULE, keys=keys_of([0, 0]))
    found = programs.evaluate(everyone, episodes=3, states=runner.carry.agent, key=jax.random.key(7))
    agent = loop.on_device(AGENT)
    state = loop.jitted_begin(agent, ENV, SCHEDULE, jax.random.key(0)).agent
    one = loop.jitted_evaluate(agent, ENV, 3, state, jax.random.key(7))
    for index in (0, 1):
        np.testing.assert_allclose(found.returns[index], one.returns, rtol=1e-5)
        np.testing.assert_array_equal(found.lengths[index], one.lengths)


def test_repeated_members_fill_up_the_program_and_have_left():
    programs = Programs(ENV, "vmap")
    carry = {"x": jnp.arange(3.0)}
    seated = programs.pad(population.Population(carry, jnp.zeros(3, jnp.int32)), 3, room=5)  # ty: ignore[invalid-argument-type]
    assert seated.carry["x"].tolist() == [0, 1, 2, 2, 2]  # ty: ignore[not-subscriptable]
    assert seated.stopped.tolist() == [0, 0, 0, -1, -1]


@pytest.mark.parametrize("layout", ["vmap", "map"])
def test_lifting_applies_a_function_to_each_member(layout):
    a, b = jnp.arange(6.0), jnp.arange(12.0).reshape(6, 2)
    found = jax.jit(lambda: Lift(layout)(lambda x, y: {"sum": x + y.sum(), "y": y}, a, b))()
    assert found["sum"].tolist() == [1, 6, 11, 16, 21, 26]
    assert found["y"].tolist() == b.tolist()


SHARDED = """
import json, re
import jax, numpy as np
from tests.sweeps import test_population as t
from tests.known import quick_to_compile
assert jax.local_device_count() == 4
found = {}
with quick_to_compile():
    programs = t.Programs(t.ENV, "map", jax.local_devices())
    everyone, data = programs.place(t.stacked(t.agents())), programs.share(t.dataset())
    runner = programs.begin(everyone, schedule=t.SCHEDULE, keys=programs.place(t.keys_of(t.SEEDS)))
    found["members per device"] = sorted({x.sharding.shard_shape(x.shape)[0] for x in jax.tree.leaves(runner)})
    (phase,) = t.phases(t.SCHEDULE, t.AGENT)
    program = programs.epoch.lower(everyone, phase=phase, population=runner, dataset=data, index=np.int32(0)).compile()
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    # all but whether any member has updates left, one bool per update where they are a fraction
    found["collectives"] = len(re.findall(rf"(?<!pred\\[\\]) ({kinds})(-start)?\\(", program.as_text()))
    for index in range(phase.epochs):
        runner, _ = program(everyone, population=runner, dataset=data, index=np.int32(index))
    found["params"] = [np.asarray(x).tolist() for x in jax.tree.leaves(runner.carry.agent.params)]
    found["stopped"] = runner.stopped.tolist()
print(json.dumps(found))
"""


def test_members_on_four_devices_are_those_on_one_and_do_not_communicate(mapped):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-c", SHARDED]
    process = subprocess.run(line, env=os.environ | flags, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout.splitlines()[-1])
    assert (found["members per device"], found["collectives"]) == ([1], 0)
    members, _ = mapped
    assert found["stopped"] == members.stopped.tolist()
    for sharded, whole in zip(found["params"], jax.tree.leaves(members.carry.agent.params), strict=True):
        np.testing.assert_allclose(sharded, whole, rtol=1e-4, atol=1e-5)
