"""Facts about jaxrl.agents.awac, with networks that are formulas, so that every number is known by hand."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl import ranges
from jaxrl.agents.awac import AWAC
from jaxrl.agents.parts import Adam, Critic, GaussianPolicy, Net, Transitions
from jaxrl.errors import UserError
from jaxrl.ops.normalizer import Normalizer
from tests.known import (
    KEY,
    NARROW,
    batch_of,
    formula,
    gradient_of,
    jitted,
    leaning,
    lines,
    same,
    state_of,
    with_fields,
)

pytestmark = pytest.mark.usefixtures("quick")


KNOWN = AWAC(
    actor=formula(GaussianPolicy(std="learned"), leaning, "moments"),
    critic=formula(Critic(agg="min"), lines),
)
"""AWAC with Q_j(s, a) = b_j + c_j a + s, and a policy of mean m + l s and width exp(w)."""


def known(bias=(0.0, 0.0), slope=(0.0, 0.0), target=((0.0, 0.0), (0.0, 0.0)), mean=0.0, lean=0.0, width=0.0):
    """Returns the state of `KNOWN` with these parameters; `target` is the slow critic's bias and slope."""
    critic, slow = ({"bias": np.array(x), "slope": np.array(y)} for x, y in ((bias, slope), target))
    params = {"critic": critic, "actor": {"mean": mean, "lean": lean, "width": width}}
    return state_of(params, {"critic": slow}, dict.fromkeys(params, optax.adam(0.0)))


def drawn(noise, next_noise=None):
    """Returns the random numbers of an update: of the policy at the states and, if not 0, at the next ones."""
    noises = {"noise": noise, "next_noise": np.zeros(len(noise)) if next_noise is None else next_noise}
    return {name: np.asarray(values, np.float32)[:, None] for name, values in noises.items()}


def log_density(action, mean, width):
    return -0.5 * ((action - mean) / math.exp(width)) ** 2 - width - 0.5 * math.log(2 * math.pi)


ACTIONS = np.array([0.9, -0.2, 0.4])
BATCH = batch_of(np.zeros((3, 1)), actions=ACTIONS[:, None, None], obs=[[1.0], [2.0], [3.0]])


def imitation(agent, state, noise=(0.5, -1.0, 9.0), batch=BATCH):
    """Returns the actor's loss, its metrics and its gradient."""
    arguments = (agent, state.params["actor"], state, batch, drawn(noise))
    loss, metrics = jitted(AWAC.actor_loss)(*arguments)
    return float(loss), metrics, gradient_of(AWAC.actor_loss)(*arguments)


# The policy


def test_under_a_flat_critic_it_is_behaviour_cloning():
    loss, metrics, pull = imitation(KNOWN, known(bias=(5.0, -3.0), mean=0.1, width=-0.5))
    assert loss == pytest.approx(-np.mean(log_density(ACTIONS, 0.1, -0.5)), rel=1e-5)
    assert float(metrics["actor/weight"]) == 1
    assert float(pull["mean"]) == pytest.approx(-np.mean(ACTIONS - 0.1) / math.exp(-1.0), rel=1e-4)
    assert float(pull["width"]) == pytest.approx(1 - np.mean((ACTIONS - 0.1) ** 2) / math.exp(-1.0), rel=1e-4)


def test_actions_count_by_their_advantage_over_the_policys_own_clipped_action_under_the_lower_critic():
    agent = dataclasses.replace(KNOWN, temperature=0.5)
    state = known(bias=(1.0, 1.5), slope=(1.0, -1.0), mean=0.1, lean=0.2, width=-0.5)
    own = np.clip(0.1 + 0.2 * np.array([1, 2, 3]) + math.exp(-0.5) * np.array([0.5, -1.0, 9.0]), -1, 1)
    assert own[2] == 1
    low = lambda a: np.minimum(1 + a, 1.5 - a)  # noqa: E731
    weights = np.exp((low(ACTIONS) - low(own)) / 0.5)
    found = jitted(AWAC.advantage_weight)(agent, state, BATCH, drawn([0.5, -1.0, 9.0]))
    np.testing.assert_allclose(found, weights, rtol=1e-5)
    loss, _, pull = imitation(agent, state)
    mean = 0.1 + 0.2 * np.array([1, 2, 3])
    assert loss == pytest.approx(-np.mean(weights * log_density(ACTIONS, mean, -0.5)), rel=1e-5)
    # the policy's own action is no way to lower the loss
    assert float(pull["mean"]) == pytest.approx(-np.mean(weights * (ACTIONS - mean)) / math.exp(-1.0), rel=1e-4)


@pytest.mark.parametrize("slope", [30.0, 1e5])
def test_weights_are_bounded_and_stay_finite(slope):
    state = known(slope=(slope, slope), width=-20.0)
    found = jitted(AWAC.advantage_weight)(KNOWN, state, BATCH, drawn([0.0, 0.0, 0.0]))
    np.testing.assert_allclose(found, [100, math.exp(-0.2 * slope / (1 / 3)), 100], rtol=1e-4)
    lower = dataclasses.replace(KNOWN, max_weight=7.0)
    np.testing.assert_allclose(jitted(AWAC.advantage_weight)(lower, state, BATCH, drawn([0.0] * 3))[::2], [7, 7])
    flat = known(slope=(slope, slope), mean=0.1)
    assert all(np.isfinite(leaf) for leaf in imitation(KNOWN, flat)[2].values())


# The critics


def test_the_target_is_what_the_lower_slow_critic_says_of_the_policys_clipped_action_and_ends_with_the_task():
    state = known((9.0, 9.0), target=((1.0, 3.0), (1.0, -1.0)), mean=0.5, lean=-0.1, width=math.log(2.0))
    batch = batch_of(np.full((3, 1), 2.0), terminated=[0, 0, 1], next_obs=np.full((3, 1), 2.0))
    agent, draws = with_fields(KNOWN, discount=0.9), drawn([7.0] * 3, [-0.1, 5.0, 0.0])  # actions 0.1, 1 and 0.3
    found = jitted(AWAC.td_target)(agent, state, batch, draws)
    np.testing.assert_allclose(found, [2 + 0.9 * (2 + 1.1), 2 + 0.9 * (2 + 2), 2], rtol=1e-6)


def test_both_critics_learn_the_target():
    state = known((1.0, 2.0), (1.0, 0.0), target=((4.0, 6.0), (0.0, 0.0)))
    batch = batch_of([[1.0], [1.0]], actions=[[[0.5]], [[0.5]]], valid=[[1], [0]], terminated=[0, 0])
    agent = with_fields(KNOWN, discount=0.5)
    loss, _ = jitted(AWAC.critic_loss)(agent, state.params["critic"], state, batch, drawn([0.0, 0.0]))
    assert float(loss) == pytest.approx(((3 - 1.5) ** 2 + (3 - 2) ** 2) / 2)  # the second row did not happen


# An update


def test_the_critics_step_first_then_the_policy_sees_them_and_last_the_target_does():
    agent = dataclasses.replace(KNOWN, critic_adam=Adam(0.1), actor_adam=Adam(0.01), temperature=1.0)
    agent = with_fields(agent, tau=0.25, discount=0.0)
    batch = batch_of([[5.0]], actions=[[[1.0]]])
    state = known(slope=(0.2, 0.3), mean=-0.5, width=-20.0)
    after, metrics = jitted(AWAC.learn)(agent, state, batch, drawn([0.0]))
    # Adam's first step is its learning rate long, up for what is too low
    np.testing.assert_allclose(after.params["critic"]["slope"], [0.3, 0.4], rtol=1e-5)
    np.testing.assert_allclose(after.params["critic"]["bias"], [0.1, 0.1], rtol=1e-5)
    weight = math.exp(0.4 + 0.1)  # of 0.1 + 0.3 a or 0.1 + 0.4 a
    assert float(metrics["actor/weight"]) == pytest.approx(weight, rel=1e-5)
    assert float(after.params["actor"]["mean"]) == pytest.approx(-0.49, rel=1e-5)
    np.testing.assert_allclose(after.target["critic"]["slope"], [0.25 * 0.3, 0.25 * 0.4], rtol=1e-5)
    assert int(after.step) == 1


def test_the_target_of_the_critics_is_of_the_policy_from_before():
    agent = with_fields(KNOWN, actor_adam=Adam(5.0), discount=0.5)
    state = known(target=((0.0, 0.0), (1.0, 1.0)), mean=-0.5)
    _, metrics = jitted(AWAC.learn)(agent, state, batch_of([[1.0]], actions=[[[1.0]]]), drawn([0.0]))
    assert float(metrics["critic/loss"]) == pytest.approx(2 * (1 - 0.5 * 0.5) ** 2, rel=1e-5)


def test_observations_are_normalized_in_learning_as_in_acting():
    state = known((1.0, 2.0), (1.0, -1.0), mean=0.1, lean=0.5)
    scaled = dataclasses.replace(state, normalizer=Normalizer(jnp.array([1.0]), jnp.array([2.0])))
    raw = batch_of([[1.0]], actions=[[[0.5]]], obs=[[3.0]], next_obs=[[-2.0]])
    units = dataclasses.replace(raw, obs=(raw.obs - 1) / 2, next_obs=(raw.next_obs - 1) / 2)
    learn, draws = jitted(AWAC.learn), drawn([0.3], [0.7])
    assert same(learn(KNOWN, scaled, raw, draws)[0].params, learn(KNOWN, state, units, draws)[0].params)
    calm = KNOWN.act(scaled, jnp.array([[2.0]]), KEY, greedy=True)
    np.testing.assert_allclose(calm, [[[0.35]]], rtol=1e-6)


def test_the_policys_noise_here_is_not_that_at_the_next_states():
    draws = KNOWN.draw(NARROW, batch_of(np.zeros((2000, 1))), KEY)
    columns = np.concatenate([np.asarray(x) for x in draws.values()], axis=1)
    assert columns.shape == (2000, 2) and abs(np.corrcoef(columns, rowvar=False)[0, 1]) < 0.1


# Acting


def test_it_acts_on_a_clipped_sample_and_in_evaluation_on_the_mean():
    state, noise = known(mean=0.6, width=math.log(0.5)), np.asarray(jax.random.normal(KEY, (50, 1)))
    action = KNOWN.act(state, jnp.zeros((50, 1)), KEY)
    np.testing.assert_allclose(action[:, 0], np.clip(0.6 + 0.5 * noise, -1, 1), rtol=1e-5)
    calm = KNOWN.act(state, jnp.zeros((50, 1)), KEY, greedy=True)
    np.testing.assert_allclose(calm, np.full((50, 1, 1), 0.6), rtol=1e-6)


# Refusals


@pytest.mark.parametrize(
    ("agent", "message"),
    [
        (AWAC(actor=GaussianPolicy(Net((8, 0)))), "AWAC.actor.net.hidden = (8, 0): must be at least 1"),
        (AWAC(critic=Critic(Net((0,)))), "AWAC.critic.net.hidden = (0,): must be at least 1"),
        (AWAC(actor_adam=Adam(-1.0)), "AWAC.actor_adam.lr = -1.0: must be at least 0"),
        (AWAC(critic_adam=Adam(-1.0)), "AWAC.critic_adam.lr = -1.0: must be at least 0"),
        (AWAC(temperature=0.0), "AWAC.temperature = 0.0: must be at least 1e-06"),
        (AWAC(max_weight=-1.0), "AWAC.max_weight = -1.0: must be at least 0"),
        (AWAC(Transitions(discount=1.5)), "AWAC.transitions.discount = 1.5: must be in [0, 1]"),
        (AWAC(critic=Critic(tau=-0.1)), "AWAC.critic.tau = -0.1: must be in [0, 1]"),
    ],
)
def test_values_out_of_range_are_refused_by_name(agent, message):
    with pytest.raises(UserError, match=re.escape(message)):
        ranges.check(agent)
