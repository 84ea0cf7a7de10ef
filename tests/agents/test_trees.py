"""Observations that are dicts of vectors and images, from the steps of a rollout through the ring to agents."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import networks
from jaxrl.agents import AGENTS
from jaxrl.errors import UserError
from jaxrl.replay import ring as rings
from jaxrl.replay.ring import Steps
from jaxrl.types import Deriving, Fitting, Leaf, Spec
from tests.known import quick_to_compile, values_of, with_fields

LEAVES = (Leaf("state", (3,)), Leaf("image", (16, 16, 3), "uint8"), Leaf("secret", (2,)))
SPEC = Spec(LEAVES, action=2, actor_keys=("state", "image"))
SMALL = {"hidden": (8, 8), "batch": 8, "num_samples": 2, "target_samples": 2, "steps": 2, "samples": 2}


def small(name: str):
    """Returns an agent with small networks, few samples and few steps, whose actor learns in every update."""
    agent = AGENTS[name]()
    if values_of(agent, "backup"):  # windows that the steps below hold
        agent = with_fields(agent, backup=6)
    return with_fields(agent, **{field: value for field, value in SMALL.items() if values_of(agent, field)})


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(networks, "ImageEncoder", functools.partial(networks.ImageEncoder, (2, 4), 1, 8))
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
    actions, rewards = rng.uniform(-1, 1, (4, 12, 2)), rng.random((4, 12))
    steps = Steps(
        obs, jnp.asarray(actions, jnp.float32), jnp.asarray(rewards, jnp.float32), flag, flag, ~flag, ~flag, flag[:, 0]
    )
    return jax.jit(rings.add)(rings.empty(4, 20, SPEC), steps)


def learned(agent, replay: rings.Ring):
    """Returns an agent's state before and after two updates on a replay, and the metrics of the second."""
    data = agent.derive_columns((replay,)) if isinstance(agent, Deriving) else (replay,)
    state = jax.jit(agent.init, static_argnums=1)(jax.random.key(0), SPEC)
    first = state = agent.fit(state, data) if isinstance(agent, Fitting) else state
    sample, update = jax.jit(agent.sample), jax.jit(agent.update)
    for i in range(2):  # some actors learn in every other update
        batch = sample(data, jax.random.key(i))
        state, metrics = update(state, batch, jax.random.key(10 + i), data)
    assert batch.obs["image"].dtype == batch.next_obs["image"].dtype == jnp.uint8
    return first, state, metrics


def encoders(params) -> dict[str, jax.Array]:
    """Returns the parameters of encoders of images, by their place."""
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    return {place: leaf for place, leaf in leaves.items() if "encoder_image" in place}


@pytest.mark.parametrize("name", [name for name in AGENTS if name != "prdc"])
def test_an_agent_learns_from_dicts_with_images_and_acts_on_them(name):
    agent, replay = small(name), collected()
    assert replay.obs["image"].dtype == jnp.uint8 and replay.obs["image"].nbytes == 4 * 20 * 16 * 16 * 3
    before, after, metrics = learned(agent, replay)
    assert all(np.isfinite(value) for value in metrics.values())
    pairs = {place: (encoders(before.params)[place], leaf) for place, leaf in encoders(after.params).items()}
    assert len(pairs) >= 10 and [place for place, (was, now) in pairs.items() if np.array_equal(was, now)] == []
    act = jax.jit(functools.partial(agent.act, greedy=True))
    obs = jax.tree.map(lambda x: x[:, 0], replay.obs)
    chunk = act(after, obs, jax.random.key(3))
    assert chunk.shape == (4, agent.chunk, 2) and jnp.abs(chunk).max() <= 1
    assert not np.array_equal(chunk, act(after, obs | {"image": 255 - obs["image"]}, jax.random.key(3)))


@pytest.mark.parametrize("name", ["bc", "fql", "td3bc", "awac"])
def test_policies_do_not_see_what_is_for_critics_alone(name):
    agent, replay = small(name), collected()
    state = jax.jit(agent.init, static_argnums=1)(jax.random.key(0), SPEC)
    act = jax.jit(functools.partial(agent.act, greedy=True))
    obs = jax.tree.map(lambda x: x[:, 0], replay.obs)
    chunk = act(state, obs, jax.random.key(3))
    np.testing.assert_array_equal(chunk, act(state, obs | {"secret": obs["secret"] + 9}, jax.random.key(3)))
    assert not np.array_equal(chunk, act(state, obs | {"state": obs["state"] + 9}, jax.random.key(3)))


def test_an_agent_that_searches_neighbors_refuses_dicts():
    with pytest.raises(UserError, match="neighbors are searched among observations that are arrays, these are dicts"):
        small("prdc").init(jax.random.key(0), SPEC)
