"""Facts about jaxrl.agents.odice, with values that are linear in features, so that every gradient is known by hand."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl import ranges
from jaxrl.agents import ODICE
from jaxrl.agents.parts import Adam, Critic, GaussianPolicy
from jaxrl.errors import UserError
from jaxrl.types import pytree
from tests.known import (
    KEY,
    WIDE,
    batch_of,
    formula,
    gradient_of,
    jitted,
    linear_heads,
    random_batch,
    same,
    state_of,
    with_fields,
)

pytestmark = pytest.mark.usefixtures("quick")

TINY = with_fields(ODICE(), hidden=(8,), batch=16)


def gaussian(p, s):
    """Returns a mean m and the logarithm w of the standard deviation, of one action."""
    mean = jnp.broadcast_to(p["mean"], (*s.shape[:-1], 1))
    return mean, jnp.broadcast_to(p["width"], mean.shape)


VALUE = formula(Critic(agg="min"), lambda p, s, *action: linear_heads(p["bias"], p["slope"], s[..., 0]))
ACTOR = formula(GaussianPolicy(std="learned"), gaussian, "moments")


@pytree
class Known(ODICE):
    """O-DICE with V_k(s) = b_k + c_k s, which descends without Adam, and a policy of mean m and width exp(w)."""

    value: Critic = VALUE
    actor: GaussianPolicy = ACTOR

    def optimizers(self):
        return super().optimizers() | {"value": optax.sgd(self.value_adam.lr)}


def made(**fields) -> Known:
    """Returns the known O-DICE with these fields, those of its parts included."""
    return with_fields(Known(), **fields) if fields else Known()


def known(bias=(0.0, 0.0), slope=(0.0, 0.0), target=((0.0, 0.0), (0.0, 0.0)), mean=0.0, width=0.0):
    """Returns the state of `Known` with these parameters; `target` is the slow values' bias and slope."""
    value, slow = ({"bias": np.array(x), "slope": np.array(y)} for x, y in ((bias, slope), target))
    params = {"value": value, "actor": {"mean": mean, "width": width}}
    return state_of(params, {"value": slow}, Known().optimizers())


# The functions of the divergence


def conjugate(y, **fields):
    return ODICE(**fields).conjugate(jnp.asarray(y, jnp.float32))


def omega(y):
    return np.maximum(np.asarray(y) / 2 + 1, 0)


def test_the_conjugate_of_chi_square_at_points_worked_out_by_hand():
    np.testing.assert_allclose(conjugate([0.0, 2.0, -2.0, -5.0, 1.0]), [0, 3, -1, -1, 1.25], rtol=1e-6)


def test_its_derivative_is_the_density_ratio():
    y = np.array([-9.0, -2.1, -1.9, -1.0, 0.0, 0.5, 3.0, 40.0])
    slope = jax.grad(lambda y: conjugate(y).sum())(jnp.asarray(y, jnp.float32))
    np.testing.assert_allclose(slope, omega(y), atol=1e-6)
    finite = (np.asarray(conjugate(y + 0.05)) - np.asarray(conjugate(y - 0.05))) / 0.1
    np.testing.assert_allclose(finite, omega(y), rtol=1e-3, atol=1e-4)  # exact for a parabola
    assert float(jax.grad(lambda y: conjugate(y))(-2.0)) == 0


def test_the_conjugate_of_the_reverse_divergence_is_its_own_derivative():
    y = jnp.array([-3.0, 0.0, 1.0, 4.0])
    slope = jax.grad(lambda y: conjugate(y, divergence="reverse_kl").sum())(y)
    np.testing.assert_allclose(slope, np.exp(np.asarray(y) - 1), rtol=1e-5)
    np.testing.assert_allclose(conjugate(y, divergence="reverse_kl"), slope, rtol=1e-6)


# The value

BATCH = batch_of(
    [[0.5], [-0.3], [1.0], [-4.0]],
    obs=[[1.0], [-2.0], [0.5], [3.0]],
    next_obs=[[0.2], [1.5], [-1.0], [2.0]],
    terminated=[0, 0, 1, 0],
)
MIXED = {"bias": (0.3, -0.2), "slope": (0.7, -0.4), "target": ((0.1, 0.4), (0.5, -0.6))}
SINGLE = {"bias": (0.3,), "slope": (0.7,), "target": ((0.1,), (0.5,))}


def by_hand(bias, slope, target, trade, eta, discount=0.9):
    """Returns (d_f, d_b, g_0, g_f, g_b) in float64: residuals [K, 4], and gradients [K, 2] on biases and slopes."""
    bias, slope, target = np.array(bias)[:, None], np.array(slope)[:, None], np.array(target)
    rewards, s, after = (np.asarray(x, np.float64)[:, 0] for x in (BATCH.rewards, BATCH.obs, BATCH.next_obs))
    going_on = discount * ~np.asarray(BATCH.terminated)
    slow = lambda s: (target[0][:, None] + target[1][:, None] * s).min(axis=0)  # noqa: E731
    forward = rewards + going_on * slow(after) - (bias + slope * s)
    backward = rewards + going_on * (bias + slope * after) - slow(s)
    count = forward.size
    ones, here = np.array([np.ones(4), s]), np.array([np.ones(4), s])
    there = going_on * np.array([np.ones(4), after])
    g_0 = np.broadcast_to((1 - trade) * ones.sum(axis=1) / count, (len(bias), 2))
    g_f = -trade * omega(forward) @ here.T / count
    g_b = trade * eta * omega(backward) @ there.T / count
    return forward, backward, g_0, g_f, g_b


def test_residuals_see_each_value_itself_and_the_lowest_of_the_slow_ones():
    forward, backward, *_ = by_hand(**MIXED, trade=0.5, eta=1.0)
    state, agent = known(**MIXED), made(discount=0.9)
    np.testing.assert_allclose(
        jitted(Known.residual)(agent, state.params["value"], state, BATCH), forward, rtol=1e-5, atol=1e-6
    )
    found = jitted(Known.backward_residual)(agent, state.params["value"], state, BATCH)
    np.testing.assert_allclose(found, backward, rtol=1e-5, atol=1e-6)


def test_after_the_tasks_end_nothing_is_worth_anything_and_nothing_is_learned_backwards():
    state, agent = known(**MIXED), made(discount=0.9)
    ended = dataclasses.replace(BATCH, terminated=np.ones(4, bool))
    found = jitted(Known.residual)(agent, state.params["value"], state, ended)
    np.testing.assert_allclose(found[0], BATCH.rewards[:, 0] - 0.3 - 0.7 * BATCH.obs[:, 0], rtol=1e-5)
    elsewhere = dataclasses.replace(ended, next_obs=BATCH.next_obs + 9)
    gradient = jitted(Known.value_gradient)
    assert same(gradient(agent, state, ended), gradient(agent, state, elsewhere))
    semi = gradient(dataclasses.replace(agent, gradient="semi"), state, ended)[0]
    for ours, theirs in zip(*map(jax.tree.leaves, (gradient(agent, state, ended)[0], semi)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def descended(state, **fields):
    """Returns the gradient [K, 2] on biases and slopes that the values descend, and its metrics."""
    gradient, metrics = jitted(Known.value_gradient)(made(discount=0.9, **fields), state, BATCH)
    return np.stack([gradient["bias"], gradient["slope"]], axis=1), metrics


@pytest.mark.parametrize("parameters", [MIXED, SINGLE], ids=["twins", "single"])
@pytest.mark.parametrize(("trade", "eta"), [(0.6, 1.0), (0.3, 5.0)])
def test_the_backward_gradient_loses_its_part_along_the_forward_one_over_all_values_together(parameters, trade, eta):
    *_, g_0, g_f, g_b = by_hand(**parameters, trade=trade, eta=eta)
    kappa = (g_f * g_b).sum() / (g_f * g_f).sum()
    assert abs(kappa) > 0.05
    left = g_b - kappa * g_f
    if len(g_f) == 2:
        assert abs((g_f[0] * left[0]).sum()) > 1e-3  # of one value alone they are not orthogonal
    count = {"heads": len(g_f), "trade": trade, "eta": eta}
    found, metrics = descended(known(**parameters), **count)
    np.testing.assert_allclose(found, g_0 + g_f + left, rtol=1e-4, atol=1e-6)
    assert float(metrics["value/kappa"]) == pytest.approx(kappa, rel=1e-4)
    semi, _ = descended(known(**parameters), gradient="semi", **count)
    np.testing.assert_allclose(semi, g_0 + g_f, rtol=1e-4, atol=1e-6)


def test_what_is_left_of_the_backward_gradient_is_orthogonal_to_the_forward_one():
    state, batch = jax.jit(TINY.init, static_argnums=1)(KEY, WIDE), random_batch(0, length=1)
    state = dataclasses.replace(state, target=jax.tree.map(lambda x: x + 0.1, state.target))

    @jax.jit
    def parts(agent, state, batch):
        params = state.params["value"]
        residuals = {"f": agent.residual, "b": agent.backward_residual}
        weights = {"f": agent.trade, "b": agent.trade * agent.eta}
        loss = lambda p, way: weights[way] * jnp.mean(agent.conjugate(residuals[way](p, state, batch)))  # noqa: E731
        semi = dataclasses.replace(agent, gradient="semi").value_gradient(state, batch)[0]
        return agent.value_gradient(state, batch)[0], semi, *(jax.grad(loss)(params, way) for way in "fb")

    whole, semi, g_f, g_b = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)
        for tree in parts(TINY, state, batch)
    )
    left, size = whole - semi, np.linalg.norm
    assert abs(g_f @ g_b) > 1e-2 * size(g_f) * size(g_b) and size(left) > 0.1 * size(g_b)
    assert abs(g_f @ left) < 1e-5 * size(g_f) * size(g_b)


def test_without_a_backward_gradient_the_update_is_the_semi_gradients_bit_for_bit():
    state, batch = jax.jit(TINY.init, static_argnums=1)(KEY, WIDE), random_batch(1, length=1)
    orthogonal, semi = (
        jitted(ODICE.learn)(dataclasses.replace(TINY, gradient=gradient, eta=0.0), state, batch)[0]
        for gradient in ("orthogonal", "semi")
    )
    assert same(orthogonal, semi) and not same(orthogonal.params["value"], state.params["value"])


def test_a_value_of_one_parameter_has_no_direction_left_but_the_forward_one():
    LINE = formula(Critic(agg="min"), lambda p, s, *action: p["w"] * s[None, ..., 0])

    @pytree
    class Line(Known):
        """One value, w s."""

        value: Critic = LINE

    value = {"w": jnp.asarray(0.7)}
    state = dataclasses.replace(known(), params={"value": value}, target={"value": {"w": jnp.asarray(0.2)}})
    agent = Line(eta=3.0)
    orthogonal, semi = (
        float(jitted(Line.value_gradient)(dataclasses.replace(agent, gradient=gradient), state, BATCH)[0]["w"])
        for gradient in ("orthogonal", "semi")
    )
    assert orthogonal == pytest.approx(semi, rel=1e-5)
    backward = lambda w: jnp.mean(agent.conjugate(agent.backward_residual({"w": w}, state, BATCH)))  # noqa: E731
    assert abs(float(jax.grad(backward)(0.7))) > 0.1  # which was not nothing


def test_values_far_too_high_have_no_forward_gradient_and_nothing_breaks():
    parameters = {"bias": (50.0, 60.0), "slope": (0.1, 0.2), "target": ((0.1, 0.4), (0.5, -0.6))}
    forward, _, g_0, g_f, g_b = by_hand(**parameters, trade=0.6, eta=1.0)
    assert forward.max() < -2 and not g_f.any() and g_b.all()
    found, metrics = descended(known(**parameters))
    assert float(metrics["value/kappa"]) == 0
    np.testing.assert_allclose(found, g_0 + g_b, rtol=1e-5)


def test_the_true_gradient_is_of_one_residual_without_a_slow_value():
    bias, slope, discount = (np.array(x)[:, None] for x in ((0.3, -0.2), (0.7, -0.4), (0.9,)))
    going_on = discount * ~np.asarray(BATCH.terminated)
    s, after = (np.asarray(x, np.float64)[:, 0] for x in (BATCH.obs, BATCH.next_obs))
    residual = np.asarray(BATCH.rewards)[:, 0] + going_on * (bias + slope * after) - (bias + slope * s)
    state, agent = known(**MIXED), made(gradient="true", discount=0.9)
    found = jitted(Known.residual)(agent, state.params["value"], state, BATCH)
    np.testing.assert_allclose(found, residual, rtol=1e-5, atol=1e-6)
    on_bias = 0.4 * 4 / 8 + 0.6 * (omega(residual) * (going_on - 1)).sum(axis=1) / 8
    on_slope = 0.4 * s.sum() / 8 + 0.6 * (omega(residual) * (going_on * after - s)).sum(axis=1) / 8
    gradient, _ = descended(state, gradient="true")
    np.testing.assert_allclose(gradient, np.stack([on_bias, on_slope], axis=1), rtol=1e-4, atol=1e-6)


# The policy


def test_the_policy_imitates_by_the_positive_part_of_the_residual_and_not_by_the_density_ratio():
    residual = jnp.array([-5.0, -1.0, 0.0, 0.7, 250.0])
    np.testing.assert_allclose(ODICE().weight(residual), [0, 0, 0, 0.7, 100], rtol=1e-6)
    np.testing.assert_allclose(ODICE(max_weight=0.5).weight(residual), [0, 0, 0, 0.5, 0.5], rtol=1e-6)
    reverse = ODICE(divergence="reverse_kl").weight(residual)
    np.testing.assert_allclose(reverse, [*np.exp(np.array([-6, -2, -1, -0.3])), 100], rtol=1e-5)


def test_the_policys_loss_is_the_weighted_likelihood_in_the_mean_over_values_and_batch():
    action, residual = np.array([0.5, -0.2, 0.9]), np.array([[0.4, -1.0, 2.0], [0.0, 3.0, 0.5]])
    batch = batch_of(np.zeros((3, 1)), actions=action[:, None, None], valid=[[1], [1], [0]])
    state = known(mean=0.1, width=-0.5)
    arguments = (Known(), state.params["actor"], state, batch, jnp.asarray(residual, jnp.float32))
    loss, metrics = jitted(Known.actor_loss)(*arguments)
    density = -0.5 * ((action - 0.1) / math.exp(-0.5)) ** 2 + 0.5 - 0.5 * math.log(2 * math.pi)
    weight = np.maximum(residual, 0)
    assert float(loss) == pytest.approx(-(weight * density * [1, 1, 0]).sum() / 6, rel=1e-5)
    assert float(metrics["actor/weight"]) == pytest.approx(weight.mean(), rel=1e-5)
    pull = gradient_of(Known.actor_loss)(*arguments)
    assert float(pull["mean"]) == pytest.approx(
        -(weight * (action - 0.1) * [1, 1, 0]).sum() / 6 / math.exp(-1), rel=1e-4
    )


def test_two_equal_values_teach_the_policy_what_one_does():
    single, metrics = jitted(Known.learn)(made(heads=1, actor_adam=Adam(0.1)), known(**SINGLE), BATCH)
    twice = {name: np.concatenate([value, value], axis=-1) for name, value in SINGLE.items()}
    twins, other = jitted(Known.learn)(made(heads=2, actor_adam=Adam(0.1)), known(**twice), BATCH)
    for name in ("actor/loss", "actor/weight", "value/loss", "value/level", "value/kappa"):
        assert float(metrics[name]) == pytest.approx(float(other[name]), rel=1e-5)
    assert float(single.params["actor"]["mean"]) == pytest.approx(float(twins.params["actor"]["mean"]), rel=1e-5)


def test_an_update_is_a_step_of_the_values_then_of_their_target_then_of_the_policy_on_the_residual_from_before():
    agent, state = made(value_adam=Adam(10.0), tau=0.25, discount=0.9), known(**MIXED)
    forward, *_, g_0, g_f, g_b = by_hand(**MIXED, trade=0.6, eta=1.0)
    after, metrics = jitted(Known.learn)(agent, state, BATCH)
    assert float(metrics["actor/weight"]) == pytest.approx(np.maximum(forward, 0).mean(), rel=1e-5)
    gradient = g_0 + g_f + g_b - (g_f * g_b).sum() / (g_f * g_f).sum() * g_f
    for i, name in enumerate(("bias", "slope")):
        new = MIXED[name] - 10 * gradient[:, i]
        np.testing.assert_allclose(after.params["value"][name], new, rtol=1e-4)
        np.testing.assert_allclose(
            after.target["value"][name], 0.75 * np.array(MIXED["target"][i]) + 0.25 * new, rtol=1e-4
        )
    assert int(after.step) == 1


def test_the_policys_weights_decay_through_its_gradient_and_not_beside_it():
    agent = made(weight_decay=1e-2, actor_adam=Adam(0.1))
    nothing = dataclasses.replace(BATCH, rewards=BATCH.rewards - 99)  # no residual is positive
    after, metrics = jitted(Known.learn)(agent, known(**MIXED, mean=0.3, width=-0.5), nothing)
    assert float(metrics["actor/weight"]) == 0
    # Adam's first step is its learning rate long, however small the gradient
    assert float(after.params["actor"]["mean"]) == pytest.approx(0.3 - 0.1, rel=1e-4)
    assert float(after.params["actor"]["width"]) == pytest.approx(-0.5 + 0.1, rel=1e-4)


def test_values_do_not_decay_and_rows_that_did_not_happen_teach_nothing():
    nothing = dataclasses.replace(BATCH, valid=jnp.zeros((4, 1)))
    state = known(**MIXED, mean=0.3)
    after, _ = jitted(Known.learn)(made(weight_decay=0.0, value_adam=Adam(1.0)), state, nothing)
    assert same(after.params, state.params)
    decayed, _ = jitted(Known.learn)(made(weight_decay=0.1, value_adam=Adam(1.0)), state, nothing)
    assert same(decayed.params["value"], state.params["value"]) and not same(decayed.params, state.params)


# Acting


def test_it_acts_on_a_clipped_sample_and_in_evaluation_on_the_clipped_mean():
    act, noise = jax.jit(Known.act, static_argnames="greedy"), np.asarray(jax.random.normal(KEY, (50, 1)))
    action = act(Known(), known(mean=0.6, width=math.log(0.5)), jnp.zeros((50, 1)), KEY)
    np.testing.assert_allclose(action[:, 0], np.clip(0.6 + 0.5 * noise, -1, 1), rtol=1e-5)
    for mean, wanted in ((0.6, 0.6), (1.4, 1.0)):
        calm = act(Known(), known(mean=mean), jnp.zeros((50, 1)), KEY, greedy=True)
        np.testing.assert_allclose(calm, np.full((50, 1, 1), wanted), rtol=1e-6)


# Refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden": (8, 0)}, "ODICE.actor.net.hidden = (8, 0): must be at least 1"),
        ({"value": with_fields(ODICE().value, hidden=(0,))}, "ODICE.value.net.hidden = (0,): must be at least 1"),
        ({"heads": 0}, "ODICE.value.heads = 0: must be at least 1"),
        ({"actor_adam": Adam(-1.0)}, "ODICE.actor_adam.lr = -1.0: must be at least 0"),
        ({"value_adam": Adam(-1.0)}, "ODICE.value_adam.lr = -1.0: must be at least 0"),
        ({"weight_decay": -1.0}, "ODICE.weight_decay = -1.0: must be at least 0"),
        ({"eta": -1.0}, "ODICE.eta = -1.0: must be at least 0"),
        ({"max_weight": -1.0}, "ODICE.max_weight = -1.0: must be at least 0"),
        ({"trade": 1.5}, "ODICE.trade = 1.5: must be in [0, 1]"),
        ({"discount": 1.5}, "ODICE.transitions.discount = 1.5: must be in [0, 1]"),
        ({"tau": -0.1}, "ODICE.value.tau = -0.1: must be in [0, 1]"),
    ],
)
def test_values_out_of_range_are_refused_by_name(fields, message):
    with pytest.raises(UserError, match=re.escape(message)):
        ranges.check(with_fields(ODICE(), **fields))
