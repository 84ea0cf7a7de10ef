"""Facts about jaxrl.agents.iql, with networks that are formulas, so that every number is known by hand."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.agents.iql import IQL
from jaxrl.errors import UserError
from jaxrl.ops import losses
from jaxrl.types import Spec
from tests.known import (
    KEY,
    Formula,
    batch_of,
    fitted,
    linear_heads,
    pull_of,
    quick_to_compile,
    random_batch,
    same,
    state_of,
)

TINY = IQL(actor_hidden=(8,), critic_hidden=(8,), batch_size=16)


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_to_compile():
        yield


class Known(IQL):
    """IQL with Q_j(s, a) = b_j + c_j (sum of the chunk), V(s) = v + s, and a Gaussian of mean m and width exp(w)."""

    def critic(self):
        return Formula(lambda p, s, a: linear_heads(p["bias"], p["slope"], a.sum(axis=-1)))

    def value(self):
        return Formula(lambda p, s: p["v"] + s[..., 0])

    def actor(self, spec):
        def gaussian(p, s):
            mean = jnp.broadcast_to(p["mean"], (*s.shape[:-1], self.chunk))
            return mean, jnp.broadcast_to(0.0 if self.unit_width else p["width"], mean.shape)

        return Formula(gaussian)


def known(bias=(0.0, 0.0), slope=(0.0, 0.0), v=0.0, mean=0.0, width=0.0, target=None):
    """Returns the state of `Known` with these parameters; `target` is the slow critic's biases, without slopes."""
    params = {
        "critic": {"bias": np.array(bias), "slope": np.array(slope)},
        "value": {"v": v},
        "actor": {"mean": mean, "width": width},
    }
    slow = None if target is None else {"bias": np.array(target), "slope": np.zeros(len(target))}
    return state_of(params, slow)


NO_NOISE = {"actor_noise": jnp.zeros((1, 1))}

# The value (Eq. 5)


def value_loss(agent, state, batch) -> float:
    return float(agent.value_loss(state.params["value"], state, batch))


@pytest.mark.parametrize(("level", "weights"), [(0.5, (0.5, 0.5)), (0.9, (0.9, 0.1))])
def test_the_value_is_drawn_to_the_slow_critic_more_from_below_than_from_above(level, weights):
    state = known(bias=(9, 9), v=1.0, target=(3.0, 4.0))  # the lower head counts, and not the fast critic
    batch = batch_of([[0.0], [0.0]], obs=[[0.0], [5.0]])  # V = 1 and 6
    wanted = (weights[0] * 2**2 + weights[1] * 3**2) / 2
    assert value_loss(Known(expectile=level), state, batch) == pytest.approx(wanted)


@pytest.mark.parametrize(("head", "bias", "slope"), [("mse", 0, 1), ("bce", -30, 60)])
@pytest.mark.parametrize("level", [0.5, 0.9])
def test_the_expectile_of_zero_and_one_is_the_level_itself(head, bias, slope, level):
    agent, state = Known(expectile=level, head=head), known((bias, bias), (slope, slope))
    batch = batch_of([[0.0], [0.0]], actions=[[[0.0]], [[1.0]]])
    value = fitted(lambda value: agent.value_loss(value, state, batch), state.params["value"])
    assert float(losses.value_of(value["v"], head)) == pytest.approx(level, abs=0.005)


# The critic (Eq. 6)


def target(agent, state, batch) -> list[float]:
    return agent.td_target(state, batch).tolist()


def test_the_critic_learns_the_reward_and_the_online_value_after_it():
    state = known(bias=(1.0, 2.0), v=3.0, target=(50.0, 50.0))
    batch = batch_of([[2.0], [2.0]], terminated=[False, True], next_obs=[[7.0], [7.0]])
    agent = Known(discount=0.9)
    assert target(agent, state, batch) == pytest.approx([2 + 0.9 * 10, 2])
    loss = float(agent.critic_loss(state.params["critic"], state, batch))
    assert loss == pytest.approx(((10**2 + 9**2) + (1**2 + 0**2)) / 2)  # the sum over the heads


def test_returns_of_several_steps_bootstrap_where_the_window_ends():
    state, agent = known(v=8.0), Known(chunk=1, backup=5, discount=0.5)
    assert target(agent, state, batch_of(np.ones((1, 5)))) == pytest.approx([1.9375 + 8 / 32])
    batch = batch_of(np.ones((1, 5)), valid=[[1, 1, 0, 0, 0]])
    assert target(agent, state, batch) == pytest.approx([1.5 + 8 / 4])


def test_probabilities_are_learned_by_cross_entropy_of_a_target_that_is_one():
    agent, state = Known(head="bce", discount=0.5), known(bias=(0.3, -2.0), v=0.0)
    batch = batch_of([[0.25], [0.9], [-0.6]])
    wanted = np.array([0.5, 1.0, 0.0])
    np.testing.assert_allclose(target(agent, state, batch), wanted, atol=1e-6)
    p = 1 / (1 + np.exp([[-0.3], [2.0]]))
    entropy = -(wanted[None] * np.log(p) + (1 - wanted[None]) * np.log(1 - p))
    found = float(agent.critic_loss(state.params["critic"], state, batch))
    assert found == pytest.approx(entropy.sum(axis=0).mean(), rel=1e-5)


ENDS = {  # whole, terminated after one step, truncated after one
    "rewards": [[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]],
    "valid": [[1, 1], [1, 0], [1, 0]],
    "terminated": [False, True, False],
}


@pytest.mark.parametrize(
    ("chunk", "cut_windows", "weight"), [(2, "keep", [1, 1, 0]), (2, "drop", [1, 0, 0]), (1, "keep", [1, 1, 1])]
)
def test_windows_that_are_cut_short_count_in_all_losses_only_as_far_as_they_should(chunk, cut_windows, weight):
    agent = Known(chunk=chunk, backup=2, cut_windows=cut_windows, discount=0.5, expectile=0.5, alpha=0.0)
    state, batch = known(v=4.0), batch_of(**ENDS)
    wanted = np.array([1.5 + 1, 1, 1 + 2])  # where a window of a single step is whole, its own discount counts
    critic = float(agent.critic_loss(state.params["critic"], state, batch))
    assert critic == pytest.approx(2 * (wanted**2 * weight).sum() / 3)
    assert value_loss(agent, state, batch) == pytest.approx(0.5 * 16 * sum(weight) / 3)
    imitation, _ = agent.actor_losses(state.params["actor"], state, batch, jnp.zeros((3, chunk)))
    assert float(imitation) == pytest.approx(chunk * 0.5 * math.log(2 * math.pi) * sum(weight) / 3, rel=1e-5)


# The actor (Eq. 7)


def density(x, mean, std=1.0) -> float:
    return -0.5 * ((x - mean) / std) ** 2 - math.log(std) - 0.5 * math.log(2 * math.pi)


def test_imitation_is_weighted_by_the_exponent_of_the_advantage_up_to_100():
    agent = Known(alpha=2.0)
    state = known(slope=(1, 3), v=0.5, mean=0.1)
    batch = batch_of(np.zeros((3, 1)), actions=[[[0.9]], [[-0.2]], [[0.4]]], obs=[[0.0], [0.0], [-9.0]])
    weights = [math.exp(2 * (0.9 - 0.5)), math.exp(2 * (-0.6 - 0.5)), 100.0]
    np.testing.assert_allclose(agent.advantage_weight(state, batch), weights, rtol=1e-5)
    imitation, climb = agent.actor_losses(state.params["actor"], state, batch, NO_NOISE["actor_noise"])
    wanted = -np.mean([w * density(x, 0.1) for w, x in zip(weights, (0.9, -0.2, 0.4), strict=True)])
    assert float(imitation) == pytest.approx(wanted, rel=1e-5) and float(climb) == 0


@pytest.mark.parametrize(("advantage_of", "weight"), [("online", math.exp(2.0)), ("target", math.exp(-1.0))])
def test_the_advantage_is_judged_by_the_critic_that_is_asked(advantage_of, weight):
    state = known(bias=(2.0, 5.0), target=(-1.0, 7.0))
    found = Known(alpha=1.0, advantage_of=advantage_of).advantage_weight(state, batch_of([[0.0]]))
    np.testing.assert_allclose(found, [weight], rtol=1e-6)


def test_a_weighted_gaussian_learns_the_weighted_mean_and_width_of_the_data():
    agent, state = Known(alpha=2.0, unit_width=False), known(slope=(1, 1))
    actions = np.array([-0.8, -0.1, 0.3, 0.9])
    weights = np.exp(2 * actions) / np.exp(2 * actions).sum()
    batch = batch_of(np.zeros((4, 1)), actions=actions[:, None, None])
    loss = lambda actor: sum(agent.actor_losses(actor, state, batch, jnp.zeros((4, 1))))  # noqa: E731
    actor = fitted(loss, state.params["actor"])
    mean = weights @ actions
    assert float(actor["mean"]) == pytest.approx(mean, abs=0.002)
    assert math.exp(float(actor["width"])) == pytest.approx(math.sqrt(weights @ (actions - mean) ** 2), rel=0.005)


def test_climbing_is_relative_to_the_critics_size_next_to_plain_imitation():
    agent = Known(extraction="ddpgbc", alpha=0.3)
    batch = batch_of(np.zeros((2, 1)), actions=[[[0.5]], [[-0.5]]])

    def parts(state, noise=0.7):
        both = lambda actor: agent.actor_losses(actor, state, batch, jnp.full((2, 1), noise))  # noqa: E731
        return both(state.params["actor"]), jax.jacrev(both)(state.params["actor"])

    state = known(slope=(2, 3), bias=(1.0, 1.0), mean=0.1)  # the lower head's slope is 2; the noise does not matter
    (imitation, climb), (pull, push) = parts(state)
    assert float(imitation) == pytest.approx(-0.3 * np.mean([density(0.5, 0.1), density(-0.5, 0.1)]), rel=1e-5)
    assert float(climb) == pytest.approx(-1.0) and float(push["mean"]) == pytest.approx(-2 / 1.2, rel=1e-5)
    assert float(pull["mean"]) == pytest.approx(0.3 * 0.1, rel=1e-5)
    _, (_, scaled) = parts(known(slope=(20, 30), bias=(10.0, 10.0), mean=0.1))
    assert float(scaled["mean"]) == pytest.approx(float(push["mean"]), rel=1e-5)
    _, (_, outside) = parts(known(slope=(2, 3), bias=(1.0, 1.0), mean=1.2))
    assert float(outside["mean"]) == 0  # the action is clipped before it is valued


def test_a_learned_width_is_sampled_from_and_a_width_of_one_is_not():
    batch, noise = batch_of(np.zeros((1, 1))), jnp.full((1, 1), 0.5)
    state = known(slope=(2, 2), bias=(1.0, 1.0), mean=0.1, width=math.log(0.4))
    for unit_width, value, slopes in ((True, 1.2, (2, 0)), (False, 1 + 2 * (0.1 + 0.4 * 0.5), (2, 2 * 0.4 * 0.5))):
        agent = Known(extraction="ddpgbc", alpha=0.0, unit_width=unit_width)
        push = jax.grad(lambda actor, agent=agent: agent.actor_losses(actor, state, batch, noise)[1])
        found = push(state.params["actor"])
        assert (float(found["mean"]), float(found["width"])) == pytest.approx([-x / value for x in slopes], rel=1e-5)


@pytest.mark.parametrize("extraction", ["awr", "ddpgbc"])
def test_windows_without_any_valid_step_teach_the_actor_nothing(extraction):
    agent, state = Known(extraction=extraction, alpha=1.0), known(slope=(2, 2), bias=(1.0, 1.0), mean=0.1)
    nothing = batch_of(np.zeros((2, 1)), valid=np.zeros((2, 1)))
    pull = pull_of(agent, state, nothing, {"actor_noise": jnp.zeros((2, 1))})
    assert not any(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(pull))


# An update


@pytest.mark.parametrize("extraction", ["awr", "ddpgbc"])
def test_each_loss_moves_its_own_network_alone(extraction):
    agent = Known(extraction=extraction, unit_width=False, alpha=1.0)
    state, batch = known((1, 2), (0.5, 0.5), 0.3, 0.1, -1.0), random_batch(0, length=1, spec=Spec(1, 1))
    noise = jnp.ones((16, 1))
    parts = {
        "value": lambda p: agent.value_loss(p["value"], dataclasses.replace(state, params=p), batch),
        "critic": lambda p: agent.critic_loss(p["critic"], dataclasses.replace(state, params=p), batch),
    }
    for name, part in parts.items():
        for network, pull in jax.grad(part)(state.params).items():
            moved = any(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(pull))
            assert moved is (network == name)
    alone = jax.grad(lambda a: sum(agent.actor_losses(a, state, batch, noise)))(state.params["actor"])
    whole = pull_of(agent, state, batch, {"actor_noise": noise})
    for ours, theirs in zip(jax.tree.leaves(whole["actor"]), jax.tree.leaves(alone), strict=True):
        assert float(ours) == pytest.approx(float(theirs), rel=1e-5) and float(ours) != 0


def test_weighted_imitation_needs_no_random_number_and_climbing_with_a_width_does():
    batch, other = random_batch(1, length=1), jax.random.key(7)
    moved = {}
    for extraction in ("awr", "ddpgbc"):
        agent = dataclasses.replace(TINY, extraction=extraction, unit_width=False)
        state = jax.jit(agent.init, static_argnums=1)(KEY, Spec(3, 2))
        update = jax.jit(agent.update)
        moved[extraction] = same(update(state, batch, KEY)[0], update(state, batch, other)[0])
    assert moved == {"awr": True, "ddpgbc": False}


def test_the_target_follows_the_critic_from_before_the_step():
    agent = dataclasses.replace(TINY, tau=0.25)
    state = jax.jit(agent.init, static_argnums=1)(KEY, Spec(3, 2))
    update, batch = jax.jit(agent.update), random_batch(1, length=1)
    after, metrics = update(state, batch, KEY)
    assert same(after.target, state.target) and not same(after.params["critic"], state.params["critic"])
    twice, _ = update(after, batch, KEY)
    wanted = jax.tree.map(lambda slow, fast: 0.75 * slow + 0.25 * fast, after.target, after.params["critic"])
    for ours, theirs in zip(jax.tree.leaves(twice.target), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    loss, _ = jax.jit(agent.loss)(state.params, state, batch, agent.draw(state.spec, batch, KEY))
    assert float(sum(metrics.values())) == pytest.approx(float(loss), rel=1e-5)


# Acting


def act(agent, state, greedy=False, count=4):
    noise = np.asarray(jax.random.normal(KEY, (count, agent.num_samples, agent.chunk)))
    return np.asarray(agent.act(state, jnp.zeros((count, 1)), KEY, greedy=greedy)), noise


def test_it_acts_on_a_sample_in_the_box_and_in_evaluation_on_the_mean():
    state = known(mean=0.6, width=math.log(0.5))
    agent = Known(unit_width=False, chunk=2, backup=2)
    action, noise = act(agent, state)
    assert action.shape == (4, 2, 1)
    np.testing.assert_allclose(action[..., 0], np.clip(0.6 + 0.5 * noise[:, 0], -1, 1), atol=1e-6)
    np.testing.assert_allclose(act(agent, state, greedy=True)[0], np.full((4, 2, 1), 0.6), atol=1e-6)
    warm = dataclasses.replace(agent, eval_temperature=0.2)
    found, noise = act(warm, state, greedy=True)
    np.testing.assert_allclose(found[..., 0], np.clip(0.6 + 0.1 * noise[:, 0], -1, 1), atol=1e-6)


def test_of_several_samples_the_one_that_the_lowest_head_likes_is_taken():
    state = known(slope=(1, -3), mean=0.1)  # min(a, -3 a) is highest at zero
    action, noise = act(Known(num_samples=8), state)
    samples = np.clip(0.1 + noise[..., 0], -1, 1)
    best = np.minimum(samples, -3 * samples).argmax(axis=1)
    np.testing.assert_allclose(action[:, 0, 0], samples[np.arange(4), best], atol=1e-6)


# Refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chunk": 3}, "IQL.backup = 1: must be at least 3"),
        ({"actor_hidden": (8, 0)}, "IQL.actor_hidden"),
        ({"critic_hidden": (0,)}, "IQL.critic_hidden"),
        ({"critics": 0}, "IQL.critics = 0: must be at least 1"),
        ({"num_samples": 0}, "IQL.num_samples = 0: must be at least 1"),
        ({"lr": -1.0}, "IQL.lr = -1.0: must be at least 0"),
        ({"alpha": -1.0}, "IQL.alpha = -1.0: must be at least 0"),
        ({"eval_temperature": -1.0}, "IQL.eval_temperature"),
        ({"discount": 1.5}, "IQL.discount = 1.5: must be in [0, 1]"),
        ({"tau": -0.1}, "IQL.tau = -0.1: must be in [0, 1]"),
        ({"expectile": np.array([0.5, 1.1])}, "IQL.expectile"),
    ],
)
def test_values_out_of_range_are_refused_by_name(fields, message):
    with pytest.raises(UserError, match=re.escape(message)):
        IQL(**fields).check()
