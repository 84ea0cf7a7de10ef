"""Facts about jaxrl.losses: hand-worked values, and what carries a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from jaxrl import losses


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


def test_polyak_moves_the_target_by_tau():
    online, slow = {"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([5.0, 6.0])}
    np.testing.assert_allclose(losses.polyak(online, slow, 0.25)["a"], [4, 5])
    np.testing.assert_array_equal(losses.polyak(online, slow, 1.0)["a"], [1, 2])
    np.testing.assert_array_equal(losses.polyak(online, slow, 0.0)["a"], [5, 6])
