"""Facts about jaxrl.networks: the forward passes as plain numpy, the initialisation, the order of the inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import networks
from jaxrl.networks import MLP, Critic, Velocity


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def normalise(x, scale, bias):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * scale + bias


def forward(params, x, layer_norm):
    """Returns the MLP's output in numpy: linear, then GELU, then LayerNorm; the last layer linear."""
    layers = sorted(name for name in params if name.startswith("Dense"))
    for i, name in enumerate(layers):
        x = x @ params[name]["kernel"] + params[name]["bias"]
        if i + 1 < len(layers):
            x = gelu(x)
            if layer_norm:
                x = normalise(x, **params[f"LayerNorm_{i}"])
    return x


def shaken(params):
    """Returns the parameters, in numpy, with random biases and scales, that start at 0 and 1."""
    rng = np.random.default_rng(9)
    return jax.tree.map(lambda leaf: np.asarray(leaf + 0.3 * rng.standard_normal(leaf.shape), np.float32), params)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_an_mlp_is_dense_gelu_and_then_layer_norm(layer_norm):
    network, x = MLP((7, 6, 3), layer_norm), jax.random.normal(jax.random.key(0), (4, 5))
    params = shaken(jax.jit(network.init)(jax.random.key(1), x))
    wanted = forward(params["params"], np.asarray(x), layer_norm)
    np.testing.assert_allclose(jax.jit(network.apply)(params, x), wanted, atol=2e-6)


def test_kernels_start_uniform_with_the_average_of_fans():
    params = MLP((300, 100)).init(jax.random.key(0), jnp.zeros(100))["params"]
    for name, bound in (("Dense_0", np.sqrt(3 / 200)), ("Dense_1", np.sqrt(3 / 200))):
        kernel = np.asarray(params[name]["kernel"])
        assert bound * 0.999 < np.abs(kernel).max() <= bound
        assert kernel.std() == pytest.approx(bound / np.sqrt(3), rel=0.02)
        np.testing.assert_array_equal(params[name]["bias"], np.zeros_like(params[name]["bias"]))


def test_time_features_fall_from_frequency_1_to_1e_minus_4():
    t = np.array([[0.0], [0.3], [1.0]])
    features = networks.time_features(jnp.asarray(t))
    frequencies = 10.0 ** -np.linspace(0, 4, 32)
    wanted = np.concatenate([np.cos(t * frequencies), np.sin(t * frequencies)], axis=-1)
    np.testing.assert_allclose(features, wanted, atol=1e-6)
    np.testing.assert_allclose(
        networks.time_features(jnp.array([2.0]), size=4), [np.cos(2), np.cos(2e-4), np.sin(2), np.sin(2e-4)], rtol=1e-4
    )


@pytest.mark.parametrize(("fourier", "layer_norm", "count"), [(True, False, 2), (True, True, 1), (False, False, 2)])
def test_a_velocity_reads_observation_point_and_times_in_this_order(fourier, layer_norm, count):
    network = Velocity(2, (8, 8), layer_norm, fourier)
    obs, x = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[-1.0, 0.5]])
    times = [jnp.array([[0.2]]), jnp.array([[0.7]])][:count]
    params = shaken(jax.jit(network.init)(jax.random.key(0), obs, x, *times))
    features = [networks.time_features(t) if fourier else t for t in times]
    joined = np.concatenate([obs, x, *features], axis=-1)
    wanted = forward(params["params"]["MLP_0"], joined, layer_norm)
    assert wanted.shape == (1, 2)
    np.testing.assert_allclose(jax.jit(network.apply)(params, obs, x, *times), wanted, atol=5e-6)


def test_a_critic_is_that_many_independent_networks_with_layer_norm():
    network = Critic(3, (8, 8))
    obs, action = np.random.default_rng(0).standard_normal((2, 2, 5, 3)).astype(np.float32)
    params = jax.jit(network.init)(jax.random.key(2), obs[0, 0], action[0, 0])
    kernel = np.asarray(params["params"]["VmapMLP_0"]["Dense_0"]["kernel"])
    assert kernel.shape == (3, 6, 8) and len(np.unique(kernel)) == kernel.size
    params = shaken(params)
    joined = np.concatenate([obs, action], axis=-1)
    heads = [jax.tree.map(lambda x, j=j: x[j], params["params"]["VmapMLP_0"]) for j in range(3)]
    wanted = np.stack([forward(head, joined, layer_norm=True)[..., 0] for head in heads])
    np.testing.assert_allclose(jax.jit(network.apply)(params, obs, action), wanted, atol=5e-6)


def test_a_critic_without_layer_norm_has_none():
    params = Critic(2, (8,), layer_norm=False).init(jax.random.key(0), jnp.zeros(1), jnp.zeros(1))
    assert set(params["params"]["VmapMLP_0"]) == {"Dense_0", "Dense_1"}


def test_observations_are_repeated_for_each_candidate():
    obs = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    repeated = networks.repeat_for(jnp.zeros((2, 3, 7)), obs)
    np.testing.assert_array_equal(repeated, [[[1, 2]] * 3, [[3, 4]] * 3])
