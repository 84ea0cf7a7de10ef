"""Facts about jaxrl.agents.famo2o, with networks that are formulas, so that every number is known by hand."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from jaxrl import ranges
from jaxrl.agents.famo2o import FamO2O, features
from jaxrl.agents.iql import IQL
from jaxrl.agents.parts import Adam, Critic, GaussianPolicy, Net, Transitions, Value
from jaxrl.errors import UserError
from jaxrl.types import Phase
from tests.known import (
    KEY,
    NARROW,
    Descent,
    batch_of,
    formula,
    gradient_of,
    jitted,
    linear_heads,
    metrics_of,
    pull_of,
    same,
    state_of,
    with_fields,
)

pytestmark = pytest.mark.usefixtures("quick")

ONLINE = Phase("online", epochs=1, iterations=1, collects=True, updates=1)


def gaussian(p, x):
    """Returns a mean m + l x and the logarithm w of the standard deviation."""
    return p["mean"] + p["lean"] * x, jnp.broadcast_to(p["width"], x.shape)


POLICY = GaussianPolicy(std="learned")
CRITIC = formula(
    Critic(agg="min"), lambda p, s, a: linear_heads(p["bias"], p["slope"], a.sum(axis=-1)) + s[None, ..., 0]
)
VALUE = formula(Value(), lambda p, s: p["v"] + s[..., 0])
KNOWN = FamO2O(
    family=formula(POLICY, lambda p, s, seen: gaussian(p, seen[..., :1]), "moments"),
    balance=formula(POLICY, gaussian, "moments"),
    critic=CRITIC,
    value=VALUE,
)
"""FamO2O with Q_j(s, a) = b_j + c_j a + s, V(s) = v + s and Gaussians of width exp(w).

The choice's mean is m + l s, the family's is m + l sin(b), both before they are squashed.
"""


def known(
    bias=(0.0, 0.0),
    slope=(0.0, 0.0),
    target=None,
    v=0.0,
    entropy=0.0,
    balance=(0.0,) * 3,
    family=(0.0,) * 3,
    optimizer=None,
):
    """Returns the state of `KNOWN` with these parameters; Gaussians' are m, l and w, `target` a bias and a slope."""
    policy = lambda values: dict(zip(("mean", "lean", "width"), values, strict=True))  # noqa: E731
    critic, slow = ({"bias": np.array(x), "slope": np.array(y)} for x, y in ((bias, slope), target or (bias, slope)))
    params = {
        "family": policy(family),
        "balance": policy(balance),
        "entropy": entropy,
        "critic": critic,
        "value": {"v": v},
    }
    return state_of(params, {"critic": slow}, dict.fromkeys(params, optimizer or optax.adam(0.0)))


def drawn(count=3, **named):
    """Returns random numbers of an update that are all zero, unless given."""
    names = ("choice", "action", "uniform", "online")
    return {name: np.reshape(np.float32(named.get(name, np.zeros(count))), (count, 1)) for name in names}


def log_density(x, mean, width):
    """Returns the log density of x = tanh(u), u a Gaussian of this mean and exp(width), in float64."""
    return scipy.stats.norm.logpdf(np.arctanh(x), mean, np.exp(width)) - np.log(1 - x**2)


ACTIONS = np.array([0.9, -0.2, 0.4])
OBS = np.array([1.0, -2.0, 0.5])
BATCH = batch_of(np.zeros((3, 1)), actions=ACTIONS[:, None, None], obs=OBS[:, None])

# The balance as the family sees it


def test_a_balance_is_seen_through_sines_and_cosines_of_falling_frequency():
    np.testing.assert_array_equal(features(jnp.zeros((1, 1))), [[0, 1, 0, 1, 0, 1]])
    b = np.array([8.0, 11.0, 14.0])
    wanted = [[f(x / 10_000 ** (i / 3)) for i in range(3) for f in (math.sin, math.cos)] for x in b]
    np.testing.assert_allclose(features(jnp.asarray(b, jnp.float32)[:, None]), wanted, atol=1e-6)


def test_the_range_is_reached_at_both_ends():
    np.testing.assert_allclose(FamO2O().scaled(jnp.array([-1.0, 0.0, 1.0])), [8, 11, 14], rtol=1e-6)
    np.testing.assert_allclose(FamO2O(lowest=3.0, highest=3.0).scaled(jnp.array([-1.0, 0.3])), [3, 3], rtol=1e-6)


def test_the_family_sees_the_state_and_then_the_balance():
    agent, obs, b = with_fields(FamO2O(), hidden=()), jnp.array([[0.3, -0.7]]), jnp.array([[2.0]])
    shapes = agent.family.init(KEY, obs[0], jnp.zeros(1), jnp.zeros(6))

    def member(which):  # whose mean is any one of its inputs
        choose = lambda x: jnp.eye(8)[:, [which]] if x.ndim == 2 else jnp.zeros(x.shape)  # noqa: E731
        return float(agent.member(jax.tree.map(choose, shapes), obs, b)[0][0, 0])

    wanted = np.tanh([0.3, -0.7, math.sin(2), math.cos(2)])
    np.testing.assert_allclose([member(which) for which in range(4)], wanted, rtol=1e-6)


# The choice

CHOICE = {"choice": [0.5, -1.0, 0.2], "action": [1.0, 0.0, -2.0]}
MIXED = {
    "bias": (7.0, 7.0),  # of the fast critics, which nothing but their own loss asks
    "target": ((1.0, 1.5), (1.0, -1.0)),
    "entropy": math.log(0.3),
    "balance": (0.2, 0.1, -0.5),
    "family": (0.1, 0.8, -1.0),
}


def balance_loss_by_hand(mean, width=-0.5):
    """Returns the loss of the choice with MIXED and CHOICE, but for its own parameters."""
    mean = mean + 0.1 * OBS
    x = np.tanh(mean + np.exp(width) * np.array(CHOICE["choice"]))
    b = 8 + (x + 1) / 2 * 6
    a = np.tanh(0.1 + 0.8 * np.sin(b)) + np.exp(-1.0) * np.array(CHOICE["action"])
    low = np.minimum(1 + a, 1.5 - a) + OBS
    return (0.3 * log_density(x, mean, width) - low).mean()


def balance_slopes_by_hand():
    """Returns the slopes of that loss on the mean and the width, as finite differences."""
    slope = lambda f: (f(1e-6) - f(-1e-6)) / 2e-6  # noqa: E731
    return {
        "mean": slope(lambda d: balance_loss_by_hand(0.2 + d)),
        "width": slope(lambda d: balance_loss_by_hand(0.2, width=-0.5 + d)),
    }


def choice_loss(state, **noise):
    """Returns the loss of the choice, and by network its gradient and that of the loss of its entropy's weight."""
    arguments = (KNOWN, state.params, state, BATCH, drawn(**noise))
    metrics = jitted(FamO2O.choice_loss)(*arguments)[1]
    return float(metrics["balance/loss"]), gradient_of(FamO2O.choice_loss)(*arguments)


def test_the_choice_climbs_the_slow_critic_through_the_family_and_keeps_its_entropy():
    loss, pull = choice_loss(known(**MIXED), **CHOICE)
    assert loss == pytest.approx(balance_loss_by_hand(0.2), rel=1e-5)
    for name, slope in balance_slopes_by_hand().items():
        assert float(pull["balance"][name]) == pytest.approx(slope, rel=1e-3) and abs(slope) > 0.05


def test_where_the_critic_does_not_mind_the_action_the_choice_minds_its_entropy_alone():
    flat = known(**(MIXED | {"target": ((1.0, 1.5), (0.0, 0.0))}))
    noise = drawn(**CHOICE)["choice"]
    density = lambda balance: KNOWN.balance.squashed(balance, BATCH.obs, noise)[1].mean()  # noqa: E731
    entropy_alone, (_, pull) = jax.jit(jax.grad(density))(flat.params["balance"]), choice_loss(flat, **CHOICE)
    for name, slope in entropy_alone.items():
        assert float(pull["balance"][name]) == pytest.approx(0.3 * float(slope), rel=1e-4) and slope != 0


def test_the_entropys_weight_rises_where_the_choices_entropy_is_below_minus_one_half():
    def pull(width):
        slope = float(choice_loss(known(balance=(0.0, 0.0, width), entropy=0.7))[1]["entropy"])
        entropy = -log_density(0.0, 0.0, width)
        assert slope == pytest.approx(math.exp(0.7) * (entropy + 0.5), rel=1e-4, abs=1e-5)
        return slope

    at_peace = -0.5 - 0.5 * math.log(2 * math.pi)
    assert pull(at_peace - 0.5) < -0.5 < pull(at_peace) < 0.5 < pull(at_peace + 0.5)  # descent of it raises the weight


# The family


def online(state):
    return KNOWN.enter(state, ONLINE)


UNIFORM = {"uniform": [-1.0, 0.0, 1.0], "online": [0.5, -1.0, 0.2]}


def test_the_family_is_trained_on_the_whole_range_and_online_on_what_is_chosen():
    state, draws = known(**MIXED), drawn(**UNIFORM)
    np.testing.assert_allclose(KNOWN.trained_balance(state, BATCH, draws)[:, 0], [8, 11, 14], rtol=1e-6)
    x = np.tanh(0.2 + 0.1 * OBS + math.exp(-0.5) * np.array(UNIFORM["online"]))
    found = KNOWN.trained_balance(online(state), BATCH, draws)
    np.testing.assert_allclose(found[:, 0], 8 + (x + 1) / 2 * 6, rtol=1e-5)


def test_training_the_family_is_no_way_to_change_the_choice():
    agent, state = with_fields(KNOWN, lr=0.01), online(known(**MIXED))
    one, other = (learned(agent, state, **CHOICE, online=noise)[0].params for noise in (np.zeros(3), np.ones(3)))
    assert same(one["balance"], other["balance"]) and not same(one["family"], other["family"])


def test_going_online_twice_is_going_online_once():
    state = known(**MIXED)
    once = online(state)
    assert once.online and not state.online and same(online(once), once)
    assert same(dataclasses.replace(once, online=False), state)


def family_loss(agent, state, **noise):
    """Returns the family's loss, its metrics and its gradient by network."""
    arguments = (agent, state.params, state, BATCH, drawn(**noise))
    return *jitted(FamO2O.family_loss)(*arguments), gradient_of(FamO2O.family_loss)(*arguments)


def test_each_balance_weighs_the_advantage_and_tells_the_policy_of_itself():
    state = known(**(MIXED | {"target": ((0.1, 0.2), (0.1, -0.1))}), v=0.05)
    loss, metrics, _ = family_loss(KNOWN, state, **UNIFORM)
    b = np.array([8.0, 11.0, 14.0])
    weights = np.exp(b * (np.minimum(0.1 + 0.1 * ACTIONS, 0.2 - 0.1 * ACTIONS) - 0.05))
    density = scipy.stats.norm.logpdf(ACTIONS, np.tanh(0.1 + 0.8 * np.sin(b)), np.exp(-1.0))
    assert float(loss) == pytest.approx(-np.mean(weights * density), rel=1e-4)
    assert float(metrics["actor/weight"]) == pytest.approx(weights.mean(), rel=1e-4)


def test_weights_are_bounded_and_stay_finite():
    state = known(target=((500.0, 500.0), (0.0, 0.0)))
    loss, metrics, pull = family_loss(KNOWN, state, **UNIFORM)
    assert float(metrics["actor/weight"]) == 100 and np.isfinite(loss)
    assert float(pull["family"]["mean"]) == pytest.approx(-100 * ACTIONS.mean(), rel=1e-5)
    assert float(family_loss(with_fields(KNOWN, max_weight=7.0), state, **UNIFORM)[1]["actor/weight"]) == 7


PLAIN = IQL(
    actor=formula(POLICY, lambda p, s: (jnp.tanh(p["mean"] + 0 * s), jnp.broadcast_to(p["width"], s.shape)), "moments"),
    critic=CRITIC,
    value=VALUE,
    advantage_of="target",
)
"""Implicit Q-learning with the networks of `KNOWN`, whose policy knows of no balance."""


@pytest.mark.parametrize("phase", ["offline", "online"])
@pytest.mark.parametrize("beta", [3.0, 10.0])
def test_a_family_of_one_balance_is_imitation_as_in_implicit_q_learning(beta, phase):
    target, family = ((0.1, 0.2), (0.5, -0.5)), (0.3, 0.0, -0.8)
    state = known(target=target, v=-0.05, family=family, balance=(0.3, 0.2, -1.0))
    state = online(state) if phase == "online" else state
    loss, metrics, pull = family_loss(with_fields(KNOWN, lowest=beta, highest=beta), state, **UNIFORM)

    plain = with_fields(PLAIN, alpha=beta)
    params = {name: state.params[name] for name in ("critic", "value")} | {"actor": state.params["family"]}
    other = state_of(params, state.target)
    wanted = metrics_of(plain, other, BATCH, {})["actor/bc_loss"]
    assert float(loss) == pytest.approx(wanted, rel=1e-5) and abs(float(metrics["actor/weight"]) - 1) > 0.01
    slope = pull_of(plain, other, BATCH, {})["actor"]
    for name in ("mean", "width"):
        assert float(pull["family"][name]) == pytest.approx(float(slope[name]), rel=1e-5) and slope[name] != 0


# The critics


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_the_value_is_drawn_to_the_slow_critic_more_from_below_than_from_above(level):
    agent, batch = with_fields(KNOWN, expectile=level), batch_of([[0.0], [0.0]])
    for v, weight in ((1.0, level), (6.0, 1 - level)):
        state = known(bias=(9.0, 9.0), target=((3.0, 4.0), (0.0, 0.0)), v=v)
        loss, _ = jitted(FamO2O.value_loss)(agent, state.params, state, batch, drawn(2))
        assert float(loss) == pytest.approx(weight * (3 - v) ** 2, rel=1e-5)


def test_the_critics_learn_the_reward_and_the_value_after_it_and_nothing_after_the_end():
    state = known(bias=(1.0, 2.0), target=((50.0, 50.0), (0.0, 0.0)), v=3.0)
    batch = batch_of([[2.0], [2.0]], terminated=[False, True], next_obs=[[7.0], [7.0]])
    agent = with_fields(KNOWN, discount=0.9)
    np.testing.assert_allclose(jitted(FamO2O.td_target)(agent, state, batch), [11, 2], rtol=1e-6)
    loss, _ = jitted(FamO2O.critic_loss)(agent, state.params, state, batch, drawn(2))
    assert float(loss) == pytest.approx(((10**2 + 9**2) + (1**2 + 0**2)) / 2)


# An update


def learned(agent, state, batch=BATCH, **noise):
    return jitted(FamO2O.learn)(agent, state, batch, drawn(**noise))


def test_family_and_critics_see_the_new_value_and_the_target_the_new_critics():
    agent = with_fields(KNOWN, lr=0.01, tau=0.25, discount=0.5, lowest=4.0, highest=4.0)
    state = known(bias=(1.0, 2.0), target=((0.3, 0.4), (0.0, 0.0)), v=0.1)
    batch = dataclasses.replace(BATCH, next_obs=jnp.zeros((3, 1)))
    after, metrics = learned(agent, state, batch)
    # Adam's first step is its learning rate long: V rises towards the target's 0.3, at any state
    assert float(after.params["value"]["v"]) == pytest.approx(0.11, rel=1e-5)
    assert float(metrics["actor/weight"]) == pytest.approx(math.exp(4 * (0.3 - 0.11)), rel=1e-5)
    error = np.array([1.0, 2.0])[:, None] + OBS - 0.5 * 0.11
    assert float(metrics["critic/loss"]) == pytest.approx((error**2).sum(axis=0).mean(), rel=1e-5)
    np.testing.assert_allclose(after.params["critic"]["bias"], [0.99, 1.99], rtol=1e-5)
    wanted = 0.75 * np.array([0.3, 0.4]) + 0.25 * np.array([0.99, 1.99])
    np.testing.assert_allclose(after.target["critic"]["bias"], wanted, rtol=1e-5)
    assert int(after.step) == 1


def test_the_choice_and_its_entropys_weight_step_on_each_other_as_they_were():
    agent = with_fields(KNOWN, adam=Descent(0.5))
    after, metrics = learned(agent, known(**MIXED, optimizer=Descent(0.5).transformation()), **CHOICE)
    assert float(metrics["balance/loss"]) == pytest.approx(balance_loss_by_hand(0.2), rel=1e-5)
    steps = balance_slopes_by_hand()
    for name, before in (("mean", 0.2), ("width", -0.5)):
        assert float(after.params["balance"][name]) == pytest.approx(before - 0.5 * steps[name], rel=1e-4)
    mean = 0.2 + 0.1 * OBS
    x = np.tanh(mean + math.exp(-0.5) * np.array(CHOICE["choice"]))
    slope = 0.3 * (0.5 - log_density(x, mean, -0.5).mean())
    assert float(after.params["entropy"]) == pytest.approx(math.log(0.3) - 0.5 * slope, rel=1e-5)


def test_online_the_family_is_trained_on_the_choice_after_its_step():
    agent, state = with_fields(KNOWN, lr=0.5), online(known(**MIXED))
    after, metrics = learned(agent, state, **CHOICE, **UNIFORM)
    moved = dataclasses.replace(state, params=after.params | {"family": state.params["family"]})
    loss, _, _ = family_loss(agent, moved, **CHOICE, **UNIFORM)
    before, _, _ = family_loss(agent, state, **CHOICE, **UNIFORM)
    assert float(metrics["actor/loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert abs(float(loss) - float(before)) > 0.01


def test_every_random_number_of_an_update_is_its_own():
    draws = KNOWN.draw(NARROW, batch_of(np.zeros((2000, 1))), KEY)
    columns = np.concatenate([np.asarray(x) for x in draws.values()], axis=1)
    assert columns.shape == (2000, 4) and np.abs(np.corrcoef(columns, rowvar=False) - np.eye(4)).max() < 0.1
    uniform = np.asarray(draws["uniform"])
    assert uniform.min() == pytest.approx(-1, abs=0.01) and uniform.max() == pytest.approx(1, abs=0.01)
    assert uniform.std() == pytest.approx(3**-0.5, rel=0.05)


# Acting


def test_it_acts_at_the_balance_of_the_choices_mean_by_a_clipped_sample_and_in_evaluation_by_the_mean():
    act, noise = jax.jit(FamO2O.act, static_argnames="greedy"), np.asarray(jax.random.normal(KEY, (50, 1)))
    state, obs = known(**MIXED), jnp.full((50, 1), 3.0)
    mean = math.tanh(0.1 + 0.8 * math.sin(8 + (math.tanh(0.2 + 0.3) + 1) / 2 * 6))
    action = act(KNOWN, state, obs, KEY)[:, 0]
    np.testing.assert_allclose(action, np.clip(mean + math.exp(-1.0) * noise, -1, 1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(act(KNOWN, state, obs, KEY, greedy=True), np.full((50, 1, 1), mean), rtol=1e-5)
    assert same(act(KNOWN, online(state), obs, KEY)[:, 0], action)


# Refusals


@pytest.mark.parametrize(
    ("agent", "message"),
    [
        (FamO2O(family=GaussianPolicy(Net((8, 0)))), "FamO2O.family.net.hidden = (8, 0): must be at least 1"),
        (FamO2O(balance=GaussianPolicy(Net((8, 0)))), "FamO2O.balance.net.hidden = (8, 0): must be at least 1"),
        (FamO2O(critic=Critic(Net((0,)))), "FamO2O.critic.net.hidden = (0,): must be at least 1"),
        (FamO2O(value=Value(Net((0,)))), "FamO2O.value.net.hidden = (0,): must be at least 1"),
        (FamO2O(adam=Adam(-1.0)), "FamO2O.adam.lr = -1.0: must be at least 0"),
        (FamO2O(lowest=-1.0), "FamO2O.lowest = -1.0: must be at least 0"),
        (FamO2O(lowest=9.0, highest=8.0), "FamO2O.highest = 8.0: must be at least 9"),
        (FamO2O(max_weight=-1.0), "FamO2O.max_weight = -1.0: must be at least 0"),
        (FamO2O(Transitions(discount=1.5)), "FamO2O.transitions.discount = 1.5: must be in [0, 1]"),
        (FamO2O(critic=Critic(tau=-0.1)), "FamO2O.critic.tau = -0.1: must be in [0, 1]"),
        (FamO2O(expectile=1.1), "FamO2O.expectile = 1.1: must be in [0, 1]"),
    ],
)
def test_values_out_of_range_are_refused_by_name(agent, message):
    with pytest.raises(UserError, match=re.escape(message)):
        ranges.check(agent)
