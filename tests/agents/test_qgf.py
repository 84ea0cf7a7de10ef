"""Facts about jaxrl.agents.qgf: what is learned, in which order, and what the weight of the guidance does.

How the critic steers a flow is in tests/ops/test_guidance.py.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs.point import BUMPS, Bandit
from jaxrl import ranges
from jaxrl.agents import BC, QGF
from jaxrl.agents.parts import Adam, Critic, FlowPolicy, Net, Value, Windows
from jaxrl.data.files import Dataset
from jaxrl.errors import UserError
from jaxrl.ops.guidance import QGuidance
from jaxrl.ops.losses import value_of
from jaxrl.replay import ring as rings
from jaxrl.replay.loading import from_dataset
from jaxrl.training.loop import on_device
from tests.known import (
    KEY,
    WIDE,
    batch_of,
    fitted,
    formula,
    linear_heads,
    metrics_of,
    random_batch,
    reached,
    same,
    slopes_of,
    state_of,
    with_fields,
)

pytestmark = pytest.mark.usefixtures("quick")

TINY = with_fields(QGF(), chunk=2, backup=3, hidden=(8,), batch=16)
KNOWN = QGF(
    Windows(backup=1),
    flow=formula(FlowPolicy(), lambda p, s, x, t: p["drift"] - p["pull"] * x + 0 * t),
    critic=formula(Critic(agg="min"), lambda p, s, a: linear_heads(p["bias"], p["slope"], a.sum(axis=-1))),
    value=formula(Value(), lambda p, s: p["v"] + s[..., 0]),
)
"""QGF with v(s, x, t) = drift - pull x, Q_j(s, a) = b_j + c_j (sum of the chunk) and V(s) = v + s."""


def made(size=1, **fields) -> QGF:
    """Returns `KNOWN` for chunks of a size, with these fields, its parts' too."""
    return with_fields(KNOWN, **{"chunk": size, "backup": size} | fields)


def known(bias=(0.0, 0.0), slope=(0.0, 0.0), v=0.0, target=None, target_slope=(0.0, 0.0), optimizer=None):
    """Returns the state of `KNOWN` with these parameters; the slow critic has biases `target` if they are given."""
    params = {
        "flow": {"drift": 0.2, "pull": 1.0},
        "critic": {"bias": np.array(bias), "slope": np.array(slope)},
        "value": {"v": v},
    }
    slow = None if target is None else {"critic": {"bias": np.array(target), "slope": np.array(target_slope)}}
    return state_of(params, slow, optimizer)


def parts(agent, state, batch) -> dict[str, float]:
    """Returns the three losses, of noise 0 at time 1/2."""
    zero = jnp.zeros((len(batch.obs), agent.windows.chunk))
    return metrics_of(agent, state, batch, {"x0": zero, "t": zero[:, :1] + 0.5})


# What is learned


def test_the_critic_learns_the_windows_return_and_the_online_value_after_it():
    agent, state = made(5, discount=0.5), known(bias=(1.0, 2.0), v=3.0, target=(50.0, 60.0))
    batch = batch_of(np.ones((2, 5)), terminated=[False, True], next_obs=[[5.0], [5.0]])
    wanted = np.array([1.9375 + 8 / 32, 1.9375])
    np.testing.assert_allclose(agent.td_target(state, batch), wanted)
    loss = parts(agent, state, batch)["critic/loss"]
    assert loss == pytest.approx(np.mean([(wanted - 1) ** 2, (wanted - 2) ** 2]), rel=1e-6)  # the mean over the heads


@pytest.mark.parametrize(("agg", "q"), [("min", 3.0), ("mean", 4.0)])
def test_the_value_is_drawn_to_the_slow_critics_aggregate(agg, q):
    agent, state = made(agg=agg, expectile=0.9), known((9, 9), v=1.0, target=(3.0, 5.0))
    batch = batch_of([[0.0], [0.0]], obs=[[0.0], [5.0]])  # V = 1 and 6
    wanted = (0.9 * (q - 1) ** 2 + 0.1 * (q - 6) ** 2) / 2
    assert parts(agent, state, batch)["value/loss"] == pytest.approx(wanted)


@pytest.mark.parametrize(("head", "bias", "slope"), [("mse", 0, 1), ("bce", -30, 60)])
def test_the_expectile_of_zero_and_one_is_the_level_itself(head, bias, slope):
    agent, state = made(expectile=0.9, head=head), known((bias, bias), (slope, slope))
    batch = batch_of([[0.0], [0.0]], actions=[[[0.0]], [[1.0]]])
    zero = {"x0": jnp.zeros((2, 1)), "t": jnp.zeros((2, 1))}
    loss = lambda value: agent.loss(state.params | {"value": value}, state, batch, zero)[1]["value/loss"]  # noqa: E731
    value = fitted(loss, state.params["value"])
    assert float(value_of(value["v"], head)) == pytest.approx(0.9, abs=0.005)


def test_probabilities_have_targets_that_are_probabilities():
    agent, state = made(head="bce", discount=0.5), known(bias=(0.3, -2.0))
    batch = batch_of([[0.25], [0.9], [-0.6]])
    wanted = np.array([0.5, 1.0, 0.0])
    np.testing.assert_allclose(agent.td_target(state, batch), wanted, atol=1e-6)
    p = 1 / (1 + np.exp([[-0.3], [2.0]]))
    entropy = -(wanted[None] * np.log(p) + (1 - wanted[None]) * np.log(1 - p))
    assert parts(agent, state, batch)["critic/loss"] == pytest.approx(entropy.mean(), rel=1e-5)


ENDS = {  # whole, terminated after one step, truncated after one
    "rewards": [[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]],
    "valid": [[1, 1], [1, 0], [1, 0]],
    "terminated": [False, True, False],
}


@pytest.mark.parametrize(("cut", "weight"), [("keep", [1, 1, 0]), ("drop", [1, 0, 0])])
def test_windows_that_are_cut_short_train_critic_and_value_only_if_termination_cut_them(cut, weight):
    agent = made(2, cut=cut, discount=0.5, expectile=0.5)
    found = parts(agent, known(v=4.0), batch_of(**ENDS))
    wanted = np.array([1.5 + 1, 1, 1 + 2])
    assert found["critic/loss"] == pytest.approx((wanted**2 * weight).sum() / 3)
    assert found["value/loss"] == pytest.approx(0.5 * 16 * sum(weight) / 3)


@pytest.mark.parametrize("mask_actor", [True, False])
def test_the_flow_learns_what_happened_and_the_rest_only_if_asked(mask_actor):
    agent, state = made(2, backup=3, mask_actor=mask_actor), known()
    batch = batch_of(np.zeros((1, 3)), valid=[[1, 0, 0]], actions=[[[0.5], [-0.4], [9.0]]])
    x0, t = jnp.array([[0.3, -1.0]]), jnp.array([[0.25]])
    x1 = np.array([[0.5, -0.4]])
    error = np.square(0.2 - (0.75 * np.asarray(x0) + 0.25 * x1) - (x1 - np.asarray(x0)))[0]
    found = metrics_of(agent, state, batch, {"x0": x0, "t": t})["actor/flow_loss"]
    assert found == pytest.approx((error[0] + (0 if mask_actor else error[1])) / 2, rel=1e-5)


def test_times_are_drawn_evenly_from_the_samplers_grid_and_its_end():
    agent = made(2, steps=4)
    draws = agent.draw(WIDE, batch_of(np.zeros((5000, 2))), KEY)
    times, counts = np.unique(draws["t"], return_counts=True)
    np.testing.assert_allclose(times, [0, 0.25, 0.5, 0.75, 1])
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(800)
    assert draws["x0"].shape == (5000, 4) and abs(float(draws["x0"].std()) - 1) < 0.02
    assert abs(np.corrcoef(draws["x0"][:, 0], draws["t"][:, 0])[0, 1]) < 0.06


# An update


def test_the_value_learns_from_the_target_of_before_the_update_and_the_target_from_the_critic_of_before():
    agent = made(flow_adam=Adam(0.0), critic_adam=Adam(0.5), value_adam=Adam(0.1), tau=1.0)
    state = known(bias=(-5.0, -6.0), v=1.0, target=(5.0, 6.0), optimizer=agent.optimizer())
    after, _ = jax.jit(agent.update)(state, batch_of([[100.0]]), KEY)
    np.testing.assert_array_equal(after.target["critic"]["bias"], [-5, -6])
    np.testing.assert_allclose(after.params["critic"]["bias"], [-4.5, -5.5], rtol=1e-5)
    assert float(after.params["value"]["v"]) == pytest.approx(1.1, rel=1e-5)  # up to 5, not down to -5 or -4.5
    assert same(after.params["flow"], state.params["flow"])


@pytest.mark.parametrize("name", ["flow", "critic", "value"])
def test_each_network_has_a_rate_and_a_loss_of_its_own(name):
    agent = dataclasses.replace(with_fields(TINY, lr=0.0), **{f"{name}_adam": Adam(0.01)})
    state = jax.jit(agent.init, static_argnums=1)(KEY, WIDE)
    after, metrics = jax.jit(agent.update)(state, random_batch(0), KEY)
    moved = {net for net in state.params if not same(state.params[net], after.params[net])}
    assert moved == {name}
    assert set(metrics) == {"actor/flow_loss", "critic/loss", "value/loss"}


def test_no_loss_reaches_another_network():
    state, batch = jax.jit(TINY.init, static_argnums=1)(KEY, WIDE), random_batch(0)

    slopes = slopes_of(TINY, state, batch, TINY.draw(WIDE, batch, KEY))
    own = {"actor/flow_loss": "flow", "critic/loss": "critic", "value/loss": "value"}
    assert {name: reached(each) for name, each in slopes.items()} == {name: {net} for name, net in own.items()}


# Acting


def acted(agent, state, count=6):
    noise = np.asarray(jax.random.normal(KEY, (count, agent.num_samples, agent.windows.chunk)))
    return np.asarray(agent.act(state, jnp.zeros((count, 1)), KEY))[..., 0], noise


def test_guidance_climbs_the_lowest_head_of_the_slow_critic():
    state = known(slope=(50, 50), target=(0.0, 0.1), target_slope=(1.0, 3.0))  # heads cross at -0.05
    agent = made(steps=1, guide=QGuidance(0.05))
    action, _ = acted(agent, state)  # one step lands on 0.2: the first head is the lower one
    np.testing.assert_allclose(action, np.full((6, 1), 0.25), atol=1e-6)
    lower = dataclasses.replace(state, params=state.params | {"flow": {"drift": jnp.array(-0.2), "pull": jnp.ones(())}})
    np.testing.assert_allclose(acted(agent, lower)[0], np.full((6, 1), -0.05), atol=1e-6)
    mean = with_fields(agent, agg="mean")
    np.testing.assert_allclose(acted(mean, state)[0], np.full((6, 1), 0.3), atol=1e-6)


def test_of_several_guided_samples_the_one_that_the_slow_critic_likes_is_taken():
    state = known(slope=(-9, -9), target=(0.0, 0.0), target_slope=(1.0, -3.0))  # the lower head is highest at zero
    agent = made(2, steps=2, num_samples=8, guide=QGuidance(0.1))
    action, noise = acted(agent, state)
    alone = dataclasses.replace(agent, num_samples=1)
    guided = np.stack(
        [alone.choose(state, jnp.zeros((6, 1)), jnp.asarray(noise[:, i : i + 1])) for i in range(8)], axis=1
    )
    scores = np.minimum(guided.sum(axis=-1), -3 * guided.sum(axis=-1))
    np.testing.assert_allclose(action, guided[np.arange(6), scores.argmax(axis=1)], atol=1e-6)
    assert len(set(scores.argmax(axis=1))) > 1


# Two modes


def bandit_data() -> rings.Ring:
    """Returns 1000 episodes of the bandit, half on top of each bump, so that values rise from one to the other."""
    rng = np.random.default_rng(0)
    actions = np.repeat(rng.choice(BUMPS, 1000) + rng.uniform(-0.05, 0.05, 1000), 2)[:, None].astype(np.float32)
    data = Dataset(np.ones((2000, 1), np.float32), actions, np.arange(2000) % 2 == 1)
    rewards, terminated = Bandit().relabel(data.observations, data.actions, data.observations)
    return from_dataset(data, np.asarray(rewards), np.asarray(terminated))


PLAYER = QGF(
    Windows(backup=1, batch=128),
    flow=FlowPolicy(Net((32, 32), norm="before_but_last"), "sinusoidal", 16),
    critic=Critic(Net((32, 32)), agg="min", tau=0.02),
    value=Value(Net((32, 32))),
    flow_adam=Adam(3e-3),
    critic_adam=Adam(3e-3),
    value_adam=Adam(3e-3),
)
OBS = jnp.ones((500, 1))


@functools.cache
def player():
    """Returns the agent's state after learning from the bandit's data."""
    agent, data = on_device(PLAYER), bandit_data()

    @jax.jit
    def train(agent, data):
        def step(state, key):
            key_batch, key_step = jax.random.split(key)
            return agent.update(state, agent.sample((data,), key_batch), key_step)[0], None

        return jax.lax.scan(step, agent.init(KEY, Bandit().spec), jax.random.split(KEY, 1000))[0]

    return train(agent, data)


def weighed(weight, **fields) -> QGF:
    return dataclasses.replace(PLAYER, guide=QGuidance(weight, **fields))


@pytest.mark.parametrize("gradient", ["one_step", "jacobian"])
def test_the_better_mode_is_taken_the_more_often_the_higher_the_weight(gradient):
    weights = jnp.array([0.0, 0.1, 0.3, 1.0, 2.0])
    traces = []

    @jax.jit
    def played(state, weights):
        def play(weight):
            traces.append(weight)
            return weighed(weight, gradient=gradient).act(state, OBS, KEY)

        return jax.vmap(play)(weights)

    actions = np.asarray(played(player(), weights))[..., 0, 0]
    assert len(traces) == 1
    lesser, higher = ((np.abs(actions - bump) < 0.3).mean(axis=1) for bump in BUMPS)
    assert min(lesser[0], higher[0]) > 0.4 and lesser[0] + higher[0] > 0.9  # the data's own
    assert (np.diff((actions > 0).mean(axis=1)) > 0).all() and (np.diff(lesser) < 0).all()
    assert higher[-1] > higher[0] + 0.2 and lesser[-1] < lesser[0] - 0.2  # measured: 0.3 and -0.3


def test_no_weight_is_the_behaviour_flow_bit_for_bit():
    state = player()
    noise = jax.random.normal(KEY, (500, 1, 1))

    @jax.jit
    def plain(state):
        return PLAYER.flow.sample(state.params["flow"], OBS[:, None], noise)

    act = jax.jit(lambda state, weight: weighed(weight).act(state, OBS, KEY))
    np.testing.assert_array_equal(act(state, 0.0), plain(state))
    assert np.abs(act(state, 1.0) - plain(state)).max() > 0.1

    np.testing.assert_array_equal(act(state, 0.0), jax.jit(BC(PLAYER.windows, PLAYER.flow).act)(state, OBS, KEY))


# Refusals


@pytest.mark.parametrize(
    ("agent", "message"),
    [
        (QGF(Windows(6, 5)), "QGF.windows.backup = 5: must be at least 6"),
        (QGF(flow=FlowPolicy(Net((8, 0)))), "QGF.flow.net.hidden = (8, 0): must be at least 1"),
        (QGF(critic=Critic(Net((0,)))), "QGF.critic.net.hidden = (0,): must be at least 1"),
        (QGF(value=Value(Net((0,)))), "QGF.value.net.hidden = (0,): must be at least 1"),
        (QGF(value=Value(head="bce")), "QGF.value.head = 'bce': must be that of the critic, 'mse'"),
        (QGF(flow=FlowPolicy(time="sinusoidal", time_size=1)), "QGF.flow.time_size = 1: must be at least 2"),
        (QGF(flow=FlowPolicy(steps=0)), "QGF.flow.steps = 0: must be at least 1"),
        (QGF(num_samples=0), "QGF.num_samples = 0: must be at least 1"),
        (QGF(flow_adam=Adam(-1.0)), "QGF.flow_adam.lr = -1.0: must be at least 0"),
        (QGF(critic_adam=Adam(-1.0)), "QGF.critic_adam.lr = -1.0: must be at least 0"),
        (QGF(value_adam=Adam(-1.0)), "QGF.value_adam.lr = -1.0: must be at least 0"),
        (QGF(expectile=1.1), "QGF.expectile = 1.1: must be in [0, 1]"),
        (QGF(guide=QGuidance(weight=-1.0)), "QGF.guide.weight = -1.0: must be at least 0"),
        (QGF(guide=QGuidance(ascent_steps=-1)), "QGF.guide.ascent_steps = -1: must be at least 0"),
        (QGF(guide=QGuidance(ascent_size=-0.1)), "QGF.guide.ascent_size = -0.1: must be at least 0"),
    ],
)
def test_values_out_of_range_are_refused_by_name(agent, message):
    with pytest.raises(UserError, match=re.escape(message)):
        ranges.check(agent)
