"""Facts about jaxrl.agents.fmq, with networks that are formulas, so that every number is known by hand.

Errors of flow maps, trust regions and beam searches themselves are tested in tests/ops.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import ranges
from jaxrl.agents import FMQ
from jaxrl.agents.learner import State
from jaxrl.agents.parts import AdamW, Critic, FlowMapPolicy, Net, SelfDistillation, Windows
from jaxrl.errors import UserError
from jaxrl.ops import flow, guidance
from jaxrl.ops.guidance import BeamSearch
from jaxrl.types import Phase
from tests.known import (
    KEY,
    WIDE,
    batch_of,
    formula,
    jitted,
    metrics_of,
    random_batch,
    same,
    state_of,
    with_fields,
)

pytestmark = pytest.mark.usefixtures("quick")

OFFLINE = Phase("offline", epochs=1, iterations=1, collects=False, updates=1, data="dataset")
ONLINE = Phase("online", epochs=1, iterations=1, collects=True, updates=1)
SMALL = {"chunk": 3, "backup": 3, "num_samples": 4, "target_samples": 4, "warmup": 2, "curriculum": 10}
TINY = with_fields(FMQ(), hidden=(16,), batch=8, **SMALL)
KNOWN = dataclasses.replace(
    with_fields(FMQ(), discount=1.0, **SMALL),
    actor=formula(
        FlowMapPolicy(), lambda p, s, x, r, t: p["shift"] + (p["scale"] - 1) * x + p["sight"] * s[..., :1] + 0 * t
    ),
    critic=formula(
        Critic(), lambda p, s, a: jnp.stack([row[0] + a @ row[1:] + s[..., 0] for row in p["biases_and_slopes"]])
    ),
)
"""FMQ with X_{0,1}(x) = shift + scale x + sight s for each entry, and Q_j(s, a) = b_j + c_j a + s."""


def heads(*rows):
    """Returns the parameters of critics, each as (bias, slope of every entry of the flat chunk)."""
    return {"biases_and_slopes": np.array(rows)}


ZERO = heads((0, 0, 0, 0), (0, 0, 0, 0))
TEN = heads((10, 0, 0, 0), (10, 0, 0, 0))


def known(critic=ZERO, target=None, shift=0.0, scale=0.3, sight=0.0, online=False) -> State:
    """Returns the state of `KNOWN` with these parameters, critics as `heads`; online the actor is its own anchor."""
    params = {"actor": {"shift": shift, "scale": scale, "sight": sight}, "critic": critic}
    state = state_of(params, None if target is None else {"critic": target})
    return KNOWN.enter(state, ONLINE) if online else state


def after(state: State, updates: int) -> State:
    """Returns the state as if after so many updates."""
    return dataclasses.replace(state, step=jnp.asarray(updates))


@jax.jit
def _measured(agent, state, batch):
    def loss(params):
        total, metrics = agent.loss(params, state, batch, agent.draw(state, batch, KEY))
        return total, metrics | {"loss": total}

    gradient, metrics = jax.grad(loss, has_aux=True)(state.params)
    return metrics, gradient["actor"]


def measured(agent, state, batch) -> dict[str, float]:
    """Returns the joint loss, as "loss", and what it consists of."""
    return {name: float(value) for name, value in _measured(agent, state, batch)[0].items()}


update = jitted(FMQ.update)


def started(agent=TINY) -> State:
    return jax.jit(agent.init, static_argnums=1)(KEY, WIDE)


def whole_batch():
    """Returns random windows that nothing cuts."""
    batch = random_batch(0)
    return dataclasses.replace(batch, valid=jnp.ones((16, 3)), terminated=jnp.zeros(16, bool))


# The critic


def test_the_td_target_is_the_chunks_return_and_the_targets_value():
    found = measured(KNOWN, known(ZERO, TEN), batch_of([[1, 2, 3]]))
    assert (found["critic/loss"], found["critic/target_max"], found["critic/q"]) == (256, 16, 0)


def test_with_one_step_it_is_ordinary_td():
    agent = with_fields(KNOWN, chunk=1, backup=1, discount=0.9)
    state = known(heads((2, 0), (2, 0)), heads((10, 0), (10, 0)))
    found = measured(agent, state, batch_of([[3.0], [5.0]], terminated=[False, True]))
    assert found["critic/target_max"] == pytest.approx(12.0)
    assert found["critic/loss"] == pytest.approx(((3 + 9 - 2) ** 2 + (5 - 2) ** 2) / 2)


def test_the_critic_regresses_every_head_at_the_windows_own_chunk():
    batch = batch_of([[0, 0, 0]], actions=[[[0.5], [-0.25], [1.0]]])
    found = measured(KNOWN, known(heads((1, 1, 0, 0), (0, 0, 2, -1)), ZERO), batch)
    assert found["critic/loss"] == pytest.approx((1.5**2 + (-1.5) ** 2) / 2)
    assert found["critic/q"] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("agent", "online", "value"),
    [
        (KNOWN, False, 7),
        (KNOWN, True, 4),
        (with_fields(KNOWN, agg="min"), False, 4),
        (with_fields(KNOWN, online_agg="mean"), True, 7),
    ],
)
def test_each_phase_aggregates_the_target_heads_in_its_own_way(agent, online, value):
    state = known(ZERO, heads((10, 0, 0, 0), (4, 0, 0, 0)), online=online)
    assert measured(agent, state, batch_of([[0, 0, 0]]))["critic/target_max"] == value


def test_the_online_critic_chooses_the_next_action_and_the_target_values_it():
    state = known(heads((0, 1, 0, 0), (0, 1, 0, 0)), heads((0, -1, 0, 0), (0, -1, 0, 0)))
    batch = batch_of([[0, 0, 0]])
    draws = KNOWN.draw(state, batch, KEY)
    candidates = np.clip(0.3 * np.asarray(draws["next_noise"]), -1, 1)
    assert candidates.shape == (1, 4, 3)
    assert metrics_of(KNOWN, state, batch, draws)["critic/target_max"] == pytest.approx(-candidates[..., 0].max())


def test_next_actions_and_their_values_are_those_of_the_next_observation():
    state = known(heads((0, 1, 1, 1), (0, 1, 1, 1)), scale=0.0, sight=1.0)
    found = measured(KNOWN, state, batch_of([[0, 0, 0]], obs=[[0.9]], next_obs=[[0.25]]))
    assert found["critic/target_max"] == pytest.approx(0.75 + 0.25)


ENDS = {  # three steps each: whole, terminated after two, truncated after one, terminated in the last, none at all
    "rewards": [[1, 1, 1], [1, 1, 0], [1, 0, 0], [2, 1, 1], [0, 0, 0]],
    "valid": [[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]],
    "terminated": [0, 1, 0, 1, 0],
}


@pytest.mark.parametrize(("cut", "kept"), [("keep", [13, 2, 0, 4, 0]), ("drop", [13, 0, 0, 4, 0])])
def test_windows_that_are_cut_short_train_the_critic_only_if_termination_cut_them(cut, kept):
    found = measured(with_fields(KNOWN, cut=cut), known(ZERO, TEN), batch_of(**ENDS))
    assert found["critic/loss"] == pytest.approx(sum(target**2 for target in kept) / 5)


def test_probabilities_have_targets_that_are_probabilities():
    agent = with_fields(KNOWN, chunk=1, backup=1, head="bce", discount=0.5)
    state = known(heads((0.3, 0), (-2.0, 0)), heads((0, 0), (0, 0)))
    p = 1 / (1 + np.exp([[-0.3], [2.0]]))
    for reward, y in ((0.25, 0.5), (0.9, 1.0), (-0.6, 0.0)):
        found = measured(agent, state, batch_of([[reward]]))
        entropy = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
        assert (found["critic/target_max"], found["critic/loss"]) == pytest.approx((y, entropy), rel=1e-5, abs=1e-6)
        assert found["critic/q"] == pytest.approx(p.mean())


# An update


def test_the_target_follows_the_critic_from_before_the_step():
    state = started()
    state = dataclasses.replace(state, target=jax.tree.map(lambda x: x + 1.0, state.target))
    after, _ = update(with_fields(TINY, tau=0.25), state, random_batch(0), KEY)
    wanted = jax.tree.map(lambda slow, fast: 0.75 * slow + 0.25 * fast, state.target["critic"], state.params["critic"])
    for ours, theirs in zip(jax.tree.leaves(after.target), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert not same(after.params["critic"], state.params["critic"])
    assert int(after.step) == 1


def test_the_target_starts_as_the_critic_and_there_is_no_anchor():
    state = started()
    assert same(state.target, {"critic": state.params["critic"]}) and state.anchor is None and int(state.step) == 0


def test_weight_decay_shrinks_what_no_loss_moves():
    state, batch = started(), whole_batch()
    nothing = dataclasses.replace(batch, valid=0 * batch.valid)
    after, _ = update(dataclasses.replace(TINY, adam=AdamW(0.1, 0.5)), state, nothing, KEY)
    for ours, before in zip(*map(jax.tree.leaves, (after.params, state.params)), strict=True):
        np.testing.assert_allclose(ours, 0.95 * before, rtol=1e-5)


def test_the_first_step_of_adam_moves_each_parameter_by_the_learning_rate():
    state = started()
    after, _ = update(with_fields(TINY, lr=0.01), state, random_batch(0), KEY)
    moved = np.concatenate(
        [np.abs(a - b).ravel() for a, b in zip(*map(jax.tree.leaves, (after.params, state.params)), strict=True)]
    )
    moved = moved[moved > 0]
    assert len(moved) > 100 and np.median(moved) == pytest.approx(0.01, rel=1e-3) and moved.max() <= 0.0101


@pytest.mark.parametrize("online", [False, True])
def test_every_random_number_of_an_update_is_its_own(online):
    agent = with_fields(KNOWN, num_samples=6, target_samples=2)
    draws = agent.draw(known(online=online), batch_of(np.zeros((2000, 3))), KEY)
    shapes = {"next_noise": (2, 3), "x0": (3,), "t": (1,), "off_x0": (3,), "off_r": (1,), "off_t": (1,)}
    shapes |= {"off_split": (1,)} | ({"guided_x0": (3,), "guided_r": (1,)} if online else {})
    assert {name: x.shape[1:] for name, x in draws.items()} == shapes
    columns = np.concatenate([np.asarray(x).reshape(2000, -1) for name, x in draws.items() if name != "off_t"], axis=1)
    assert np.abs(np.corrcoef(columns, rowvar=False) - np.eye(columns.shape[1])).max() < 0.1
    assert (draws["off_r"] <= draws["off_t"]).all()


# The offline actor

FULL = batch_of(np.zeros((64, 3)), actions=np.random.default_rng(1).uniform(-1, 1, (64, 3, 1)).astype(np.float32))


def waves(p, s, x, r, t):
    return p * jnp.sin(2 * x + r) + p**2 * t * jnp.cos(x - r * t)


WAVY = dataclasses.replace(KNOWN, actor=formula(FlowMapPolicy(), waves))
ERRORS = {
    ("esd", "sample"): lambda u, *points, split: flow.esd_error(u, *points, "sample"),
    ("esd", "diagonal"): lambda u, *points, split: flow.esd_error(u, *points, "diagonal"),
    ("lsd", "sample"): lambda u, *points, split: flow.lsd_error(u, *points),
    ("lsd_reverse", "sample"): lambda u, *points, split: flow.lsd_error(u, *points, reverse=True),
    ("psd", "sample"): lambda u, *points, split: flow.psd_error(u, *points, split),
}


@pytest.mark.parametrize(("kind", "velocity"), ERRORS)
def test_the_chosen_self_distillation_loss_is_the_one_that_is_added(kind, velocity):
    agent = with_fields(WAVY, kind=kind, velocity=velocity)
    valid = np.ones((64, 3), np.float32)
    valid[:16, 1:] = 0
    batch = dataclasses.replace(FULL, valid=jnp.asarray(valid))
    state = after(state_of({"actor": 0.8, "critic": ZERO}), 10)
    found, slope = _measured(agent, state, batch)

    @jax.jit
    def by_hand():
        """Returns (value, slope) of the diagonal loss and of all others, steps after the end counted as 0."""
        draws, x1 = agent.draw(state, batch, KEY), batch.actions[..., 0]
        points = draws["off_x0"], x1, draws["off_r"], draws["off_t"]
        errors = [lambda u: flow.matching_error(u, draws["x0"], x1, draws["t"])]
        errors += [lambda u, error=error: error(u, *points, split=draws["off_split"]) for error in ERRORS.values()]

        def mean(p, error):
            return (error(lambda x, r, t: waves(p, None, x, r, t)) * valid).mean()

        return [jax.value_and_grad(mean)(0.8, error) for error in errors]

    diagonal, *off = np.array(by_hand())
    assert float(found["actor/diagonal_loss"]) == pytest.approx(diagonal[0], rel=1e-4)
    ours = np.array([found["actor/distillation_loss"], slope - diagonal[1]])
    assert [name for name, wanted in zip(ERRORS, off, strict=True) if ours == pytest.approx(wanted, rel=1e-3)] == [
        (kind, velocity)
    ]


def test_intervals_widen_from_the_warm_up_to_the_curriculums_end():
    # one jump of length l against two that meet at the split s: (l - s^2 l - (1 - s)^2 l)^2
    agent = with_fields(dataclasses.replace(KNOWN, actor=formula(FlowMapPolicy(), _length)), kind="psd")
    state = state_of({"actor": 0.0, "critic": ZERO})
    draws = agent.draw(state, FULL, KEY)
    split, width = np.asarray(draws["off_split"]), np.asarray(draws["off_t"] - draws["off_r"])
    assert 0 <= split.min() < 0.2 and 0.8 < split.max() <= 1
    assert width.mean() == pytest.approx(1 / 3, abs=0.1) and width.max() > 0.7

    def off(agent, updates):
        return metrics_of(agent, after(state, updates), FULL, draws)["actor/distillation_loss"]

    whole = np.square(2 * split * (1 - split) * width).mean()
    found = [off(agent, updates) for updates in (0, 2, 4, 10, 99)]
    assert found == pytest.approx([0, 0, 0.25**2 * whole, whole, whole], rel=1e-4)
    sudden = with_fields(agent, warmup=5, curriculum=5)  # a curriculum of no length is whole at once
    assert [off(sudden, updates) for updates in (5, 6)] == pytest.approx([0, whole], rel=1e-4)


def _length(p, s, x, r, t):
    return t - r + 0 * x


FIVE_AND_SEVEN = formula(SelfDistillation(warmup=2), lambda *_: (jnp.asarray(5.0), jnp.asarray(7.0)), "losses")


@pytest.mark.parametrize(("updates", "weight"), [(0, 0), (2, 0), (3, 1), (50, 1)])
def test_self_distillation_counts_once_the_warm_up_is_over(updates, weight):
    agent = dataclasses.replace(KNOWN, distillation=FIVE_AND_SEVEN)
    state, batch = after(known(ZERO, TEN), updates), batch_of([[1, 2, 3]])
    found = measured(agent, state, batch)
    assert found["loss"] == 256 + 5 + 7 * weight
    parts = {name: value for name, value in found.items() if name.startswith("actor/")}
    assert parts == {"actor/diagonal_loss": 5, "actor/distillation_loss": 7}


# The online actor


MU, S = 0.7, 0.4


def spread(t):
    """Returns the standard deviation at time t of the flow from noise to N(MU, S^2)."""
    return jnp.sqrt((1 - t) ** 2 + t**2 * S**2)


def exact_velocity(p, s, x, r, t):
    """Returns the average velocity of the exact flow map to N(MU, S^2), moved by the shift."""
    slope = ((1 + S**2) * (r + t) - 2) / (spread(r) ** 2 * (1 + spread(t) / spread(r)))
    return MU + slope * (x - r * MU) + p["shift"].reshape((1,) * (x.ndim - 1) + (-1,))


EXACT = formula(FlowMapPolicy(), exact_velocity)


def exact(q, shift=(0.0,), gradient_of="first", actor=EXACT, **fields) -> tuple[FMQ, State]:
    """Returns an agent with critics q(a) and its online state: the anchor is the exact map, the actor that, shifted."""
    windows = Windows(chunk=len(shift), backup=len(shift))
    fields = {"eta": 0.3, "beta": 0.0, "target_samples": 1} | fields
    agent = FMQ(windows, actor, critic=formula(Critic(), lambda p, s, a: q(a)), gradient_of=gradient_of, **fields)
    state = state_of({"actor": {"shift": np.array(shift)}, "critic": {}})
    return agent, dataclasses.replace(state, anchor={"shift": jnp.zeros(len(shift))})


def guided(agent, state, batch):
    """Returns what the actor's loss consists of, and its gradient with respect to the actor's shift."""
    metrics, gradient = _measured(agent, state, batch)
    found = {name: float(value) for name, value in metrics.items() if name.startswith("actor/")}
    return found, np.asarray(gradient["shift"])


def ones(count, chunk=1):
    return batch_of(np.zeros((count, chunk)), actions=np.full((count, chunk, 1), 0.4))


def alike(a):
    """Two equal critics that want the sum of the chunk to be high."""
    return jnp.stack([a.sum(axis=-1)] * 2)


def test_the_gaussian_policy_moves_to_the_edge_of_the_trust_region():
    far = lambda a: jnp.stack([-0.5 * jnp.square(a[..., 0] - 9)] * 2)  # noqa: E731
    found, gradient = guided(*exact(far), ones(200))
    assert found == pytest.approx({"actor/fmq_loss": 0.3**2, "actor/drift": 0, "actor/radius": 0.3}, rel=1e-4)
    np.testing.assert_allclose(gradient, [-2 * 0.3], rtol=1e-4)

    agent, state = exact(far, shift=(0.3,))
    found, gradient = guided(agent, state, ones(200))
    assert (found["actor/fmq_loss"], gradient[0]) == pytest.approx((0, 0), abs=1e-6)
    assert found["actor/drift"] == pytest.approx(0.3, rel=1e-4)
    noise = jax.random.normal(KEY, (1, 4000, 1))
    sample = agent.one_step(state, jnp.zeros((1, 1)), noise)
    np.testing.assert_allclose(sample, np.clip(MU + 0.3 + S * np.asarray(noise), -1, 1), atol=1e-5)


def test_a_linear_critic_is_climbed_along_its_weights_and_a_flat_one_not_at_all():
    c = np.array([3.0, 0.0, -4.0], np.float32)
    q = lambda a: jnp.stack([a @ jnp.asarray(c), a @ jnp.array([0.0, 1.0, 0.0])])  # noqa: E731
    still = (0.0, 0.0, 0.0)
    found, gradient = guided(*exact(q, still), ones(50, 3))
    assert found["actor/fmq_loss"] == pytest.approx(0.09 / 3, rel=1e-4)
    np.testing.assert_allclose(gradient, -2 * 0.3 * c / 5 / 3, rtol=1e-4, atol=1e-7)
    mean = np.array([3, 1, -4]) / np.sqrt(26)
    _, gradient = guided(*exact(q, still, gradient_of="mean"), ones(50, 3))
    np.testing.assert_allclose(gradient, -2 * 0.3 * mean / 3, rtol=1e-4, atol=1e-7)
    found, gradient = guided(*exact(lambda a: jnp.zeros((2, *a.shape[:-1])), still), ones(50, 3))
    assert found["actor/fmq_loss"] == 0 and not gradient.any()


def test_steps_past_the_end_do_not_count():
    batch = dataclasses.replace(ones(4, 2), valid=jnp.array([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]))
    found, gradient = guided(*exact(alike, (0.0, 0.0)), batch)
    assert found["actor/fmq_loss"] == pytest.approx(0.09 / 2 * 4 / 8, rel=1e-4)  # four of eight entries, 0.3^2 / 2 each
    np.testing.assert_allclose(gradient[0] / gradient[1], 3, rtol=1e-4)


def test_no_radius_distils_the_anchor():
    q = lambda a: jnp.stack([a[..., 0], -a[..., 0]])  # noqa: E731
    found, gradient = guided(*exact(q, eta=0.0), ones(50))
    assert found["actor/fmq_loss"] == 0 and not gradient.any()
    found, gradient = guided(*exact(q, (0.2,), eta=0.0), ones(50))
    assert (found["actor/fmq_loss"], gradient[0]) == pytest.approx((0.04, 0.4), rel=1e-4)


def test_the_radius_shrinks_where_the_critics_disagree_about_where_the_anchor_arrives():
    # heads a and a + 2 a^2 have a standard deviation of a^2
    q = lambda a: jnp.stack([a[..., 0], a[..., 0] + 2 * jnp.square(a[..., 0])])  # noqa: E731
    agent, state = exact(q, beta=0.5)
    draws = agent.draw(state, ones(300), KEY)
    x0, r = np.asarray(draws["guided_x0"]), np.asarray(draws["guided_r"])
    noisy = (1 - r) * x0 + r * 0.4
    arrived = np.clip(MU + S * (noisy - r * MU) / spread(r), -1, 1)
    assert np.abs(arrived).max() == 1 and (np.abs(arrived) < 1).mean() > 0.5  # clipped
    apart = np.square(arrived[:, 0])
    radius = 0.3 / (1 + 0.5 * apart / apart.mean())
    found, _ = guided(agent, state, ones(300))
    assert found["actor/fmq_loss"] == pytest.approx(np.square(radius).mean(), rel=1e-4)
    assert found["actor/radius"] == pytest.approx(radius.mean(), rel=1e-4)
    assert guided(*exact(alike, beta=0.3), ones(50))[0]["actor/fmq_loss"] == pytest.approx(0.09, rel=1e-4)


def test_the_anchor_is_asked_at_noisy_data_and_for_the_jump_to_the_end():
    asked = []

    def watched(p, s, x, r, t):
        if x.ndim == 2:  # and not for next actions
            asked.append((p["shift"][0], x, r, t))
        return exact_velocity(p, s, x, r, t)

    agent, state = exact(alike, (0.2,), actor=formula(FlowMapPolicy(), watched))
    batch = ones(4000)

    @jax.jit
    def ask():
        agent.loss(state.params, state, batch, agent.draw(state, batch, KEY))
        return asked

    (anchor, x, r, t), (student, *same_points) = sorted(ask(), key=lambda call: call[0])
    assert (anchor, student) == pytest.approx((0.0, 0.2))
    for ours, theirs in zip((x, r, t), same_points, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(t, np.ones((4000, 1)))
    r = np.asarray(r)
    assert 0 <= r.min() < 0.01 and 0.99 < r.max() < 1 and r.mean() == pytest.approx(0.5, abs=0.02)
    noise = (np.asarray(x) - 0.4 * r) / (1 - r)
    assert noise.mean() == pytest.approx(0, abs=0.07) and noise.std() == pytest.approx(1, abs=0.05)


def test_flow_losses_go_on_online_only_if_asked():
    fields = {"distillation": FIVE_AND_SEVEN}
    asked = fields | {"flow_losses_online": True, "diagonal_weight": 2.0, "esd_weight": 3.0}
    for agent, state, more in ((*exact(alike, **fields), 0), (*exact(alike, **asked), 10 + 21)):
        found = measured(agent, state, ones(9))
        assert found["loss"] == pytest.approx(found["critic/loss"] + 0.09 + more, rel=1e-5)
        assert found["actor/fmq_loss"] == pytest.approx(0.09, rel=1e-4)


# The phases


@pytest.fixture(scope="module")
def offline_state() -> State:
    state = started()
    for key in jax.random.split(KEY, 3):
        state, _ = update(TINY, state, whole_batch(), key)
    return state


def test_going_online_copies_the_actor_and_changes_nothing_else(offline_state):
    online = TINY.enter(offline_state, ONLINE)
    assert same(online.anchor, offline_state.params["actor"])
    assert same(dataclasses.replace(online, anchor=None), offline_state)
    assert TINY.enter(offline_state, OFFLINE).anchor is None


def test_the_anchor_stays_bit_for_bit_while_the_actor_leaves_it(offline_state):
    online = TINY.enter(offline_state, ONLINE)

    @jax.jit
    def train(state):
        step = lambda state, key: TINY.update(state, whole_batch(), key)  # noqa: E731
        return jax.lax.scan(step, state, jax.random.split(KEY, 100))

    after, metrics = train(online)
    assert same(after.anchor, offline_state.params["actor"])
    assert same(TINY.enter(after, ONLINE).anchor, after.anchor)
    assert not same(after.params["actor"], online.params["actor"])
    assert int(after.step) == 103
    drift = np.asarray(metrics["actor/drift"])
    assert drift[0] == 0 and 0.01 < drift[-1] < 1


@pytest.mark.parametrize("online", [False, True])
def test_actor_and_critic_do_not_move_each_other(offline_state, online):
    state = TINY.enter(offline_state, ONLINE) if online else offline_state
    batch = whole_batch()
    after, _ = update(TINY, state, batch, KEY)
    paid, _ = update(TINY, state, dataclasses.replace(batch, rewards=batch.rewards + 100), KEY)
    assert same(after.params["actor"], paid.params["actor"]) and not same(after.params["critic"], paid.params["critic"])
    # the critic reads whole windows alone: a window cut by truncation teaches the actor only
    none, fewer = (
        update(TINY, state, dataclasses.replace(batch, valid=batch.valid.at[:, end:].set(0)), KEY)[0] for end in (2, 1)
    )
    assert same(none.params["critic"], fewer.params["critic"]) and not same(none.params["actor"], fewer.params["actor"])
    if online:
        wider, _ = update(dataclasses.replace(TINY, eta=0.1), state, batch, KEY)
        assert same(after.params["critic"], wider.params["critic"])
        assert not same(after.params["actor"], wider.params["actor"])


# Acting

OBS = jnp.zeros((5, 1))
act = jax.jit(FMQ.act, static_argnames="greedy")


def test_one_sample_is_the_one_step_map_of_its_noise():
    agent = dataclasses.replace(KNOWN, num_samples=1)
    action = act(agent, known(shift=0.4, scale=0.5), OBS, KEY)
    noise = jax.random.normal(KEY, (5, 1, 3))[:, 0]
    np.testing.assert_allclose(action[..., 0], np.clip(0.4 + 0.5 * np.asarray(noise), -1, 1), atol=1e-6)


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("online", [False, True])
def test_the_best_of_n_is_by_the_phases_aggregate_of_the_online_critic(online, greedy):
    # Q_1 = a, Q_2 = -3 a: the mean likes a low, the minimum likes a near zero
    state = known(heads((0, 1, 0, 0), (0, -3, 0, 0)), ZERO, scale=0.5, online=online)
    agent = dataclasses.replace(KNOWN, num_samples=6, target_samples=3)
    first = np.clip(0.5 * np.asarray(jax.random.normal(KEY, (5, 6, 3)))[..., 0], -1, 1)
    best = np.minimum(first, -3 * first).argmax(axis=1) if online else first.argmin(axis=1)
    found = act(agent, state, OBS, KEY, greedy=greedy)[:, 0, 0]
    np.testing.assert_allclose(found, first[np.arange(5), best], atol=1e-6)


def test_beam_search_is_for_evaluation_alone():
    state = known(heads((0, 1, 1, 1), (0, 1, 2, 1)), scale=0.5)
    beams = dataclasses.replace(KNOWN, test_sampler="beam_search")
    plain = dataclasses.replace(beams, test_sampler="best_of_n")
    np.testing.assert_array_equal(act(beams, state, OBS, KEY), act(plain, state, OBS, KEY))
    assert measured(beams, state, FULL) == measured(plain, state, FULL)
    searched, sampled = (act(agent, state, OBS, KEY, greedy=True).sum(axis=(1, 2)) for agent in (beams, plain))
    assert float((searched - sampled).mean()) > 0.2


@pytest.mark.parametrize("sampler", ["best_of_n", "beam_search"])
def test_candidates_are_made_and_scored_for_their_own_observation(sampler):
    obs = jnp.linspace(-0.8, 0.8, 5)[:, None]
    aimed = formula(Critic(), lambda p, s, a: jnp.stack([-jnp.square(a[..., 0] - s[..., 0])] * 2))
    beam = BeamSearch(width=64, rounds=1, branches=2, eta=0.0)
    agent = dataclasses.replace(KNOWN, critic=aimed, num_samples=64, test_sampler=sampler, beam=beam)
    found = act(agent, known(scale=0.5), obs, KEY, greedy=True)
    np.testing.assert_allclose(found[:, 0, 0], obs[:, 0], atol=0.15)

    again = dataclasses.replace(agent, beam=dataclasses.replace(beam, snr=0.0))  # branches start at time 0
    found = act(again, known(scale=0.0, sight=1.0), obs, KEY, greedy=True)
    np.testing.assert_allclose(found[..., 0], np.repeat(np.asarray(obs), 3, axis=1), atol=1e-6)


@pytest.mark.parametrize("online", [False, True])
def test_beam_search_without_rounds_and_step_is_the_best_of_its_beams_by_the_lowest_head(online):
    beam = BeamSearch(width=32, rounds=0, eta=0.0)
    agent = dataclasses.replace(KNOWN, test_sampler="beam_search", beam=beam)
    state = known(heads((0, 1, 0, 0), (0, -3, 0, 0)), ZERO, scale=0.5, online=online)
    noise = jax.random.normal(jax.random.split(KEY)[0], (5, 32, 3))
    beams = agent.one_step(state, OBS, noise)
    best = guidance.best_of(beams, jnp.minimum(beams[..., 0], -3 * beams[..., 0]))
    np.testing.assert_allclose(act(agent, state, OBS, KEY, greedy=True)[..., 0], best, atol=1e-6)


# Refusals


@pytest.mark.parametrize(
    ("agent", "message"),
    [
        (FMQ(actor=FlowMapPolicy(Net((8, 0)))), "FMQ.actor.net.hidden = (8, 0): must be at least 1"),
        (FMQ(actor=FlowMapPolicy(time_size=2)), "FMQ.actor.time_size = 2: must be at least 4"),
        (FMQ(critic=Critic(Net((0, 8)))), "FMQ.critic.net.hidden = (0, 8): must be at least 1"),
        (FMQ(critic=Critic(heads=0)), "FMQ.critic.heads = 0: must be at least 1"),
        (FMQ(num_samples=0), "FMQ.num_samples = 0: must be at least 1"),
        (FMQ(target_samples=0), "FMQ.target_samples = 0: must be at least 1"),
        (FMQ(adam=AdamW(-1e-3)), "FMQ.adam.lr = -0.001: must be at least 0"),
        (FMQ(adam=AdamW(np.array([1e-3, -1.0]))), "FMQ.adam.lr = "),
        (FMQ(adam=AdamW(weight_decay=-1.0)), "FMQ.adam.weight_decay = -1.0: must be at least 0"),
        (FMQ(eta=-1.0), "FMQ.eta = -1.0: must be at least 0"),
        (FMQ(beta=-1.0), "FMQ.beta = -1.0: must be at least 0"),
        (FMQ(distillation=SelfDistillation(warmup=-1)), "FMQ.distillation.warmup = -1: must be at least 0"),
        (
            FMQ(distillation=SelfDistillation(warmup=10, curriculum=9)),
            "FMQ.distillation.curriculum = 9: must be at least 10",
        ),
        (FMQ(Windows(chunk=5, backup=5, discount=1.5)), "FMQ.windows.discount = 1.5: must be in [0, 1]"),
        (FMQ(critic=Critic(tau=-0.1)), "FMQ.critic.tau = -0.1: must be in [0, 1]"),
        (FMQ(beam=BeamSearch(width=0)), "FMQ.beam.width = 0: must be at least 1"),
        (FMQ(beam=BeamSearch(rounds=-1)), "FMQ.beam.rounds = -1: must be at least 0"),
        (FMQ(beam=BeamSearch(branches=0)), "FMQ.beam.branches = 0: must be at least 1"),
        (FMQ(beam=BeamSearch(eta=-1.0)), "FMQ.beam.eta = -1.0: must be at least 0"),
        (FMQ(beam=BeamSearch(snr=-1.0)), "FMQ.beam.snr = -1.0: must be at least 0"),
        (FMQ(esd_weight=1.0), "FMQ.esd_weight = 1.0: has no effect unless flow_losses_online"),
        (FMQ(diagonal_weight=1.0), "FMQ.diagonal_weight = 1.0: has no effect unless flow_losses_online"),
        (FMQ(flow_losses_online=True, esd_weight=-1.0), "FMQ.esd_weight = -1.0: must be at least 0"),
    ],
)
def test_values_out_of_range_are_refused_by_name(agent, message):
    with pytest.raises(UserError, match=re.escape(message)):
        ranges.check(agent)


def test_values_at_the_edges_are_accepted():
    edges = {"discount": 1.0, "tau": 1.0, "eta": 0.0, "beta": 0.0, "warmup": 0, "curriculum": 0, "rounds": 0}
    ranges.check(with_fields(FMQ(), **edges))
    ranges.check(FMQ(flow_losses_online=True, esd_weight=1.0, diagonal_weight=0.5))
