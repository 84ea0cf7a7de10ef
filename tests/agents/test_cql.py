"""Facts about jaxrl.agents.cql, with networks that are formulas, so that every number is known by hand."""

import dataclasses
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats

from jaxrl import ranges
from jaxrl.agents.cql import CQL, RETURN
from jaxrl.agents.parts import Adam, Critic, Net, SquashedGaussianPolicy, Transitions
from jaxrl.data.files import Dataset
from jaxrl.errors import UserError
from jaxrl.ops.normalizer import Normalizer
from jaxrl.replay import loading
from jaxrl.replay.loading import from_dataset
from jaxrl.types import Spec
from tests.known import (
    KEY,
    NARROW,
    Descent,
    batch_of,
    formula,
    jitted,
    leaning,
    lines,
    metrics_of,
    pull_of,
    reached,
    same,
    slopes_of,
    state_of,
    with_fields,
)

pytestmark = pytest.mark.usefixtures("quick")


KNOWN = CQL(
    actor=formula(SquashedGaussianPolicy(), leaning, "moments"),
    critic=formula(Critic(agg="min"), lines),
    actor_adam=Descent(3e-5),
    critic_adam=Descent(3e-4),
    samples=2,
)
"""CQL with Q_j(s, a) = b_j + c_j (sum of the action) + s, and a policy of mean m + l s and width exp(w)."""
LEARNED = dataclasses.replace(KNOWN, lagrange=True)
CALIBRATED = dataclasses.replace(KNOWN, calibrated=True)


def known(bias=(0.0, 0.0), slope=(0.0, 0.0), target=None, spec=NARROW, **scalars):
    """Returns the state of `KNOWN` with these parameters, 0 where none is given; `target` is a bias and a slope."""
    scalars = {"mean": np.zeros(spec.action)} | dict.fromkeys(("lean", "width", "entropy", "lagrange"), 0.0) | scalars
    params = {
        "actor": {name: scalars[name] for name in ("mean", "lean", "width")},
        "entropy": scalars["entropy"],
        "critic": {"bias": np.array(bias), "slope": np.array(slope)},
        "lagrange": scalars["lagrange"],
    }
    slow = None if target is None else {"critic": dict(zip(("bias", "slope"), map(np.array, target), strict=True))}
    return state_of(params, slow, LEARNED.optimizers(), spec)


def drawn(count=1, samples=1, size=1, **named):
    """Returns random numbers of an update that are all zero, unless given."""
    many, one = jnp.zeros((count, samples, size)), jnp.zeros((count, size))
    draws = {"uniform": many, "here": many, "next": many, "policy": one, "target": one[:, None]}
    return draws | {name: jnp.asarray(value, jnp.float32) for name, value in named.items()}


def log_density(u, mean=0.0, width=0.0):
    """Returns the log density of tanh(u) in float64, u a Gaussian of this mean and exp(width)."""
    return scipy.stats.norm.logpdf(u, mean, np.exp(width)) + 2 * np.log(np.cosh(u))


# The conservative term


def soft_maximum(agent, state, batch, draws):
    return jitted(CQL.soft_maximum)(agent, state.params["critic"], state, batch, draws)


def excess(agent, state, batch, draws):
    return jitted(CQL.excess)(agent, state.params["critic"], state, batch, draws)


@pytest.mark.parametrize("size", [1, 3])
def test_a_flat_critic_and_a_uniform_policy_are_over_by_the_logarithm_of_all_samples_over_their_density(size):
    spec, (half,) = Spec(1, size), [scipy.optimize.brentq(lambda u: log_density(u) - math.log(0.5), 0, 1)]
    noise = np.full((2, 10, size), half)  # where a squashed standard Gaussian has density 1/2 per entry
    draws = drawn(2, 10, size, uniform=np.zeros((2, 10, size)), here=noise, next=-noise)
    batch = dataclasses.replace(batch_of(np.zeros((2, 1))), actions=jnp.zeros((2, 1, size)))
    state = known(bias=(7.0, -2.0), spec=spec)
    found = soft_maximum(dataclasses.replace(KNOWN, samples=10), state, batch, draws)
    wanted = np.array([7.0, -2.0])[:, None] + math.log(30 * 2**size)
    np.testing.assert_allclose(found, np.broadcast_to(wanted, (2, 2)), rtol=1e-5)


BATCH = {"obs": [[0.5]], "next_obs": [[-1.0]], "actions": [[[0.2]]]}
MIXED = {"bias": (1.0, 2.0), "slope": (1.0, -3.0), "mean": 0.3, "lean": 0.4, "width": -1.5}
NOISE = {"uniform": [[[0.9], [-0.4]]], "here": [[[1.0], [-0.5]]], "next": [[[0.2], [-2.5]]]}


def mixed():
    """Returns (actions [6], log densities [6]) of MIXED with NOISE: uniform ones, the policy's at s', then at s."""
    after, here = (0.3 + 0.4 * s + np.exp(-1.5) * np.ravel(NOISE[name]) for s, name in ((-1.0, "next"), (0.5, "here")))
    flat = np.full(2, math.log(0.5))
    density = [flat, log_density(after, 0.3 + 0.4 * -1, -1.5), log_density(here, 0.3 + 0.4 * 0.5, -1.5)]
    return np.concatenate([np.ravel(NOISE["uniform"]), np.tanh(after), np.tanh(here)]), np.concatenate(density)


@pytest.mark.parametrize("soft", [1.0, 2.5])
def test_actions_count_for_less_the_more_often_they_are_sampled_and_all_are_judged_at_the_state(soft):
    action, density = mixed()
    assert density[2:].min() < density[0] < density[2:].max()  # so that the sign of the correction matters
    agent = dataclasses.replace(KNOWN, soft=soft)
    found = soft_maximum(agent, known(**MIXED), batch_of([[0.0]], **BATCH), drawn(samples=2, **NOISE))
    q = np.array([[1.0], [2.0]]) + np.array([[1.0], [-3.0]]) * action + 0.5
    np.testing.assert_allclose(found[:, 0], soft * scipy.special.logsumexp((q - density) / soft, axis=1), rtol=1e-5)


@jax.jit
def pull_of_term(agent, state, batch, draws):
    """Returns the gradients of the conservative term of both critics: on the critics, and on the policy."""

    def term(critic, actor):
        there = dataclasses.replace(state, params=state.params | {"actor": actor})
        return agent.excess(critic, there, batch, draws).sum()

    return jax.grad(term, argnums=(0, 1))(state.params["critic"], state.params["actor"])


def test_the_term_pulls_the_soft_maximum_down_and_the_datas_value_up_and_leaves_the_policy_alone():
    action, density = mixed()
    pull, policy = pull_of_term(KNOWN, known(**MIXED), batch_of([[0.0]], **BATCH), drawn(samples=2, **NOISE))
    share = scipy.special.softmax(np.array([[1.0], [-3.0]]) * action - density, axis=1)
    np.testing.assert_allclose(pull["slope"], share @ action - 0.2, rtol=1e-4)
    np.testing.assert_allclose(pull["bias"], [0, 0], atol=1e-6)
    assert not any(np.any(leaf) for leaf in policy.values())


def test_an_excess_below_its_bound_is_the_bound_and_has_no_gradient():
    batch = batch_of([[0.0], [0.0]], actions=[[[1.0]], [[-1.0]]])  # worth 9 and -9; the samples, at 0, nothing
    state, draws = known(slope=(9.0, 9.0)), drawn(2, 2)
    soft = scipy.special.logsumexp(np.repeat([-math.log(0.5), -log_density(0.0), -log_density(0.0)], 2))
    for bound, wanted in ((-1e9, soft), (-5.0, (-5 + soft + 9) / 2)):
        found = excess(dataclasses.replace(KNOWN, lowest_gap=bound), state, batch, draws)
        np.testing.assert_allclose(found, [wanted, wanted], rtol=1e-5)
    pull, _ = pull_of_term(dataclasses.replace(KNOWN, lowest_gap=-5.0), state, batch, draws)
    np.testing.assert_allclose(pull["slope"], [0.5, 0.5], rtol=1e-5)  # of the second row alone


# Cal-QL


def test_returns_of_minus_infinity_calibrate_nothing_bit_for_bit():
    keys = jax.random.split(KEY, 3)
    batch = batch_of(
        [[1.0]] * 16, obs=jax.random.normal(keys[0], (16, 1)), next_obs=jax.random.normal(keys[1], (16, 1))
    )
    batch = dataclasses.replace(batch, extra={RETURN: jnp.full(16, -jnp.inf)})
    state, draws = known(**MIXED), KNOWN.draw(NARROW, batch, keys[2])
    loss = jax.jit(jax.value_and_grad(CQL.loss, argnums=1, has_aux=True))
    plain, calibrated = (loss(agent, state.params, state, batch, draws) for agent in (KNOWN, CALIBRATED))
    assert same(plain, calibrated) and np.isfinite(plain[0][0]) and np.any(plain[1]["critic"]["slope"])


def test_under_a_high_return_only_uniform_actions_are_pushed_down():
    action, density = mixed()
    unknown = [math.nan, -math.inf]
    batch = batch_of([[0.0]] * 3, **{name: np.repeat(value, 3, axis=0) for name, value in BATCH.items()})
    batch = dataclasses.replace(batch, extra={RETURN: jnp.array([6.0, *unknown])})
    draws = drawn(3, 2, **{name: np.repeat(value, 3, axis=0) for name, value in NOISE.items()})
    q = np.array([[1.0], [2.0]]) + np.array([[1.0], [-3.0]]) * action + 0.5
    assert q.max() < 6
    high = np.where(np.arange(6) < 2, q, 6.0)

    state = known(**MIXED)
    found = soft_maximum(CALIBRATED, state, batch, draws)
    for row, values in enumerate((high, q, q)):
        np.testing.assert_allclose(found[:, row], scipy.special.logsumexp(values - density, axis=1), rtol=1e-5)

    share = scipy.special.softmax(high - density, axis=1)[:, :2]
    first = lambda critic: CALIBRATED.soft_maximum(critic, state, batch, draws)[:, 0].sum()  # noqa: E731
    pull = jax.jit(jax.grad(first))(state.params["critic"])
    np.testing.assert_allclose(pull["slope"], share @ action[:2], rtol=1e-4)
    np.testing.assert_allclose(pull["bias"], share.sum(axis=1), rtol=1e-4)
    assert share.sum() > 0.02
    plain = soft_maximum(KNOWN, state, batch, draws)
    np.testing.assert_allclose(plain[:, 0], plain[:, 1], rtol=1e-6)


def test_a_low_return_changes_nothing():
    batch, draws, state = batch_of([[0.0]], **BATCH), drawn(samples=2, **NOISE), known(**MIXED)
    low = dataclasses.replace(batch, extra={RETURN: jnp.array([-9.0])})
    assert same(pull_of_term(CALIBRATED, state, low, draws), pull_of_term(CALIBRATED, state, batch, draws))


def data_and_replay():
    """Returns a dataset of one episode with rewards 0 to 9 doubled less one, and a replay of two, the second at 60."""
    ids = np.arange(11, dtype=np.float32)
    data = Dataset(ids[:, None], ids[:, None] / 11, ids == 10, rewards=ids, masks=(ids != 9).astype(np.float32))
    ring = loading.to_ring(data, types.SimpleNamespace(spec=NARROW), scale=2.0, shift=-1.0)
    place = np.where(np.arange(9) < 5, 50, 60).astype(np.float32)
    own = Dataset(place[:, None], np.zeros((9, 1), np.float32), np.isin(np.arange(9), [4, 8]))
    replay = from_dataset(own, np.full(9, 3.0), np.arange(9) == 3)
    return ring, dataclasses.replace(replay, truncated=jnp.zeros_like(replay.truncated))  # the second goes on


def test_data_and_finished_episodes_of_the_replay_know_their_returns():
    agent = with_fields(CALIBRATED, discount=0.9, batch=64)
    batch = jitted(CQL.sample)(agent, agent.derive_columns(data_and_replay()), KEY)
    obs, found = np.asarray(batch.obs[:, 0]), np.asarray(batch.extra[RETURN])
    wanted = np.array([sum((2 * k - 1) * 0.9 ** (k - t) for k in range(t, 10)) for t in range(10)])
    np.testing.assert_allclose(found[obs < 50], wanted[obs[obs < 50].astype(int)], rtol=1e-5)
    ended = [3 * sum(0.9**k for k in range(left)) for left in (4, 3, 2, 1)]
    assert {round(float(x), 3) for x in found[obs == 50]} == {round(x, 3) for x in ended}
    assert np.isnan(found[obs == 60]).all() and (obs == 60).sum() > 5


def test_returns_that_are_there_stay_as_they_are_and_plain_cql_asks_for_none():
    data, replay = data_and_replay()
    (known,) = CALIBRATED.derive_columns((data,))
    marked = dataclasses.replace(known, extra={RETURN: known.extra[RETURN] + 1})
    again, fresh = CALIBRATED.derive_columns((marked, replay))
    assert again is marked and fresh.extra.keys() == {RETURN} and replay.extra == {}
    assert KNOWN.derive_columns((data, replay)) == (data, replay)


@pytest.mark.parametrize(("mixing", "from_data"), [(0.5, 32), (0.25, 16), (0.0, 0), (1.0, 64)])
def test_a_batch_has_its_share_of_the_data_whatever_their_sizes(mixing, from_data):
    data, replay = data_and_replay()
    agent, sample = with_fields(KNOWN, mixing=mixing, batch=64), jitted(CQL.sample)
    batch = sample(agent, (data, replay), KEY)
    assert (batch.obs < 50).sum() == from_data
    other = dataclasses.replace(agent, mixing=0.3)
    assert same(sample(agent, (replay,), KEY), sample(other, (replay,), KEY))  # one ring is all there is


def test_goals_in_hindsight_cannot_be_calibrated():
    with pytest.raises(UserError, match=re.escape("CQL.calibrated = True: goals are drawn in hindsight")):
        CQL(calibrated=True).init(KEY, Spec(4, 1, goal=2))


# The learned weight of the term


@pytest.mark.parametrize("gap", [0.0, 100.0])
def test_the_multiplier_rises_where_the_excess_is_above_the_gap_and_falls_below_it(gap):
    agent = dataclasses.replace(LEARNED, gap=gap, conservatism=3.0, critic_adam=Descent(0.1))
    state, batch, draws = known(**MIXED, lagrange=0.7), batch_of([[0.0]], **BATCH), drawn(samples=2, **NOISE)
    over = np.asarray(excess(agent, state, batch, draws)).sum() - 2 * gap
    slope = -math.exp(0.7) * 3 * over
    after = jitted(CQL.learn)(agent, state, batch, draws)[0].params["lagrange"]
    assert float(after) == pytest.approx(0.7 - 0.1 * slope, rel=1e-5) and (after > 0.7) == (over > 0) == (gap == 0)
    fixed = jitted(CQL.learn)(dataclasses.replace(agent, lagrange=False), state, batch, draws)[0]
    assert float(fixed.params["lagrange"]) == pytest.approx(0.7)


def test_the_multiplier_is_bounded():
    batch, draws = batch_of([[0.0]], **BATCH), drawn(samples=2, **NOISE)
    weights = [metrics_of(LEARNED, known(lagrange=x), batch, draws)["lagrange/weight"] for x in (-200.0, 0.0, 20.0)]
    np.testing.assert_allclose(weights, [0, 1, 1e6], atol=1e-6)


def test_the_critics_descend_both_errors_plus_the_weighted_excess_over_the_gap():
    batch, draws, state = batch_of([[2.0]], **BATCH), drawn(samples=2, **NOISE), known(**MIXED, lagrange=0.7)
    agent = with_fields(KNOWN, conservatism=3.0, discount=0.0, gap=1.5)
    q = np.array([1 + 0.2 + 0.5, 2 - 3 * 0.2 + 0.5])
    over, (term, _) = (f(agent, state, batch, draws) for f in (excess, pull_of_term))
    for lagrange, weight, gap in ((False, 3.0, 0.0), (True, 3 * math.exp(0.7), 1.5)):
        agent = dataclasses.replace(agent, lagrange=lagrange)
        metrics, pull = (f(agent, state, batch, draws) for f in (metrics_of, pull_of))
        assert metrics["critic/loss"] == pytest.approx(((q - 2) ** 2).sum(), rel=1e-5)
        assert metrics["critic/conservative"] == pytest.approx(float(over.sum()) - 2 * gap, rel=1e-5)
        for name, slope in (("bias", 1), ("slope", 0.2)):
            np.testing.assert_allclose(pull["critic"][name], 2 * (q - 2) * slope + weight * term[name], rtol=1e-5)


# The target


def test_the_target_is_what_the_lower_slow_critic_says_of_an_action_of_the_policy_and_ends_with_the_task():
    state = known(bias=(9.0, 9.0), target=((1.0, 2.0), (1.0, -1.0)), lean=0.1, width=math.log(0.5), entropy=5.0)
    batch = batch_of([[3.0]] * 3, next_obs=[[4.0]] * 3, terminated=[0, 0, 1])
    noise = np.array([-1.0, 2.0, 0.0])
    action = np.tanh(0.4 + 0.5 * noise)
    low = np.minimum(1 + action, 2 - action) + 4
    found = jitted(CQL.td_target)(with_fields(KNOWN, discount=0.9), state, batch, drawn(3, target=noise[:, None, None]))
    np.testing.assert_allclose(found, 3 + 0.9 * low * [1, 1, 0], rtol=1e-5)  # whatever the entropy's weight


def test_the_best_of_several_actions_is_the_target_if_asked():
    state, noise = known(target=((1.0, 2.0), (1.0, -1.0))), np.array([-1.0, 0.4, 3.0])
    low = np.minimum(1 + np.tanh(noise), 2 - np.tanh(noise))
    assert low.argmax() == 1  # what the better critic likes most is another
    agent = with_fields(KNOWN, discount=0.5, max_target=True, samples=3)
    found = jitted(CQL.td_target)(agent, state, batch_of([[0.0]]), drawn(samples=3, target=noise[None, :, None]))
    np.testing.assert_allclose(found, [0.5 * low.max()], rtol=1e-5)
    for best, count in ((True, 3), (False, 1)):
        draws = dataclasses.replace(agent, max_target=best).draw(NARROW, batch_of([[0.0]]), KEY)
        assert draws["target"].shape == (1, count, 1)


# Policy and entropy


def test_the_policy_climbs_the_lower_critic_and_keeps_its_entropy_by_weight():
    state = known(bias=(1.0, 2.0), slope=(1.0, -1.0), mean=0.2, width=-0.5, entropy=math.log(0.3))
    noise = np.array([-1.0, 2.0])
    batch, draws = batch_of([[0.0]] * 2, obs=[[4.0]] * 2), drawn(2, policy=noise[:, None])
    value, pull = (f(KNOWN, state, batch, draws) for f in (metrics_of, pull_of))

    def by_hand(mean):
        u = mean + np.exp(-0.5) * noise
        low = np.minimum(1 + np.tanh(u), 2 - np.tanh(u)) + 4
        return (0.3 * log_density(u, mean, -0.5) - low).mean()

    assert value["actor/loss"] == pytest.approx(by_hand(0.2), rel=1e-5)
    assert float(pull["actor"]["mean"]) == pytest.approx((by_hand(0.2 + 1e-5) - by_hand(0.2 - 1e-5)) / 2e-5, rel=1e-3)


@pytest.mark.parametrize("size", [1, 3])
def test_the_entropy_weighs_more_where_the_policys_falls_below_minus_the_number_of_entries(size):
    spec, batch = Spec(1, size), dataclasses.replace(batch_of([[0.0]]), actions=jnp.zeros((1, 1, size)))

    def pull(entry):  # of a policy whose action has this log density per entry
        state = known(spec=spec, width=-entry - 0.5 * math.log(2 * math.pi))
        return float(pull_of(KNOWN, state, batch, drawn(samples=2, size=size))["entropy"])

    assert pull(1.0) == pytest.approx(0, abs=1e-5)
    assert pull(1.5) == pytest.approx(-0.5 * size, rel=1e-4)  # descent raises the weight
    assert pull(0.5) == pytest.approx(0.5 * size, rel=1e-4)


# An update


def test_every_network_steps_on_what_the_others_were_before():
    agent = with_fields(LEARNED, actor_adam=Descent(0.5), critic_adam=Descent(0.1), tau=0.25, conservatism=2.0)
    state = known(**MIXED, target=((0.0, 1.0), (2.0, 2.0)), lagrange=0.4, entropy=-0.7)
    batch, draws = batch_of([[3.0]], **BATCH), drawn(samples=2, **NOISE, policy=[[0.6]], target=[[[0.3]]])
    after, metrics = jitted(CQL.learn)(agent, state, batch, draws)
    pulls = pull_of(agent, state, batch, draws)
    for name, lr in {"entropy": 0.5, "actor": 0.5, "critic": 0.1, "lagrange": 0.1}.items():
        trees = after.params[name], state.params[name], pulls[name]
        for new, old, slope in zip(*map(jax.tree.leaves, trees), strict=True):
            np.testing.assert_allclose(new, old - lr * slope, rtol=1e-5, atol=1e-6)
            assert np.any(slope)
    slopes = slopes_of(agent, state, batch, draws, through_state=False)
    moved = {"actor/loss": {"actor"}, "critic/loss": {"critic"}, "critic/conservative": {"critic"}}
    assert {name: reached(slopes[name]) for name in moved} == moved
    before = metrics_of(agent, state, batch, draws)
    assert float(metrics["actor/loss"]) == pytest.approx(before["actor/loss"], rel=1e-5)
    for name in ("bias", "slope"):  # the target follows the critics as they are now
        slow = 0.75 * state.target["critic"][name] + 0.25 * after.params["critic"][name]
        np.testing.assert_allclose(after.target["critic"][name], slow, rtol=1e-5)
    assert int(after.step) == 1


def test_steps_that_did_not_happen_teach_nothing():
    agent, state = dataclasses.replace(LEARNED, gap=0.0), known(**MIXED)
    batch, draws = batch_of([[3.0]], valid=[[0]], **BATCH), drawn(samples=2, **NOISE)
    assert same(jitted(CQL.learn)(agent, state, batch, draws)[0].params, state.params)


def test_observations_are_normalized_in_learning_as_in_acting():
    state, raw = known(lean=1.0), batch_of([[3.0]], **BATCH)
    scaled = dataclasses.replace(state, normalizer=Normalizer(jnp.array([1.0]), jnp.array([2.0])))
    draws = drawn(samples=2, **NOISE)
    units = dataclasses.replace(raw, obs=(raw.obs - 1) / 2, next_obs=(raw.next_obs - 1) / 2)
    learn = jitted(CQL.learn)
    assert same(learn(LEARNED, scaled, raw, draws)[0].params, learn(LEARNED, state, units, draws)[0].params)
    action = LEARNED.act(scaled, jnp.array([[5.0]]), KEY, greedy=True)
    np.testing.assert_allclose(action, [[[np.tanh(2.0)]]], rtol=1e-6)


def test_every_random_number_of_an_update_is_its_own():
    draws = KNOWN.draw(NARROW, batch_of(np.zeros((2000, 1))), KEY)
    columns = np.concatenate([np.asarray(x).reshape(2000, -1) for x in draws.values()], axis=1)
    assert columns.shape == (2000, 3 * 2 + 2)
    assert np.abs(np.corrcoef(columns, rowvar=False) - np.eye(8)).max() < 0.1
    uniform = np.asarray(draws["uniform"])
    assert uniform.min() == pytest.approx(-1, abs=0.01) and uniform.max() == pytest.approx(1, abs=0.01)
    assert uniform.std() == pytest.approx(3**-0.5, rel=0.02) and columns[:, 2:].std() == pytest.approx(1, rel=0.02)


# Acting


def test_it_acts_on_a_squashed_sample_and_in_evaluation_on_the_squashed_mean():
    state, noise = known(mean=0.6, width=math.log(0.5)), np.asarray(jax.random.normal(KEY, (50, 1)))
    action = KNOWN.act(state, jnp.zeros((50, 1)), KEY)
    np.testing.assert_allclose(action[:, 0], np.tanh(0.6 + 0.5 * noise), rtol=1e-5)
    calm = KNOWN.act(state, jnp.zeros((50, 1)), KEY, greedy=True)
    np.testing.assert_allclose(calm, np.full((50, 1, 1), np.tanh(0.6)), rtol=1e-6)


# Refusals


@pytest.mark.parametrize(
    ("agent", "message"),
    [
        (CQL(actor=SquashedGaussianPolicy(Net((8, 0)))), "CQL.actor.net.hidden = (8, 0): must be at least 1"),
        (CQL(critic=Critic(Net((0,)))), "CQL.critic.net.hidden = (0,): must be at least 1"),
        (CQL(samples=0), "CQL.samples = 0: must be at least 1"),
        (CQL(soft=0.0), "CQL.soft = 0.0: must be at least 1e-06"),
        (CQL(actor_adam=Adam(-1.0)), "CQL.actor_adam.lr = -1.0: must be at least 0"),
        (CQL(critic_adam=Adam(-1.0)), "CQL.critic_adam.lr = -1.0: must be at least 0"),
        (CQL(conservatism=-1.0), "CQL.conservatism = -1.0: must be at least 0"),
        (CQL(Transitions(discount=1.5)), "CQL.transitions.discount = 1.5: must be in [0, 1]"),
        (CQL(critic=Critic(tau=-0.1)), "CQL.critic.tau = -0.1: must be in [0, 1]"),
        (CQL(mixing=1.5), "CQL.mixing = 1.5: must be in [0, 1]"),
    ],
)
def test_values_out_of_range_are_refused_by_name(agent, message):
    with pytest.raises(UserError, match=re.escape(message)):
        ranges.check(agent)
