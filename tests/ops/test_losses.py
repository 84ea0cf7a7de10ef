"""Facts about jaxrl.ops.losses: hand-worked values, and what carries a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.stats

from jaxrl.ops import losses


def test_masked_mean_divides_by_all_elements():
    x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    assert float(losses.masked_mean(x, jnp.array([[1.0, 0.0], [1.0, 0.0]]))) == (1 + 3) / 4


def test_aggregate_is_over_heads():
    heads = jnp.array([[1.0, 5.0], [3.0, -1.0]])
    np.testing.assert_array_equal(losses.aggregate(heads, "mean"), [2, 2])
    np.testing.assert_array_equal(losses.aggregate(heads, "min"), [1, -1])


def test_chunk_return_discounts_by_the_steps_that_a_window_reaches():
    rewards = jnp.array([[1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    returns, factor = losses.chunk_return(rewards, jnp.array([5, 2, 0]), 0.5)
    np.testing.assert_allclose(returns, [1.9375, 2.0, 0.0])
    np.testing.assert_allclose(factor, [1 / 32, 1 / 4, 1.0])


def target(rewards, next_value, discount, terminated=False, steps=None):
    rewards = jnp.asarray([rewards], jnp.float32)
    steps = jnp.array([rewards.shape[1] if steps is None else steps])
    return float(losses.td_target(rewards, steps, jnp.array([terminated]), jnp.array([next_value]), discount)[0])


def test_td_targets_worked_out_by_hand():
    assert target([1, 1, 1, 1, 1], 8.0, 0.5) == pytest.approx(1.9375 + 8 / 32)
    assert target([1, 2, 3], 10.0, 1.0) == 16
    assert target([1, 2, 3], 10.0, 1.0, terminated=True) == 6
    assert target([1, 2, 0], 8.0, 0.5, steps=2) == pytest.approx(1 + 1 + 0.25 * 8)
    assert target([3.0], 10.0, 0.9) == pytest.approx(3 + 0.9 * 10)  # one step: ordinary TD


def test_td_target_takes_no_gradient():
    one, steps = jnp.ones((1, 2)), jnp.array([2])
    gradient = jax.grad(lambda v, r: losses.td_target(r, steps, jnp.array([False]), v, 0.9).sum(), argnums=(0, 1))
    value, rewards = gradient(jnp.array([2.0]), one)
    assert float(jnp.abs(value).sum() + jnp.abs(rewards).sum()) == 0


def test_expectile_and_quantile_weigh_errors_by_their_sign():
    error = jnp.array([-2.0, 3.0, 0.0])
    np.testing.assert_allclose(losses.expectile(error, 0.9), [0.1 * 4, 0.9 * 9, 0], rtol=1e-6)
    np.testing.assert_allclose(losses.quantile(error, 0.9), [0.1 * 2, 0.9 * 3, 0], rtol=1e-6)


@pytest.mark.parametrize("level", [0.5, 0.8])
def test_their_minima_are_the_expectile_and_the_quantile_of_the_data(level):
    data = np.random.default_rng(0).exponential(size=401).astype(np.float32)

    def least(loss):
        objective = lambda guess: float(loss(jnp.asarray(data - guess, jnp.float32), level).mean())  # noqa: E731
        return scipy.optimize.minimize_scalar(objective, bounds=(0, 5), method="bounded").x

    assert least(losses.quantile) == pytest.approx(np.quantile(data, level), abs=0.02)
    guess = least(losses.expectile)
    above, below = np.maximum(data - guess, 0).mean(), np.maximum(guess - data, 0).mean()
    assert level * above == pytest.approx((1 - level) * below, rel=0.01)  # what defines an expectile


def test_cross_entropy_of_logits_is_stable():
    logit, goal = jnp.array([0.0, 2.0, 200.0, -200.0]), jnp.array([0.3, 0.25, 1.0, 1.0])
    p = 1 / (1 + np.exp(-2))
    wanted = [np.log(2), -(0.25 * np.log(p) + 0.75 * np.log(1 - p)), 0, 200]
    np.testing.assert_allclose(losses.bce_logit(logit, goal), wanted, rtol=1e-6)


# Heads that say values, and heads that say logits of probabilities


def test_a_heads_output_stands_for_a_value_or_for_a_probability():
    output = jnp.array([-2.0, 0.0, 3.0])
    np.testing.assert_array_equal(losses.value_of(output, "mse"), output)
    np.testing.assert_allclose(losses.value_of(output, "bce"), 1 / (1 + np.exp([2.0, 0, -3])), rtol=1e-6)


def test_targets_of_probabilities_stay_probabilities():
    goal = jnp.array([-0.5, 0.0, 0.3, 1.0, 1.7])
    np.testing.assert_array_equal(losses.bounded(goal, "mse"), goal)
    np.testing.assert_array_equal(losses.bounded(goal, "bce"), jnp.array([0, 0, 0.3, 1, 1]))


def test_regression_is_the_square_or_the_cross_entropy():
    output, goal = jnp.array([0.0, 2.0]), jnp.array([0.3, 0.25])
    np.testing.assert_allclose(losses.regression(output, goal, "mse"), [0.09, 1.75**2], rtol=1e-6)
    np.testing.assert_array_equal(losses.regression(output, goal, "bce"), losses.bce_logit(output, goal))


def test_a_tilt_weighs_targets_that_are_not_below_the_value():
    weights = {  # of targets below, at and above the value 0.5, and above the logit 0.25 of a higher value
        "mse": losses.tilt_weight(jnp.full(4, 0.5), jnp.array([0.4, 0.5, 0.6, 0.5]), 0.8, "mse"),
        "bce": losses.tilt_weight(jnp.array([0, 0, 0, 0.25]), jnp.array([0.4, 0.5, 0.6, 0.5]), 0.8, "bce"),
    }
    np.testing.assert_allclose(weights["mse"], [0.2, 0.8, 0.8, 0.8], rtol=1e-6)
    np.testing.assert_allclose(weights["bce"], [0.2, 0.8, 0.8, 0.2], rtol=1e-6)


@pytest.mark.parametrize("head", ["mse", "bce"])
@pytest.mark.parametrize("tilt", ["expectile", "quantile"])
def test_a_tilted_error_is_the_error_of_its_head_times_the_weight(head, tilt):
    output, goal = jnp.array([-1.0, 0.5, 2.0]), jnp.array([0.9, 0.1, 0.4])
    weight = np.array([0.7, 0.3, 0.3])  # in values as in probabilities (0.27, 0.62, 0.88)
    logit = np.log(np.asarray(goal) / (1 - np.asarray(goal)))
    away = {
        ("expectile", "mse"): np.square(goal - output),
        ("expectile", "bce"): losses.bce_logit(output, goal),
        ("quantile", "mse"): np.abs(goal - output),
        ("quantile", "bce"): np.abs(logit - np.asarray(output)),
    }
    found = losses.tilted(output, goal, 0.7, head, tilt)
    np.testing.assert_allclose(found, weight * np.asarray(away[tilt, head]), rtol=1e-5)
    if (tilt, head) == ("expectile", "mse"):
        np.testing.assert_allclose(found, losses.expectile(goal - output, 0.7), rtol=1e-6)


def test_a_level_of_one_half_is_half_the_error():
    output, goal = jnp.array([-1.0, 0.5, 2.0]), jnp.array([0.9, 0.1, 0.4])
    np.testing.assert_allclose(losses.tilted(output, goal, 0.5, "mse"), 0.5 * np.square(goal - output), rtol=1e-6)


def test_targets_of_zero_and_one_have_logits_as_far_away_as_the_margin_says():
    goal = jnp.array([0.0, 1.0])
    for margin in (1e-2, 1e-6):
        edge = np.log((1 - margin) / margin)
        found = losses.tilted(jnp.zeros(2), goal, 0.9, "bce", "quantile", margin)
        np.testing.assert_allclose(found, [0.1 * edge, 0.9 * edge], rtol=2e-3)


@pytest.mark.parametrize("head", ["mse", "bce"])
@pytest.mark.parametrize("tilt", ["expectile", "quantile"])
def test_a_tilted_error_pulls_the_output_and_not_the_target(head, tilt):
    total = lambda output, goal: losses.tilted(output, goal, 0.7, head, tilt).sum()  # noqa: E731
    output, goal = jnp.array([-1.0, 0.5, 2.0]), jnp.array([0.9, 0.1, 0.4])
    pull, back = jax.grad(total, argnums=(0, 1))(output, goal)
    np.testing.assert_array_equal(np.sign(pull), [-1, 1, 1])
    np.testing.assert_array_equal(back, np.zeros(3))
    outside = jax.grad(lambda output: losses.tilt_weight(output, goal, 0.7, head).sum())(output)
    np.testing.assert_array_equal(outside, np.zeros(3))


@pytest.mark.parametrize("level", [0.5, 0.9])
@pytest.mark.parametrize(("head", "tilt"), [("mse", "expectile"), ("bce", "expectile"), ("bce", "quantile")])
def test_zeros_and_ones_lead_to_the_level_itself_and_probabilities_to_their_quantile(head, tilt, level):
    if tilt == "expectile":
        goal, wanted = jnp.array([0.0, 1.0]), level
    else:
        goal = jnp.linspace(0.1, 0.9, 401)
        wanted = 0.1 + 0.8 * level

    def objective(guess):
        return float(losses.tilted(jnp.full_like(goal, guess), goal, level, head, tilt).mean())

    least = scipy.optimize.minimize_scalar(objective, bounds=(-5, 5), method="bounded", options={"xatol": 1e-4}).x
    assert float(losses.value_of(jnp.asarray(least), head)) == pytest.approx(wanted, abs=0.005)


def test_a_gaussian_density_is_that_of_independent_entries():
    x, mean = jnp.array([[0.5, -1.0], [0.0, 2.0]]), jnp.array([[0.0, 1.0], [0.0, 2.0]])
    log_std = jnp.log(jnp.array([[1.0, 2.0], [0.5, 0.5]]))
    away = [0.5 * 0.5**2 + 0.5 * 1 + np.log(2), 2 * np.log(0.5)]
    np.testing.assert_allclose(
        losses.gaussian_log_density(x, mean, log_std), -np.log(2 * np.pi) - np.array(away), rtol=1e-5
    )


def test_polyak_moves_the_target_by_tau():
    online, slow = {"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([5.0, 6.0])}
    np.testing.assert_allclose(losses.polyak(online, slow, 0.25)["a"], [4, 5])
    np.testing.assert_array_equal(losses.polyak(online, slow, 1.0)["a"], [1, 2])
    np.testing.assert_array_equal(losses.polyak(online, slow, 0.0)["a"], [5, 6])


@pytest.mark.parametrize(("mean", "log_std"), [(0.0, 0.0), (0.8, -1.0), (-0.3, 0.4)])
def test_the_density_of_a_squashed_gaussian_integrates_to_the_gaussians_own_probabilities(mean, log_std):
    action = np.linspace(-1, 1, 20_001)[1:-1]
    u = jnp.asarray(np.arctanh(action), jnp.float32)[:, None]
    density = np.exp(losses.tanh_log_density(u, jnp.full_like(u, mean), jnp.full_like(u, log_std)))
    gaussian = scipy.stats.norm(mean, np.exp(log_std))
    assert scipy.integrate.trapezoid(density, action) == pytest.approx(1, abs=2e-3)
    for low, high in ((-0.9, -0.1), (0.0, 0.5), (0.5, 0.99)):
        inside = (action >= low) & (action <= high)
        wanted = gaussian.cdf(np.arctanh(high)) - gaussian.cdf(np.arctanh(low))
        assert scipy.integrate.trapezoid(density[inside], action[inside]) == pytest.approx(wanted, abs=1e-3)


def test_the_log_density_of_a_squashed_gaussian_is_summed_over_entries_and_stays_finite_at_the_sides():
    u, mean, log_std = np.array([[0.5, -1.2], [20.0, -30.0]]), np.array([0.1, 0.2]), np.array([-0.5, 0.3])
    arrays = [jnp.asarray(np.broadcast_to(x, u.shape), jnp.float32) for x in (u, mean, log_std)]
    change = 2 * (np.log(2) - np.abs(u) - np.log1p(np.exp(-2 * np.abs(u))))  # log(1 - tanh(u)^2)
    wanted = (scipy.stats.norm.logpdf(u, mean, np.exp(log_std)) - change).sum(axis=1)
    np.testing.assert_allclose(losses.tanh_log_density(*arrays), wanted, rtol=1e-5)
    slope = jax.grad(lambda u: losses.tanh_log_density(u, *arrays[1:]).sum())(arrays[0])
    np.testing.assert_allclose(slope, -(u - mean) / np.exp(2 * log_std) + 2 * np.tanh(u), rtol=1e-4)
