"""Facts about CFPI: the operators' closed forms, what may not happen, and the agent that learns what they need."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import ranges
from jaxrl.agents import IQL
from jaxrl.agents.cfpi import CFPI, levels
from jaxrl.agents.parts import MixturePolicy, QuantileCritic, Transitions
from jaxrl.errors import UserError
from jaxrl.networks import repeat_for
from jaxrl.ops import closed_form, losses
from jaxrl.ops.closed_form import ClosedForm, Mixture
from jaxrl.types import Spec
from tests.known import KEY, WIDE, formula, jitted, random_batch, same, state_of, with_fields

pytestmark = pytest.mark.usefixtures("quick")

SLOPE = np.array([0.3, -1.1], np.float32)
MEAN, STD = np.array([[0.2, -0.4]], np.float32), np.array([[0.5, 0.9]], np.float32)
JENSEN = ClosedForm(bound="jensen")
improve = jax.jit(ClosedForm.improve, static_argnums=3)
squared_radii, jensen_squared_radius = jax.jit(closed_form.squared_radii), jax.jit(closed_form.jensen_squared_radius)
log_density = jax.jit(Mixture.log_density)


def linear(actions):
    """A value that is linear in u, the action before tanh."""
    return (jnp.arctanh(actions) * SLOPE.reshape((1,) * (actions.ndim - 1) + (2,))).sum(-1)


def mixture(weights, means, stds) -> Mixture:
    """Returns the density of one row."""
    return Mixture(*(jnp.asarray(x, jnp.float32)[None] for x in (np.log(weights), means, stds)))


ONE = Mixture(jnp.zeros((1, 1)), jnp.asarray(MEAN[:, None]), jnp.asarray(STD[:, None]))


def moved(operator: ClosedForm, behavior: Mixture = ONE, value=linear, key=KEY) -> np.ndarray:
    """Returns u of the improved action."""
    return np.arctanh(np.asarray(improve(operator, key, behavior, value)))[0]


def mahalanobis(u) -> float:
    return float(np.sum(np.square((u - MEAN[0]) / STD[0])))


# One component


@pytest.mark.parametrize(
    ("operator", "squared"),
    [(JENSEN, 1.0), (ClosedForm(bound="lse", stretch=1.0), 1.0), (ClosedForm(bound="lse"), 2.0), (ClosedForm(), 2.0)],
)
def test_the_best_action_of_a_linear_value_lies_at_the_edge_of_the_level_set(operator, squared):
    u = moved(operator)
    variance = np.square(STD[0])
    norm = np.sqrt(np.sum(variance * np.square(SLOPE)))
    np.testing.assert_allclose(u, MEAN[0] + np.sqrt(squared) * variance * SLOPE / norm, rtol=1e-4)
    assert mahalanobis(u) == pytest.approx(squared, rel=1e-3)  # 2 delta, times the official factor
    directions = np.random.default_rng(0).normal(size=(1000, 2))
    edge = MEAN[0] + np.sqrt(squared) * STD[0] * directions / np.linalg.norm(directions, axis=1, keepdims=True)
    assert np.max(edge @ SLOPE) <= u @ SLOPE + 1e-3


def test_the_gradient_is_that_before_tanh():
    value = lambda actions: actions.sum(axis=-1)  # noqa: E731
    u = moved(JENSEN, value=value)
    gradient = 1 - np.square(np.tanh(MEAN[0]))  # at the action it would be 1 in both entries
    step = np.square(STD[0]) * gradient
    np.testing.assert_allclose(u - MEAN[0], step / np.sqrt(step @ gradient), rtol=1e-4)


def test_the_radius_grows_with_delta_and_no_delta_is_the_mean():
    lengths = [mahalanobis(moved(dataclasses.replace(JENSEN, delta=d, delta_high=d))) for d in (0.0, 0.1, 0.5, 2.0)]
    np.testing.assert_allclose(lengths, [0.0, 0.2, 1.0, 4.0], atol=1e-2)


@pytest.mark.parametrize("bound", ["lse", "jensen", "both"])
def test_a_flat_critic_leaves_the_mean(bound):
    u = moved(ClosedForm(bound=bound), value=lambda actions: 0 * actions.sum(axis=-1))
    np.testing.assert_allclose(u, MEAN[0], rtol=1e-5)


def test_of_many_deltas_the_one_that_the_critic_likes_best_is_taken():
    drawing = ClosedForm(bound="jensen", delta=0.2, delta_high=2.0, draws=10)
    uniform = np.asarray(jax.random.uniform(KEY, (1, 10), minval=0.2, maxval=2.0))
    assert mahalanobis(moved(drawing)) == pytest.approx(2 * uniform.max(), rel=1e-3)
    near = lambda actions: -jnp.square(jnp.arctanh(actions) - 1.01 * MEAN[:, None]).sum(axis=-1)  # noqa: E731
    assert mahalanobis(moved(drawing, value=near)) == pytest.approx(2 * uniform.min(), rel=1e-2)
    assert not np.array_equal(moved(drawing), moved(drawing, key=jax.random.key(1)))
    np.testing.assert_array_equal(moved(JENSEN), moved(JENSEN, key=jax.random.key(1)))


def test_many_deltas_at_once_are_what_they_are_alone():
    deltas = jnp.array([0.1, 1.0])
    sweep = jax.jit(jax.vmap(lambda d: ClosedForm(delta=d, delta_high=d).improve(KEY, ONE, linear)))(deltas)
    for together, d in zip(sweep, (0.1, 1.0), strict=True):
        alone = improve(ClosedForm(delta=d, delta_high=d), KEY, ONE, linear)
        np.testing.assert_allclose(together, alone, rtol=1e-5)


# Mixtures


def test_jensens_radius_shrinks_by_how_far_the_means_lie_apart():
    m, std = np.array([0.3, -0.5]), np.array([0.8, 0.6])
    pair = mixture([0.5, 0.5], [m, -m], [std, std])
    found = jensen_squared_radius(pair, jnp.array([[0.5, 1.5]]))
    np.testing.assert_allclose(found[0], np.array([1.0, 3.0]) - np.sum(np.square(m / std)), rtol=1e-4)
    weights, means, stds = [0.2, 0.5, 0.3], np.array([[0.1, 1], [-0.4, 0], [0.6, 0.7]]), np.full((3, 2), 0.9)
    stds[1] = 0.4
    precision = np.array(weights)[:, None] / (stds**2 + closed_form.VARIANCE)
    total = precision.sum(axis=0)
    center = (precision * means).sum(axis=0) / total
    plain = 4.0 - (precision * means**2).sum() + (total * center**2).sum()
    several = mixture(weights, means, stds)
    assert float(jensen_squared_radius(several, jnp.array([[2.0]]))[0, 0]) == pytest.approx(plain, rel=1e-4)
    u = moved(dataclasses.replace(JENSEN, delta=2.0, delta_high=2.0), several)
    direction = np.asarray(SLOPE) / total / np.sqrt(np.sum(np.square(SLOPE) / total))
    np.testing.assert_allclose(u, center + np.sqrt(plain) * direction, rtol=1e-3)


def test_equal_components_are_one():
    equal = mixture([0.3, 0.7], np.repeat(MEAN, 2, 0), np.repeat(STD, 2, 0))
    np.testing.assert_allclose(moved(JENSEN, equal), moved(JENSEN), rtol=1e-4)


def test_the_radius_of_a_light_component_shrinks_by_the_logarithm_of_its_weight():
    for light in (0.4, 0.2):
        pair = mixture([1 - light, light], [[0.0, 0], [1, 1]], [[0.5, 0.5]] * 2)
        squared = squared_radii(pair, jnp.array([[1.0]]))[0, 0]
        np.testing.assert_allclose(squared, [2.0, 2 * max(1 + np.log(light / (1 - light)), 0)], rtol=1e-5, atol=1e-6)
    narrow = mixture([0.5, 0.5], [[0.0], [1]], [[0.1], [0.3]])  # whose density is higher at its mean
    squared = squared_radii(narrow, jnp.array([[1.5]]))[0, 0]
    np.testing.assert_allclose(squared, [3.0, 2 * (1.5 - np.log(3))], rtol=1e-4)


def test_densities_beyond_the_range_of_floats_have_finite_radii():
    sharp = Mixture(jnp.zeros((1, 2)) - jnp.log(2.0), jnp.zeros((1, 2, 300)), jnp.full((1, 2, 300), 1e-2))
    np.testing.assert_allclose(squared_radii(sharp, jnp.array([[0.5]]))[0, 0], 1.0, rtol=1e-6)


def test_without_delta_a_mixture_gives_the_best_mean_among_components_that_count():
    means = np.array([[0.5, -0.5], [-1.0, 0.1], [0.9, -0.9]])  # the critic likes the last one best
    still = ClosedForm(delta=0.0, delta_high=0.0)
    np.testing.assert_allclose(moved(still, mixture([0.46, 0.5, 0.04], means, np.ones((3, 2)))), means[0], rtol=1e-4)
    np.testing.assert_allclose(moved(still, mixture([0.44, 0.5, 0.06], means, np.ones((3, 2)))), means[2], rtol=1e-4)


def test_where_no_component_counts_the_heaviest_does():
    weights = np.full(30, 0.99 / 30)
    weights[7] += 0.01
    means = np.linspace(-1, 1, 30)[:, None] * np.ones((1, 2))
    u = moved(ClosedForm(delta=0.0, delta_high=0.0), mixture(weights, means, np.ones((30, 2))))
    np.testing.assert_allclose(u, means[7], rtol=1e-4)


def test_jensens_candidate_loses_where_it_does_not_exist():
    far = mixture([0.4, 0.6], [[1.0, 1.0], [-1.0, -1.0]], [[0.2, 0.2]] * 2)
    between = lambda actions: -jnp.square(actions).sum(axis=-1)  # noqa: E731  (highest halfway, where no data are)
    assert float(jensen_squared_radius(far, jnp.array([[0.5]]))[0, 0]) < 0
    assert np.abs(moved(ClosedForm(), far, between)).min() > 0.5
    np.testing.assert_allclose(moved(JENSEN, far, between), [-1, -1], rtol=1e-4)  # alone, it leaves the heaviest mean


def test_the_better_of_both_bounds_is_taken():
    near = mixture([0.5, 0.5], [[0.1, 0.0], [-0.1, 0.0]], [[0.5, 0.5]] * 2)
    for stretch in (0.1, 2.0):
        scores = {}
        for bound in ("lse", "jensen", "both"):
            u = moved(ClosedForm(bound=bound, stretch=stretch), near)
            scores[bound] = float(u @ SLOPE)
        assert scores["both"] == pytest.approx(max(scores["lse"], scores["jensen"]), rel=1e-5)
        assert scores["lse"] < scores["jensen"] if stretch == 0.1 else scores["lse"] > scores["jensen"]


def test_the_density_of_actions_is_one_in_all_and_that_of_its_change_of_variables():
    u = np.linspace(-3.7, 3.7, 5001)
    actions = np.tanh(u)
    pair = Mixture(*(jnp.asarray(np.repeat(x, len(u), 0), jnp.float32) for x in two_bumps()))
    density = np.exp(np.asarray(log_density(pair, jnp.asarray(actions[:, None], jnp.float32)), np.float64))
    assert np.trapezoid(density, actions) == pytest.approx(1, abs=1e-3)
    bound = log_density(pair, jnp.ones((len(u), 1)))
    assert np.isfinite(bound).all()


def two_bumps():
    return np.log([[0.3, 0.7]]), np.array([[[-0.7], [0.9]]]), np.array([[[0.2], [0.4]]])


def test_a_lower_bound_is_less_by_the_unbiased_spread():
    heads = jnp.array([[1.0, 4.0], [3.0, 4.0]])
    np.testing.assert_allclose(closed_form.lower_bound(heads, 0.7), [2 - 0.7 * 2 / np.sqrt(2), 4.0], rtol=1e-6)


# Any agent


def test_any_agents_actions_are_improved_about_what_it_would_do():
    agent = with_fields(IQL(), chunk=2, backup=2, hidden=(8,))
    state = init(agent, Spec(observation=2, action=2))

    def heads(obs, actions):
        return agent.critic.values(state.params["critic"], repeat_for(actions, obs), actions)

    def behavior(obs, key):
        return closed_form.around(closed_form.flat(agent.act(state, obs, key, greedy=True)), std=0.3)

    act = closed_form.improved(behavior, heads, ClosedForm(delta=1e-3, delta_high=1e-3), action=2)

    @jax.jit
    def gain(obs):
        value = lambda chunks: closed_form.lower_bound(heads(obs, closed_form.flat(chunks)[:, None]), 1.0)  # noqa: E731
        chunks = act(obs, KEY)
        return value(chunks) - value(agent.act(state, obs, KEY, greedy=True)), chunks

    gains, chunks = gain(jax.random.uniform(KEY, (50, 2), minval=-1))
    assert chunks.shape == (50, 2, 2) and float(jnp.abs(chunks).max()) <= 1
    assert float((gains > 0).mean()) > 0.9


# Quantile critics


def test_the_loss_of_the_median_is_half_of_hubers():
    errors = jnp.array([-3.0, -0.4, 0.0, 0.7, 2.0])[:, None]
    half, one = jnp.full((5, 1), 0.5), jnp.ones((5, 1))
    huber = np.where(np.abs(errors) < 1, 0.5 * np.square(errors), np.abs(errors) - 0.5)
    np.testing.assert_allclose(losses.quantile_huber(-errors, 0 * errors, half, one), huber[:, 0] / 2, rtol=1e-6)


def test_the_loss_is_the_mean_over_levels_of_the_sum_over_shares():
    z, y = np.array([0.1, -2.0, 0.6]), np.array([1.0, -0.3])
    level, share = np.array([0.1, 0.5, 0.8]), np.array([0.25, 0.75])
    total = 0.0
    for i in range(3):
        for j in range(2):
            e = z[i] - y[j]
            total += share[j] * abs(level[i] - (e > 0)) * (e**2 / 2 if abs(e) < 1 else abs(e) - 0.5) / 3
    found = losses.quantile_huber(*(jnp.asarray(x, jnp.float32)[None] for x in (z, y, level, share)))
    assert float(found[0]) == pytest.approx(total, rel=1e-5)


def test_levels_lie_in_the_middles_of_shares_that_fill_the_interval():
    level, share = (np.asarray(x) for x in levels(jax.random.uniform(KEY, (50, 8))))
    np.testing.assert_allclose(share.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(level, np.cumsum(share, axis=1) - share / 2, atol=1e-6)
    assert float((share.max(axis=1) / share.min(axis=1)).max()) <= 11 and np.all(np.diff(level, axis=1) > 0)
    np.testing.assert_allclose(levels(jnp.zeros((1, 4)))[0][0], [0.125, 0.375, 0.625, 0.875], rtol=1e-6)


# The agent

KNOWN = CFPI(
    Transitions(discount=0.5),
    critic=formula(
        QuantileCritic(),
        lambda bias, s, a, level: bias.reshape(2, *[1] * level.ndim) + a.sum(axis=-1)[None, ..., None] + level[None],
    ),
)
"""One whose critics are bias_k + the sum of the action + the level."""


def taken(count=6, **fields):
    """Returns transitions and the actions that follow them."""
    batch = random_batch(0, count, 1)
    ones = jnp.ones(count)
    more = {"next_action": jnp.full((count, 2), 0.25), "followed": ones, "valid": ones[:, None]}
    never = {"terminated": jnp.zeros(count, bool), "steps": jnp.ones(count, jnp.int32)}
    return dataclasses.replace(batch, **(never | more | fields))


def critic_loss(batch, target=(0.0, 0.0)) -> float:
    """Returns the loss with one level, which is one half."""
    zero = jnp.zeros((len(batch.obs), 1))
    state = state_of({"critic": np.zeros(2)}, {"critic": np.array(target)}, spec=WIDE)
    draws = {"levels": zero, "target_levels": zero}
    return float(jitted(CFPI.critic_loss)(KNOWN, state.params["critic"], state, batch, draws)[0])


def test_each_critic_learns_from_its_own_copy_at_the_action_that_the_data_take_next():
    batch, target = taken(), np.array([0.3, -0.2])
    y = np.asarray(batch.rewards)[:, 0][None] + 0.5 * (target[:, None] + 0.5 + 0.5)  # of the level 1/2
    error = y - (np.asarray(batch.actions)[:, 0].sum(-1) + 0.5)[None]
    huber = np.where(np.abs(error) < 1, 0.5 * error**2, np.abs(error) - 0.5)
    assert critic_loss(batch, target) == pytest.approx(huber.sum(axis=0).mean() / 2, rel=1e-5)


def test_the_end_of_the_task_counts_without_bootstrap_and_the_end_of_the_clock_not_at_all():
    nothing = jnp.zeros(6)
    unknown = jnp.full((6, 2), 9.0)
    over = taken(terminated=jnp.ones(6, bool), followed=nothing, next_action=unknown)
    assert critic_loss(over) == critic_loss(dataclasses.replace(over, followed=nothing + 1), target=(5, 5))
    assert critic_loss(over) > 0
    assert critic_loss(taken(followed=nothing, next_action=unknown)) == 0


def test_an_agent_without_the_next_action_is_told_so():
    with pytest.raises(UserError, match="a batch needs next_action and followed"):
        critic_loss(taken(next_action=None, followed=None))


def init(agent, spec):
    return jax.jit(agent.init, static_argnums=1)(KEY, spec)


def small(**fields) -> CFPI:
    return with_fields(CFPI(), hidden=(16,), **({"components": 3, "levels": 4} | fields))


def values(agent, state, obs, actions):
    """Returns each critic's value [K, B, N] of actions [B, N, A]."""
    return agent.critic.values(state.params["critic"], state.spec.critic(repeat_for(actions, obs)), actions)


def test_the_values_of_an_untrained_agent_are_means_over_its_quantiles():
    agent = small()
    obs, actions = jax.random.normal(KEY, (5, 3)), jax.random.uniform(KEY, (5, 7, 2))

    @jax.jit
    def found(state):
        level = jnp.broadcast_to(jnp.array([0.125, 0.375, 0.625, 0.875]), (5, 7, 4))
        z = agent.critic.quantiles(state.params["critic"], repeat_for(actions, obs), actions, level)
        return values(agent, state, obs, actions), z

    heads, z = map(np.asarray, found(init(agent, WIDE)))
    np.testing.assert_allclose(heads, z.mean(axis=-1), rtol=1e-5)
    assert np.ptp(z, axis=-1).min() > 1e-4 and not np.allclose(z[0], z[1], atol=1e-3)


def test_it_acts_above_the_value_of_its_behaviors_means():
    agent = small(components=1, operator=ClosedForm(delta=1e-3, delta_high=1e-3))

    @jax.jit
    def gain(state, obs):
        density = agent.actor.density(state.params["actor"], obs)
        score = lambda actions: closed_form.lower_bound(values(agent, state, obs, actions), 1.0)  # noqa: E731
        chosen = agent.act(state, obs, KEY, greedy=True)
        return score(chosen)[:, 0] - score(jnp.tanh(density.mean)).max(axis=1), chosen

    gains, chosen = gain(init(agent, WIDE), jax.random.normal(KEY, (40, 3)))
    assert float((gains > 0).mean()) > 0.9 and float(jnp.abs(chosen).max()) <= 1


def test_the_behavior_does_not_see_the_goal_and_the_critic_does():
    agent = small(components=1)
    still = with_fields(agent, operator=ClosedForm(delta=0.0, delta_high=0.0))  # acts on the behavior's mean
    state = init(agent, Spec(observation=3, action=2, goal=1))

    @jax.jit
    def seen(goal):
        batch = taken(obs=taken().obs.at[:, 2].set(goal))
        draws = agent.draw(state.spec, batch, KEY)
        behavior = agent.actor_loss(state.params["actor"], state, batch), still.act(state, batch.obs, KEY, greedy=True)
        return (
            behavior,
            agent.critic_loss(state.params["critic"], state, batch, draws),
            agent.act(state, batch.obs, KEY, greedy=True),
        )

    (behavior, loss, action), (other, other_loss, other_action) = seen(0.0), seen(5.0)
    assert same(behavior, other) and not same(loss, other_loss) and not same(action, other_action)


@pytest.mark.parametrize(
    ("agent", "message"),
    [
        (CFPI(actor=MixturePolicy(components=0)), "CFPI.actor.components = 0: must be at least 1"),
        (CFPI(critic=QuantileCritic(levels=0)), "CFPI.critic.levels = 0: must be at least 1"),
        (CFPI(critic=QuantileCritic(heads=1)), "CFPI.critic.heads = 1: must be at least 2"),
        (CFPI(operator=ClosedForm(delta=-0.1)), "CFPI.operator.delta = -0.1: must be at least 0"),
        (CFPI(operator=ClosedForm(delta=1.0)), "CFPI.operator.delta_high = 0.5: must be at least 1.0"),
        (CFPI(operator=ClosedForm(threshold=1.1)), "CFPI.operator.threshold = 1.1: must be in [0, 1]"),
        (CFPI(operator=ClosedForm(draws=0)), "CFPI.operator.draws = 0: must be at least 1"),
    ],
)
def test_a_setting_out_of_range_is_refused(agent, message):
    with pytest.raises(UserError, match=re.escape(message)):
        ranges.check(agent)
