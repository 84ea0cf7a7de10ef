"""Facts about jaxrl.agents.iql, with networks that are formulas, so that every number is known by hand."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import ranges
from jaxrl.agents.iql import IQL
from jaxrl.agents.parts import Adam, Critic, GaussianPolicy, Net, Value, Windows
from jaxrl.errors import UserError
from jaxrl.ops import losses
from jaxrl.types import Spec
from tests.known import (
    KEY,
    batch_of,
    fitted,
    formula,
    linear_heads,
    metrics_of,
    pull_of,
    random_batch,
    reached,
    same,
    slopes_of,
    state_of,
    with_fields,
)

pytestmark = pytest.mark.usefixtures("quick")

TINY = with_fields(IQL(), hidden=(8,), batch=16)


def gaussian(std: str, size: int) -> GaussianPolicy:
    """Returns the policy of mean m and standard deviation 1, or exp(w)."""

    def moments(p, s):
        mean = jnp.broadcast_to(p["mean"], (*s.shape[:-1], size))
        return mean, jnp.broadcast_to(0.0 if std == "unit" else p["width"], mean.shape)

    return formula(GaussianPolicy(std=std), moments, "moments")


KNOWN = IQL(
    actor=gaussian("unit", 1),
    critic=formula(Critic(agg="min"), lambda p, s, a: linear_heads(p["bias"], p["slope"], a.sum(axis=-1))),
    value=formula(Value(), lambda p, s: p["v"] + s[..., 0]),
)
"""IQL with Q_j(s, a) = b_j + c_j (sum of the chunk), V(s) = v + s, and a Gaussian of mean m and width 1."""
WIDTH_IS_LEARNED = dataclasses.replace(KNOWN, actor=gaussian("learned", 1))
OF_TWO_ACTIONS = with_fields(KNOWN, chunk=2, backup=2, actor=gaussian("learned", 2))
TWO = gaussian("unit", 2)


def known(bias=(0.0, 0.0), slope=(0.0, 0.0), v=0.0, mean=0.0, width=0.0, target=None):
    """Returns the state of `KNOWN` with these parameters; `target` is the slow critic's biases, without slopes."""
    params = {
        "critic": {"bias": np.array(bias), "slope": np.array(slope)},
        "value": {"v": v},
        "actor": {"mean": mean, "width": width},
    }
    slow = None if target is None else {"critic": {"bias": np.array(target), "slope": np.zeros(len(target))}}
    return state_of(params, slow)


def parts(agent, state, batch, noise=0.0) -> dict[str, float]:
    """Returns the four losses, of samples at so many standard deviations."""
    return metrics_of(agent, state, batch, drawn(batch, noise, agent.chunk))


def drawn(batch, noise=0.0, size=1):
    return {"actor_noise": jnp.full((len(batch.obs), size), noise)}


def actor_losses(agent, actor, state, batch, noise=0.0) -> tuple[jax.Array, jax.Array]:
    """Returns the losses of the actor with these parameters: that of imitating, and that of climbing."""
    metrics = agent.loss(state.params | {"actor": actor}, state, batch, drawn(batch, noise))[1]
    return metrics["actor/bc_loss"], metrics["actor/q_loss"]


# The value (Eq. 5)


@pytest.mark.parametrize(("level", "weights"), [(0.5, (0.5, 0.5)), (0.9, (0.9, 0.1))])
def test_the_value_is_drawn_to_the_slow_critic_more_from_below_than_from_above(level, weights):
    state = known(bias=(9, 9), v=1.0, target=(3.0, 4.0))  # the lower head counts, and not the fast critic
    batch = batch_of([[0.0], [0.0]], obs=[[0.0], [5.0]])  # V = 1 and 6
    wanted = (weights[0] * 2**2 + weights[1] * 3**2) / 2
    assert parts(dataclasses.replace(KNOWN, expectile=level), state, batch)["value/loss"] == pytest.approx(wanted)


@pytest.mark.parametrize(("head", "bias", "slope"), [("mse", 0, 1), ("bce", -30, 60)])
@pytest.mark.parametrize("level", [0.5, 0.9])
def test_the_expectile_of_zero_and_one_is_the_level_itself(head, bias, slope, level):
    agent, state = with_fields(KNOWN, expectile=level, head=head), known((bias, bias), (slope, slope))
    batch = batch_of([[0.0], [0.0]], actions=[[[0.0]], [[1.0]]])
    loss = lambda value: agent.loss(state.params | {"value": value}, state, batch, drawn(batch))[1]["value/loss"]  # noqa: E731
    value = fitted(loss, state.params["value"])
    assert float(losses.value_of(value["v"], head)) == pytest.approx(level, abs=0.005)


# The critic (Eq. 6)


def target(agent, state, batch) -> list[float]:
    return agent.td_target(state, batch).tolist()


def test_the_critic_learns_the_reward_and_the_online_value_after_it():
    state = known(bias=(1.0, 2.0), v=3.0, target=(50.0, 50.0))
    batch = batch_of([[2.0], [2.0]], terminated=[False, True], next_obs=[[7.0], [7.0]])
    agent = with_fields(KNOWN, discount=0.9)
    assert target(agent, state, batch) == pytest.approx([2 + 0.9 * 10, 2])
    loss = parts(agent, state, batch)["critic/loss"]
    assert loss == pytest.approx(((10**2 + 9**2) + (1**2 + 0**2)) / 2)  # the sum over the heads


def test_returns_of_several_steps_bootstrap_where_the_window_ends():
    state, agent = known(v=8.0), with_fields(KNOWN, chunk=1, backup=5, discount=0.5)
    assert target(agent, state, batch_of(np.ones((1, 5)))) == pytest.approx([1.9375 + 8 / 32])
    batch = batch_of(np.ones((1, 5)), valid=[[1, 1, 0, 0, 0]])
    assert target(agent, state, batch) == pytest.approx([1.5 + 8 / 4])


def test_probabilities_are_learned_by_cross_entropy_of_a_target_that_is_one():
    agent, state = with_fields(KNOWN, head="bce", discount=0.5), known(bias=(0.3, -2.0), v=0.0)
    batch = batch_of([[0.25], [0.9], [-0.6]])
    wanted = np.array([0.5, 1.0, 0.0])
    np.testing.assert_allclose(target(agent, state, batch), wanted, atol=1e-6)
    p = 1 / (1 + np.exp([[-0.3], [2.0]]))
    entropy = -(wanted[None] * np.log(p) + (1 - wanted[None]) * np.log(1 - p))
    found = parts(agent, state, batch)["critic/loss"]
    assert found == pytest.approx(entropy.sum(axis=0).mean(), rel=1e-5)


ENDS = {  # whole, terminated after one step, truncated after one
    "rewards": [[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]],
    "valid": [[1, 1], [1, 0], [1, 0]],
    "terminated": [False, True, False],
}


@pytest.mark.parametrize(
    ("chunk", "cut", "weight"), [(2, "keep", [1, 1, 0]), (2, "drop", [1, 0, 0]), (1, "keep", [1, 1, 1])]
)
def test_windows_that_are_cut_short_count_in_all_losses_only_as_far_as_they_should(chunk, cut, weight):
    agent = with_fields(KNOWN, actor={1: KNOWN.actor, 2: TWO}[chunk], chunk=chunk, backup=2)
    agent = with_fields(agent, cut=cut, discount=0.5, expectile=0.5, alpha=0.0)
    found = parts(agent, known(v=4.0), batch_of(**ENDS))
    wanted = np.array([1.5 + 1, 1, 1 + 2])  # where a window of a single step is whole, its own discount counts
    assert found["critic/loss"] == pytest.approx(2 * (wanted**2 * weight).sum() / 3)
    assert found["value/loss"] == pytest.approx(0.5 * 16 * sum(weight) / 3)
    assert found["actor/bc_loss"] == pytest.approx(chunk * 0.5 * math.log(2 * math.pi) * sum(weight) / 3, rel=1e-5)


# The actor (Eq. 7)


def density(x, mean, std=1.0) -> float:
    return -0.5 * ((x - mean) / std) ** 2 - math.log(std) - 0.5 * math.log(2 * math.pi)


def test_imitation_is_weighted_by_the_exponent_of_the_advantage_up_to_100():
    agent = dataclasses.replace(KNOWN, alpha=2.0)
    state = known(slope=(1, 3), v=0.5, mean=0.1)
    batch = batch_of(np.zeros((3, 1)), actions=[[[0.9]], [[-0.2]], [[0.4]]], obs=[[0.0], [0.0], [-9.0]])
    weights = [math.exp(2 * (0.9 - 0.5)), math.exp(2 * (-0.6 - 0.5)), 100.0]
    np.testing.assert_allclose(agent.advantage_weight(state, batch), weights, rtol=1e-5)
    found = parts(agent, state, batch)
    wanted = -np.mean([w * density(x, 0.1) for w, x in zip(weights, (0.9, -0.2, 0.4), strict=True)])
    assert found["actor/bc_loss"] == pytest.approx(wanted, rel=1e-5) and found["actor/q_loss"] == 0


@pytest.mark.parametrize(("advantage_of", "weight"), [("online", math.exp(2.0)), ("target", math.exp(-1.0))])
def test_the_advantage_is_judged_by_the_critic_that_is_asked(advantage_of, weight):
    state = known(bias=(2.0, 5.0), target=(-1.0, 7.0))
    agent = dataclasses.replace(KNOWN, alpha=1.0, advantage_of=advantage_of)
    found = agent.advantage_weight(state, batch_of([[0.0]]))
    np.testing.assert_allclose(found, [weight], rtol=1e-6)


def test_a_weighted_gaussian_learns_the_weighted_mean_and_width_of_the_data():
    agent, state = dataclasses.replace(WIDTH_IS_LEARNED, alpha=2.0), known(slope=(1, 1))
    actions = np.array([-0.8, -0.1, 0.3, 0.9])
    weights = np.exp(2 * actions) / np.exp(2 * actions).sum()
    batch = batch_of(np.zeros((4, 1)), actions=actions[:, None, None])
    loss = lambda actor: sum(actor_losses(agent, actor, state, batch))  # noqa: E731
    actor = fitted(loss, state.params["actor"])
    mean = weights @ actions
    assert float(actor["mean"]) == pytest.approx(mean, abs=0.002)
    assert math.exp(float(actor["width"])) == pytest.approx(math.sqrt(weights @ (actions - mean) ** 2), rel=0.005)


def test_climbing_is_relative_to_the_critics_size_next_to_plain_imitation():
    agent = dataclasses.replace(KNOWN, extraction="ddpgbc", alpha=0.3)
    batch = batch_of(np.zeros((2, 1)), actions=[[[0.5]], [[-0.5]]])

    def values(state, noise=0.7):
        both = lambda actor: actor_losses(agent, actor, state, batch, noise)  # noqa: E731
        return both(state.params["actor"]), jax.jacrev(both)(state.params["actor"])

    state = known(slope=(2, 3), bias=(1.0, 1.0), mean=0.1)  # the lower head's slope is 2; the noise does not matter
    (imitation, climb), (pull, push) = values(state)
    assert float(imitation) == pytest.approx(-0.3 * np.mean([density(0.5, 0.1), density(-0.5, 0.1)]), rel=1e-5)
    assert float(climb) == pytest.approx(-1.0) and float(push["mean"]) == pytest.approx(-2 / 1.2, rel=1e-5)
    assert float(pull["mean"]) == pytest.approx(0.3 * 0.1, rel=1e-5)
    _, (_, scaled) = values(known(slope=(20, 30), bias=(10.0, 10.0), mean=0.1))
    assert float(scaled["mean"]) == pytest.approx(float(push["mean"]), rel=1e-5)
    _, (_, outside) = values(known(slope=(2, 3), bias=(1.0, 1.0), mean=1.2))
    assert float(outside["mean"]) == 0  # the action is clipped before it is valued


def test_a_learned_width_is_sampled_from_and_a_width_of_one_is_not():
    batch = batch_of(np.zeros((1, 1)))
    state = known(slope=(2, 2), bias=(1.0, 1.0), mean=0.1, width=math.log(0.4))
    learned = (WIDTH_IS_LEARNED, 1 + 2 * (0.1 + 0.4 * 0.5), (2, 2 * 0.4 * 0.5))
    for agent, value, slopes in ((KNOWN, 1.2, (2, 0)), learned):
        agent = dataclasses.replace(agent, extraction="ddpgbc", alpha=0.0)
        push = jax.grad(lambda actor, agent=agent: actor_losses(agent, actor, state, batch, 0.5)[1])
        found = push(state.params["actor"])
        assert (float(found["mean"]), float(found["width"])) == pytest.approx([-x / value for x in slopes], rel=1e-5)


@pytest.mark.parametrize("extraction", ["awr", "ddpgbc"])
def test_windows_without_any_valid_step_teach_the_actor_nothing(extraction):
    agent = dataclasses.replace(KNOWN, extraction=extraction, alpha=1.0)
    state = known(slope=(2, 2), bias=(1.0, 1.0), mean=0.1)
    nothing = batch_of(np.zeros((2, 1)), valid=np.zeros((2, 1)))
    pull = pull_of(agent, state, nothing, drawn(nothing))
    assert not any(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(pull))


# An update


@pytest.mark.parametrize("extraction", ["awr", "ddpgbc"])
def test_each_loss_moves_its_own_network_alone(extraction):
    agent = dataclasses.replace(WIDTH_IS_LEARNED, extraction=extraction, alpha=1.0)
    state, batch = known((1, 2), (0.5, 0.5), 0.3, 0.1, -1.0), random_batch(0, length=1, spec=Spec(1, 1))
    held, past = (slopes_of(agent, state, batch, drawn(batch, 1.0), through) for through in (True, False))
    assert reached(held["value/loss"]) == {"value"} and reached(held["critic/loss"]) == {"critic"}
    assert reached(past["actor/bc_loss"]) == {"actor"}
    assert reached(past["actor/q_loss"]) == ({"actor"} if extraction == "ddpgbc" else set())
    alone = jax.tree.map(lambda x, y: x + y, past["actor/bc_loss"]["actor"], past["actor/q_loss"]["actor"])
    whole = pull_of(agent, state, batch, drawn(batch, 1.0))
    for ours, theirs in zip(jax.tree.leaves(whole["actor"]), jax.tree.leaves(alone), strict=True):
        assert float(ours) == pytest.approx(float(theirs), rel=1e-5) and float(ours) != 0


def test_weighted_imitation_needs_no_random_number_and_climbing_with_a_width_does():
    batch, other = random_batch(1, length=1), jax.random.key(7)
    moved = {}
    for extraction in ("awr", "ddpgbc"):
        agent = with_fields(TINY, extraction=extraction, std="learned")
        state = jax.jit(agent.init, static_argnums=1)(KEY, Spec(3, 2))
        update = jax.jit(agent.update)
        moved[extraction] = same(update(state, batch, KEY)[0], update(state, batch, other)[0])
    assert moved == {"awr": True, "ddpgbc": False}


def test_the_target_follows_the_critic_from_before_the_step():
    agent = with_fields(TINY, tau=0.25)
    state = jax.jit(agent.init, static_argnums=1)(KEY, Spec(3, 2))
    update, batch = jax.jit(agent.update), random_batch(1, length=1)
    after, metrics = update(state, batch, KEY)
    assert same(after.target, state.target) and not same(after.params["critic"], state.params["critic"])
    twice, _ = update(after, batch, KEY)
    wanted = jax.tree.map(lambda slow, fast: 0.75 * slow + 0.25 * fast, after.target["critic"], after.params["critic"])
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
    action, noise = act(OF_TWO_ACTIONS, state)
    assert action.shape == (4, 2, 1)
    np.testing.assert_allclose(action[..., 0], np.clip(0.6 + 0.5 * noise[:, 0], -1, 1), atol=1e-6)
    np.testing.assert_allclose(act(OF_TWO_ACTIONS, state, greedy=True)[0], np.full((4, 2, 1), 0.6), atol=1e-6)
    warm = dataclasses.replace(OF_TWO_ACTIONS, eval_temperature=0.2)
    found, noise = act(warm, state, greedy=True)
    np.testing.assert_allclose(found[..., 0], np.clip(0.6 + 0.1 * noise[:, 0], -1, 1), atol=1e-6)


def test_of_several_samples_the_one_that_the_lowest_head_likes_is_taken():
    state = known(slope=(1, -3), mean=0.1)  # min(a, -3 a) is highest at zero
    action, noise = act(dataclasses.replace(KNOWN, num_samples=8), state)
    samples = np.clip(0.1 + noise[..., 0], -1, 1)
    best = np.minimum(samples, -3 * samples).argmax(axis=1)
    np.testing.assert_allclose(action[:, 0, 0], samples[np.arange(4), best], atol=1e-6)


# Refusals


@pytest.mark.parametrize(
    ("agent", "message"),
    [
        (IQL(Windows(chunk=3)), "IQL.windows.backup = 1: must be at least 3"),
        (IQL(actor=GaussianPolicy(Net((8, 0)))), "IQL.actor.net.hidden = (8, 0): must be at least 1"),
        (IQL(critic=Critic(Net((0,)))), "IQL.critic.net.hidden = (0,): must be at least 1"),
        (IQL(value=Value(Net((0,)))), "IQL.value.net.hidden = (0,): must be at least 1"),
        (IQL(critic=Critic(heads=0)), "IQL.critic.heads = 0: must be at least 1"),
        (IQL(critic=Critic(head="bce")), "IQL.value.head = 'mse': must be that of the critic, 'bce'"),
        (IQL(num_samples=0), "IQL.num_samples = 0: must be at least 1"),
        (IQL(adam=Adam(-1.0)), "IQL.adam.lr = -1.0: must be at least 0"),
        (IQL(alpha=-1.0), "IQL.alpha = -1.0: must be at least 0"),
        (IQL(eval_temperature=-1.0), "IQL.eval_temperature"),
        (IQL(Windows(discount=1.5)), "IQL.windows.discount = 1.5: must be in [0, 1]"),
        (IQL(critic=Critic(tau=-0.1)), "IQL.critic.tau = -0.1: must be in [0, 1]"),
        (IQL(expectile=jnp.array([0.5, 1.1])), "IQL.expectile"),
    ],
)
def test_values_out_of_range_are_refused_by_name(agent, message):
    with pytest.raises(UserError, match=re.escape(message)):
        ranges.check(agent)
