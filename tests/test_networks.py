"""Facts about jaxrl.networks: the forward passes as plain numpy, the initialisation, the order of the inputs."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import networks
from jaxrl.networks import (
    MLP,
    Critic,
    Deterministic,
    Encoder,
    Gaussian,
    ImageEncoder,
    QuantileCritic,
    Squashed,
    TemporalUNet,
    Value,
    Velocity,
    neighbours,
)


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


# Dicts of vectors and images


def convolved(x, kernel, bias):
    """Returns a 3x3 convolution of an image [H, W, C] that keeps its size, in numpy."""
    padded = np.pad(x, [(1, 1), (1, 1), (0, 0)])
    height, width, _ = x.shape
    parts = [padded[i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3)]
    return sum(parts) + bias


def pooled(x):
    """Returns the maxima of an image [2h, 2w, C] over windows of 3x3 that begin at every other pixel."""
    padded = np.pad(x, [(0, 1), (0, 1), (0, 0)], constant_values=-np.inf)
    height, width, _ = x.shape
    return np.max([padded[i : i + height : 2, j : j + width : 2] for i in range(3) for j in range(3)], axis=0)


def test_an_image_is_scaled_and_goes_through_residual_blocks():
    network, images = ImageEncoder((2, 3), 1, 5), np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), np.uint8)
    images = np.pad(images, [(0, 0), (0, 0), (0, 2), (0, 0)])
    params = shaken(jax.jit(network.init)(jax.random.key(0), images[0]))
    net, wanted = params["params"], []
    for image in images:
        x = image.astype(np.float32) / 255
        for first in (0, 3):
            x = pooled(convolved(x, **net[f"Conv_{first}"]))
            change = convolved(np.maximum(x, 0), **net[f"Conv_{first + 1}"])
            x = x + convolved(np.maximum(change, 0), **net[f"Conv_{first + 2}"])
        wanted.append(ACTIVATIONS["gelu"](np.maximum(x, 0).ravel() @ net["Dense_0"]["kernel"] + net["Dense_0"]["bias"]))
    np.testing.assert_allclose(jax.jit(network.apply)(params, images), wanted, atol=2e-5)
    one = jax.jit(network.apply)(params, images[0])
    np.testing.assert_allclose(one, wanted[0], atol=2e-5)


@pytest.fixture
def small_encoders(monkeypatch):
    """Has networks encode images by few channels, and programs compiled without most optimizations: in less time."""
    monkeypatch.setattr(networks, "ImageEncoder", functools.partial(ImageEncoder, (2,), 1, 4))
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def seen(*lead: int) -> dict[str, jax.Array]:
    """Returns observations of two vectors and an image between them in the order of names."""
    rng = np.random.default_rng(1)
    return {
        "velocity": jnp.asarray(rng.normal(size=(*lead, 2)), jnp.float32),
        "angle": jnp.asarray(rng.normal(size=(*lead, 3)), jnp.float32),
        "image": jnp.asarray(rng.integers(0, 256, (*lead, 8, 8, 3)), jnp.uint8),
    }


@pytest.mark.usefixtures("small_encoders")
def test_a_dict_is_joined_in_the_order_of_names_with_the_features_of_its_images():
    network, obs = Value((4,), "none", "relu"), seen(5)
    params = shaken(jax.jit(network.init)(jax.random.key(0), obs))
    assert set(params["params"]) == {"MLP_0", "encoder_image"}
    features = networks.ImageEncoder().apply({"params": params["params"]["encoder_image"]}, obs["image"])
    together = np.concatenate([obs["angle"], features, obs["velocity"]], axis=-1)
    wanted = forward(params["params"]["MLP_0"], together, "none", "relu")[..., 0]
    np.testing.assert_allclose(jax.jit(network.apply)(params, obs), wanted, rtol=1e-4, atol=1e-4)


CHUNK, TIME = jnp.zeros(2), jnp.zeros(1)
MODULES = {
    "velocity": (Velocity(2, (4,)), (CHUNK, TIME), ("MLP_0",)),
    "critic": (Critic(2, (4,)), (CHUNK,), ("VmapMLP_0",)),
    "critic of states": (Critic(2, (4,)), (), ("VmapMLP_0",)),
    "quantiles": (QuantileCritic(2, (4,)), (CHUNK, jnp.zeros(3)), ("Vmap_Quantiles_0",)),
    "value": (Value((4,)), (), ("MLP_0",)),
    "deterministic": (Deterministic(2, (4,)), (), ("MLP_0",)),
    "encoder": (Encoder(2, (4,)), (CHUNK,), ("MLP_0",)),
    "gaussian": (Gaussian(2, (4,)), (), ("MLP_0",)),
    "squashed": (Squashed(2, (4,)), (), ("MLP_0",)),
}


@pytest.mark.usefixtures("small_encoders")
@pytest.mark.parametrize("name", MODULES)
def test_every_network_sees_dicts_and_its_gradient_reaches_the_encoder(name):
    network, others, parts = MODULES[name]
    array = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros(5), *others)["params"]
    assert tuple(array) == parts  # arrays ask for no further parameters
    params = jax.jit(network.init)(jax.random.key(0), seen(), *others)
    assert set(params["params"]) == {*parts, "encoder_image"}
    batch = [jnp.broadcast_to(x, (5, *x.shape)) for x in others]

    @jax.jit
    def both(params, obs):
        out = lambda params: network.apply(params, obs, *batch)  # noqa: E731
        total = lambda params: sum(jnp.square(x).sum() for x in jax.tree.leaves(out(params)))  # noqa: E731
        return out(params), jax.grad(total)(params)

    found, slope = both(params, seen(5))
    turned, _ = both(params, jax.tree.map(lambda x: x[::-1], seen(5)))
    rows = (lambda x: x[:, ::-1]) if name.startswith(("critic", "quantiles")) else (lambda x: x[::-1])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(rows(x), y, rtol=1e-4, atol=1e-5), found, turned)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(slope["params"]["encoder_image"]))


@pytest.mark.usefixtures("small_encoders")
def test_an_image_is_encoded_once_for_all_candidates():
    network, obs, action = Critic(2, (4,)), seen(5), jnp.asarray(np.random.default_rng(2).normal(size=(5, 7, 2)))
    params, apply = jax.jit(network.init)(jax.random.key(0), obs, action[:, 0]), jax.jit(network.apply)
    repeated = networks.repeat_for(action, obs)
    assert jax.tree.map(jnp.shape, repeated) == {"velocity": (5, 7, 2), "angle": (5, 7, 3), "image": (5, 1, 8, 8, 3)}
    scores = apply(params, repeated, action)
    each = [apply(params, obs, action[:, i]) for i in range(7)]
    np.testing.assert_allclose(scores, np.stack(each, axis=-1), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("small_encoders")
def test_the_first_of_an_ensemble_keeps_the_encoder_that_all_share():
    network, obs, action = Critic(3, (4,)), seen(5), jnp.ones((5, 2))
    params = jax.jit(network.init)(jax.random.key(0), obs, action)
    alone = jax.jit(Critic(1, (4,)).apply)(networks.first_of(params), obs, action)
    np.testing.assert_allclose(alone[0], jax.jit(network.apply)(params, obs, action)[0], rtol=1e-5)
    of_array = jax.jit(Critic(3, (4,)).init)(jax.random.key(0), obs["angle"], action)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y[:1]), networks.first_of(of_array), of_array)


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
