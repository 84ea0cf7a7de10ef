"""Facts about jaxrl.agents.bc, with a velocity that is linear, so that every number is known by hand."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import ranges
from jaxrl.agents.bc import BC
from jaxrl.agents.learner import State, unflatten
from jaxrl.agents.parts import Adam, FlowPolicy, Net, Windows
from jaxrl.errors import UserError
from jaxrl.ops import flow
from jaxrl.types import Batch, Spec
from tests.known import KEY, bias_of, state_of, with_fields

SPEC = Spec(observation=2, action=2)
WINDOWS = Windows(chunk=3, backup=3, batch=64)
LINEAR = BC(WINDOWS, FlowPolicy(Net(()), "fourier"))
SIZE = 6


def linear(obs: float = 0.0, x: float = 0.0, time: float = 0.0, bias: float = 0.0) -> State:
    """Returns the state whose velocity is obs * o_0 + x * x_t + time * cos(t) + bias, in every entry alike."""
    kernel = jnp.zeros((2 + SIZE + 64, SIZE)).at[0].set(obs).at[2 : 2 + SIZE].set(x * jnp.eye(SIZE))
    dense = {"kernel": kernel.at[2 + SIZE].set(time), "bias": jnp.full(SIZE, bias)}
    return state_of({"flow": {"params": {"MLP_0": {"Dense_0": dense}}}}, spec=SPEC)


def batch_of(count: int) -> Batch:
    rng = np.random.default_rng(0)
    return Batch(
        obs=jnp.asarray(rng.normal(size=(count, 2)), jnp.float32),
        actions=jnp.asarray(rng.uniform(-1, 1, (count, 3, 2)), jnp.float32),
        rewards=jnp.zeros((count, 3)),
        valid=jnp.ones((count, 3)),
        terminated=jnp.zeros(count, bool),
        next_obs=jnp.zeros((count, 2)),
        steps=jnp.full(count, 3),
    )


def test_chunks_are_flattened_step_by_step_with_their_mask():
    batch = dataclasses.replace(
        batch_of(4), valid=jnp.asarray([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]], jnp.float32)
    )
    flat = WINDOWS.actions(batch)
    np.testing.assert_array_equal(flat[:, 2:4], batch.actions[:, 1])
    np.testing.assert_array_equal(unflatten(flat, 2), batch.actions)
    np.testing.assert_array_equal(WINDOWS.mask(batch)[1:3], [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])


def test_the_loss_is_flow_matching_of_the_flat_chunks_under_their_mask(monkeypatch):
    seen = {}
    error = flow.matching_error

    def spy(u, x0, x1, t):
        seen.update(x0=x0, x1=x1, t=t, error=error(u, x0, x1, t))
        return seen["error"]

    monkeypatch.setattr(flow, "matching_error", spy)
    batch = batch_of(2000)
    batch = dataclasses.replace(batch, valid=batch.valid.at[:500, 1:].set(0))
    state = linear(obs=0.5, x=-1.0, bias=0.25)
    with jax.disable_jit():
        _, metrics = LINEAR.update(state, batch, KEY)
    x0, x1, t = (np.asarray(jax.lax.stop_gradient(seen[name])) for name in ("x0", "x1", "t"))
    np.testing.assert_array_equal(x1, batch.actions.reshape(2000, -1))
    assert abs(np.corrcoef(x0.ravel()[:2000], t.ravel())[0, 1]) < 0.1  # drawn from keys of their own
    assert x0.mean() == pytest.approx(0, abs=0.04) and x0.std() == pytest.approx(1, abs=0.03)
    assert (
        t.shape == (2000, 1) and t.mean() == pytest.approx(0.5, abs=0.03) and t.std() == pytest.approx(0.289, abs=0.02)
    )
    velocity = 0.5 * np.asarray(batch.obs[:, :1]) - ((1 - t) * x0 + t * x1) + 0.25
    wanted = np.square(velocity - (x1 - x0)) * np.repeat(np.asarray(batch.valid), 2, axis=1)
    assert float(metrics["actor/flow_loss"]) == pytest.approx(wanted.mean(), rel=1e-5)


def test_an_update_is_one_step_of_adam_against_the_gradient():
    agent = dataclasses.replace(LINEAR, adam=Adam(0.01))
    state = jax.jit(BC.init, static_argnums=2)(agent, KEY, SPEC)
    after, metrics = jax.jit(BC.update)(agent, state, batch_of(64), KEY)
    before, moved = (bias_of(x.params["flow"]) for x in (state, after))
    np.testing.assert_allclose(np.abs(moved - before), 0.01, rtol=1e-3)
    assert int(after.step) == 1 and float(metrics["actor/grad_norm"]) > 0
    again, better = jax.jit(BC.update)(agent, after, batch_of(64), KEY)
    assert float(better["actor/flow_loss"]) < float(metrics["actor/flow_loss"]) and int(again.step) == 2


def act(state: State, obs=((0.0, 0.0),), steps=10):
    agent, obs = with_fields(LINEAR, steps=steps), jnp.asarray(obs)
    noise = np.asarray(jax.random.normal(KEY, (len(obs), SIZE)))
    return np.asarray(agent.act(state, obs, KEY)).reshape(len(obs), SIZE), noise


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_acting_integrates_the_velocity_with_euler_steps_and_clips(steps):
    action, noise = act(linear(x=-1.0, bias=0.3), steps=steps)
    left = (1 - 1 / steps) ** steps
    np.testing.assert_allclose(action, np.clip(0.3 + left * (noise - 0.3), -1, 1), atol=1e-5)
    clipped, noise = act(linear(), steps=steps)
    np.testing.assert_allclose(clipped, np.clip(noise, -1, 1), atol=1e-6)
    assert np.abs(noise).max() > 1


def test_acting_asks_for_the_time_at_which_a_step_begins():
    action, noise = act(linear(x=-1.0, time=1.0), steps=4)
    x = noise
    for time in (0, 0.25, 0.5, 0.75):
        x = x + 0.25 * (np.cos(time) - x)
    np.testing.assert_allclose(action, np.clip(x, -1, 1), atol=1e-5)


def test_acting_reads_each_rows_own_observation():
    action, noise = act(linear(x=-1.0, obs=1.0), obs=[[0.5, 9.0], [-0.5, 9.0]], steps=1)
    np.testing.assert_allclose(action, [[0.5] * SIZE, [-0.5] * SIZE], atol=1e-5)
    assert len(np.unique(noise)) == noise.size


def test_a_single_chunk_of_data_is_learned_by_heart():
    agent = BC(Windows(chunk=2, backup=2, batch=64), FlowPolicy(Net((32, 32)), "fourier"), Adam(5e-3))
    chunk = jnp.array([[0.7, -0.2], [-0.5, 0.1]])
    batch = dataclasses.replace(
        batch_of(64),
        actions=jnp.broadcast_to(chunk[None], (64, 2, 2)),
        valid=jnp.ones((64, 2)),
        obs=jnp.zeros((64, 2)),
    )

    @jax.jit
    def learned(key):
        step = lambda state, key: (agent.update(state, batch, key)[0], None)  # noqa: E731
        state = jax.lax.scan(step, agent.init(key, SPEC), jax.random.split(key, 1500))[0]
        return agent.act(state, jnp.zeros((100, 2)), key)

    error = np.asarray(learned(KEY)) - np.asarray(chunk)
    assert np.sqrt(np.square(error).mean()) < 0.15


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chunk": 0}, "BC.windows.chunk = 0: must be at least 1"),
        ({"batch": 0}, "BC.windows.batch = 0: must be at least 1"),
        ({"hidden": (8, 0)}, "BC.flow.net.hidden = (8, 0): must be at least 1"),
        ({"steps": 0}, "BC.flow.steps = 0: must be at least 1"),
        ({"time_size": 3}, "BC.flow.time_size = 3: must be at least 4"),
        ({"lr": -1.0}, "BC.adam.lr = -1.0: must be at least 0"),
    ],
)
def test_values_out_of_range_are_refused_by_name(fields, message):
    with pytest.raises(UserError, match=re.escape(message)):
        ranges.check(with_fields(BC(), **fields))


def test_too_few_time_features_are_refused_for_each_kind_of_them():
    for time, low in (("fourier", 4), ("sinusoidal", 2), ("raw", 1)):
        ranges.check(FlowPolicy(time=time, time_size=low))
        with pytest.raises(UserError, match=f"time_size = {low - 1}: must be at least {low}"):
            ranges.check(FlowPolicy(time=time, time_size=low - 1))
