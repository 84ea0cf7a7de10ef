"""Observations that are dicts of vectors and images, from the steps of a rollout through the ring to agents."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import networks
from jaxrl.agents import AGENTS
from jaxrl.agents.parts import Critic, DeterministicPolicy, FlowPolicy, Net, OneStepPolicy
from jaxrl.agents.td3 import TD3
from jaxrl.replay import ring as rings
from jaxrl.replay.ring import Steps
from jaxrl.types import Leaf, Spec
from tests.known import quick_to_compile

LEAVES = (Leaf("state", (3,)), Leaf("image", (16, 16, 3), "uint8"), Leaf("secret", (2,)))
SPEC = Spec(LEAVES, action=2, actor_keys=("state", "image"))
SMALL = Net((8, 8))
SEEING = {  # agents with small networks
    "fql": {
        "chunk": 2,
        "backup": 2,
        "batch_size": 8,
        "flow": FlowPolicy(SMALL, steps=2),
        "policy": OneStepPolicy(SMALL),
        "critic": Critic(SMALL),
    },
    "td3bc": {
        "td3": TD3(DeterministicPolicy(SMALL), Critic(SMALL, agg="min"), normalize=True, batch_size=8, delay=1),
    },
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    small = functools.partial(networks.ImageEncoder, (2, 4), 1, 8)
    monkeypatch.setattr(networks, "ImageEncoder", small)
    with quick_to_compile():
        yield


def collected() -> rings.Ring:
    """Returns a replay of random steps in which no episode ended."""
    rng, flag = np.random.default_rng(0), jnp.zeros((4, 12), bool)
    obs = {
        "state": jnp.asarray(rng.normal(size=(4, 13, 3)), jnp.float32),
        "image": jnp.asarray(rng.integers(0, 256, (4, 13, 16, 16, 3)), jnp.uint8),
        "secret": jnp.asarray(rng.normal(size=(4, 13, 2)), jnp.float32),
    }
    actions, rewards = rng.uniform(-1, 1, (4, 12, 2)), rng.normal(size=(4, 12))
    steps = Steps(
        obs, jnp.asarray(actions, jnp.float32), jnp.asarray(rewards, jnp.float32), flag, flag, ~flag, ~flag, flag[:, 0]
    )
    return jax.jit(rings.add)(rings.empty(4, 20, SPEC), steps)


@pytest.mark.parametrize("name", SEEING)
def test_an_agent_learns_from_dicts_with_images_and_acts_on_them(name):
    agent, replay = AGENTS[name](**SEEING[name]), collected()
    assert replay.obs["image"].dtype == jnp.uint8 and replay.obs["image"].nbytes == 4 * 20 * 16 * 16 * 3
    state = jax.jit(agent.init, static_argnums=1)(jax.random.key(0), SPEC)
    for network, params in state.params.items():
        assert "encoder_image" in params["params"], network
    batch = jax.jit(agent.sample)((replay,), jax.random.key(1))
    assert batch.obs["image"].dtype == jnp.uint8
    after, metrics = jax.jit(agent.update)(state, batch, jax.random.key(2), (replay,))
    assert all(np.isfinite(value) for value in metrics.values())
    moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), state.params, after.params)
    for network, change in moved.items():
        assert min(jax.tree.leaves(change["params"]["encoder_image"])) > 0, network
    act = jax.jit(functools.partial(agent.act, greedy=True))
    obs = jax.tree.map(lambda x: x[:, 0], replay.obs)
    chunk = act(after, obs, jax.random.key(3))
    assert chunk.shape == (4, agent.chunk, 2) and jnp.abs(chunk).max() <= 1
    assert not np.array_equal(chunk, act(after, obs | {"image": 255 - obs["image"]}, jax.random.key(3)))
    np.testing.assert_array_equal(chunk, act(after, obs | {"secret": obs["secret"] + 9}, jax.random.key(3)))
