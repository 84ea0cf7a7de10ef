"""Facts about jaxrl.agents.edp, with networks that are formulas, so that every number is known by hand."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import ranges
from jaxrl.agents import EDP, QGF
from jaxrl.agents.parts import Critic, FlowPolicy, Value, Windows
from jaxrl.errors import UserError
from jaxrl.ops.guidance import QGuidance
from jaxrl.types import Spec
from tests.known import (
    KEY,
    batch_of,
    fitted,
    formula,
    linear_heads,
    metrics_of,
    random_batch,
    reached,
    same,
    slopes_of,
    state_of,
    with_fields,
)

pytestmark = pytest.mark.usefixtures("quick")

TINY = with_fields(EDP(), chunk=2, backup=3, hidden=(8,), batch=16)
KNOWN = EDP(
    QGF(
        Windows(backup=1),
        flow=formula(FlowPolicy(), lambda p, s, x, t: p["drift"] - p["pull"] * x + 0 * t),
        critic=formula(Critic(agg="min"), lambda p, s, a: linear_heads(p["bias"], p["slope"], a.sum(axis=-1))),
        value=formula(Value(), lambda p, s: p["v"] + s[..., 0]),
        guide=QGuidance(weight=0.0),
    ),
    bc_weight=2.0,
)
"""EDP with v(s, x, t) = drift - pull x, Q_j(s, a) = b_j + c_j (sum of the chunk) and V(s) = v + s."""


def known(drift=0.2, pull=1.0, target=(0.0, 0.0), slope=(0.0, 0.0)):
    """Returns the state of `KNOWN`, whose critic and value are 0, with such a slow critic."""
    zero = np.zeros(2)
    params = {"flow": {"drift": drift, "pull": pull}, "critic": {"bias": zero, "slope": zero}, "value": {"v": 0.0}}
    return state_of(params, {"critic": {"bias": np.array(target), "slope": np.array(slope)}})


def drawn(x0=0.0, t=0.5):
    return {"x0": jnp.full((1, 1), x0), "t": jnp.full((1, 1), t)}


def one_step(state, batch, draws):
    return KNOWN.one_step(*KNOWN.velocity(state.params, state, batch, draws), draws)


def test_the_policy_climbs_the_slow_critic_at_the_one_step_action():
    state, batch = known(target=(5.0, 1.0), slope=(3.0, 2.0)), batch_of([[0.0]], actions=[[[0.4]]])
    x = 0.25 * 0.4 + 0.75 * 0.8  # at time 1/4 between noise 0.8 and the action
    action = x + 0.75 * (0.2 - x)
    found = one_step(state, batch, drawn(0.8, 0.25))
    np.testing.assert_allclose(found, [[action]], rtol=1e-6)
    losses = metrics_of(KNOWN, state, batch, drawn(0.8, 0.25))
    assert losses["actor/q_loss"] == pytest.approx(-(1 + 2 * action), rel=1e-6)  # the lower head
    assert losses["actor/flow_loss"] == pytest.approx((0.2 - x - (0.4 - 0.8)) ** 2, rel=1e-5)
    total, _ = KNOWN.loss(state.params, state, batch, drawn(0.8, 0.25))
    rest = losses["critic/loss"] + losses["value/loss"]
    assert float(total) == pytest.approx(2 * losses["actor/flow_loss"] + losses["actor/q_loss"] + rest, rel=1e-6)


def test_the_one_step_action_is_clipped_and_pulls_nowhere_beyond_the_box():
    state, batch = known(drift=9.0, slope=(1.0, 1.0)), batch_of([[0.0]], actions=[[[0.4]]])
    assert float(one_step(state, batch, drawn())[0, 0]) == 1.0
    slopes = slopes_of(KNOWN, state, batch, drawn())
    assert reached(slopes["actor/q_loss"]) == set() and reached(slopes["actor/flow_loss"]) == {"flow"}


def test_the_policy_settles_between_the_data_and_the_critic():
    state, batch = known(pull=0.0, slope=(0.8, 0.8)), batch_of([[0.0]], actions=[[[0.4]]])
    drift = lambda p: {"drift": p, "pull": jnp.zeros(())}  # noqa: E731
    loss = lambda p: KNOWN.loss(state.params | {"flow": drift(p)}, state, batch, drawn(0.3))[0]  # noqa: E731
    # the minimum of 2 (d - (0.4 - 0.3))^2 - 0.8 (x + d / 2)
    assert float(fitted(loss, jnp.zeros(()))) == pytest.approx(0.1 + 0.8 / (2 * 2 * 2), abs=1e-3)


def test_each_loss_moves_its_own_network_alone():
    spec = Spec(observation=5, action=2, goal=2)
    batch, state = random_batch(0, spec=spec), TINY.init(KEY, spec)
    slopes = slopes_of(TINY, state, batch, TINY.draw(spec, batch, KEY), through_state=False)
    moved = {name: reached(slope) for name, slope in slopes.items()}
    assert moved == {
        "actor/flow_loss": {"flow"},
        "actor/q_loss": {"flow"},
        "critic/loss": {"critic"},
        "value/loss": {"value"},
    }


def test_the_policy_sees_the_goal_unlike_the_behavior_of_qgf():
    spec = Spec(observation=3, action=2, goal=1)
    obs = jnp.asarray([[0.1, 0.2, -0.9], [0.1, 0.2, 0.9]])
    for agent, sees in ((TINY, True), (TINY.qgf, False)):
        state = agent.init(KEY, spec)
        noise = jnp.ones((2, 4)) * 0.1
        seen = state.spec.behaviour(obs)
        first, second = agent_flow(agent).sample(state.params["flow"], seen, noise)
        assert np.array_equal(first, second) != sees


def agent_flow(agent: EDP | QGF) -> FlowPolicy:
    return agent.qgf.flow if isinstance(agent, EDP) else agent.flow


def test_with_no_climbing_it_learns_and_acts_as_qgf_without_guidance():
    spec = Spec(observation=3, action=2)
    batch, ours = random_batch(1, spec=spec), dataclasses.replace(TINY, bc_weight=1.0)
    state = ours.init(KEY, spec)
    assert same(state, ours.qgf.init(KEY, spec))
    draws = ours.draw(spec, batch, KEY)
    theirs = metrics_of(ours.qgf, state, batch, draws)
    found = metrics_of(ours, state, batch, draws)
    assert {name: found[name] for name in theirs} == pytest.approx(theirs, rel=1e-6)
    np.testing.assert_array_equal(ours.act(state, batch.obs, KEY), ours.qgf.act(state, batch.obs, KEY))


def test_values_out_of_range_are_refused_by_name():
    with pytest.raises(UserError, match=re.escape("EDP.bc_weight = -1.0: must be at least 0")):
        ranges.check(EDP(bc_weight=-1.0))
    with pytest.raises(UserError, match=re.escape("EDP.qgf.value.head = 'bce': must be that of the critic, 'mse'")):
        ranges.check(EDP(QGF(value=Value(head="bce"))))
