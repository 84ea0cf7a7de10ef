"""Facts about jaxrl.agents.td3 and what its descendants have of it: targets, the order of an update, normalized
observations, initial layers. Networks have one layer, so that every number is known by hand.
"""

import dataclasses
import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs.point import Point
from jaxrl import ranges
from jaxrl.agents import A2PR, PRDC, TD3, TD3BC, ReBRAC, learner
from jaxrl.agents.learner import State
from jaxrl.agents.td3 import climb
from jaxrl.data.files import Dataset
from jaxrl.errors import UserError
from jaxrl.ops import normalizer
from jaxrl.replay.loading import from_dataset
from jaxrl.training import loop
from jaxrl.training.schedule import Schedule
from jaxrl.types import Requirements, Spec
from tests.known import (
    KEY,
    NARROW,
    WIDE,
    batch_of,
    bias_of,
    one_layer_each,
    random_batch,
    same,
    some_data,
    values_of,
    with_fields,
)

pytestmark = pytest.mark.usefixtures("quick")

FAMILY = [TD3, TD3BC, ReBRAC, PRDC, A2PR]
every_one = pytest.mark.parametrize("cls", FAMILY, ids=lambda cls: cls.__name__)


def linear(cls, **fields) -> Any:
    """Returns an agent whose networks have no hidden layer."""
    return with_fields(cls(), hidden=(), **fields)


def td3_of(agent) -> TD3:
    """Returns the TD3 that an agent is, or has."""
    return agent if isinstance(agent, TD3) else agent.td3


LINEAR = linear(TD3)


def close(a, b, **tolerance) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


# The target


def test_the_noise_of_target_actions_is_clipped_and_so_are_these():
    low, high = np.arctanh([0.3, 0.8])
    state = one_layer_each(LINEAR, actor=(0, 9.0), target={"actor": (high - low, low)})
    agent = dataclasses.replace(LINEAR, target_noise=0.5, noise_clip=0.6)
    batch = batch_of(np.zeros((6, 1)), next_obs=[[0.0], [0.0], [0.0], [0.0], [1.0], [1.0]])
    noise = {"target_noise": jnp.array([[0.0], [1.0], [3.0], [-3.0], [3.0], [0.2]])}
    found = agent.target_action(state, batch, noise)
    np.testing.assert_allclose(found[:, 0], [0.3, 0.8, 0.9, -0.3, 1.0, 0.9], rtol=1e-6)


def test_the_target_is_the_reward_and_the_lower_of_the_slow_critics_unless_the_task_is_over():
    agent = with_fields(LINEAR, discount=0.9)
    state = one_layer_each(agent, critic=(9, 9), target={"critic": ([[10, 2], [10, -1]], (1, 3))})
    batch = batch_of(np.full((4, 1), 2.0), terminated=[0, 0, 0, 1], next_obs=[[0.0], [0.0], [0.5], [0.5]])
    action = jnp.array([[0.5], [0.9], [0.0], [0.0]])  # 1 + 2 a below 3 - a up to a = 2/3
    loss = lambda critic: agent.td_target(state, critic, batch, action)  # noqa: E731
    np.testing.assert_allclose(loss(state.target["critic"]), [2 + 0.9 * 2, 2 + 0.9 * 2.1, 2 + 0.9 * 6, 2], rtol=1e-6)
    slopes = jax.grad(lambda critic: loss(critic).sum())(state.target["critic"])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(slopes))


def test_the_twins_errors_are_added_and_steps_that_did_not_happen_are_no_errors():
    state = one_layer_each(LINEAR, critic=([[0, 2], [0, 0]], (0, 1)))
    batch = batch_of([[0.0]] * 3, valid=[[1], [1], [0]], actions=[[[0.5]], [[-0.5]], [[0.1]]])
    y = jnp.array([3.0, 0.0, 100.0])
    loss = LINEAR.critic_loss(state.params["critic"], state, batch, y, batch.valid[:, 0])
    assert float(loss) == pytest.approx(((2**2 + 2**2) + (1**2 + 1**2)) / 3)


def test_probabilities_have_targets_that_are_probabilities():
    agent = linear(TD3, discount=0.5, head="bce")
    state = one_layer_each(agent, critic=(0, (0.3, -2.0)), target={"critic": (0, 0.0)})
    batch = batch_of([[0.25], [0.9], [-0.6]])
    y = agent.td_target(state, state.target["critic"], batch, jnp.zeros((3, 1)))
    wanted = np.array([0.5, 1.0, 0.0])
    np.testing.assert_allclose(y, wanted, atol=1e-6)
    p = 1 / (1 + np.exp([[-0.3], [2.0]]))
    entropy = -(wanted[None] * np.log(p) + (1 - wanted[None]) * np.log(1 - p))
    loss = float(agent.critic_loss(state.params["critic"], state, batch, y, jnp.ones(3)))
    assert loss == pytest.approx(entropy.sum(axis=0).mean(), rel=1e-5)
    assert agent.requires() == Requirements(unit_rewards=True, batch=256)
    with pytest.raises(UserError, match=re.escape("Goals.negative = True: values are probabilities")):
        ranges.check(with_fields(agent, negative=True))


# What the actor climbs


def test_the_actor_climbs_the_first_critic_alone():
    state = one_layer_each(LINEAR, actor=(0, np.arctanh(0.5)), critic=([[1, 2], [0, 50]], (0, 50)))
    batch = batch_of(np.zeros((3, 1)), valid=[[1], [1], [0]], obs=[[1.0], [-3.0], [100.0]])
    (loss, metrics), slope = jax.value_and_grad(LINEAR.actor_loss, has_aux=True)(state.params["actor"], state, batch)
    assert float(loss) == float(metrics["actor/q_loss"]) == pytest.approx(-((1 + 1) + (-3 + 1)) / 3)
    assert bias_of(slope)[0] == pytest.approx(-(2 + 2) / 3 * (1 - 0.5**2))


def test_a_critic_is_climbed_by_its_value_over_its_mean_size_where_its_scale_is_divided_out():
    q = jnp.array([2.0, -2.5])
    over = lambda q: climb(q, 1.8, batch_of([[0.0], [0.0]]))  # noqa: E731
    loss, weight = over(q)
    assert (float(loss), float(weight)) == pytest.approx((-0.8 * (2 - 2.5) / 2, 0.8))  # 1.8 / 2.25, not 1.8 / .25
    np.testing.assert_allclose(jax.grad(lambda q: over(q)[0])(q), [-0.8 / 2, -0.8 / 2])  # lambda is no function of Q
    assert not np.any(jax.grad(lambda q: over(q)[1])(q))
    assert float(over(2 * q)[0]) == pytest.approx(float(loss)) and float(over(2 * q)[1]) == pytest.approx(0.4)


# An update


@functools.cache
def three_updates(cls):
    """Returns an agent that updates its actor every second time, its first states and the metrics between them."""
    agent = linear(cls, tau=0.25, lr=0.01)
    rng = np.random.default_rng(0)
    first = one_layer_each(agent, WIDE)
    params, target = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), (first.params, first.target)
    )
    states, rows = [dataclasses.replace(first, params=params, target=target)], []
    update = jax.jit(agent.update)
    for i in range(3):
        state, metrics = update(states[-1], random_batch(i, length=1), jax.random.key(i), (some_data(WIDE),))
        states.append(state)
        rows.append(metrics)
    return agent, states, rows


@every_one
def test_critics_move_every_time_and_the_actor_and_all_targets_every_second_time(cls):
    _, states, rows = three_updates(cls)
    for i, (before, after) in enumerate(itertools.pairwise(states)):
        moved = {name for name in before.params if not same(before.params[name], after.params[name])}
        slow = {name for name in before.target if not same(before.target[name], after.target[name])}
        assert moved == before.params.keys() - ({"actor"} if i != 1 else set())
        assert slow == ({"actor", "critic"} if i == 1 else set())
        assert np.isnan(rows[i]["actor/q_loss"]) == (i != 1) and np.isfinite(rows[i]["critic/loss"])
    assert [int(state.step) for state in states] == [0, 1, 2, 3]


@every_one
def test_targets_move_a_share_tau_of_the_way_to_the_networks_after_their_step(cls):
    _, (_, before, after, _), _ = three_updates(cls)
    actor = before if cls is ReBRAC else after  # whose actor's target alone lags by one step
    towards = {"critic": after.params["critic"], "actor": actor.params["actor"]}
    wanted = jax.tree.map(lambda slow, fast: 0.75 * slow + 0.25 * fast, before.target, towards)
    close(after.target, wanted, rtol=1e-5, atol=1e-7)


@every_one
def test_the_actor_climbs_the_critic_that_has_just_been_updated(cls):
    agent, (_, before, after, _), (_, metrics, _) = three_updates(cls)
    obs, td3 = random_batch(1, length=1).obs, td3_of(agent)
    q = td3.critic.values(after.params["critic"], obs, td3.choose(before, obs))
    q = q.min(axis=0) if cls is ReBRAC else q[0]
    alpha = next(iter(values_of(agent, "alpha")), 1.0)
    weight = 1.0 if cls is TD3 else alpha / float(jnp.abs(q).mean())
    assert float(metrics["actor/q_loss"]) == pytest.approx(-weight * float(q.mean()), rel=1e-4)


@pytest.mark.parametrize(("delay", "made"), [(1, [1, 2, 3]), (3, [np.nan, np.nan, 3])])
def test_without_a_delay_every_update_is_whole_and_with_one_of_three_every_third(delay, made):
    def change(state):
        return dataclasses.replace(state, target={"x": state.target["x"] + 1}), {"at": state.step + 1.0}

    state, rows = State(NARROW, {}, {"x": jnp.zeros(())}, {}, jnp.zeros((), jnp.int32)), []
    for _ in range(3):
        state, metrics = learner.every(delay, state, change)
        state = learner.counted(state)
        rows.append(float(metrics["at"]))
    np.testing.assert_array_equal(rows, made)
    assert float(state.target["x"]) == np.isfinite(made).sum()


def test_updates_draw_one_number_per_entry_of_the_next_actions():
    noise = np.asarray(TD3().draw(Spec(3, 2), random_batch(0, 4000, 1), KEY)["target_noise"])
    assert noise.shape == (4000, 2)
    np.testing.assert_allclose(noise.mean(axis=0), 0, atol=0.06)
    np.testing.assert_allclose(np.cov(noise.T), np.eye(2), atol=0.08)


# Observations in units of the data's spread


NORMALIZED = linear(TD3, normalize=True)


def fitted(states: np.ndarray, ends: np.ndarray, agent=NORMALIZED, spec: Spec | None = None, **how) -> State:
    """Returns the state of an agent that has seen a dataset of these states."""
    states = np.asarray(states, np.float32)
    nothing = np.zeros(len(states), bool)
    data = from_dataset(Dataset(states, np.zeros((len(states), 1), np.float32), ends), nothing, nothing, **how)
    spec = spec or Spec(states.shape[1], 1)
    return agent.fit(one_layer_each(agent, spec), (data,))


@pytest.mark.parametrize("lanes", [1, 3])
def test_mean_and_biased_deviation_are_of_the_rows_that_a_transition_leaves(lanes):
    rng = np.random.default_rng(0)
    states, ends = rng.normal([3, -1], [2, 0.1], (40, 2)), np.isin(np.arange(40), (4, 17, 39))
    states[ends] = 1e6
    normalizer = fitted(states, ends, lanes=lanes).normalizer
    np.testing.assert_allclose(normalizer.mean, states[~ends].mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(normalizer.std, states[~ends].std(axis=0) + 1e-3, rtol=1e-6)


def test_a_column_that_never_changes_stays_in_its_own_units():
    rng = np.random.default_rng(0)
    columns = [np.full(5001, 0.1), np.full(5001, 12345.678), np.zeros(5001), 0.01 * rng.normal(size=5001)]
    normalizer = fitted(np.stack(columns, axis=1), np.arange(5001) == 5000).normalizer
    np.testing.assert_array_equal(normalizer.std[:3], 1)
    np.testing.assert_allclose(normalizer.mean[:3], [0.1, 12345.678, 0], rtol=1e-6)
    assert float(normalizer.std[3]) == pytest.approx(columns[3][:-1].std() + 1e-3, rel=1e-5)


def test_a_mean_that_is_large_does_not_drown_the_deviation():
    rng = np.random.default_rng(0)
    states = (1e4 + 0.5 * rng.standard_normal((300_001, 1))).astype(np.float32)
    normalizer = fitted(states, np.arange(300_001) == 300_000).normalizer
    rows = states[:-1].astype(float)
    assert float(normalizer.mean[0]) == pytest.approx(rows.mean(), abs=2e-3)  # to the last bit of float32 at 1e4
    assert float(normalizer.std[0]) == pytest.approx(rows.std() + 1e-3, rel=1e-4)


def test_the_goals_part_is_measured_in_goals():
    rng, ends = np.random.default_rng(0), np.arange(30) % 10 == 9
    states = rng.normal(5, 2, (30, 1)).astype(np.float32)
    for goals in (rng.normal(-7, 3, (30, 1)).astype(np.float32), states):
        normalizer = fitted(states, ends, spec=Spec(2, 1, goal=1), goals=goals).normalizer
        both = np.concatenate([states, goals], axis=1)[~ends]
        np.testing.assert_allclose(normalizer.mean, both.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(normalizer.std, both.std(axis=0) + 1e-3, rtol=1e-5)


@every_one
def test_observations_are_normalized_in_learning_as_in_acting_where_the_agent_says_so(cls):
    agent = linear(cls, normalize=True)
    ends, states = np.arange(20) == 19, np.linspace(1, 9, 20)[:, None]
    start, raw = one_layer_each(agent, actor=(1, 0)), linear(cls, normalize=False)
    state = dataclasses.replace(start, normalizer=fitted(states, ends, agent).normalizer)
    rows = states[:-1]
    np.testing.assert_allclose(
        agent.act(state, jnp.asarray(rows, jnp.float32), KEY, greedy=True)[:, 0],
        np.tanh((rows - rows.mean()) / (rows.std() + 1e-3)),
        atol=1e-6,
    )
    batch = learner.normalized(state, batch_of([[0.0]], obs=[[4.0]], next_obs=[[5.0]]))
    close((batch.obs, batch.next_obs), [(x - rows.mean()) / (rows.std() + 1e-3) for x in ([[4.0]], [[5.0]])], rtol=1e-5)
    assert same(fitted(states, ends, raw).normalizer, start.normalizer)


# Acting


@every_one
def test_it_explores_with_noise_and_does_not_in_evaluation(cls):
    agent = linear(cls, exploration=0.4, noise_clip=0.5)
    state, noise = one_layer_each(agent, actor=(0, np.arctanh(0.7))), np.asarray(jax.random.normal(KEY, (50, 1)))
    found = agent.act(state, jnp.zeros((50, 1)), KEY)
    np.testing.assert_allclose(found[:, 0], np.clip(0.7 + np.clip(0.4 * noise, -0.5, 0.5), -1, 1), atol=1e-6)
    np.testing.assert_allclose(
        agent.act(state, jnp.zeros((50, 1)), KEY, greedy=True), np.full((50, 1, 1), 0.7), atol=1e-6
    )


# How layers begin


def test_layers_begin_uniform_within_one_over_the_root_of_their_inputs_and_targets_as_copies():
    agent, key = linear(A2PR), jax.random.key(0, impl="unsafe_rbg")
    state = jax.jit(agent.init, static_argnums=1)(key, Spec(170, 60))
    params = state.params
    layers, _ = jax.tree.flatten(params, is_leaf=lambda x: isinstance(x, dict) and "kernel" in x)
    assert len(layers) == 5
    for layer in layers:
        bound = layer["kernel"].shape[-2] ** -0.5
        kernel, bias = np.asarray(layer["kernel"]), np.asarray(layer["bias"])
        assert 0.95 * bound < np.abs(kernel).max() <= bound and np.abs(bias).max() <= bound
        assert bias.all() and (bias.size < 60 or bias.std() == pytest.approx(bound / np.sqrt(3), rel=0.2))
        assert kernel.std() == pytest.approx(bound / np.sqrt(3), rel=0.2)
    critic = jax.tree.leaves(params["critic"])
    assert not any(np.array_equal(leaf[0], leaf[1]) for leaf in critic)  # the twins differ

    assert same(state.target, {name: params[name] for name in ("actor", "critic")})
    assert same(state.normalizer, normalizer.identity(jnp.zeros(170)))


# Learning online


def test_it_learns_from_its_own_steps_alone_to_go_straight_to_a_goal():
    env, seed = Point(dimensions=1, horizon=30), jax.random.key(2)
    agent = with_fields(TD3(), hidden=(16, 16), lr=3e-3, batch=64, discount=0.9, tau=0.02, exploration=0.6)
    agent = loop.on_device(dataclasses.replace(agent, noise_clip=1.0))
    schedule = Schedule(
        offline_updates=0, online_steps=2400, warmup_steps=400, envs=8, utd=0.5, replay=4000, steps_per_epoch=400
    )
    carry, (_, online) = jax.jit(loop.run, static_argnums=(1, 2))(agent, env, schedule, seed, None)
    assert int(carry.updates) == 1200 and int(carry.steps) == 2800
    found, before = (
        loop.jitted_evaluate(agent, env, 50, state, KEY) for state in (carry.agent, agent.init(seed, env.spec))
    )
    assert before.success.mean() == 0 and found.success.mean() == 1
    assert online["collect/success"][0] < 0.5 < online["collect/success"][-1]
    starts = jax.vmap(env.reset)(jax.random.split(KEY, 1000)).obs
    assert float(found.lengths.mean()) == pytest.approx(float(env.optimal_steps(starts).mean()), abs=1.5)


# Refusals


@every_one
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden": (8, 0)}, "actor.net.hidden = (8, 0): must be at least 1"),
        ({"heads": 0}, "critic.heads = 0: must be at least 1"),
        ({"delay": 0}, "delay = 0: must be at least 1"),
        ({"lr": -1.0}, "actor_adam.lr = -1.0: must be at least 0"),
        ({"target_noise": -1.0}, "target_noise = -1.0: must be at least 0"),
        ({"noise_clip": -1.0}, "noise_clip = -1.0: must be at least 0"),
        ({"exploration": -1.0}, "exploration = -1.0: must be at least 0"),
        ({"discount": 1.5}, "transitions.discount = 1.5: must be in [0, 1]"),
        ({"tau": np.array([0.5, -0.1])}, "critic.tau = [ 0.5 -0.1]: must be in [0, 1]"),
    ],
)
def test_values_out_of_range_are_refused_by_name(cls, fields, message):
    name = "TD3" if cls is TD3 else f"{cls.__name__}.td3"
    with pytest.raises(UserError, match=re.escape(f"{name}.{message}")):
        ranges.check(with_fields(cls(), **fields))
