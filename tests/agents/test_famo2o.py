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

from jaxrl.agents import common
from jaxrl.agents.famo2o import FamO2O, features
from jaxrl.agents.iql import IQL
from jaxrl.errors import UserError
from jaxrl.types import Spec, pytree
from tests.known import (
    KEY,
    NARROW,
    Formula,
    batch_of,
    gradient_of,
    jitted,
    linear_heads,
    quick_to_compile,
    same,
    state_of,
)


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_to_compile():
        yield


def lines(p, s, a):
    """Returns critics b_j + c_j a + s."""
    return linear_heads(p["bias"], p["slope"], a.sum(axis=-1)) + s[None, ..., 0]


@pytree
class Known(FamO2O):
    """FamO2O with Q_j(s, a) = b_j + c_j a + s, V(s) = v + s and Gaussians of width exp(w).

    The choice's mean is m + l s, the family's is m + l sin(b), both before they are squashed.
    """

    def critic(self):
        return Formula(lines)

    def value(self):
        return Formula(lambda p, s: p["v"] + s[..., 0])

    def balance(self):
        return Formula(lambda p, s: (p["mean"] + p["lean"] * s, jnp.broadcast_to(p["width"], s.shape)))

    def family(self, spec):
        def gaussian(p, x):
            mean = p["mean"] + p["lean"] * x[..., spec.observation : spec.observation + 1]
            return mean, jnp.broadcast_to(p["width"], mean.shape)

        return Formula(gaussian)


def known(bias=(0.0, 0.0), slope=(0.0, 0.0), target=None, v=0.0, entropy=0.0, balance=(0.0,) * 3, family=(0.0,) * 3):
    """Returns the state of `Known` with these parameters; Gaussians' are m, l and w, `target` a bias and a slope."""
    names = ("mean", "lean", "width")
    params = {
        "family": dict(zip(names, family, strict=True)),
        "balance": dict(zip(names, balance, strict=True)),
        "entropy": entropy,
        "critic": {"bias": np.array(bias), "slope": np.array(slope)},
        "value": {"v": v},
    }
    target = (bias, slope) if target is None else target
    slow = {"bias": np.array(target[0]), "slope": np.array(target[1])}
    params, slow = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, slow))
    state = common.start_each(NARROW, params, dict.fromkeys(params, optax.adam(0.0)), "critic")
    return dataclasses.replace(state, target={"critic": slow})


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
    class Seen(Known):
        """A family whose mean is any one of its inputs."""

        def family(self, spec):
            return Formula(lambda which, x: (x[:, which : which + 1], x[:, :1]))

    obs, b = jnp.array([[0.3, -0.7]]), jnp.array([[2.0]])
    found = [float(Seen().member(Spec(2, 1), which, obs, b)[0][0, 0]) for which in range(4)]
    np.testing.assert_allclose(found, np.tanh([0.3, -0.7, math.sin(2), math.cos(2)]), rtol=1e-6)


# The choice

CHOICE = {"choice": [0.5, -1.0, 0.2], "action": [1.0, 0.0, -2.0]}
MIXED = {
    "bias": (7.0, 7.0),  # of the fast critics, which nothing but their own loss asks
    "target": ((1.0, 1.5), (1.0, -1.0)),
    "entropy": math.log(0.3),
    "balance": (0.2, 0.1, -0.5),
    "family": (0.1, 0.8, -1.0),
}


def balance_loss_by_hand(mean, lean=0.1, width=-0.5):
    """Returns the loss of the choice with MIXED and CHOICE, but for its own parameters."""
    mean = mean + lean * OBS
    x = np.tanh(mean + np.exp(width) * np.array(CHOICE["choice"]))
    b = 8 + (x + 1) / 2 * 6
    a = np.tanh(0.1 + 0.8 * np.sin(b)) + np.exp(-1.0) * np.array(CHOICE["action"])
    low = np.minimum(1 + a, 1.5 - a) + OBS
    return (0.3 * log_density(x, mean, width) - low).mean()


def test_the_choice_climbs_the_slow_critic_through_the_family_and_keeps_its_entropy():
    state = known(**MIXED)
    arguments = (Known(), state.params["balance"], state, BATCH, drawn(**CHOICE))
    loss, _ = jitted(Known.balance_loss)(*arguments)
    assert float(loss) == pytest.approx(balance_loss_by_hand(0.2), rel=1e-5)
    pull = gradient_of(Known.balance_loss)(*arguments)
    finite = (balance_loss_by_hand(0.2 + 1e-6) - balance_loss_by_hand(0.2 - 1e-6)) / 2e-6
    assert float(pull["mean"]) == pytest.approx(finite, rel=1e-3) and abs(finite) > 0.05
    finite = (balance_loss_by_hand(0.2, width=-0.5 + 1e-6) - balance_loss_by_hand(0.2, width=-0.5 - 1e-6)) / 2e-6
    assert float(pull["width"]) == pytest.approx(finite, rel=1e-3) and abs(finite) > 0.05


def test_where_the_critic_does_not_mind_the_action_the_choice_minds_its_entropy_alone():
    flat = known(**(MIXED | {"target": ((1.0, 1.5), (0.0, 0.0))}))
    agent, draws = Known(), drawn(**CHOICE)
    pull = gradient_of(Known.balance_loss)(agent, flat.params["balance"], flat, BATCH, draws)

    @jax.jit
    def entropy_alone(balance):
        density = lambda balance: agent.chosen(balance, BATCH.obs, draws["choice"])[1].mean()  # noqa: E731
        return jax.grad(density)(balance)

    for name, slope in entropy_alone(flat.params["balance"]).items():
        assert float(pull[name]) == pytest.approx(0.3 * float(slope), rel=1e-4) and slope != 0


def test_the_entropys_weight_rises_where_the_choices_entropy_is_below_minus_one_half():
    agent, log = Known(), jnp.asarray(0.7)

    def pull(width):
        state = known(balance=(0.0, 0.0, width), entropy=0.7)
        slope = gradient_of(Known.entropy_loss)(agent, log, state, BATCH, drawn())
        entropy = -log_density(0.0, 0.0, width)
        assert float(slope) == pytest.approx(math.exp(0.7) * (entropy + 0.5), rel=1e-4, abs=1e-5)
        return float(slope)

    at_peace = -0.5 - 0.5 * math.log(2 * math.pi)
    assert pull(at_peace - 0.5) < -0.5 < pull(at_peace) < 0.5 < pull(at_peace + 0.5)  # descent of it raises the weight


# The family


def online(state):
    return Known().start_online(state)


UNIFORM = {"uniform": [-1.0, 0.0, 1.0], "online": [0.5, -1.0, 0.2]}


def test_the_family_is_trained_on_the_whole_range_and_online_on_what_is_chosen():
    state, draws = known(**MIXED), drawn(**UNIFORM)
    np.testing.assert_allclose(Known().trained_balance(state, BATCH, draws)[:, 0], [8, 11, 14], rtol=1e-6)
    x = np.tanh(0.2 + 0.1 * OBS + math.exp(-0.5) * np.array(UNIFORM["online"]))
    found = Known().trained_balance(online(state), BATCH, draws)
    np.testing.assert_allclose(found[:, 0], 8 + (x + 1) / 2 * 6, rtol=1e-5)


def test_training_the_family_is_no_way_to_change_the_choice():
    @jax.jit
    def pull(state, draws):
        def loss(balance):
            there = dataclasses.replace(state, params=state.params | {"balance": balance})
            return Known().family_loss(state.params["family"], there, BATCH, draws)[0]

        return jax.grad(loss)(state.params["balance"])

    assert all(float(leaf) == 0 for leaf in pull(online(known(**MIXED)), drawn(**UNIFORM)).values())


def test_going_online_twice_is_going_online_once():
    state = known(**MIXED)
    once = online(state)
    assert once.online and not state.online and same(online(once), once)
    assert same((once.params, once.target, once.opt, once.step), (state.params, state.target, state.opt, state.step))


def family_loss(agent, state, batch=BATCH, **noise):
    """Returns the family's loss, its metrics and its gradient."""
    arguments = (agent, state.params["family"], state, batch, drawn(**noise))
    return *jitted(Known.family_loss)(*arguments), gradient_of(Known.family_loss)(*arguments)


def test_each_balance_weighs_the_advantage_and_tells_the_policy_of_itself():
    state = known(**(MIXED | {"target": ((0.1, 0.2), (0.1, -0.1))}), v=0.05)
    loss, metrics, _ = family_loss(Known(), state, **UNIFORM)
    b = np.array([8.0, 11.0, 14.0])
    weights = np.exp(b * (np.minimum(0.1 + 0.1 * ACTIONS, 0.2 - 0.1 * ACTIONS) - 0.05))
    density = scipy.stats.norm.logpdf(ACTIONS, np.tanh(0.1 + 0.8 * np.sin(b)), np.exp(-1.0))
    assert float(loss) == pytest.approx(-np.mean(weights * density), rel=1e-4)
    assert float(metrics["actor/weight"]) == pytest.approx(weights.mean(), rel=1e-4)


def test_weights_are_bounded_and_stay_finite():
    state = known(target=((500.0, 500.0), (0.0, 0.0)))
    loss, metrics, pull = family_loss(Known(), state, **UNIFORM)
    assert float(metrics["actor/weight"]) == 100 and np.isfinite(loss)
    assert float(pull["mean"]) == pytest.approx(-100 * ACTIONS.mean(), rel=1e-5)
    assert float(family_loss(Known(max_weight=7.0), state, **UNIFORM)[1]["actor/weight"]) == 7


@pytree
class Plain(IQL):
    """Implicit Q-learning with the networks of `Known`, whose policy knows of no balance."""

    def critic(self):
        return Formula(lines)

    def value(self):
        return Formula(lambda p, s: p["v"] + s[..., 0])

    def actor(self, spec):
        return Formula(lambda p, s: (jnp.tanh(p["mean"] + 0 * s), jnp.broadcast_to(p["width"], s.shape)))


@pytest.mark.parametrize("phase", ["offline", "online"])
@pytest.mark.parametrize("beta", [3.0, 10.0])
def test_a_family_of_one_balance_is_imitation_as_in_implicit_q_learning(beta, phase):
    target, family = ((0.1, 0.2), (0.5, -0.5)), (0.3, 0.0, -0.8)
    state = known(target=target, v=-0.05, family=family, balance=(0.3, 0.2, -1.0))
    agent = Known(lowest=beta, highest=beta)
    state = online(state) if phase == "online" else state
    loss, metrics, pull = family_loss(agent, state, **UNIFORM)

    params = {name: state.params[name] for name in ("critic", "value")} | {"actor": state.params["family"]}
    plain = Plain(alpha=beta, unit_width=False, advantage_of="target")
    other = state_of(params, state.target["critic"])

    def imitation(agent, actor, state):
        return agent.actor_losses(actor, state, BATCH, jnp.zeros((3, 1)))[0]

    wanted, slope = jax.jit(jax.value_and_grad(imitation, argnums=1))(plain, params["actor"], other)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5) and abs(float(metrics["actor/weight"]) - 1) > 0.01
    for name in ("mean", "width"):
        assert float(pull[name]) == pytest.approx(float(slope[name]), rel=1e-5) and slope[name] != 0


# The critics


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_the_value_is_drawn_to_the_slow_critic_more_from_below_than_from_above(level):
    state = known(bias=(9.0, 9.0), target=((3.0, 4.0), (0.0, 0.0)), v=1.0)
    batch = batch_of([[0.0], [0.0]], obs=[[0.0], [0.0]], actions=[[[0.0]], [[0.0]]])
    for v, weight in ((1.0, level), (6.0, 1 - level)):
        value = {"v": jnp.asarray(v)}
        loss, _ = jitted(Known.value_loss)(Known(expectile=level), value, state, batch, drawn(2))
        assert float(loss) == pytest.approx(weight * (3 - v) ** 2, rel=1e-5)


def test_the_critics_learn_the_reward_and_the_value_after_it_and_nothing_after_the_end():
    state = known(bias=(1.0, 2.0), target=((50.0, 50.0), (0.0, 0.0)), v=3.0)
    batch = batch_of([[2.0], [2.0]], terminated=[False, True], next_obs=[[7.0], [7.0]])
    agent = Known(discount=0.9)
    np.testing.assert_allclose(jitted(Known.td_target)(agent, state, batch), [11, 2], rtol=1e-6)
    loss, _ = jitted(Known.critic_loss)(agent, state.params["critic"], state, batch, drawn(2))
    assert float(loss) == pytest.approx(((10**2 + 9**2) + (1**2 + 0**2)) / 2)


# An update


def learned(agent, state, batch=BATCH, **noise):
    return jitted(Known.learn)(agent, state, batch, drawn(**noise))


def test_family_and_critics_see_the_new_value_and_the_target_the_new_critics():
    agent = Known(lr=0.01, tau=0.25, discount=0.5, lowest=4.0, highest=4.0)
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
    agent, state = Known(lr=0.5), known(**MIXED)
    after, metrics = learned(agent, state, **CHOICE)
    assert float(metrics["balance/loss"]) == pytest.approx(balance_loss_by_hand(0.2), rel=1e-5)
    mean = 0.2 + 0.1 * OBS
    x = np.tanh(mean + math.exp(-0.5) * np.array(CHOICE["choice"]))
    slope = 0.3 * (0.5 - log_density(x, mean, -0.5).mean())
    momentum = after.opt["entropy"][0].mu  # a tenth of the first gradient
    assert float(momentum) == pytest.approx(0.1 * slope, rel=1e-4)


def test_online_the_family_is_trained_on_the_choice_after_its_step():
    agent = Known(lr=0.5)
    state = online(known(**MIXED))
    after, metrics = learned(agent, state, **CHOICE, **UNIFORM)
    moved = dataclasses.replace(state, params=after.params | {"family": state.params["family"]})
    loss, _, _ = family_loss(agent, moved, **CHOICE, **UNIFORM)
    before, _, _ = family_loss(agent, state, **CHOICE, **UNIFORM)
    assert float(metrics["actor/loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert abs(float(loss) - float(before)) > 0.01


def test_steps_that_did_not_happen_teach_nothing():
    nothing = dataclasses.replace(BATCH, valid=jnp.zeros((3, 1)))
    state = known(**MIXED, v=0.3)
    assert same(learned(Known(), state, nothing, **CHOICE, **UNIFORM)[0].params, state.params)


def test_every_random_number_of_an_update_is_its_own():
    draws = Known().draw(NARROW, batch_of(np.zeros((2000, 1))), KEY)
    columns = np.concatenate([np.asarray(x) for x in draws.values()], axis=1)
    assert columns.shape == (2000, 4) and np.abs(np.corrcoef(columns, rowvar=False) - np.eye(4)).max() < 0.1
    uniform = np.asarray(draws["uniform"])
    assert uniform.min() == pytest.approx(-1, abs=0.01) and uniform.max() == pytest.approx(1, abs=0.01)
    assert uniform.std() == pytest.approx(3**-0.5, rel=0.05)


# Acting


def test_it_acts_at_the_balance_of_the_choices_mean_by_a_clipped_sample_and_in_evaluation_by_the_mean():
    act, noise = jax.jit(Known.act, static_argnames="greedy"), np.asarray(jax.random.normal(KEY, (50, 1)))
    state, obs = known(**MIXED), jnp.full((50, 1), 3.0)
    mean = math.tanh(0.1 + 0.8 * math.sin(8 + (math.tanh(0.2 + 0.3) + 1) / 2 * 6))
    action = act(Known(), state, obs, KEY)[:, 0]
    np.testing.assert_allclose(action, np.clip(mean + math.exp(-1.0) * noise, -1, 1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(act(Known(), state, obs, KEY, greedy=True), np.full((50, 1, 1), mean), rtol=1e-5)
    assert same(act(Known(), online(state), obs, KEY)[:, 0], action)


# Refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"actor_hidden": (8, 0)}, "FamO2O.actor_hidden"),
        ({"critic_hidden": (0,)}, "FamO2O.critic_hidden"),
        ({"lr": -1.0}, "FamO2O.lr = -1.0: must be at least 0"),
        ({"lowest": -1.0}, "FamO2O.lowest = -1.0: must be at least 0"),
        ({"lowest": 9.0, "highest": 8.0}, "FamO2O.highest = 8.0: must be at least 9"),
        ({"max_weight": -1.0}, "FamO2O.max_weight = -1.0: must be at least 0"),
        ({"discount": 1.5}, "FamO2O.discount = 1.5: must be in [0, 1]"),
        ({"tau": -0.1}, "FamO2O.tau = -0.1: must be in [0, 1]"),
        ({"expectile": 1.1}, "FamO2O.expectile = 1.1: must be in [0, 1]"),
    ],
)
def test_values_out_of_range_are_refused_by_name(fields, message):
    with pytest.raises(UserError, match=re.escape(message)):
        FamO2O(**fields).check()
