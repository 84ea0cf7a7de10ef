"""Facts about jaxrl.agents.qc, with networks that are formulas, so that every number is known by hand.

Windows themselves, the chain of twenty steps and the execution of chunks are tested with ring and rollout.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import ranges
from jaxrl.agents import FQL, QC
from jaxrl.agents.parts import AdamW, Critic, FlowPolicy, Net, OneStepPolicy, Windows
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

TINY = with_fields(QC(), chunk=2, backup=3, hidden=(8,), batch=16, num_samples=4, steps=2)
KNOWN = QC(
    Windows(backup=1),
    flow=formula(FlowPolicy(), lambda p, s, x, t: p["drift"] - p["pull"] * x + 0 * t),
    policy=formula(OneStepPolicy(), lambda p, s, z: p["shift"] + p["scale"] * z),
    critic=formula(Critic(), lambda p, s, a: linear_heads(p["bias"], p["slope"], a.sum(axis=-1)) + s[None, ..., 0]),
)
"""QC with v = drift - pull x, mu(s, z) = m + n z, and Q_j(s, a) = b_j + c_j (sum of the chunk) + s."""
STRAIGHT = formula(FlowPolicy(), lambda p, s, x, t: (p["drift"] - x) / (1 - t))


def made(size=1, **fields) -> QC:
    """Returns `KNOWN` for chunks of a size, with these fields, its parts' too."""
    return with_fields(KNOWN, **{"chunk": size, "backup": size} | fields)


def heads(bias, slope=(0.0, 0.0)):
    return {"bias": np.array(bias), "slope": np.array(slope)}


def known(critic=None, target=None, drift=0.0, pull=0.0, shift=0.0, scale=0.0):
    """Returns the state of `KNOWN` with these parameters, critics as `heads`; the flow lets its noise be."""
    params = {
        "flow": {"drift": drift, "pull": pull},
        "policy": {"shift": shift, "scale": scale},
        "critic": critic or heads((0.0, 0.0)),
    }
    return state_of(params, None if target is None else {"critic": target})


def critic_loss(agent, state, batch, draws) -> float:
    return metrics_of(agent, state, batch, draws)["critic/loss"]


def policy_losses(agent, policy, state, batch, draws):
    """Returns the two losses of the one-step policy with these parameters: its distance to the flow, and its climb."""
    metrics = agent.loss(state.params | {"policy": policy}, state, batch, draws)[1]
    return metrics["actor/distillation_loss"], metrics["actor/q_loss"]


def drawn(count=1, size=1, **named):
    """Returns random numbers of an update that are all zero, at time 1/2, unless given."""
    zero = jnp.zeros((count, size))
    return {"next_noise": zero[:, None], "x0": zero, "t": jnp.full((count, 1), 0.5), "distill_noise": zero} | named


# The critic


def test_the_target_is_the_windows_return_and_the_value_after_it():
    agent, state = made(5, discount=0.5), known(target=heads((8.0, 8.0)))
    batch = batch_of(np.ones((3, 5)), [[1] * 5, [1] * 5, [1, 1, 0, 0, 0]], terminated=[0, 1, 0])
    found = agent.td_target(state, batch, drawn(3, 5))
    np.testing.assert_allclose(found, [1.9375 + 8 / 32, 1.9375, 1.5 + 8 / 4])


@pytest.mark.parametrize(("agg", "value"), [("mean", 7.0), ("min", 4.0)])
def test_the_online_critic_chooses_what_the_target_values_at_the_next_state(agg, value):
    agent = made(discount=1.0, agg=agg, num_samples=3)
    state = known(heads((0, 0), (1.0, 1.0)), heads((10.0, 4.0), (-1.0, -1.0)))
    noise = jnp.array([[[0.2], [0.9], [-3.0]]])
    batch = batch_of([[0.0]], next_obs=[[100.0]], obs=[[-100.0]])
    found = agent.td_target(state, batch, drawn(next_noise=noise))
    np.testing.assert_allclose(found, [100 + value - 0.9], rtol=1e-6)


def test_every_head_regresses_the_target_at_the_windows_own_chunk():
    agent, state = made(2, discount=0.5), known(heads((1, 2), (1, -1)), heads((4.0, 6.0)))
    batch = batch_of([[1.0, 2.0]], actions=[[[0.5], [0.25]]])
    assert critic_loss(agent, state, batch, drawn(size=2)) == pytest.approx(
        ((3.25 - 1.75) ** 2 + (3.25 - 1.25) ** 2) / 2
    )


def test_single_actions_with_returns_of_several_steps():
    agent, state = made(backup=5, discount=0.5), known(heads((0, 0), (1, 1)), heads((8.0, 8.0)))
    batch = batch_of(np.ones((1, 5)), actions=np.full((1, 5, 1), 0.25))
    assert critic_loss(agent, state, batch, drawn()) == pytest.approx((2.1875 - 0.25) ** 2)


@pytest.mark.parametrize(
    ("valid", "terminated", "weights"),
    [
        ([1, 1, 0, 0, 0], True, {"keep": 1, "drop": 0}),
        ([1, 1, 0, 0, 0], False, {"keep": 0, "drop": 0}),
        ([1, 1, 1, 1, 1], True, {"keep": 1, "drop": 1}),
        ([1, 1, 1, 1, 1], False, {"keep": 1, "drop": 1}),
    ],
)
def test_a_window_cut_short_trains_the_flow_as_far_as_it_goes_and_the_critic_if_termination_cut_it(
    valid, terminated, weights
):
    batch = batch_of(np.ones((1, 5)), [valid], [terminated], actions=np.full((1, 5, 1), 0.5))
    steps = sum(valid)
    y = sum(0.5**i for i in range(steps)) + 0.5**steps * 8 * (not terminated)
    state = known(target=heads((8.0, 8.0)))
    for cut, weight in weights.items():
        agent = made(5, discount=0.5, cut=cut)
        found = metrics_of(agent, state, batch, drawn(size=5))
        assert found["critic/loss"] == pytest.approx(weight * y**2)
        assert found["actor/flow_loss"] == pytest.approx(0.25 * steps / 5)  # five entries, whether they happened or not


def test_probabilities_have_targets_that_are_probabilities():
    agent, state = made(head="bce", discount=0.5), known(heads((0.3, -2.0)), heads((0.0, 0.0)))
    batch = batch_of([[0.25], [0.9], [-0.6]])
    wanted = np.array([0.5, 1.0, 0.0])
    np.testing.assert_allclose(agent.td_target(state, batch, drawn(3)), wanted, atol=1e-6)
    p = 1 / (1 + np.exp([[-0.3], [2.0]]))
    entropy = -(wanted[None] * np.log(p) + (1 - wanted[None]) * np.log(1 - p))
    assert critic_loss(agent, state, batch, drawn(3)) == pytest.approx(entropy.mean(), rel=1e-5)


# The flow


@pytest.mark.parametrize("steps", [1, 4])
def test_the_flow_of_a_single_chunk_of_data_is_straight_and_arrives(steps):
    agent = dataclasses.replace(made(2), flow=dataclasses.replace(STRAIGHT, steps=steps))
    noise = jax.random.normal(KEY, (64, 2))
    batch = batch_of(np.zeros((64, 2)), actions=np.full((64, 2, 1), 0.3))
    state, draws = known(), drawn(64, 2, x0=noise, t=jax.random.uniform(KEY, (64, 1), maxval=0.9))
    loss = lambda flow: agent.loss(state.params | {"flow": flow}, state, batch, draws)[1]["actor/flow_loss"]  # noqa: E731
    found = fitted(loss, {"drift": 0.0, "pull": 0.0})
    assert float(found["drift"]) == pytest.approx(0.3, abs=1e-3) and float(loss(found)) < 1e-5
    arrived = agent.proposals(known(drift=0.3), jnp.zeros((64, 1)), noise)
    np.testing.assert_allclose(arrived, np.full((64, 2), 0.3), atol=1e-6)


@pytest.mark.parametrize("steps", [1, 5])
def test_proposals_are_euler_steps_from_the_noise_clipped_at_the_end(steps):
    noise = jax.random.normal(KEY, (50, 2))
    found = made(2, steps=steps).proposals(known(drift=0.4, pull=-0.5), jnp.zeros((50, 1)), noise)
    grown = (1 + 0.5 / steps) ** steps
    np.testing.assert_allclose(found, np.clip((np.asarray(noise) + 0.8) * grown - 0.8, -1, 1), atol=1e-5)


# Best of N


def near(p, s, a):
    """Heads that want the chunk to be (0.2, -0.4)."""
    distance = jnp.square(a[..., 0] - 0.2) + jnp.square(a[..., 1] + 0.4)
    return jnp.stack([-distance, -2 * distance])


@pytest.mark.parametrize("agg", ["mean", "min"])
def test_the_best_of_n_is_the_candidate_that_the_critic_wants(agg):
    aimed = dataclasses.replace(made(2, num_samples=32), critic=formula(Critic(agg=agg), near))
    noise = np.clip(np.asarray(jax.random.normal(KEY, (7, 32, 2))), -1, 1)
    best = np.linalg.norm(noise - np.array([0.2, -0.4]), axis=-1).argmin(axis=1)
    for greedy in (False, True):
        action = aimed.act(known(), jnp.zeros((7, 1)), KEY, greedy=greedy)
        np.testing.assert_allclose(action[..., 0], noise[np.arange(7), best], atol=1e-6)


def test_each_statistic_of_the_heads_has_a_favourite_of_its_own():
    state, noise = known(heads((0, 0), (3.0, -1.0))), jnp.array([[[0.5], [0.1], [0.9]]])
    for agg, favourite in (("min", 0.1), ("mean", 0.9)):
        agent = made(num_samples=3, agg=agg)
        np.testing.assert_allclose(agent.choose(state, jnp.zeros((1, 1)), noise), [[favourite]], rtol=1e-6)


def test_the_best_of_one_is_one_sample_of_the_flow():
    agent = dataclasses.replace(TINY, num_samples=1)
    state = jax.jit(agent.init, static_argnums=1)(KEY, WIDE)
    obs = jax.random.normal(jax.random.key(4), (7, 3))
    noise = agent.noise(WIDE, KEY, 7)
    flow = jax.jit(agent.proposals)(state, obs, noise[:, 0])
    np.testing.assert_allclose(agent.act(state, obs, KEY).reshape(7, 4), flow, atol=1e-6)


# Distillation


def test_the_distilled_policy_is_near_the_clipped_flow_and_climbs():
    agent = made(2, actor="distill", steps=1, alpha=5.0)
    state, batch = known(heads((0, 0), (0.2, 0.4)), drift=0.3, pull=1.0), batch_of(np.zeros((1, 2)))
    draws = drawn(size=2)

    def loss(policy):
        return agent.loss(state.params | {"policy": policy}, state, batch, draws)[0]

    found = fitted(loss, {"shift": 0.0, "scale": 0.0})
    assert float(found["shift"]) == pytest.approx(0.3 + 0.3 * 2 / (2 * 5), abs=1e-3)
    outside = known(heads((0, 0), (0.2, 0.4)), drift=3.0, pull=1.0, shift=1.5)
    losses = lambda policy: policy_losses(agent, policy, outside, batch, draws)  # noqa: E731
    distance, climb = losses(outside.params["policy"])
    assert (float(distance), float(climb)) == pytest.approx((0.25, -0.6), rel=1e-5)
    assert float(jax.grad(lambda policy: losses(policy)[1])(outside.params["policy"])["shift"]) == 0


def test_with_a_large_weight_only_the_distillation_is_left():
    agent = dataclasses.replace(TINY, actor="distill", alpha=1e6)
    state, batch = jax.jit(agent.init, static_argnums=1)(KEY, WIDE), random_batch(0)
    draws = agent.draw(WIDE, batch, KEY)

    alone = jax.jit(jax.grad(lambda p: policy_losses(agent, p, state, batch, draws)[0]))
    whole = jax.jit(lambda: pull_of(agent, state, batch, draws))()
    for ours, theirs in zip(*map(jax.tree.leaves, (whole["policy"], alone(state.params["policy"]))), strict=True):
        scale = float(jnp.abs(theirs).max())
        np.testing.assert_allclose(ours / 1e6, theirs, atol=1e-4 * scale)


@pytest.mark.parametrize("actor", ["best_of_n", "distill"])
def test_each_loss_moves_its_own_network_alone(actor):
    agent = dataclasses.replace(TINY, actor=actor)
    state, batch = jax.jit(agent.init, static_argnums=1)(KEY, WIDE), random_batch(0)
    draws = agent.draw(WIDE, batch, KEY)
    assert ("policy" in state.params) is (actor == "distill")

    slopes = slopes_of(agent, state, batch, draws)
    own = {"critic/loss": "critic", "actor/flow_loss": "flow"}
    own |= {"actor/distillation_loss": "policy"} if actor == "distill" else {}
    assert {name: reached(slopes[name]) for name in own} == {name: {net} for name, net in own.items()}
    if actor == "distill":  # which climbs the critic as it is
        assert reached(slopes_of(agent, state, batch, draws, through_state=False)["actor/q_loss"]) == {"policy"}
    joint = pull_of(agent, state, batch, draws)
    for name, net in own.items():
        if net != "policy":
            for x, y in zip(*map(jax.tree.leaves, (joint[net], slopes[name][net])), strict=True):
                np.testing.assert_allclose(x, y, atol=1e-6)


def test_single_actions_distilled_are_flow_q_learning():
    fields = {"hidden": (8,), "alpha": 7.0, "tau": 0.1, "steps": 3}
    chunked, plain = (
        with_fields(QC(Windows(chunk=1, backup=1), actor="distill"), **fields),
        with_fields(FQL(), **fields),
    )
    batch = random_batch(0, length=1)
    state = jax.jit(plain.init, static_argnums=1)(KEY, WIDE)
    theirs = dataclasses.replace(state, opt=chunked.adam.transformation().init(state.params))
    draws = plain.draw(WIDE, batch, KEY)
    after, losses = jax.jit(plain.learn)(state, batch, draws)
    draws = draws | {"next_noise": draws["next_noise"][:, None]}
    found, ours = jax.jit(chunked.learn)(theirs, batch, draws)
    assert losses.keys() == ours.keys()
    for x, y in zip(
        *map(jax.tree.leaves, ((after.params, after.target, losses), (found.params, found.target, ours))), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


# An update


def test_the_target_follows_the_critic_from_before_the_step():
    agent = with_fields(TINY, tau=0.25)
    state, batch = jax.jit(agent.init, static_argnums=1)(KEY, WIDE), random_batch(1)
    update = jax.jit(agent.update)
    after, metrics = update(state, batch, KEY)
    assert same(after.target, state.target) and not same(after.params["critic"], state.params["critic"])
    twice, _ = update(after, batch, KEY)
    wanted = jax.tree.map(lambda slow, fast: 0.75 * slow + 0.25 * fast, after.target["critic"], after.params["critic"])
    for ours, theirs in zip(jax.tree.leaves(twice.target), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert set(metrics) == {"critic/loss", "actor/flow_loss"}


def test_weight_decay_shrinks_what_no_loss_moves():
    agent = dataclasses.replace(TINY, adam=AdamW(0.1, 0.5))
    state = jax.jit(agent.init, static_argnums=1)(KEY, WIDE)
    batch = random_batch(1)
    nothing = dataclasses.replace(batch, valid=0 * batch.valid, terminated=jnp.zeros(16, bool))
    after, _ = jax.jit(agent.update)(state, nothing, KEY)
    for ours, before in zip(*map(jax.tree.leaves, (after.params, state.params)), strict=True):
        np.testing.assert_allclose(ours, 0.95 * before, rtol=1e-5)


def test_every_random_number_of_an_update_is_its_own():
    for actor, count in (("best_of_n", 4), ("distill", 1)):
        agent = dataclasses.replace(TINY, actor=actor)
        draws = agent.draw(WIDE, random_batch(0, 2000), KEY)
        assert {name: x.shape[1:] for name, x in draws.items()} == {
            "next_noise": (count, 4),
            "x0": (4,),
            "t": (1,),
            "distill_noise": (4,),
        }
        columns = np.concatenate([np.asarray(x).reshape(2000, -1) for x in draws.values()], axis=1)
        assert np.abs(np.corrcoef(columns, rowvar=False) - np.eye(columns.shape[1])).max() < 0.1


# Refusals


@pytest.mark.parametrize(
    ("agent", "message"),
    [
        (QC(Windows(6, 5)), "QC.windows.backup = 5: must be at least 6"),
        (QC(flow=FlowPolicy(Net((8, 0)))), "QC.flow.net.hidden = (8, 0): must be at least 1"),
        (QC(policy=OneStepPolicy(Net((0,)))), "QC.policy.net.hidden = (0,): must be at least 1"),
        (QC(critic=Critic(Net((0,)))), "QC.critic.net.hidden = (0,): must be at least 1"),
        (QC(critic=Critic(heads=0)), "QC.critic.heads = 0: must be at least 1"),
        (QC(num_samples=0), "QC.num_samples = 0: must be at least 1"),
        (QC(flow=FlowPolicy(steps=0)), "QC.flow.steps = 0: must be at least 1"),
        (QC(flow=FlowPolicy(time="fourier", time_size=2)), "QC.flow.time_size = 2: must be at least 4"),
        (QC(adam=AdamW(-1.0)), "QC.adam.lr = -1.0: must be at least 0"),
        (QC(adam=AdamW(weight_decay=-1.0)), "QC.adam.weight_decay = -1.0: must be at least 0"),
        (QC(alpha=-1.0), "QC.alpha = -1.0: must be at least 0"),
        (QC(Windows(discount=1.5)), "QC.windows.discount = 1.5: must be in [0, 1]"),
        (QC(critic=Critic(tau=-0.1)), "QC.critic.tau = -0.1: must be in [0, 1]"),
    ],
)
def test_values_out_of_range_are_refused_by_name(agent, message):
    with pytest.raises(UserError, match=re.escape(message)):
        ranges.check(agent)
