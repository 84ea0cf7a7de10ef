"""Facts about jaxrl.agents.prdc, with networks of one layer and datasets of a few pairs, all known by hand."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import ranges
from jaxrl.agents import PRDC, TD3BC
from jaxrl.agents.parts import Adam
from jaxrl.data.files import Dataset
from jaxrl.errors import UserError
from jaxrl.ops.normalizer import Normalizer
from jaxrl.replay import loading
from jaxrl.replay import ring as rings
from jaxrl.replay.loading import from_dataset
from jaxrl.replay.neighbours import with_forest
from jaxrl.types import ChecksData, Leaf, Requirements, Spec
from tests.known import KEY, NARROW, WIDE, batch_of, bias_of, one_layer_each, with_fields

pytestmark = pytest.mark.usefixtures("quick")

AGENT = with_fields(PRDC(), hidden=())
STATES, ACTIONS = np.array([[1.0], [1.1], [2.0]]), np.array([[0.0], [0.5], [0.6]])
window_at = jax.jit(rings.window_at, static_argnums=3)
nearest, nearest_action = jax.jit(PRDC.nearest), jax.jit(PRDC.nearest_action)


def pairs(states, actions) -> rings.Ring:
    """Returns a dataset of these pairs, pair i in row 2 i; each odd row closes an episode, with a lure: pi(0.9)."""
    states, actions = np.repeat(states, 2, axis=0).astype(np.float32), np.repeat(actions, 2, axis=0).astype(np.float32)
    states[1::2], actions[1::2] = 0.9, 0.6
    nothing = np.zeros(len(states), bool)
    return from_dataset(Dataset(states, actions, np.arange(len(states)) % 2 == 1), 0.0 * nothing, nothing)


THREE = pairs(STATES, ACTIONS)


def known(agent=AGENT, pi=(0.6,), spec=NARROW, mean=1.0, std=0.5, **layers):
    """Returns the state with pi(s) = `pi` and states measured from 1 in halves."""
    state = one_layer_each(agent, spec, actor=(0, np.arctanh(pi)), **layers)
    return dataclasses.replace(state, normalizer=Normalizer(*(jnp.full(spec.observation, x) for x in (mean, std))))


def asked(*obs):
    """Returns a batch at these states."""
    return batch_of(np.zeros((len(obs), 1)), obs=[[x] for x in obs])


# The neighbour


@pytest.mark.parametrize(
    ("beta", "rows", "squared"),
    [
        (2.0, (2, 0, 4), (0.04 + 0.01, 0.16 + 0.36, 0.16)),  # 4 per unit of the state
        (0.1, (2, 2, 4), (0.0001 + 0.01, 0.0016 + 0.01, 0.0004)),
        (0.0, (4, 4, 4), (0.0, 0.0, 0.0)),  # the nearest action
        (1e3, (2, 0, 4), (1e4 + 0.01, 4e4 + 0.36, 4e4)),  # the nearest state
    ],
)
def test_the_nearest_of_three_pairs_by_normalised_state_and_the_policys_action(beta, rows, squared):
    agent = dataclasses.replace(AGENT, beta=beta)
    distance, row = nearest(agent, known(), asked(1.05, 0.9, 1.9), (THREE,))
    np.testing.assert_array_equal(row[:, 0], rows)
    np.testing.assert_allclose(distance[:, 0], squared, rtol=1e-4, atol=1e-9)
    found = nearest_action(agent, known(), asked(1.05, 0.9, 1.9), (THREE,))
    np.testing.assert_array_equal(found, ACTIONS[np.array(rows) // 2].astype(np.float32))


def test_of_several_neighbours_the_actor_is_pulled_to_the_mean():
    agent = dataclasses.replace(AGENT, neighbours=2, beta=0.5)  # 1 per unit of the state
    asking = (agent, known(), asked(1.05, 1.9), (THREE,))
    np.testing.assert_allclose(nearest_action(*asking), [[0.25], [0.55]], rtol=1e-6)
    assert np.shape(nearest(*asking)[1]) == (2, 2)


def test_a_goal_is_no_part_of_the_state_that_is_compared():
    spec = Spec(observation=2, action=1, goal=1)
    batch = dataclasses.replace(asked(1.05, 1.05), obs=jnp.array([[1.05, -50.0], [1.05, 50.0]]))
    distance, row = nearest(AGENT, known(spec=spec), batch, (THREE,))
    np.testing.assert_array_equal(row[:, 0], [2, 2])
    np.testing.assert_allclose(distance[:, 0], [0.05, 0.05], rtol=1e-4)


def test_neighbors_are_looked_up_in_the_dataset_and_never_in_the_replay():
    replay = dataclasses.replace(THREE, obs=THREE.obs + 1e-3, actions=THREE.actions - 0.3)  # nearer
    agent, state, batch = with_fields(AGENT, delay=1), known(), asked(1.101, 1.101)
    update = jax.jit(agent.update)
    held = [float(update(state, batch, KEY, data)[1]["actor/constraint"]) for data in ((THREE,), (THREE, replay))]
    assert held[0] == held[1] == pytest.approx((0.6 - 0.5) ** 2, rel=1e-4)
    assert float(update(state, batch, KEY, (replay,))[1]["actor/constraint"]) == pytest.approx(0.4**2, rel=1e-4)


def test_an_update_without_data_to_look_things_up_in_is_refused():
    with pytest.raises(UserError, match=re.escape("PRDC.update: data is empty")):
        AGENT.update(known(), asked(1.0), KEY)


def test_observations_that_are_dicts_are_refused():
    with pytest.raises(UserError, match=re.escape("PRDC: neighbors are searched among observations that are arrays")):
        AGENT.init(KEY, Spec((Leaf("state", (3,)),), 1))


@pytest.mark.parametrize(
    ("search", "trees", "called"), [("auto", True, True), ("tree", True, True), ("blocks", False, False)]
)
def test_only_a_search_by_trees_asks_for_them_and_calls_the_host(search, trees, called):
    agent, data = dataclasses.replace(AGENT, search=search), (with_forest(THREE),)
    assert agent.requires() == Requirements(dataset=True, kdtree=trees, batch=256)
    program = jax.make_jaxpr(agent.update)(known(), asked(1.0, 1.9), KEY, data)
    assert ("pure_callback" in str(program)) == called


def test_a_dataset_with_fewer_transitions_than_neighbors_is_refused():
    agent = dataclasses.replace(AGENT, neighbours=9)
    assert isinstance(agent, ChecksData)
    agent.check_data(9)
    with pytest.raises(UserError, match=re.escape("k = 9: the dataset has 8 rows to choose from")):
        agent.check_data(8)


# The actor's loss


PAIR = Spec(observation=1, action=2)


def slope_of(agent, state, batch, near):
    """Returns the slope of the actor's loss in the action before the tanh, the layer's bias."""
    loss = lambda actor: agent.actor_loss(actor, state, batch, near(actor))[0]  # noqa: E731
    return bias_of(jax.grad(loss)(state.params["actor"]))


def test_a_constant_critic_leaves_twice_the_distance_to_the_neighbour_over_batch_and_entries():
    data = pairs(STATES, np.array([[0.0, 0.1], [0.5, -0.3], [0.6, 0.2]]))
    state, batch = known(pi=(0.4, -0.2), spec=PAIR, critic=(0, 3.0)), asked(1.0, 1.9)
    near = nearest_action(AGENT, state, batch, (data,))
    np.testing.assert_allclose(near, [[0.5, -0.3], [0.6, 0.2]])
    loss, metrics = AGENT.actor_loss(state.params["actor"], state, batch, near)
    apart = np.array([0.4, -0.2]) - np.asarray(near)
    assert float(metrics["actor/constraint"]) == pytest.approx(np.square(apart).mean(), rel=1e-5)
    assert float(loss) == pytest.approx(-2.5 + np.square(apart).mean(), rel=1e-5)
    wanted = (2 * apart / (2 * 2)).sum(axis=0) * (1 - np.square([0.4, -0.2]))
    np.testing.assert_allclose(slope_of(AGENT, state, batch, lambda _: near), wanted, rtol=1e-5)


def test_the_search_has_no_gradient():
    state, batch = known(critic=(0, 1.0)), asked(1.0, 1.9)
    at = lambda actor: dataclasses.replace(state, params=state.params | {"actor": actor})  # noqa: E731
    through = slope_of(AGENT, state, batch, lambda actor: nearest_action(AGENT, at(actor), batch, (THREE,)))
    fixed = nearest_action(AGENT, state, batch, (THREE,))
    np.testing.assert_array_equal(through, slope_of(AGENT, state, batch, lambda _: fixed))
    keys = lambda obs: (dataclasses.replace(THREE, obs=obs),)  # noqa: E731
    assert not np.any(jax.grad(lambda obs: nearest(AGENT, state, batch, keys(obs))[0].sum())(THREE.obs))


def test_a_critic_twice_as_large_changes_nothing():
    batch, near = asked(1.0, 1.9), jnp.array([[0.5], [0.1]])
    losses, slopes = [], []
    for factor in (1, 2):
        state = known(critic=([[factor, -3 * factor], [0, 0]], (0.5 * factor, 0)))
        losses.append(AGENT.actor_loss(state.params["actor"], state, batch, near)[0])
        slopes.append(slope_of(AGENT, state, batch, lambda _: near))
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-6)
    np.testing.assert_allclose(*slopes, rtol=1e-5)
    assert abs(slopes[0] - slope_of(AGENT, known(critic=(0, 1.0)), batch, lambda _: near)) > 0.1


# Its limit


def test_with_a_large_beta_and_distinct_states_it_is_td3bc():
    rng = np.random.default_rng(0)
    states, actions = rng.normal(size=(12, 3)).astype(np.float32), rng.uniform(-1, 1, (12, 2)).astype(np.float32)
    ends = np.arange(12) % 6 == 5
    data = from_dataset(Dataset(states, actions, ends), rng.normal(size=12), np.arange(12) == 4)
    start = jnp.asarray([0, 1, 2, 3, 4, 6, 8, 10])
    batch = window_at(data, jnp.zeros_like(start), start, 1)
    outcomes = []
    for agent, more in ((PRDC(beta=1e3), ((data,),)), (TD3BC(), ())):
        agent = with_fields(agent, hidden=(), delay=1, lr=0.05)
        state = agent.fit(one_layer_each(agent, WIDE, critic=([[1, 2, 3, -1, 2]], 0.5)), (data,))
        learn = jax.jit(agent.learn)
        for key in jax.random.split(KEY, 2):
            state, metrics = learn(state, batch, agent.td3.draw(WIDE, batch, key), *more)
        held = metrics.get("actor/constraint", metrics.get("actor/bc_loss"))
        outcomes.append((state.params, state.target, {**metrics, "held": held}))
    names = outcomes[0][2].keys() & outcomes[1][2].keys()
    assert names == {"critic/loss", "actor/q_loss", "actor/lambda", "held"}
    for x, y in zip(*(jax.tree.leaves(outcome[:2]) for outcome in outcomes), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    for name in names:
        assert float(outcomes[0][2][name]) == pytest.approx(float(outcomes[1][2][name]), rel=1e-5)


def test_the_neighbour_is_looked_up_anew_as_the_actor_moves():
    agent = with_fields(AGENT, delay=1, beta=0.01, actor_adam=Adam(0.5), alpha=5.0)
    state, batch = known(agent, pi=(0.02,), critic=([[0, 1.0]], 0.2)), asked(1.0, 1.9)
    learn, rows = jax.jit(agent.learn), []
    for key in jax.random.split(KEY, 3):
        near, before = nearest_action(agent, state, batch, (THREE,)), agent.td3.choose(state, batch.obs)
        state, metrics = learn(state, batch, agent.td3.draw(NARROW, batch, key), (THREE,))
        assert float(metrics["actor/constraint"]) == pytest.approx(float(jnp.square(before - near).mean()), rel=1e-5)
        rows.append(float(near[0, 0]))
    assert rows == pytest.approx([0.0, 0.5, 0.6])


# Rewards


def test_rewards_are_scaled_and_shifted_and_next_states_are_not():
    columns = {"observations": np.arange(6, dtype=np.float32)[:, None], "actions": np.zeros((6, 1), np.float32)}
    dataset = Dataset(**columns, terminals=np.arange(6) % 3 == 2, rewards=np.array([0, 0, 0, 0, 1, 0], np.float32))
    dataset = dataclasses.replace(dataset, masks=1 - dataset.rewards)
    data = loading.to_ring(dataset, SimpleNamespace(spec=NARROW), scale=10_000.0, shift=-1.0)
    batch = window_at(data, jnp.zeros(4, int), jnp.array([0, 1, 3, 4]), 1)
    np.testing.assert_array_equal(batch.rewards[:, 0], [-1, -1, -1, 9999])
    np.testing.assert_array_equal(batch.next_obs[:, 0], [1, 2, 4, 5])
    state = known(critic=(0, 100.0))
    y = AGENT.td3.td_target(state, state.target["critic"], batch, jnp.zeros((4, 1)))
    np.testing.assert_allclose(y, [98, 98, 98, 9999], rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": -1.0}, "alpha = -1.0: must be at least 0"),
        ({"beta": -1.0}, "beta = -1.0: must be at least 0"),
        ({"neighbours": 0}, "neighbours = 0: must be at least 1"),
        ({"block": 0}, "block = 0: must be at least 1"),
    ],
)
def test_values_out_of_range_are_refused_by_name(fields, message):
    with pytest.raises(UserError, match=re.escape(f"PRDC.{message}")):
        ranges.check(PRDC(**fields))
