"""Facts about jaxrl.agents.fql, with networks that are formulas, so that every number is known by hand."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.agents.fql import FQL
from jaxrl.errors import UserError
from tests.known import (
    KEY,
    NARROW,
    WIDE,
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

TINY = FQL(actor_hidden=(8,), critic_hidden=(8,), batch_size=16, flow_steps=2)


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_to_compile():
        yield


class Known(FQL):
    """FQL whose flow goes straight to p, with mu(s, z) = m + n z and Q_j(s, a) = b_j + c_j (sum of the chunk) + s."""

    def behaviour(self, spec):
        return Formula(lambda p, s, x, t: (p["point"] - x) / (1 - t))

    def policy(self, spec):
        return Formula(lambda p, s, z: p["shift"] + p["scale"] * z)

    def critic(self):
        return Formula(lambda p, s, a: linear_heads(p["bias"], p["slope"], a.sum(axis=-1)) + s[None, ..., 0])


def known(bias=(0.0, 0.0), slope=(0.0, 0.0), shift=0.0, scale=0.0, point=0.3, target=None):
    """Returns the state of `Known` with these parameters; `target` is the slow critic's biases, without slopes."""
    params = {
        "flow": {"point": point},
        "policy": {"shift": shift, "scale": scale},
        "critic": {"bias": np.array(bias), "slope": np.array(slope)},
    }
    slow = None if target is None else {"bias": np.array(target), "slope": np.zeros(len(target))}
    return state_of(params, slow)


def drawn(count=1, size=1, **named):
    """Returns random numbers of an update that are all zero, at time 1/2, unless given."""
    zero = jnp.zeros((count, size))
    return {"next_noise": zero, "x0": zero, "t": jnp.full((count, 1), 0.5), "distill_noise": zero} | named


# The critic


def test_the_target_values_the_one_step_policys_clipped_action_at_the_next_state():
    state = known(bias=(9.0, 9.0), slope=(9.0, 9.0), shift=0.5, scale=2.0)
    state = dataclasses.replace(state, target={"bias": jnp.array([1.0, 3.0]), "slope": jnp.array([1.0, -1.0])})
    batch = batch_of(np.full((3, 1), 2.0), terminated=[0, 0, 1], next_obs=np.full((3, 1), 10.0))
    noise = jnp.array([[-0.1], [5.0], [0.0]])  # actions 0.3, 1 and 0.5
    for agg, q in (("mean", [2.0, 2.0]), ("min", [1.3, 2.0])):
        agent = Known(discount=0.9, agg=agg)
        found = agent.td_target(state, batch, drawn(3, next_noise=noise))
        np.testing.assert_allclose(found, [2 + 0.9 * (10 + q[0]), 2 + 0.9 * (10 + q[1]), 2], rtol=1e-6)


def test_the_lowest_head_is_never_above_the_mean():
    state, batch = jax.jit(TINY.init, static_argnums=1)(KEY, WIDE), random_batch(0, length=1)
    draws = TINY.draw(WIDE, batch, KEY)
    low, mean = (
        np.asarray(jax.jit(dataclasses.replace(TINY, agg=agg).td_target)(state, batch, draws))
        for agg in ("min", "mean")
    )
    terminated = np.asarray(batch.terminated)
    assert (low[~terminated] < mean[~terminated]).all() and 0 < terminated.sum() < 16
    np.testing.assert_array_equal(low[terminated], batch.rewards[terminated, 0])
    np.testing.assert_array_equal(mean[terminated], batch.rewards[terminated, 0])


def test_every_head_regresses_the_target_in_the_mean():
    agent, state = Known(discount=0.5), known(bias=(1.0, 2.0), slope=(1.0, 0.0), target=(4.0, 6.0))
    batch = batch_of([[1.0]], actions=[[[0.5]]])
    loss = float(agent.critic_loss(state.params["critic"], state, batch, drawn()))
    assert loss == pytest.approx(((3.5 - 1.5) ** 2 + (3.5 - 2) ** 2) / 2)


def test_returns_of_several_steps_for_a_single_action():
    agent, state = Known(chunk=1, backup=5, discount=0.5), known(slope=(1.0, 1.0), target=(8.0, 8.0))
    batch = batch_of(np.ones((2, 5)), valid=[[1] * 5, [1, 1, 0, 0, 0]], actions=np.full((2, 5, 1), 0.25))
    np.testing.assert_allclose(agent.td_target(state, batch, drawn(2)), [1.9375 + 8 / 32, 1.5 + 8 / 4])
    loss = float(agent.critic_loss(state.params["critic"], state, batch, drawn(2)))
    assert loss == pytest.approx(((2.1875 - 0.25) ** 2 + (3.5 - 0.25) ** 2) / 2)  # the critic sees one action


ENDS = {  # whole, terminated after one step, truncated after one
    "rewards": [[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]],
    "valid": [[1, 1], [1, 0], [1, 0]],
    "terminated": [False, True, False],
}


@pytest.mark.parametrize(("cut_windows", "weight"), [("keep", [1, 1, 0]), ("drop", [1, 0, 0])])
def test_windows_that_are_cut_short_train_the_critic_only_if_termination_cut_them(cut_windows, weight):
    agent = Known(chunk=2, backup=2, cut_windows=cut_windows, discount=0.5)
    loss = agent.critic_loss(known().params["critic"], known(target=(4.0, 4.0)), batch_of(**ENDS), drawn(3, 2))
    assert float(loss) == pytest.approx((np.array([2.5, 1, 3]) ** 2 * weight).sum() / 3)


def test_probabilities_have_targets_that_are_probabilities():
    agent, state = Known(head="bce", discount=0.5), known(bias=(0.3, -2.0), target=(0.0, 0.0))
    batch = batch_of([[0.25], [0.9], [-0.6]])
    wanted = np.array([0.5, 1.0, 0.0])
    np.testing.assert_allclose(agent.td_target(state, batch, drawn(3)), wanted, atol=1e-6)
    p = 1 / (1 + np.exp([[-0.3], [2.0]]))
    entropy = -(wanted[None] * np.log(p) + (1 - wanted[None]) * np.log(1 - p))
    loss = float(agent.critic_loss(state.params["critic"], state, batch, drawn(3)))
    assert loss == pytest.approx(entropy.mean(), rel=1e-5)


# The flow and the policy


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_a_flow_with_straight_paths_arrives_in_any_number_of_steps(steps):
    noise = jax.random.normal(KEY, (20, 2))
    for point, wanted in ((0.3, 0.3), (1.7, 1.0)):
        found = Known(flow_steps=steps).flow_actions(known(point=point), jnp.zeros((20, 1)), noise)
        np.testing.assert_allclose(found, np.full((20, 2), wanted), atol=1e-6)


def test_the_flow_clones_the_steps_that_happened():
    agent, state = Known(chunk=2, backup=3), known()
    batch = batch_of(np.zeros((1, 3)), valid=[[1, 0, 0]], actions=[[[0.5], [-0.4], [9.0]]])
    x0 = jnp.array([[0.1, -1.0]])
    found = agent.cloning_loss(state.params["flow"], NARROW, batch, drawn(size=2, x0=x0))
    assert float(found) == pytest.approx(((0.3 - 0.3) / 0.5 - (0.5 - 0.1)) ** 2 / 2, rel=1e-5)


def test_without_a_critic_the_policy_becomes_the_flows_own_map():
    mu, s = 0.1, 0.15

    class Gaussian(Known):
        """The exact flow from N(0, 1) to N(mu, s^2), whose ten Euler steps are linear in the noise."""

        def behaviour(self, spec):
            def velocity(p, obs, x, t):
                slope = (t * s**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * s**2)
                return mu + slope * (x - t * mu)

            return Formula(velocity)

    left = np.prod([1 + (t * s**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * s**2) / 10 for t in np.arange(10) / 10])
    state, noise = known(), jax.random.normal(KEY, (200, 1))

    def loss(policy):
        batch, draws = batch_of(np.zeros((200, 1))), drawn(200, distill_noise=noise)
        return Gaussian().policy_losses(policy, state, batch, draws)[0]

    found = fitted(loss, {"shift": 0.0, "scale": 1.0})
    assert (float(found["shift"]), float(found["scale"])) == pytest.approx((mu, left), abs=1e-3)
    assert abs(left - s) > 0.02  # ten steps are not the exact flow
    assert float(loss(found)) < 1e-6


@pytest.mark.parametrize("size", [1, 3])
def test_a_linear_critic_moves_the_policy_from_the_flow_by_its_slope_over_twice_alpha(size):
    agent, state = Known(chunk=size, backup=size, alpha=5.0), known(slope=(0.4, 0.8), point=0.3)
    batch = batch_of(np.zeros((1, size)))

    def loss(policy):
        distance, climb = agent.policy_losses(policy, state, batch, drawn(size=size))
        return agent.alpha * distance + climb

    found = fitted(loss, {"shift": 0.0, "scale": 0.0})
    assert float(found["shift"]) == pytest.approx(0.3 + 0.6 * size / (2 * 5), abs=1e-3)


def test_the_distance_is_of_the_action_as_it_is_and_the_value_of_the_action_clipped():
    agent, state, batch = Known(), known(slope=(1.0, 1.0), shift=1.5, point=2.0), batch_of([[0.0]])
    losses = lambda policy: agent.policy_losses(policy, state, batch, drawn())  # noqa: E731
    distance, climb = losses(state.params["policy"])
    assert (float(distance), float(climb)) == pytest.approx((0.25, -1.0))  # the flow's own actions are clipped
    pull, push = jax.jacrev(losses)(state.params["policy"])
    assert (float(pull["shift"]), float(push["shift"])) == pytest.approx((1.0, 0.0))


def test_flow_and_policy_begin_at_the_same_noise():
    agent = dataclasses.replace(TINY, actor_hidden=())
    state = jax.jit(agent.init, static_argnums=1)(KEY, WIDE)
    obs, noise = jnp.zeros((5, 3)), jax.random.normal(KEY, (5, 2))
    batch = random_batch(0, 5, 1)
    batch = dataclasses.replace(batch, obs=obs)
    draws = agent.draw(WIDE, batch, KEY) | {"distill_noise": noise}
    distance, climb = agent.policy_losses(state.params["policy"], state, batch, draws)
    action = agent.one_step(WIDE, state.params["policy"], obs, noise)
    wanted = np.square(action - agent.flow_actions(state, obs, noise)).mean()
    assert float(distance) == pytest.approx(float(wanted), rel=1e-5)
    q = agent.q(state.params["critic"], obs, jnp.clip(action, -1, 1)).mean()
    assert float(climb) == pytest.approx(-float(q), rel=1e-5)


def test_the_critics_scale_is_divided_out_if_asked():
    batch = batch_of(np.zeros((2, 1)), obs=[[1.0], [3.0]])

    def push(factor, normalize_q):
        agent = Known(normalize_q=normalize_q)
        state = known(bias=(1.0, 1.0), slope=(2.0, 4.0), shift=0.1)
        scaled = jax.tree.map(lambda x: factor * x, state.params["critic"])
        state = dataclasses.replace(state, params=state.params | {"critic": scaled})
        q = lambda p: agent.policy_losses(p, state, dataclasses.replace(batch, obs=factor * batch.obs), drawn(2))[1]  # noqa: E731
        value, slope = jax.value_and_grad(q)(state.params["policy"])
        return float(value), float(slope["shift"])

    assert push(1.0, True) == pytest.approx((-1.0, -3 / 3.3), rel=1e-5)
    assert push(7.0, True) == pytest.approx(push(1.0, True), rel=1e-5)
    assert push(1.0, False) == pytest.approx((-3.3, -3.0)) and push(7.0, False)[1] == pytest.approx(-21)


def test_windows_without_any_step_do_not_move_the_policy():
    agent, state = Known(), known(slope=(1.0, 1.0), shift=0.1)
    batch = batch_of([[0.0], [0.0]], valid=[[1], [0]], obs=[[0.0], [50.0]])
    distance, climb = agent.policy_losses(state.params["policy"], state, batch, drawn(2))
    assert (float(distance), float(climb)) == pytest.approx((0.04 / 2, -0.1 / 2), rel=1e-4)


# An update


def test_each_loss_moves_its_own_network_alone():
    state, batch = jax.jit(TINY.init, static_argnums=1)(KEY, WIDE), random_batch(0, length=1)
    draws = TINY.draw(WIDE, batch, KEY)

    @jax.jit
    def pulls(params):
        at = lambda p: dataclasses.replace(state, params=p)  # noqa: E731
        parts = {
            "critic": lambda p: TINY.critic_loss(p["critic"], at(p), batch, draws),
            "flow": lambda p: TINY.cloning_loss(p["flow"], WIDE, batch, draws),
            "policy": lambda p: sum(TINY.policy_losses(p["policy"], state, batch, draws)),
        }
        alone = {name: jax.grad(part)(params) for name, part in parts.items()}
        return alone, pull_of(TINY, state, batch, draws)

    alone, joint = pulls(state.params)
    for name, pull in alone.items():
        reached = {net for net, leaves in pull.items() if any(np.any(leaf) for leaf in jax.tree.leaves(leaves))}
        assert reached == {name}
        if name != "policy":
            for x, y in zip(*map(jax.tree.leaves, (joint[name], pull[name])), strict=True):
                np.testing.assert_allclose(x, y, atol=1e-6)


def test_the_joint_loss_weighs_the_distillation_by_alpha():
    agent, state = dataclasses.replace(TINY, alpha=7.0), jax.jit(TINY.init, static_argnums=1)(KEY, WIDE)
    batch = random_batch(0, length=1)
    total, parts = jax.jit(agent.loss)(state.params, state, batch, agent.draw(WIDE, batch, KEY))
    weights = {"critic/loss": 1, "actor/flow_loss": 1, "actor/distillation_loss": 7, "actor/q_loss": 1}
    assert parts.keys() == weights.keys()
    assert float(total) == pytest.approx(sum(weights[name] * float(part) for name, part in parts.items()), rel=1e-5)


def test_the_target_follows_the_critic_from_before_the_step():
    agent = dataclasses.replace(TINY, tau=0.25, lr=0.01)
    state, batch = jax.jit(agent.init, static_argnums=1)(KEY, WIDE), random_batch(1, length=1)
    update = jax.jit(agent.update)
    after, _ = update(state, batch, KEY)
    assert same(after.target, state.target) and not same(after.params["critic"], state.params["critic"])
    twice, _ = update(after, batch, KEY)
    wanted = jax.tree.map(lambda slow, fast: 0.75 * slow + 0.25 * fast, after.target, after.params["critic"])
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
    agent, state = Known(chunk=2, backup=2), known(shift=0.5, scale=0.5, point=-9.0)
    noise = np.asarray(jax.random.normal(KEY, (50, 2)))
    for greedy in (False, True):
        action = agent.act(state, jnp.zeros((50, 1)), KEY, greedy=greedy)
        np.testing.assert_allclose(action[..., 0], np.clip(0.5 + 0.5 * noise, -1, 1), atol=1e-6)


# Refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chunk": 2}, "FQL.backup = 1: must be at least 2"),
        ({"actor_hidden": (8, 0)}, "FQL.actor_hidden"),
        ({"critic_hidden": (0,)}, "FQL.critic_hidden"),
        ({"time_size": 2}, "FQL.time_size = 2: must be at least 4"),
        ({"flow_steps": 0}, "FQL.flow_steps = 0: must be at least 1"),
        ({"critics": 0}, "FQL.critics = 0: must be at least 1"),
        ({"lr": -1.0}, "FQL.lr = -1.0: must be at least 0"),
        ({"alpha": -1.0}, "FQL.alpha = -1.0: must be at least 0"),
        ({"discount": 1.5}, "FQL.discount = 1.5: must be in [0, 1]"),
        ({"tau": -0.1}, "FQL.tau = -0.1: must be in [0, 1]"),
    ],
)
def test_values_out_of_range_are_refused_by_name(fields, message):
    with pytest.raises(UserError, match=re.escape(message)):
        FQL(**fields).check()
