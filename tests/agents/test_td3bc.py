"""Facts about jaxrl.agents.td3bc, with networks of one layer, so that every number is known by hand."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import ranges
from jaxrl.agents import TD3, TD3BC
from jaxrl.errors import UserError
from jaxrl.types import Spec
from tests.known import batch_of, bias_of, fitted, one_layer_each, with_fields

pytestmark = pytest.mark.usefixtures("quick")

PAIR = Spec(observation=1, action=2)
AGENT = with_fields(TD3BC(alpha=1.5), hidden=())


def known(pi=(0.5, -0.2), critic=([[1, 2, 0], [9, 9, 9]], (0.5, 9)), spec=PAIR):
    """Returns the state with pi(s) = `pi`, and by default Q_1 = s + 2 a_1 + 1/2."""
    return one_layer_each(AGENT, spec, actor=(0, np.arctanh(pi)), critic=critic)


def loss_of(agent, state, batch):
    """Returns the actor's loss and its slope in the action before the tanh, the layer's bias."""
    (loss, metrics), slope = jax.value_and_grad(agent.actor_loss, has_aux=True)(state.params["actor"], state, batch)
    return float(loss), metrics, bias_of(slope)


BATCH = batch_of([[0.0], [0.0]], obs=[[1.0], [-4.0]], actions=[[[0.9, 0.1]], [[0.1, -0.2]]])


def test_the_actor_climbs_the_normalized_critic_and_stays_near_the_data_in_the_mean_over_entries():
    loss, metrics, slope = loss_of(AGENT, known(), BATCH)
    q = np.array([1 + 2 * 0.5 + 0.5, -4 + 2 * 0.5 + 0.5])  # 2.5 and -2.5
    weight = 1.5 / np.abs(q).mean()
    apart = np.array([[0.5 - 0.9, -0.2 - 0.1], [0.5 - 0.1, 0.0]])
    assert float(metrics["actor/lambda"]) == pytest.approx(weight, rel=1e-5)
    assert loss == pytest.approx(-weight * q.mean() + np.square(apart).mean(), rel=1e-5)
    squash = 1 - np.square([0.5, -0.2])
    wanted = (-weight * np.array([2, 0]) + (2 * apart / (2 * 2)).sum(axis=0)) * squash
    np.testing.assert_allclose(slope, wanted, rtol=1e-5)


def test_a_critic_twice_as_large_changes_nothing():
    one, two = (
        loss_of(AGENT, known(critic=(factor * np.array([[1, 2, 0], [0, 0, 0]]), 0.5 * factor)), BATCH)
        for factor in (1, 2)
    )
    assert two[0] == pytest.approx(one[0], rel=1e-6)
    np.testing.assert_allclose(two[2], one[2], rtol=1e-5)
    assert float(two[1]["actor/lambda"]) == pytest.approx(float(one[1]["actor/lambda"]) / 2)


def test_without_weight_on_the_critic_it_is_behaviour_cloning():
    agent = dataclasses.replace(AGENT, alpha=0.0)
    losses = [loss_of(agent, known(critic=critic), BATCH) for critic in (([[1, 2, 0]], 0.5), ([[-3, 5, 7]], 2))]
    apart = np.array([[0.5 - 0.9, -0.2 - 0.1], [0.5 - 0.1, 0.0]])
    assert [loss for loss, _, _ in losses] == pytest.approx([np.square(apart).mean()] * 2, rel=1e-5)
    np.testing.assert_allclose(losses[0][2], apart.mean(axis=0) * (1 - np.square([0.5, -0.2])), atol=1e-6)
    np.testing.assert_array_equal(losses[0][2], losses[1][2])
    actor = fitted(lambda actor: agent.actor_loss(actor, known(), BATCH)[0], known().params["actor"], updates=400)
    layer = actor["params"]["MLP_0"]["Dense_0"]
    found = np.tanh(BATCH.obs @ layer["kernel"] + layer["bias"][None])
    np.testing.assert_allclose(found, BATCH.actions[:, 0], atol=0.01)


def test_a_critic_proportional_to_the_action_moves_it_to_the_root_that_is_known():
    agent, narrow = dataclasses.replace(AGENT, alpha=0.1), Spec(1, 1)
    state = known((0.1,), ([[0, 7], [0, 0]], 0), narrow)
    batch = batch_of([[0.0]], actions=[[[0.5]]])
    actor = fitted(lambda actor: agent.actor_loss(actor, state, batch)[0], state.params["actor"], updates=400)
    p = math.tanh(bias_of(actor)[0])
    assert p == pytest.approx((0.5 + math.sqrt(0.25 + 2 * 0.1)) / 2, abs=1e-3)  # 2 (p - a) = alpha / p


def test_steps_that_did_not_happen_have_no_weight():
    _, metrics, _ = loss_of(AGENT, known(), dataclasses.replace(BATCH, valid=jnp.array([[1.0], [0.0]])))
    assert float(metrics["actor/q_loss"]) == pytest.approx(-1.5 / 2.5 * 2.5 / 2)
    assert float(metrics["actor/bc_loss"]) == pytest.approx((0.4**2 + 0.3**2) / 2 / 2)


def test_the_critics_learn_the_reward_and_the_lower_slow_critic_at_the_slow_actors_noisy_action():
    agent = with_fields(AGENT, discount=0.5, target_noise=0.1)
    slow = {"actor": (0, np.arctanh([0.25, 0.0])), "critic": ([[0, 4, 0], [0, 0, 2]], (1, 3))}
    state = one_layer_each(agent, PAIR, target=slow, critic=(0, (1, 2)))
    batch = batch_of([[1.0], [1.0]], actions=np.zeros((2, 1, 2)), terminated=[False, True])
    _, metrics = agent.learn(state, batch, {"target_noise": jnp.array([[1.0, -6.0]] * 2)})
    y = np.array([1 + 0.5 * min(1 + 4 * 0.35, 3 - 2 * 0.5), 1])  # the noise of -0.6 is clipped to -0.5
    assert float(metrics["critic/loss"]) == pytest.approx(np.mean((1 - y) ** 2 + (2 - y) ** 2), rel=1e-5)


def test_its_td3_is_that_of_the_paper_but_for_normalized_observations():
    assert TD3BC().td3 == dataclasses.replace(TD3(), normalize=True)
    assert TD3BC().requires() == TD3().requires()


def test_a_negative_weight_is_refused_by_name():
    with pytest.raises(UserError, match=re.escape("TD3BC.alpha = -1.0: must be at least 0")):
        ranges.check(TD3BC(alpha=-1.0))
