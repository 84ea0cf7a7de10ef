"""Facts about jaxrl.agents.fql, with networks that are formulas, so that every number is known by hand."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import ranges
from jaxrl.agents.fql import FQL
from jaxrl.agents.parts import Adam, Critic, FlowPolicy, Net, OneStepPolicy, Windows
from jaxrl.errors import UserError
from tests.known import (
    KEY,
    WIDE,
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

TINY = with_fields(FQL(), hidden=(8,), batch=16, steps=2)
KNOWN = FQL(
    flow=formula(FlowPolicy(steps=1), lambda p, s, x, t: (p["point"] - x) / (1 - t)),
    policy=formula(OneStepPolicy(), lambda p, s, z: p["shift"] + p["scale"] * z),
    critic=formula(Critic(), lambda p, s, a: linear_heads(p["bias"], p["slope"], a.sum(axis=-1)) + s[None, ..., 0]),
)
"""FQL whose flow goes straight to p, with mu(s, z) = m + n z and Q_j(s, a) = b_j + c_j (sum of the chunk) + s."""


def known(bias=(0.0, 0.0), slope=(0.0, 0.0), shift=0.0, scale=0.0, point=0.3, target=None):
    """Returns the state of `KNOWN` with these parameters; `target` is the slow critic's biases, without slopes."""
    params = {
        "flow": {"point": point},
        "policy": {"shift": shift, "scale": scale},
        "critic": {"bias": np.array(bias), "slope": np.array(slope)},
    }
    slow = None if target is None else {"critic": {"bias": np.array(target), "slope": np.zeros(len(target))}}
    return state_of(params, slow)


def policy_losses(agent, policy, state, batch, draws):
    """Returns the two losses of the one-step policy with these parameters: its distance to the flow, and its climb."""
    metrics = agent.loss(state.params | {"policy": policy}, state, batch, draws)[1]
    return metrics["actor/distillation_loss"], metrics["actor/q_loss"]


def drawn(count=1, size=1, **named):
    """Returns random numbers of an update that are all zero, at time 1/2, unless given."""
    zero = jnp.zeros((count, size))
    return {"next_noise": zero, "x0": zero, "t": jnp.full((count, 1), 0.5), "distill_noise": zero} | named


# The critic


def test_the_target_values_the_one_step_policys_clipped_action_at_the_next_state():
    state = known(bias=(9.0, 9.0), slope=(9.0, 9.0), shift=0.5, scale=2.0)
    slow = {"bias": jnp.array([1.0, 3.0]), "slope": jnp.array([1.0, -1.0])}
    state = dataclasses.replace(state, target={"critic": slow})
    batch = batch_of(np.full((3, 1), 2.0), terminated=[0, 0, 1], next_obs=np.full((3, 1), 10.0))
    noise = jnp.array([[-0.1], [5.0], [0.0]])  # actions 0.3, 1 and 0.5
    for agg, q in (("mean", [2.0, 2.0]), ("min", [1.3, 2.0])):
        agent = with_fields(KNOWN, discount=0.9, agg=agg)
        found = agent.td_target(state, batch, drawn(3, next_noise=noise))
        np.testing.assert_allclose(found, [2 + 0.9 * (10 + q[0]), 2 + 0.9 * (10 + q[1]), 2], rtol=1e-6)


def test_the_lowest_head_is_never_above_the_mean():
    state, batch = jax.jit(TINY.init, static_argnums=1)(KEY, WIDE), random_batch(0, length=1)
    draws = TINY.draw(WIDE, batch, KEY)
    low, mean = (
        np.asarray(jax.jit(with_fields(TINY, agg=agg).td_target)(state, batch, draws)) for agg in ("min", "mean")
    )
    terminated = np.asarray(batch.terminated)
    assert (low[~terminated] < mean[~terminated]).all() and 0 < terminated.sum() < 16
    np.testing.assert_array_equal(low[terminated], batch.rewards[terminated, 0])
    np.testing.assert_array_equal(mean[terminated], batch.rewards[terminated, 0])


def test_every_head_regresses_the_target_in_the_mean():
    agent, state = with_fields(KNOWN, discount=0.5), known(bias=(1.0, 2.0), slope=(1.0, 0.0), target=(4.0, 6.0))
    loss = metrics_of(agent, state, batch_of([[1.0]], actions=[[[0.5]]]), drawn())["critic/loss"]
    assert loss == pytest.approx(((3.5 - 1.5) ** 2 + (3.5 - 2) ** 2) / 2)


def test_returns_of_several_steps_for_a_single_action():
    agent, state = with_fields(KNOWN, chunk=1, backup=5, discount=0.5), known(slope=(1.0, 1.0), target=(8.0, 8.0))
    batch = batch_of(np.ones((2, 5)), valid=[[1] * 5, [1, 1, 0, 0, 0]], actions=np.full((2, 5, 1), 0.25))
    np.testing.assert_allclose(agent.td_target(state, batch, drawn(2)), [1.9375 + 8 / 32, 1.5 + 8 / 4])
    loss = metrics_of(agent, state, batch, drawn(2))["critic/loss"]
    assert loss == pytest.approx(((2.1875 - 0.25) ** 2 + (3.5 - 0.25) ** 2) / 2)  # the critic sees one action


ENDS = {  # whole, terminated after one step, truncated after one
    "rewards": [[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]],
    "valid": [[1, 1], [1, 0], [1, 0]],
    "terminated": [False, True, False],
}


@pytest.mark.parametrize(("cut", "weight"), [("keep", [1, 1, 0]), ("drop", [1, 0, 0])])
def test_windows_that_are_cut_short_train_the_critic_only_if_termination_cut_them(cut, weight):
    agent = with_fields(KNOWN, chunk=2, backup=2, cut=cut, discount=0.5)
    loss = metrics_of(agent, known(target=(4.0, 4.0)), batch_of(**ENDS), drawn(3, 2))["critic/loss"]
    assert loss == pytest.approx((np.array([2.5, 1, 3]) ** 2 * weight).sum() / 3)


def test_probabilities_have_targets_that_are_probabilities():
    agent, state = with_fields(KNOWN, head="bce", discount=0.5), known(bias=(0.3, -2.0), target=(0.0, 0.0))
    batch = batch_of([[0.25], [0.9], [-0.6]])
    wanted = np.array([0.5, 1.0, 0.0])
    np.testing.assert_allclose(agent.td_target(state, batch, drawn(3)), wanted, atol=1e-6)
    p = 1 / (1 + np.exp([[-0.3], [2.0]]))
    entropy = -(wanted[None] * np.log(p) + (1 - wanted[None]) * np.log(1 - p))
    loss = metrics_of(agent, state, batch, drawn(3))["critic/loss"]
    assert loss == pytest.approx(entropy.mean(), rel=1e-5)


# The flow and the policy


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_a_flow_with_straight_paths_arrives_in_any_number_of_steps(steps):
    noise = jax.random.normal(KEY, (20, 2))
    flow = dataclasses.replace(KNOWN.flow, steps=steps)
    for point, wanted in ((0.3, 0.3), (1.7, 1.0)):
        found = flow.sample({"point": point}, jnp.zeros((20, 1)), noise)
        np.testing.assert_allclose(found, np.full((20, 2), wanted), atol=1e-6)


def test_the_flow_clones_the_steps_that_happened():
    agent = with_fields(KNOWN, chunk=2, backup=3)
    batch = batch_of(np.zeros((1, 3)), valid=[[1, 0, 0]], actions=[[[0.5], [-0.4], [9.0]]])
    x0 = jnp.array([[0.1, -1.0]])
    found = metrics_of(agent, known(), batch, drawn(size=2, x0=x0))["actor/flow_loss"]
    assert found == pytest.approx(((0.3 - 0.3) / 0.5 - (0.5 - 0.1)) ** 2 / 2, rel=1e-5)


def test_without_a_critic_the_policy_becomes_the_flows_own_map():
    mu, s = 0.1, 0.15

    def velocity(p, obs, x, t):
        """The exact flow from N(0, 1) to N(mu, s^2), whose ten Euler steps are linear in the noise."""
        slope = (t * s**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * s**2)
        return mu + slope * (x - t * mu)

    left = np.prod([1 + (t * s**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * s**2) / 10 for t in np.arange(10) / 10])
    agent = dataclasses.replace(KNOWN, flow=formula(FlowPolicy(steps=10), velocity))
    state, noise = known(), jax.random.normal(KEY, (200, 1))

    def loss(policy):
        batch, draws = batch_of(np.zeros((200, 1))), drawn(200, distill_noise=noise)
        return policy_losses(agent, policy, state, batch, draws)[0]

    found = fitted(loss, {"shift": 0.0, "scale": 1.0})
    assert (float(found["shift"]), float(found["scale"])) == pytest.approx((mu, left), abs=1e-3)
    assert abs(left - s) > 0.02  # ten steps are not the exact flow
    assert float(loss(found)) < 1e-6


@pytest.mark.parametrize("size", [1, 3])
def test_a_linear_critic_moves_the_policy_from_the_flow_by_its_slope_over_twice_alpha(size):
    agent, state = with_fields(KNOWN, chunk=size, backup=size, alpha=5.0), known(slope=(0.4, 0.8), point=0.3)
    batch = batch_of(np.zeros((1, size)))

    def loss(policy):
        return agent.loss(state.params | {"policy": policy}, state, batch, drawn(size=size))[0]

    found = fitted(loss, {"shift": 0.0, "scale": 0.0})
    assert float(found["shift"]) == pytest.approx(0.3 + 0.6 * size / (2 * 5), abs=1e-3)


def test_the_distance_is_of_the_action_as_it_is_and_the_value_of_the_action_clipped():
    state, batch = known(slope=(1.0, 1.0), shift=1.5, point=2.0), batch_of([[0.0]])
    losses = lambda policy: policy_losses(KNOWN, policy, state, batch, drawn())  # noqa: E731
    distance, climb = losses(state.params["policy"])
    assert (float(distance), float(climb)) == pytest.approx((0.25, -1.0))  # the flow's own actions are clipped
    pull, push = jax.jacrev(losses)(state.params["policy"])
    assert (float(pull["shift"]), float(push["shift"])) == pytest.approx((1.0, 0.0))


def test_flow_and_policy_begin_at_the_same_noise():
    flow, policy = (dataclasses.replace(part, net=Net(())) for part in (TINY.flow, TINY.policy))
    agent = dataclasses.replace(TINY, flow=flow, policy=policy)
    state = jax.jit(agent.init, static_argnums=1)(KEY, WIDE)
    obs, noise = jnp.zeros((5, 3)), jax.random.normal(KEY, (5, 2))
    batch = random_batch(0, 5, 1)
    batch = dataclasses.replace(batch, obs=obs)
    draws = agent.draw(WIDE, batch, KEY) | {"distill_noise": noise}
    found = metrics_of(agent, state, batch, draws)
    action = policy.sample(state.params["policy"], obs, noise)
    wanted = np.square(action - flow.sample(state.params["flow"], obs, noise)).mean()
    assert found["actor/distillation_loss"] == pytest.approx(float(wanted), rel=1e-5)
    q = agent.critic.values(state.params["critic"], obs, jnp.clip(action, -1, 1)).mean()
    assert found["actor/q_loss"] == pytest.approx(-float(q), rel=1e-5)


def test_the_critics_scale_is_divided_out_if_asked():
    batch = batch_of(np.zeros((2, 1)), obs=[[1.0], [3.0]])

    def push(factor, normalize_q):
        agent = dataclasses.replace(KNOWN, normalize_q=normalize_q)
        state = known(bias=(1.0, 1.0), slope=(2.0, 4.0), shift=0.1)
        scaled = jax.tree.map(lambda x: factor * x, state.params["critic"])
        state = dataclasses.replace(state, params=state.params | {"critic": scaled})
        larger = dataclasses.replace(batch, obs=factor * batch.obs)
        q = lambda p: policy_losses(agent, p, state, larger, drawn(2))[1]  # noqa: E731
        value, slope = jax.value_and_grad(q)(state.params["policy"])
        return float(value), float(slope["shift"])

    assert push(1.0, True) == pytest.approx((-1.0, -3 / 3.3), rel=1e-5)
    assert push(7.0, True) == pytest.approx(push(1.0, True), rel=1e-5)
    assert push(1.0, False) == pytest.approx((-3.3, -3.0)) and push(7.0, False)[1] == pytest.approx(-21)


def test_windows_without_any_step_do_not_move_the_policy():
    batch = batch_of([[0.0], [0.0]], valid=[[1], [0]], obs=[[0.0], [50.0]])
    found = metrics_of(KNOWN, known(slope=(1.0, 1.0), shift=0.1), batch, drawn(2))
    assert (found["actor/distillation_loss"], found["actor/q_loss"]) == pytest.approx((0.04 / 2, -0.1 / 2), rel=1e-4)


# An update


def test_each_loss_moves_its_own_network_alone():
    state, batch = jax.jit(TINY.init, static_argnums=1)(KEY, WIDE), random_batch(0, length=1)
    draws = TINY.draw(WIDE, batch, KEY)

    slopes = slopes_of(TINY, state, batch, draws)
    climb = slopes_of(TINY, state, batch, draws, through_state=False)["actor/q_loss"]  # of the critic as it is
    own = {"critic/loss": "critic", "actor/flow_loss": "flow", "actor/distillation_loss": "policy"}
    assert {name: reached(slopes[name]) for name in own} == {name: {net} for name, net in own.items()}
    assert reached(climb) == {"policy"}
    joint = pull_of(TINY, state, batch, draws)
    for name, net in own.items():
        if net != "policy":
            for x, y in zip(*map(jax.tree.leaves, (joint[net], slopes[name][net])), strict=True):
                np.testing.assert_allclose(x, y, atol=1e-6)


def test_the_joint_loss_weighs_the_distillation_by_alpha():
    agent, state = dataclasses.replace(TINY, alpha=7.0), jax.jit(TINY.init, static_argnums=1)(KEY, WIDE)
    batch = random_batch(0, length=1)
    total, parts = jax.jit(agent.loss)(state.params, state, batch, agent.draw(WIDE, batch, KEY))
    weights = {"critic/loss": 1, "actor/flow_loss": 1, "actor/distillation_loss": 7, "actor/q_loss": 1}
    assert parts.keys() == weights.keys()
    assert float(total) == pytest.approx(sum(weights[name] * float(part) for name, part in parts.items()), rel=1e-5)


def test_the_target_follows_the_critic_from_before_the_step():
    agent = with_fields(TINY, tau=0.25, adam=Adam(0.01))
    state, batch = jax.jit(agent.init, static_argnums=1)(KEY, WIDE), random_batch(1, length=1)
    update = jax.jit(agent.update)
    after, _ = update(state, batch, KEY)
    assert same(after.target, state.target) and not same(after.params["critic"], state.params["critic"])
    twice, _ = update(after, batch, KEY)
    wanted = jax.tree.map(lambda slow, fast: 0.75 * slow + 0.25 * fast, after.target["critic"], after.params["critic"])
    for ours, theirs in zip(jax.tree.leaves(twice.target), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_every_random_number_of_an_update_is_its_own():
    draws = TINY.draw(WIDE, random_batch(0, 2000, 1), KEY)
    assert {name: x.shape for name, x in draws.items()} == {
        "next_noise": (2000, 2),
        "x0": (2000, 2),
        "t": (2000, 1),
        "distill_noise": (2000, 2),
    }
    columns = np.concatenate([np.asarray(x) for x in draws.values()], axis=1)
    apart = np.corrcoef(columns, rowvar=False) - np.eye(7)
    assert np.abs(apart).max() < 0.1
    t = np.asarray(draws["t"])
    assert 0 <= t.min() < 0.01 and 0.99 < t.max() < 1 and t.mean() == pytest.approx(0.5, abs=0.03)


# Acting


def test_acting_takes_one_clipped_step_of_the_policy_in_training_as_in_evaluation():
    agent, state = with_fields(KNOWN, chunk=2, backup=2), known(shift=0.5, scale=0.5, point=-9.0)
    noise = np.asarray(jax.random.normal(KEY, (50, 2)))
    for greedy in (False, True):
        action = agent.act(state, jnp.zeros((50, 1)), KEY, greedy=greedy)
        np.testing.assert_allclose(action[..., 0], np.clip(0.5 + 0.5 * noise, -1, 1), atol=1e-6)


# Refusals


@pytest.mark.parametrize(
    ("agent", "message"),
    [
        (FQL(Windows(chunk=2)), "FQL.windows.backup = 1: must be at least 2"),
        (FQL(flow=FlowPolicy(Net((8, 0)))), "FQL.flow.net.hidden = (8, 0): must be at least 1"),
        (FQL(policy=OneStepPolicy(Net((0,)))), "FQL.policy.net.hidden = (0,): must be at least 1"),
        (FQL(critic=Critic(Net((0,)))), "FQL.critic.net.hidden = (0,): must be at least 1"),
        (FQL(flow=FlowPolicy(time="fourier", time_size=2)), "FQL.flow.time_size = 2: must be at least 4"),
        (FQL(flow=FlowPolicy(steps=0)), "FQL.flow.steps = 0: must be at least 1"),
        (FQL(critic=Critic(heads=0)), "FQL.critic.heads = 0: must be at least 1"),
        (FQL(adam=Adam(-1.0)), "FQL.adam.lr = -1.0: must be at least 0"),
        (FQL(alpha=-1.0), "FQL.alpha = -1.0: must be at least 0"),
        (FQL(Windows(discount=1.5)), "FQL.windows.discount = 1.5: must be in [0, 1]"),
        (FQL(critic=Critic(tau=-0.1)), "FQL.critic.tau = -0.1: must be in [0, 1]"),
    ],
)
def test_values_out_of_range_are_refused_by_name(agent, message):
    with pytest.raises(UserError, match=re.escape(message)):
        ranges.check(agent)
