"""Facts about jaxrl.agents.fmq, with networks that are linear (or exact), so that every number is known by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.agents.fmq import FMQ, FMQState
from jaxrl.errors import UserError
from jaxrl.ops import flow, guidance
from jaxrl.ops.guidance import BeamSearch
from jaxrl.types import Batch, Spec

SPEC = Spec(observation=2, action=1)
TINY = FMQ(
    chunk=3,
    actor_hidden=(16,),
    critic_hidden=(16,),
    batch_size=8,
    num_samples=4,
    target_samples=4,
    warmup=2,
    curriculum=10,
)
LINEAR = dataclasses.replace(TINY, actor_hidden=(), critic_hidden=(), discount=1.0)


def batch_of(rewards, valid=None, terminated=None, **fields) -> Batch:
    """Returns windows with the given rewards [B, H]; what is not said is zero, valid and goes on."""
    rewards = jnp.asarray(rewards, jnp.float32)
    count, chunk = rewards.shape
    valid = jnp.ones_like(rewards) if valid is None else jnp.asarray(valid, jnp.float32)
    empty = Batch(
        obs=jnp.zeros((count, 2)),
        actions=jnp.zeros((count, chunk, 1)),
        rewards=rewards * valid,
        valid=valid,
        terminated=jnp.zeros(count, bool) if terminated is None else jnp.asarray(terminated, bool),
        next_obs=jnp.zeros((count, 2)),
        steps=valid.sum(axis=1).astype(jnp.int32),
    )
    return dataclasses.replace(empty, **{name: jnp.asarray(value) for name, value in fields.items()})


def random_batch(count: int = 8, chunk: int = 3) -> Batch:
    rng = np.random.default_rng(0)
    return batch_of(
        rng.random((count, chunk)),
        obs=rng.random((count, 2)).astype(np.float32),
        actions=rng.uniform(-1, 1, (count, chunk, 1)).astype(np.float32),
        next_obs=rng.random((count, 2)).astype(np.float32),
    )


def linear_critic(*heads: tuple[float, ...]) -> dict:
    """Returns a linear critic, each head as (bias, weights of the flat chunk); observations do not matter."""
    weights = np.array(heads, np.float32)
    kernel = np.concatenate([np.zeros((len(heads), 2)), weights[:, 1:]], axis=1)[..., None]
    return {"params": {"VmapMLP_0": {"Dense_0": {"kernel": jnp.asarray(kernel, jnp.float32), "bias": weights[:, :1]}}}}


def linear_actor(scale: float, size: int = 3, shift: float = 0.0) -> dict:
    """Returns an actor whose one-step map is x -> shift + scale x."""
    kernel = jnp.zeros((2 + size + 128, size)).at[2 : 2 + size].set((scale - 1) * jnp.eye(size))
    return {"params": {"MLP_0": {"Dense_0": {"kernel": kernel, "bias": jnp.full(size, shift)}}}}


def state_of(critic: dict, target: dict | None = None, actor: dict | None = None, online: bool = False) -> FMQState:
    actor = linear_actor(0.3) if actor is None else actor
    return FMQState(
        spec=SPEC,
        params={"actor": actor, "critic": critic},
        target=critic if target is None else target,
        opt=None,
        step=jnp.zeros((), jnp.int32),
        anchor=actor if online else None,
    )


ZERO = linear_critic((0, 0, 0, 0), (0, 0, 0, 0))
KEY = jax.random.key(0)
update = jax.jit(FMQ.update)
init = jax.jit(FMQ.init, static_argnums=2)


def same(a, b) -> bool:
    """Returns whether two trees are equal, bit for bit."""
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


# The critic


def critic_loss(agent: FMQ, state: FMQState, batch: Batch) -> tuple[float, dict]:
    loss, metrics = agent.critic_loss(state.params["critic"], state, batch, KEY)
    return float(loss), {name: float(value) for name, value in metrics.items()}


def test_the_td_target_is_the_chunks_return_and_the_targets_value():
    ten = linear_critic((10, 0, 0, 0), (10, 0, 0, 0))
    loss, metrics = critic_loss(LINEAR, state_of(ZERO, ten), batch_of([[1, 2, 3]]))
    assert (loss, metrics["critic/target_max"], metrics["critic/q"], metrics["critic/loss"]) == (256, 16, 0, 256)


def test_with_one_step_it_is_ordinary_td():
    agent = dataclasses.replace(LINEAR, chunk=1, discount=0.9)
    q, slow = linear_critic((2, 0), (2, 0)), linear_critic((10, 0), (10, 0))
    state = state_of(q, slow, linear_actor(0.3, size=1))
    loss, metrics = critic_loss(agent, state, batch_of([[3.0], [5.0]], terminated=[False, True]))
    assert metrics["critic/target_max"] == pytest.approx(12.0)
    assert loss == pytest.approx(((3 + 9 - 2) ** 2 + (5 - 2) ** 2) / 2)


def test_the_critic_regresses_every_head_at_the_windows_own_chunk():
    heads = linear_critic((1, 1, 0, 0), (0, 0, 2, -1))
    batch = batch_of([[0, 0, 0]], actions=[[[0.5], [-0.25], [1.0]]])
    loss, metrics = critic_loss(LINEAR, state_of(heads, ZERO), batch)
    assert loss == pytest.approx((1.5**2 + (-1.5) ** 2) / 2)
    assert metrics["critic/q"] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("agent", "online", "value"),
    [
        (LINEAR, False, 7),
        (LINEAR, True, 4),
        (dataclasses.replace(LINEAR, offline_agg="min"), False, 4),
        (dataclasses.replace(LINEAR, online_agg="mean"), True, 7),
    ],
)
def test_each_phase_aggregates_the_target_heads_in_its_own_way(agent, online, value):
    slow = linear_critic((10, 0, 0, 0), (4, 0, 0, 0))
    _, metrics = critic_loss(agent, state_of(ZERO, slow, online=online), batch_of([[0, 0, 0]]))
    assert metrics["critic/target_max"] == value


def test_the_online_critic_chooses_the_next_action_and_the_target_values_it():
    likes, fears = linear_critic((0, 1, 0, 0), (0, 1, 0, 0)), linear_critic((0, -1, 0, 0), (0, -1, 0, 0))
    state = state_of(likes, fears)
    _, metrics = critic_loss(LINEAR, state, batch_of([[0, 0, 0]]))
    candidates = LINEAR.one_step(state, jnp.zeros((1, 2)), KEY, 4)
    assert metrics["critic/target_max"] == pytest.approx(-float(candidates[..., 0].max()))


def test_next_actions_are_those_of_the_next_observation():
    kernel = jnp.zeros((2 + 3 + 128, 3)).at[2:5].set(-jnp.eye(3)).at[0].set(1.0)
    actor = {"params": {"MLP_0": {"Dense_0": {"kernel": kernel, "bias": jnp.zeros(3)}}}}  # a = first entry of obs
    q = linear_critic((0, 1, 1, 1), (0, 1, 1, 1))
    batch = batch_of([[0, 0, 0]], obs=[[0.9, 0.0]], next_obs=[[0.25, 0.0]])
    _, metrics = critic_loss(LINEAR, state_of(q, actor=actor), batch)
    assert metrics["critic/target_max"] == pytest.approx(0.75)


ENDS = {  # three steps each: whole, terminated after two, truncated after one, terminated in the last, none at all
    "rewards": [[1, 1, 1], [1, 1, 0], [1, 0, 0], [2, 1, 1], [0, 0, 0]],
    "valid": [[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]],
    "terminated": [0, 1, 0, 1, 0],
}


@pytest.mark.parametrize(("cut_windows", "kept"), [("keep", [13, 2, 0, 4, 0]), ("drop", [13, 0, 0, 4, 0])])
def test_windows_that_are_cut_short_train_the_critic_only_if_termination_cut_them(cut_windows, kept):
    ten = linear_critic((10, 0, 0, 0), (10, 0, 0, 0))
    agent = dataclasses.replace(LINEAR, cut_windows=cut_windows)
    loss, _ = critic_loss(agent, state_of(ZERO, ten), batch_of(**ENDS))
    assert loss == pytest.approx(sum(target**2 for target in kept) / 5)


# An update


def test_the_target_follows_the_critic_from_before_the_step():
    state = init(TINY, KEY, SPEC)
    state = dataclasses.replace(state, target=jax.tree.map(lambda x: x + 1.0, state.target))
    after, _ = update(dataclasses.replace(TINY, tau=0.25), state, random_batch(), KEY)
    wanted = jax.tree.map(lambda slow, fast: 0.75 * slow + 0.25 * fast, state.target, state.params["critic"])
    for ours, theirs in zip(jax.tree.leaves(after.target), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert not same(after.params["critic"], state.params["critic"])
    assert int(after.step) == 1


def test_the_target_starts_as_the_critic_and_there_is_no_anchor():
    state = init(TINY, KEY, SPEC)
    assert same(state.target, state.params["critic"]) and state.anchor is None and int(state.step) == 0


def test_windows_without_a_valid_step_teach_nothing_and_decay_shrinks_the_weights():
    state = init(TINY, KEY, SPEC)
    nothing = batch_of(np.zeros((8, 3)), valid=np.zeros((8, 3)))
    after, _ = update(TINY, state, nothing, KEY)
    assert same(after.params, state.params)
    after, _ = update(dataclasses.replace(TINY, lr=0.1, weight_decay=0.5), state, nothing, KEY)
    for ours, before in zip(jax.tree.leaves(after.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(ours, 0.95 * before, rtol=1e-5)


def test_the_first_step_of_adam_moves_each_parameter_by_the_learning_rate():
    state = init(TINY, KEY, SPEC)
    after, _ = update(dataclasses.replace(TINY, lr=0.01), state, random_batch(), KEY)
    moved = np.concatenate(
        [np.abs(a - b).ravel() for a, b in zip(*map(jax.tree.leaves, (after.params, state.params)), strict=True)]
    )
    moved = moved[moved > 0]
    assert len(moved) > 100 and np.median(moved) == pytest.approx(0.01, rel=1e-3) and moved.max() <= 0.0101


# The offline actor

FULL = batch_of(np.zeros((64, 3)), actions=np.random.default_rng(1).uniform(-1, 1, (64, 3, 1)).astype(np.float32))


@pytest.mark.parametrize(
    ("name", "velocity", "called", "options"),
    [
        ("esd", "sample", "esd_error", ("sample",)),
        ("esd", "diagonal", "esd_error", ("diagonal",)),
        ("lsd", "sample", "lsd_error", False),
        ("lsd_reverse", "sample", "lsd_error", True),
        ("psd", "sample", "psd_error", "split"),
    ],
)
def test_the_chosen_self_distillation_loss_is_the_one_that_is_added(monkeypatch, name, velocity, called, options):
    seen = {}

    def spy(u, x0, x1, r, t, *rest, **named):
        seen.update(x0=x0, x1=x1, r=r, t=t, rest=rest, named=named)
        return jnp.full_like(x1, 7.0)

    monkeypatch.setattr(flow, called, spy)
    monkeypatch.setattr(flow, "matching_error", lambda u, x0, x1, t: seen.update(noise=x0, data=x1, t=t) or 0 * x1 + 2)
    agent = dataclasses.replace(LINEAR, offline_loss=name, velocity=velocity)
    valid = np.ones((64, 3), np.float32)
    valid[:16, 1:] = 0
    state = dataclasses.replace(state_of(ZERO), step=jnp.asarray(10))
    diagonal, off = agent.flow_losses(state.params["actor"], state, dataclasses.replace(FULL, valid=valid), KEY)
    assert (float(diagonal), float(off)) == pytest.approx((2 * 160 / 192, 7 * 160 / 192))
    for data in (seen["x1"], seen["data"]):
        np.testing.assert_array_equal(data, FULL.actions[..., 0])
    assert np.abs(np.asarray(seen["x0"] - seen["noise"])).min() > 0  # each loss has noise of its own
    if options == "split":
        split = np.asarray(seen["rest"][0])
        assert split.shape == (64, 1) and 0 <= split.min() < 0.2 and 0.8 < split.max() <= 1
    else:
        assert (seen["rest"] == options) if called == "esd_error" else (seen["named"] == {"reverse": options})


def test_intervals_widen_from_the_warm_up_to_the_curriculums_end(monkeypatch):
    seen = []
    monkeypatch.setattr(flow, "psd_error", lambda u, x0, x1, r, t, split: seen.append((r, t)) or 0 * x1)
    agent, state = dataclasses.replace(LINEAR, offline_loss="psd"), state_of(ZERO)
    for step in (0, 2, 4, 10, 99):
        agent.flow_losses(state.params["actor"], dataclasses.replace(state, step=jnp.asarray(step)), FULL, KEY)
    width = [np.asarray(t - r) for r, t in seen]
    np.testing.assert_array_equal(width[0], np.zeros((64, 1)))
    np.testing.assert_array_equal(width[1], np.zeros((64, 1)))
    np.testing.assert_allclose(width[2], 0.25 * width[3], atol=1e-6)
    np.testing.assert_array_equal(width[4], width[3])
    assert width[3].mean() == pytest.approx(1 / 3, abs=0.1) and width[3].max() > 0.7


@pytest.mark.parametrize(("step", "weight"), [(0, 0), (2, 0), (3, 1), (50, 1)])
def test_self_distillation_counts_once_the_warm_up_is_over(monkeypatch, step, weight):
    monkeypatch.setattr(FMQ, "flow_losses", lambda self, *args: (jnp.asarray(2.0), jnp.asarray(7.0)))
    state = dataclasses.replace(state_of(ZERO), step=jnp.asarray(step))
    loss, metrics = TINY.cloning_loss(state.params["actor"], state, FULL, KEY)
    assert float(loss) == 2 + 7 * weight
    assert {name: float(value) for name, value in metrics.items()} == {
        "actor/diagonal_loss": 2,
        "actor/distillation_loss": 7,
    }


def test_a_curriculum_of_no_length_is_whole_at_once():
    agent = dataclasses.replace(TINY, warmup=5, curriculum=5, offline_loss="lsd")
    state = dataclasses.replace(init(agent, KEY, SPEC), step=jnp.asarray(6))
    assert np.isfinite(float(agent.cloning_loss(state.params["actor"], state, random_batch(), KEY)[0]))


# The online actor


MU, S = 0.7, 0.4


class Exact(FMQ):
    """FMQ whose actor is the exact flow map to N(MU, S^2), moved by `shift`, and whose critics are given."""

    def u(self, spec, params, obs):
        def velocity(x, r, t):
            variance = lambda t: (1 - t) ** 2 + t**2 * S**2  # noqa: E731
            slope = ((1 + S**2) * (r + t) - 2) / (variance(r) * (1 + jnp.sqrt(variance(t) / variance(r))))
            return MU + slope * (x - r * MU) + params["shift"].reshape((1,) * (x.ndim - 1) + (-1,))

        return velocity

    def heads(self, params, obs):
        return lambda action: params(action)


def exact(heads, shift=(0.0,), **fields) -> tuple[Exact, FMQState]:
    """Returns the agent and its online state, whose anchor is the exact map and whose actor is that plus `shift`."""
    agent = Exact(chunk=len(shift), **({"eta": 0.3, "adaptive": False} | fields))
    params = {"actor": {"shift": jnp.asarray(shift)}, "critic": heads}
    anchor = {"shift": jnp.zeros(len(shift))}
    return agent, FMQState(Spec(1, 1), params, heads, None, jnp.zeros((), jnp.int32), anchor)


def guided(agent: Exact, state: FMQState, batch: Batch):
    """Returns loss, metrics and the gradient with respect to the actor's shift."""
    loss = lambda actor: agent.guided_loss(actor, state, batch, KEY)  # noqa: E731
    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(state.params["actor"])
    return float(value), {name: float(x) for name, x in metrics.items()}, np.asarray(gradient["shift"])


def ones(count, chunk=1) -> Batch:
    return batch_of(
        np.zeros((count, chunk)), actions=np.full((count, chunk, 1), 0.4, np.float32), obs=np.zeros((count, 1))
    )


def test_the_gaussian_policy_moves_to_the_edge_of_the_trust_region():
    far = lambda a: jnp.stack([-0.5 * jnp.square(a[..., 0] - 9)] * 2)  # noqa: E731
    loss, metrics, gradient = guided(*exact(far), ones(200))
    assert loss == pytest.approx(0.3**2, rel=1e-4)
    assert metrics == pytest.approx({"actor/fmq_loss": 0.09, "actor/drift": 0, "actor/radius": 0.3}, rel=1e-4)
    np.testing.assert_allclose(gradient, [-2 * 0.3], rtol=1e-4)

    agent, state = exact(far, shift=(0.3,))
    loss, metrics, gradient = guided(agent, state, ones(200))
    assert (loss, gradient[0]) == pytest.approx((0, 0), abs=1e-6)
    assert metrics["actor/drift"] == pytest.approx(0.3, rel=1e-4)
    sample = agent.one_step(dataclasses.replace(state, spec=Spec(1, 1)), jnp.zeros((1, 1)), KEY, 4000)
    noise = jax.random.normal(KEY, (1, 4000, 1))
    np.testing.assert_allclose(sample, np.clip(MU + 0.3 + S * np.asarray(noise), -1, 1), atol=1e-5)


def test_a_linear_critic_is_climbed_along_its_weights_and_a_flat_one_not_at_all():
    c = np.array([3.0, 0.0, -4.0], np.float32)
    heads = lambda a: jnp.stack([a @ jnp.asarray(c), a @ jnp.array([0.0, 1.0, 0.0])])  # noqa: E731
    loss, _, gradient = guided(*exact(heads, (0.0, 0.0, 0.0)), ones(50, 3))
    assert loss == pytest.approx(0.09 / 3, rel=1e-4)
    np.testing.assert_allclose(gradient, -2 * 0.3 * c / 5 / 3, rtol=1e-4, atol=1e-7)
    mean = np.array([3, 1, -4]) / np.sqrt(26)
    _, _, gradient = guided(*exact(heads, (0.0, 0.0, 0.0), gradient_of="mean"), ones(50, 3))
    np.testing.assert_allclose(gradient, -2 * 0.3 * mean / 3, rtol=1e-4, atol=1e-7)
    loss, _, gradient = guided(*exact(lambda a: jnp.zeros((2, len(a))), (0.0, 0.0, 0.0)), ones(50, 3))
    assert loss == 0 and not gradient.any()


def test_steps_past_the_end_do_not_count():
    heads = lambda a: jnp.stack([a.sum(axis=-1)] * 2)  # noqa: E731
    batch = dataclasses.replace(ones(4, 2), valid=jnp.array([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]))
    loss, _, gradient = guided(*exact(heads, (0.0, 0.0)), batch)
    assert loss == pytest.approx(0.09 / 2 * 4 / 8, rel=1e-4)  # four of eight entries, each 0.3^2 / 2
    np.testing.assert_allclose(gradient[0] / gradient[1], 3, rtol=1e-4)


def test_no_radius_distils_the_anchor():
    heads = lambda a: jnp.stack([a[..., 0], -a[..., 0]])  # noqa: E731
    loss, _, gradient = guided(*exact(heads, eta=0.0), ones(50))
    assert loss == 0 and not gradient.any()
    loss, _, gradient = guided(*exact(heads, (0.2,), eta=0.0), ones(50))
    assert (loss, gradient[0]) == pytest.approx((0.04, 0.4), rel=1e-4)


def test_the_adaptive_radius_is_taken_where_the_anchor_arrives():
    # heads a and (1 + 2 a_off) a agree in direction; they differ by 2 a^2
    heads = lambda a: jnp.stack([a[..., 0], a[..., 0] + 2 * jnp.square(a[..., 0])])  # noqa: E731
    seen = []

    def spy(a):
        seen.append(a)
        return heads(a)

    agent, state = exact(spy, adaptive=True, beta=0.5, eta=0.3)
    loss, metrics, _ = guided(agent, state, ones(300))
    (arrived,) = [np.asarray(a) for a in seen if not isinstance(a, jax.core.Tracer)] or [None]
    assert arrived is not None and np.abs(arrived).max() == 1 and (np.abs(arrived) < 1).mean() > 0.5  # clipped
    apart = np.square(arrived[:, 0])
    radius = 0.3 / (1 + 0.5 * apart / apart.mean())
    assert loss == pytest.approx(np.square(radius).mean(), rel=1e-4)
    assert metrics["actor/radius"] == pytest.approx(radius.mean(), rel=1e-4)
    equal = lambda a: jnp.stack([a[..., 0]] * 2)  # noqa: E731
    assert guided(*exact(equal, adaptive=True), ones(50))[0] == pytest.approx(0.09, rel=1e-4)


def test_the_anchor_is_asked_at_noisy_data_and_for_the_jump_to_the_end():
    asked = []

    class Watched(Exact):
        def u(self, spec, params, obs):
            return lambda x, r, t: asked.append((x, r, t)) or super(Watched, self).u(spec, params, obs)(x, r, t)

    agent, state = exact(lambda a: jnp.stack([a[..., 0]] * 2))
    agent = Watched(chunk=1, eta=0.3, adaptive=False)
    agent.guided_loss(state.params["actor"], state, ones(4000), KEY)
    (x, r, t), student = asked
    for ours, theirs in zip((x, r, t), student, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(t, np.ones((4000, 1)))
    r = np.asarray(r)
    assert 0 <= r.min() < 0.01 and 0.99 < r.max() < 1 and r.mean() == pytest.approx(0.5, abs=0.02)
    noise = (np.asarray(x) - 0.4 * r) / (1 - r)
    assert noise.mean() == pytest.approx(0, abs=0.07) and noise.std() == pytest.approx(1, abs=0.05)


def test_flow_losses_go_on_online_only_if_asked(monkeypatch):
    heads = lambda a: jnp.stack([a[..., 0]] * 2)  # noqa: E731
    monkeypatch.setattr(FMQ, "flow_losses", lambda self, *args: (jnp.asarray(5.0), jnp.asarray(7.0)))
    assert guided(*exact(heads), ones(9))[0] == pytest.approx(0.09, rel=1e-4)
    fields = {"flow_losses_online": True, "diagonal_weight": 2.0, "esd_weight": 3.0}
    loss, metrics, _ = guided(*exact(heads, **fields), ones(9))
    assert loss == pytest.approx(0.09 + 10 + 21, rel=1e-5)
    assert metrics["actor/fmq_loss"] == pytest.approx(0.09, rel=1e-4)


# The phases


@pytest.fixture(scope="module")
def offline_state() -> FMQState:
    state = init(TINY, KEY, SPEC)
    for key in jax.random.split(KEY, 3):
        state, _ = update(TINY, state, random_batch(), key)
    return state


def test_going_online_copies_the_actor_and_changes_nothing_else(offline_state):
    online = TINY.start_online(offline_state)
    assert same(online.anchor, offline_state.params["actor"])
    assert same(dataclasses.replace(online, anchor=None), offline_state)


def test_the_anchor_stays_bit_for_bit_while_the_actor_leaves_it(offline_state):
    online = TINY.start_online(offline_state)

    @jax.jit
    def train(state):
        step = lambda state, key: TINY.update(state, random_batch(), key)  # noqa: E731
        return jax.lax.scan(step, state, jax.random.split(KEY, 100))

    after, metrics = train(online)
    assert same(after.anchor, offline_state.params["actor"])
    assert not same(after.params["actor"], online.params["actor"])
    assert int(after.step) == 103
    drift = np.asarray(metrics["actor/drift"])
    assert drift[0] == 0 and 0.01 < drift[-1] < 1


@pytest.mark.parametrize("online", [False, True])
def test_actor_and_critic_do_not_move_each_other(offline_state, online):
    state = TINY.start_online(offline_state) if online else offline_state
    batch = random_batch()
    after, _ = update(TINY, state, batch, KEY)
    paid, _ = update(TINY, state, dataclasses.replace(batch, rewards=batch.rewards + 100), KEY)
    assert same(after.params["actor"], paid.params["actor"]) and not same(after.params["critic"], paid.params["critic"])
    # the critic reads whole windows alone: a window cut by truncation teaches the actor only
    cut = dataclasses.replace(batch, valid=batch.valid.at[0, 1:].set(0).at[1, 2:].set(0))
    none, _ = update(TINY, state, dataclasses.replace(cut, valid=cut.valid.at[:, 2].set(0)), KEY)
    fewer, _ = update(TINY, state, dataclasses.replace(cut, valid=cut.valid.at[:, 1:].set(0)), KEY)
    assert same(none.params["critic"], fewer.params["critic"]) and not same(none.params["actor"], fewer.params["actor"])
    if online:
        wider, _ = update(dataclasses.replace(TINY, eta=0.1), state, batch, KEY)
        assert same(after.params["critic"], wider.params["critic"])
        assert not same(after.params["actor"], wider.params["actor"])


# Acting

SPREAD = linear_actor(0.5)
OBS = jnp.zeros((5, 2))


def test_one_sample_is_the_one_step_map_of_its_noise():
    agent = dataclasses.replace(LINEAR, num_samples=1)
    action = agent.act(state_of(ZERO, actor=linear_actor(0.5, shift=0.4)), OBS, KEY)
    noise = jax.random.normal(KEY, (5, 1, 3))[:, 0]
    np.testing.assert_allclose(action[..., 0], np.clip(0.4 + 0.5 * np.asarray(noise), -1, 1), atol=1e-6)


@pytest.mark.parametrize("online", [False, True])
def test_the_best_of_n_is_by_the_phases_aggregate_of_the_online_critic(online):
    # Q_1 = a, Q_2 = -3 a: the mean likes a low, the minimum likes a near zero
    heads = linear_critic((0, 1, 0, 0), (0, -3, 0, 0))
    state = state_of(heads, ZERO, SPREAD, online)
    agent = dataclasses.replace(LINEAR, num_samples=6, target_samples=3)
    first = np.asarray(agent.one_step(state, OBS, KEY, 6))[..., 0]
    best = np.minimum(first, -3 * first).argmax(axis=1) if online else first.argmin(axis=1)
    np.testing.assert_array_equal(agent.act(state, OBS, KEY)[:, 0, 0], first[np.arange(5), best])


def test_targets_draw_as_many_samples_as_they_are_told(monkeypatch):
    seen = []
    one_step = FMQ.one_step
    monkeypatch.setattr(FMQ, "one_step", lambda self, s, o, k, n: seen.append(n) or one_step(self, s, o, k, n))
    agent = dataclasses.replace(LINEAR, num_samples=6, target_samples=3, beam=BeamSearch(width=5))
    state = state_of(ZERO)
    critic_loss(agent, state, batch_of([[0, 0, 0]]))
    agent.act(state, OBS, KEY)
    agent.act(state, OBS, KEY, greedy=True)
    dataclasses.replace(agent, test_sampler="beam_search").act(state, OBS, KEY, greedy=True)
    assert seen == [3, 6, 6, 5]


def test_beam_search_is_for_evaluation_alone():
    state = state_of(linear_critic((0, 1, 1, 1), (0, 1, 2, 1)), actor=SPREAD)
    beams = dataclasses.replace(LINEAR, test_sampler="beam_search", num_samples=4)
    plain = dataclasses.replace(beams, test_sampler="best_of_n")
    np.testing.assert_array_equal(beams.act(state, OBS, KEY), plain.act(state, OBS, KEY))
    assert critic_loss(beams, state, random_batch()) == critic_loss(plain, state, random_batch())
    better = beams.act(state, OBS, KEY, greedy=True).sum(axis=(1, 2)) - plain.act(state, OBS, KEY, greedy=True).sum(
        axis=(1, 2)
    )
    assert float(better.mean()) > 0.2


class Aimed(FMQ):
    """FMQ whose critics want the chunk's first action to be the observation's first entry."""

    def heads(self, params, obs):
        return lambda action: jnp.stack([-jnp.square(action[..., 0] - obs[..., 0])] * 2)


@pytest.mark.parametrize("sampler", ["best_of_n", "beam_search"])
def test_candidates_are_made_and_scored_for_their_own_observation(sampler):
    obs = jnp.linspace(-0.8, 0.8, 10).reshape(5, 2)
    beam = BeamSearch(width=64, rounds=1, branches=2, eta=0.0)
    agent = Aimed(chunk=3, actor_hidden=(), num_samples=64, test_sampler=sampler, beam=beam)
    found = agent.act(state_of(ZERO, actor=SPREAD), obs, KEY, greedy=True)
    np.testing.assert_allclose(found[:, 0, 0], obs[:, 0], atol=0.15)

    kernel = jnp.zeros((2 + 3 + 128, 3)).at[2:5].set(-jnp.eye(3)).at[0].set(1.0)
    actor = {"params": {"MLP_0": {"Dense_0": {"kernel": kernel, "bias": jnp.zeros(3)}}}}  # X_{0,1} = first entry of obs
    again = dataclasses.replace(agent, beam=dataclasses.replace(beam, snr=0.0))  # branches start at time 0
    found = again.act(state_of(ZERO, actor=actor), obs, KEY, greedy=True)
    np.testing.assert_allclose(found[..., 0], np.repeat(np.asarray(obs)[:, :1], 3, axis=1), atol=1e-6)


def test_beam_search_without_rounds_and_step_is_the_best_of_its_beams():
    heads = linear_critic((0, 1, 0, 0), (0, -3, 0, 0))
    agent = dataclasses.replace(LINEAR, test_sampler="beam_search", beam=BeamSearch(width=32, rounds=0, eta=0.0))
    state = state_of(heads, actor=SPREAD)
    beams = agent.one_step(state, OBS, jax.random.split(KEY)[0], 32)
    best = guidance.best_of(beams, jnp.minimum(beams[..., 0], -3 * beams[..., 0]))
    np.testing.assert_array_equal(agent.act(state, OBS, KEY, greedy=True)[..., 0], best)


# Refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chunk": 0}, "FMQ.chunk = 0: must be at least 1"),
        ({"actor_hidden": (8, 0)}, "FMQ.actor_hidden"),
        ({"critic_hidden": (0, 8)}, "FMQ.critic_hidden"),
        ({"critics": 0}, "FMQ.critics = 0"),
        ({"batch_size": 0}, "FMQ.batch_size = 0"),
        ({"num_samples": 0}, "FMQ.num_samples = 0"),
        ({"target_samples": 0}, "FMQ.target_samples = 0"),
        ({"lr": -1e-3}, "FMQ.lr = -0.001: must be at least 0"),
        ({"weight_decay": -1.0}, "FMQ.weight_decay"),
        ({"eta": -1.0}, "FMQ.eta"),
        ({"beta": -1.0}, "FMQ.beta"),
        ({"warmup": -1}, "FMQ.warmup"),
        ({"discount": 1.5}, r"FMQ.discount = 1.5: must be in \[0, 1\]"),
        ({"tau": -0.1}, "FMQ.tau"),
        ({"warmup": 10, "curriculum": 9}, "FMQ.curriculum = 9: must be at least 10"),
        ({"beam": BeamSearch(width=0)}, "BeamSearch.width"),
        ({"beam": BeamSearch(rounds=-1)}, "BeamSearch.rounds"),
        ({"beam": BeamSearch(branches=0)}, "BeamSearch.branches"),
        ({"beam": BeamSearch(eta=-1.0)}, "BeamSearch.eta"),
        ({"beam": BeamSearch(snr=-1.0)}, "BeamSearch.snr"),
        ({"esd_weight": 1.0}, "FMQ.esd_weight = 1.0: has no effect unless flow_losses_online"),
        ({"diagonal_weight": 1.0}, "FMQ.diagonal_weight"),
        ({"flow_losses_online": True, "esd_weight": -1.0}, "FMQ.esd_weight = -1.0: must be at least 0"),
        ({"lr": np.array([1e-3, -1.0])}, "FMQ.lr"),
    ],
)
def test_values_out_of_range_are_refused_by_name(fields, message):
    with pytest.raises(UserError, match=message):
        FMQ(**fields).check()


def test_the_defaults_and_their_edges_are_accepted():
    FMQ().check()
    FMQ(discount=1.0, tau=1.0, eta=0.0, beta=0.0, warmup=0, curriculum=0, beam=BeamSearch(rounds=0)).check()
    FMQ(flow_losses_online=True, esd_weight=1.0, diagonal_weight=0.5).check()
