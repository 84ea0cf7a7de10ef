"""Facts about jaxrl.networks: the forward passes as plain numpy, the initialisation, the order of the inputs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import networks
from jaxrl.networks import MLP, Critic, Gaussian, Squashed, TemporalUNet, Value, Velocity, neighbours


def normalise(x, scale, bias):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * scale + bias


ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
    "relu": lambda x: np.maximum(x, 0),
}
NORMS = ("none", "after", "before", "before_but_last")


def forward(params, x, norm, activation="gelu"):
    """Returns the MLP's output in numpy; the layer norm of hidden layer i, where it has one, is number i."""
    *hidden, last = sorted(name for name in params if name.startswith("Dense"))
    for i, name in enumerate(hidden):
        x = x @ params[name]["kernel"] + params[name]["bias"]
        if norm == "before" or (norm == "before_but_last" and name != hidden[-1]):
            x = normalise(x, **params[f"LayerNorm_{i}"])
        x = ACTIVATIONS[activation](x)
        if norm == "after":
            x = normalise(x, **params[f"LayerNorm_{i}"])
    return x @ params[last]["kernel"] + params[last]["bias"]


def shaken(params):
    """Returns the parameters, in numpy, with random biases and scales, that start at 0 and 1."""
    rng = np.random.default_rng(9)
    return jax.tree.map(lambda leaf: np.asarray(leaf + 0.3 * rng.standard_normal(leaf.shape), np.float32), params)


@pytest.mark.parametrize(
    ("norm", "activation"), [*((norm, "gelu") for norm in NORMS), ("before", "mish"), ("none", "relu")]
)
def test_an_mlp_has_its_layer_norm_where_it_says(norm, activation):
    network, x = MLP((7, 6, 5, 3), norm, activation), jax.random.normal(jax.random.key(0), (4, 5))
    params = shaken(jax.jit(network.init)(jax.random.key(1), x))
    count = {"none": 0, "before_but_last": 2}.get(norm, 3)
    assert sum(name.startswith("LayerNorm") for name in params["params"]) == count
    wanted = forward(params["params"], np.asarray(x), norm, activation)
    np.testing.assert_allclose(jax.jit(network.apply)(params, x), wanted, atol=5e-6)


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


def test_fast_time_features_fall_from_frequency_1e4_towards_1():
    t = np.array([[0.0], [0.1], [0.7], [1.0]])
    features = networks.time_features(jnp.asarray(t), "sinusoidal", 16)
    angles = t * 10.0 ** (4 - np.arange(8) / 2)  # 1e4, ..., 10^0.5
    np.testing.assert_allclose(features, np.concatenate([np.cos(angles), np.sin(angles)], axis=-1), atol=2e-3)


def test_raw_times_are_their_own_features():
    t = jnp.array([[0.1], [0.7]])
    np.testing.assert_array_equal(networks.time_features(t, "raw", 16), t)


@pytest.mark.parametrize(
    ("time", "norm", "count"),
    [
        ("fourier", "none", 2),
        ("fourier", "after", 1),
        ("raw", "none", 2),
        ("sinusoidal", "before_but_last", 1),
        ("raw", "none", 0),
    ],
)
def test_a_velocity_reads_observation_point_and_times_in_this_order(time, norm, count):
    network = Velocity(2, (8, 8), norm, "mish", time, 16)
    obs, x = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[-1.0, 0.5]])
    times = [jnp.array([[0.2]]), jnp.array([[0.7]])][:count]
    params = shaken(jax.jit(network.init)(jax.random.key(0), obs, x, *times))
    joined = np.concatenate([obs, x, *(networks.time_features(t, time, 16) for t in times)], axis=-1)
    assert joined.shape == (1, 5 + count * (1 if time == "raw" else 16))
    wanted = forward(params["params"]["MLP_0"], joined, norm, "mish")
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
    wanted = np.stack([forward(head, joined, "after")[..., 0] for head in heads])
    np.testing.assert_allclose(jax.jit(network.apply)(params, obs, action), wanted, atol=5e-6)


def test_a_critic_without_layer_norm_has_none():
    params = Critic(2, (8,), norm="none").init(jax.random.key(0), jnp.zeros(1), jnp.zeros(1))
    assert set(params["params"]["VmapMLP_0"]) == {"Dense_0", "Dense_1"}


def test_a_state_value_is_one_number_per_observation():
    network, obs = Value((8, 8), "before", "relu"), jax.random.normal(jax.random.key(0), (2, 5, 3))
    params = shaken(jax.jit(network.init)(jax.random.key(3), obs[0, 0]))
    wanted = forward(params["params"]["MLP_0"], np.asarray(obs), "before", "relu")[..., 0]
    assert wanted.shape == (2, 5)
    np.testing.assert_allclose(jax.jit(network.apply)(params, obs), wanted, atol=5e-6)


@pytest.mark.parametrize("unit_width", [True, False])
def test_a_gaussian_has_a_mean_of_the_state_and_a_width_of_its_own(unit_width):
    network, obs = Gaussian(2, (8, 8), "after", unit_width=unit_width), jax.random.normal(jax.random.key(0), (5, 3))
    params = jax.jit(network.init)(jax.random.key(3), obs[0])
    assert ("log_std" in params["params"]) is not unit_width
    mean, log_std = jax.jit(network.apply)(params, obs)
    assert float(jnp.abs(mean).max()) < 0.3 and not log_std.any()  # it starts near zero, with a width of 1
    params = shaken(params)
    if not unit_width:
        params["params"]["log_std"] = np.array([-7.0, 3.0], np.float32)
    mean, log_std = jax.jit(network.apply)(params, obs)
    np.testing.assert_allclose(mean, forward(params["params"]["MLP_0"], np.asarray(obs), "after"), atol=5e-6)
    np.testing.assert_array_equal(log_std, np.tile([0, 0] if unit_width else [-5, 2], (5, 1)))


def test_a_squashed_gaussian_has_mean_and_width_of_the_state_the_width_small_at_first_and_bounded():
    network, obs = Squashed(2, (8, 8)), jax.random.normal(jax.random.key(0), (5, 3))
    params = shaken(jax.jit(network.init)(jax.random.key(3), obs[0]))
    mean, log_std = jax.jit(network.apply)(params, obs)
    wanted = forward(params["params"]["MLP_0"], np.asarray(obs), "none", "relu")
    np.testing.assert_allclose(mean, wanted[:, :2], atol=5e-6)
    np.testing.assert_allclose(log_std, wanted[:, 2:] - 1, atol=5e-6)
    params["params"]["MLP_0"]["Dense_2"]["bias"] = np.array([0, 0, -90, 90], np.float32)
    _, log_std = jax.jit(network.apply)(params, obs)
    np.testing.assert_array_equal(log_std, np.tile([-20, 2], (5, 1)))


def test_the_last_layer_of_a_gaussian_starts_a_tenth_as_large():
    params = Gaussian(300, (300,)).init(jax.random.key(0), jnp.zeros(300))["params"]["MLP_0"]
    spread = {name: float(params[name]["kernel"].std()) for name in ("Dense_0", "Dense_1")}
    assert spread["Dense_1"] / spread["Dense_0"] == pytest.approx(0.1, rel=0.02)


def test_observations_are_repeated_for_each_candidate():
    obs = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    repeated = networks.repeat_for(jnp.zeros((2, 3, 7)), obs)
    np.testing.assert_array_equal(repeated, [[[1, 2]] * 3, [[3, 4]] * 3])


# The network of trajectories


def test_neighbours_are_what_a_convolution_sees():
    x = jnp.array([[[1.0, -1.0], [2.0, -2.0], [3.0, -3.0]]])
    np.testing.assert_array_equal(neighbours(x, 2)[0], [[1, -1, 2, -2], [2, -2, 3, -3], [3, -3, 0, 0]])
    np.testing.assert_array_equal(
        neighbours(x, 3)[0], [[0, 0, 1, -1, 2, -2], [1, -1, 2, -2, 3, -3], [2, -2, 3, -3, 0, 0]]
    )


@pytest.mark.parametrize("length", [4, 5, 7, 32])
def test_the_u_net_has_the_published_layers_for_any_length(length):
    features, widths = 6, (16, 24, 32)
    x, t = jnp.zeros((2, length, features)), jnp.zeros((2, 1))
    net = TemporalUNet(widths)
    params = jax.eval_shape(net.init, jax.random.key(0), x, t)
    assert jax.eval_shape(net.apply, params, x, t).shape == x.shape

    def dense(inputs, outputs):
        return (inputs + 1) * outputs

    def block(inputs, width, reach, timed):
        return dense(reach * inputs, width) + 2 * width + timed * dense(widths[0], width)

    count = dense(widths[0] // 4, widths[0]) + dense(widths[0], widths[0]) + dense(widths[0], features)
    for inputs, width in zip((features, *widths), widths, strict=False):
        count += block(inputs, width, 3, True) + block(width, width, 3, False)
    for below, width in zip(widths[1:], widths, strict=False):
        count += block(below, width, 2, True) + block(2 * width, width, 3, False) + block(width, width, 3, False)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == count
