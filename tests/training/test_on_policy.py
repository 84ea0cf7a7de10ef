"""On-policy agents: what an iteration hands them is what they have just done, and they learn from it."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from envs.point import Bandit, Point
from jaxrl.rollout import host
from jaxrl.rollout.device import Unroll
from jaxrl.training import host_loop, loop
from jaxrl.training.schedule import Schedule
from jaxrl.types import OnPolicy, Phase, PyTree, Remembering, Scalar, Spec, count_of, pytree
from tests import walk
from tests.rollout.test_host import WalkEnv

pytestmark = pytest.mark.usefixtures("quick")

KEY = jax.random.key(0)
SCHEDULE = Schedule(offline_updates=0, online_steps=10_000, warmup_steps=0, envs=64, eval_episodes=20)
ONLINE = Phase("online", epochs=1, iterations=150, collects=True, updates=1, data="none")


@pytree
class State:
    params: dict[str, jax.Array]
    opt: PyTree


@pytree
class Reinforce:
    """REINFORCE (Williams, 1992) with a linear mean, for tasks whose rewards tell of the last action alone.

    Its memory counts the decisions of an episode; its extras are that, the unbounded action and its log-density.
    """

    chunk: int = 1
    unroll: int = 4
    lr: Scalar = 0.02

    def init(self, key: jax.Array, spec: Spec) -> State:
        params = {"w": jnp.zeros((spec.observation, spec.action)), "log_std": jnp.full(spec.action, -0.7)}
        return State(params, optax.adam(self.lr).init(params))

    def sample(self, data, key):
        raise AssertionError("an on-policy agent samples nothing")

    update = sample

    def act(self, state, obs, key, *, greedy=False):
        raise AssertionError("an agent that remembers decides")

    def start(self, state: State, obs: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.zeros(count_of(obs), jnp.int32)

    def decide(self, state: State, memory: jax.Array, obs: jax.Array, key: jax.Array, *, greedy: bool = False):
        noise = jax.random.normal(key, (len(obs), state.params["w"].shape[1]))
        raw = obs @ state.params["w"] + (0 if greedy else jnp.exp(state.params["log_std"])[None] * noise)
        extras = {"raw": raw, "log_prob": log_prob(state.params, obs, raw), "decision": memory}
        return memory + 1, jnp.clip(raw, -1, 1)[:, None], extras

    def learn_from(self, state: State, unroll: Unroll, key: jax.Array):
        steps = jax.tree.map(
            lambda x: x.reshape(-1, *x.shape[3:]), dataclasses.replace(unroll.steps, obs=None, ended=None)
        )
        obs = unroll.steps.obs[:, :, 0].reshape(-1, unroll.steps.obs.shape[-1])
        happened = (steps.taken & steps.valid).astype(jnp.float32)
        gain = (steps.rewards - steps.rewards.mean()) / (steps.rewards.std() + 1e-6) * happened

        def loss(params):
            ratio = jnp.exp(log_prob(params, obs, steps.extra["raw"]) - steps.extra["log_prob"])
            return -(ratio * gain).mean(), ratio

        gradient, ratio = jax.grad(loss, has_aux=True)(state.params)
        updates, opt = optax.adam(self.lr).update(gradient, state.opt)
        metrics = {
            "agent/ratio": jnp.abs(ratio - 1).max(),
            "agent/decision": steps.extra["decision"].max(),
            "agent/reward": steps.rewards.mean(),
            "agent/steps": happened.sum(),
            "agent/memory": unroll.memory.max(),
        }
        return State(optax.apply_updates(state.params, updates), opt), metrics


def log_prob(params, obs, raw):
    z = (raw - obs @ params["w"]) / jnp.exp(params["log_std"])[None]
    return (-0.5 * z**2 - params["log_std"][None]).sum(axis=-1)


class DenseEnv(WalkEnv):
    def builder(self, picture=0):
        return walk.Dense


AGENT = loop.on_device(Reinforce())


def test_reinforce_is_declared_by_its_shape():
    assert isinstance(AGENT, OnPolicy) and isinstance(AGENT, Remembering)


def test_reinforce_finds_a_bump_of_the_bandit():
    env = Bandit()
    carry = loop.jitted_begin(AGENT, env, SCHEDULE, KEY)
    before = loop.jitted_evaluate(AGENT, env, 20, carry.agent, KEY).returns.mean()
    carry, metrics = loop.jitted_epoch(AGENT, env, ONLINE, carry, None)
    after = loop.jitted_evaluate(AGENT, env, 20, carry.agent, KEY).returns.mean()
    assert before < 0.01 and after > 0.9
    assert (int(carry.updates), int(carry.steps)) == (150, 150 * 64 * 4)
    assert metrics["collect/episodes"] == 150 * 64 * 4
    assert metrics["agent/ratio"] < 1e-5  # it learns from its own decisions, made with the very parameters it has
    assert metrics["agent/decision"] == 0  # each is the first of an episode
    assert 0 < metrics["agent/reward"] < after


def test_an_unroll_goes_on_where_the_last_one_ended():
    env, phase = Point(horizon=7), dataclasses.replace(ONLINE, iterations=1)
    carry, seen = loop.jitted_begin(AGENT, env, SCHEDULE, KEY), []
    for _ in range(4):
        carry, metrics = loop.jitted_epoch(AGENT, env, phase, carry, None)
        seen.append([int(metrics[f"agent/{name}"]) for name in ("memory", "decision", "steps")])
    # decisions 0 to 3, then 4 to 6 and 0, 1 to 4, and 5, 6, 0, 1
    assert seen == [[0, 3, 256], [4, 6, 256], [1, 4, 256], [5, 6, 256]]
    assert int(carry.updates) == 4 and float(metrics["collect/episodes"]) == 64


def test_rewards_of_an_unroll_are_scaled_and_shifted_for_the_agent_alone():
    env, phase = Point(horizon=7), dataclasses.replace(ONLINE, iterations=2, reward=(2.0, 0.5))
    _, metrics = loop.jitted_epoch(AGENT, env, phase, loop.jitted_begin(AGENT, env, SCHEDULE, KEY), None)
    assert metrics["agent/reward"] == -1.5 and metrics["collect/return"] == -7


def test_without_updates_it_collects_and_does_not_learn():
    env, phase = Point(horizon=7), dataclasses.replace(ONLINE, iterations=2, updates=0)
    before = loop.jitted_begin(AGENT, env, SCHEDULE, KEY)
    weights = np.array(before.agent.params["w"])
    carry, metrics = loop.jitted_epoch(AGENT, env, phase, before, None)
    np.testing.assert_array_equal(carry.agent.params["w"], weights)
    assert (int(carry.updates), int(carry.steps)) == (0, 2 * 4 * 64) and "agent/ratio" not in metrics


def test_in_simulators_it_learns_to_walk():
    """Two tasks, an end to the right and one to the left; the observed target says which."""
    env = DenseEnv()
    agent = loop.on_device(Reinforce(unroll=8, lr=0.1))
    phase = dataclasses.replace(ONLINE, iterations=12)
    carry = loop.jitted_begin(agent, env, dataclasses.replace(SCHEDULE, envs=32), KEY)
    simulators = host.Simulators(env, 2)
    with contextlib.closing(simulators):
        before = host.evaluate(simulators, agent, carry.agent, KEY, 10)
        carry, metrics = host_loop.epoch(simulators, agent, phase, carry, None, 32)
        after = host.evaluate(simulators, agent, carry.agent, KEY, 10)
    assert before.success.mean() == 0 and after.success.mean() == 1
    assert metrics["agent/ratio"] < 1e-5 and 0 < metrics["agent/decision"] < walk.HORIZON
    assert int(carry.updates) == 12 and int(carry.steps) == 12 * 32 * 8 == metrics["agent/steps"] * 12


def test_an_unroll_in_simulators_is_that_of_its_decisions():
    found, learn = [], host_loop.jitted_learn_from
    carry = loop.jitted_begin(AGENT, WalkEnv(), dataclasses.replace(SCHEDULE, envs=3), KEY)
    simulators = host.Simulators(WalkEnv(), 1)
    with contextlib.closing(simulators), pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_loop, "jitted_learn_from", lambda *given: (found.append(given[3]), learn(*given))[1])
        host_loop.epoch(simulators, AGENT, dataclasses.replace(ONLINE, iterations=3), carry, None, 3)
    assert [unroll.memory.tolist() for unroll in found] == [[0] * 3, [4] * 3, [0] * 3]  # an episode has eight steps
    for unroll in found:
        steps = unroll.steps
        assert steps.obs.shape == (4, 3, 2, 3) and steps.rewards.shape == (4, 3, 1) and steps.ended.shape == (4, 3)
        assert steps.extra["raw"].shape == (4, 3, 1, 1)
        np.testing.assert_array_equal(unroll.last_obs, steps.obs[-1, :, -1])
        wanted = unroll.memory[0] + np.arange(4)[:, None]
        np.testing.assert_array_equal(steps.extra["decision"][..., 0], np.broadcast_to(wanted, (4, 3)))
        np.testing.assert_allclose(steps.actions[..., 0, 0], np.clip(steps.extra["raw"][..., 0, 0], -1, 1))
        moved = steps.obs[..., 1, 0] - steps.obs[..., 0, 0]
        np.testing.assert_allclose(moved, walk.STEP * steps.actions[..., 0, 0], atol=1e-6)
    assert [int(unroll.sums["episodes"]) for unroll in found] == [0, 3, 0]
