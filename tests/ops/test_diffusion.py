"""Diffusion over trajectories: closed forms of denoiser, sampler and guidance, and a small model of known dynamics."""

import dataclasses
import functools
import math
import re
import shutil
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import cli
from jaxrl.data import files
from jaxrl.errors import UserError
from jaxrl.networks import TemporalUNet, neighbours
from jaxrl.ops import diffusion
from jaxrl.ops.diffusion import Sampler, Scale
from jaxrl.runs import directory
from jaxrl.runs.signals import StopRequested
from jaxrl.synthesis import generate, segments
from jaxrl.synthesis.model import Generator, State, log_density_of
from jaxrl.types import Spec, pytree
from tests import tiny
from tests.known import KEY, quick_to_compile, same

OBS, A = 2, 1  # sizes of observation and action in these tests
sample = jax.jit(diffusion.sample, static_argnames=("denoise", "shape", "guide"))


@pytest.fixture(autouse=True)
def quick():
    with quick_to_compile():
        yield


def scale_of(mean=0.0, std=1.0) -> Scale:
    """Returns the scale of OBS + A + 2 features that all have one mean and one standard deviation."""
    return Scale(OBS, A, jnp.full(OBS + A + 2, mean), jnp.full(OBS + A + 2, std))


def unit_gaussian(mean):
    """Returns log N(a; mean(obs), 1), but for a constant."""
    return lambda obs, action: -jnp.square(action - mean(obs)).sum(axis=-1) / 2


# The denoiser and its error


def test_levels_fall_from_80_to_0_002_and_then_to_0():
    sigma = diffusion.noise_schedule(16)
    assert sigma.shape == (17,)
    np.testing.assert_allclose(sigma[jnp.array([0, 15, 16])], [80, 0.002, 0], rtol=1e-4)
    assert (jnp.diff(sigma) < 0).all()
    middle = (80 ** (1 / 7) + 5 / 15 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(sigma[5], middle, rtol=1e-4)


def test_preconditioning_keeps_variances_at_1():
    sigma = jnp.array([0.002, 0.5, 1.0, 80.0])
    skip, out, inside, time = diffusion.preconditioning(sigma)
    np.testing.assert_allclose(out**2, sigma**2 * inside**2, rtol=1e-5)
    np.testing.assert_allclose(inside**2 * (1 + sigma**2), 1, rtol=1e-5)  # the network's input
    np.testing.assert_allclose(((1 - skip) ** 2 + skip**2 * sigma**2) / out**2, 1, rtol=1e-4)  # and its target
    np.testing.assert_allclose(time, np.log(sigma) / 4, rtol=1e-5)


def test_the_error_is_that_of_the_networks_output():
    """(D - tau)^2 (sigma^2 + 1) / sigma^2 = (F - (tau - c_skip x) / c_out)^2: every level weighs the same."""
    tau, noise = jax.random.normal(KEY, (2, 3, 4, 5))
    sigma = jnp.array([0.1, 1.0, 20.0])
    seen = []

    def network(x, time):
        seen.append((x, time))
        return jnp.cos(x) + time[:, None]

    error = diffusion.denoising_error(diffusion.denoiser_of(network), tau, sigma, noise)
    x = tau + sigma[:, None, None] * noise
    variance = 1 + sigma[:, None, None] ** 2
    target = (tau - x / variance) * jnp.sqrt(variance) / sigma[:, None, None]
    np.testing.assert_allclose(seen[0][0], x / jnp.sqrt(variance), rtol=1e-5)
    np.testing.assert_allclose(seen[0][1], jnp.log(sigma)[:, None] / 4, rtol=1e-5)
    np.testing.assert_allclose(error, (network(*seen[0]) - target) ** 2, rtol=2e-3, atol=1e-5)


def test_training_levels_are_log_normal():
    logarithms = jnp.log(diffusion.training_levels(KEY, 100_000))
    np.testing.assert_allclose([logarithms.mean(), logarithms.std()], [-1.2, 1.2], atol=0.02)


# The sampler


@pytest.mark.parametrize("churn", [0.0, 80.0])
def test_the_perfect_denoiser_of_a_point_gives_the_point(churn):
    point = jnp.arange(12.0).reshape(1, 4, 3)
    denoise = lambda x, sigma: jnp.broadcast_to(point, x.shape)  # noqa: E731
    x = sample(denoise, Sampler(denoising_steps=16, churn=churn), KEY, (2, 4, 3))
    np.testing.assert_allclose(x, jnp.broadcast_to(point, x.shape), atol=1e-4)


@pytest.mark.parametrize("churn", [0.0, 80.0])
def test_the_ideal_denoiser_of_a_gaussian_gives_variance_1(churn):
    ideal = lambda x, sigma: x / (1 + sigma**2)[:, None, None]  # noqa: E731
    x = sample(ideal, Sampler(denoising_steps=128, churn=churn, churn_scale=1.0), KEY, (10_000, 1, 1))
    np.testing.assert_allclose([x.mean(), x.var()], [0, 1], atol=0.03)


def test_a_step_without_churn_is_heuns():
    """With D(x) = x / (1 + sigma^2) the slope is x sigma / (1 + sigma^2)."""
    ideal = lambda x, sigma: x / (1 + sigma**2)[:, None, None]  # noqa: E731
    x, sigma, following = 3.0, 2.0, 0.5
    slope = x * sigma / (1 + sigma**2)
    end = x + (following - sigma) * slope
    heun = x + (following - sigma) * (slope + end * following / (1 + following**2)) / 2
    step = functools.partial(diffusion.heun_step, ideal, jnp.full((1, 1, 1), x), jnp.float32(sigma))
    zero, noise = jnp.float32(0), jnp.ones((1, 1, 1))
    np.testing.assert_allclose(step(jnp.float32(following), zero, noise).item(), heun, rtol=1e-6)
    np.testing.assert_allclose(step(zero, zero, noise).item(), x - sigma * slope, rtol=1e-6)  # first order


def test_churn_raises_the_level_before_it_is_left():
    """To a denoiser that says 0, x' = x_hat following / sigma_hat, to any order."""
    zero = lambda x, sigma: jnp.zeros_like(x)  # noqa: E731
    x, noise = jnp.full((1, 1, 1), 3.0), jnp.full((1, 1, 1), 0.7)
    sigma, gamma = 2.0, 0.25
    moved = 3.0 + math.sqrt((sigma * 1.25) ** 2 - sigma**2) * 0.7
    end = diffusion.heun_step(zero, x, jnp.float32(sigma), jnp.float32(0.5), jnp.float32(gamma), noise)
    np.testing.assert_allclose(end.item(), moved * 0.5 / (sigma * 1.25), rtol=1e-6)
    gammas = diffusion.churn_schedule(Sampler(denoising_steps=256), jnp.array([60.0, 50.0, 0.05, 0.04]))
    np.testing.assert_allclose(gammas, [0, 80 / 256, 80 / 256, 0])
    few = diffusion.churn_schedule(Sampler(denoising_steps=16), jnp.array([1.0]))
    np.testing.assert_allclose(few, [math.sqrt(2) - 1], rtol=1e-6)


def test_the_network_is_never_asked_about_level_0():
    levels = []

    def denoise(x, sigma):
        jax.debug.callback(lambda level: levels.append(float(level)), sigma[0])
        return jnp.zeros_like(x)

    jax.block_until_ready(sample(denoise, Sampler(denoising_steps=4), KEY, (1, 1, 1)))
    jax.effects_barrier()
    assert len(levels) == 8 and min(levels) >= 0.0019


# Guidance


def test_guidance_is_the_gradient_in_standardised_actions_before_tanh():
    x = jax.random.normal(KEY, (3, 4, OBS + A + 2))
    policy = lambda obs: 0.5 * obs[:, :1]  # noqa: E731
    guide = jax.jit(diffusion.policy_guide(unit_gaussian(policy), scale_of()))(x)
    action = jnp.tanh(x[..., OBS : OBS + A])
    gradient = -(action - 0.5 * x[..., :1]) * (1 - action**2)
    np.testing.assert_allclose(guide[..., OBS : OBS + A], gradient, atol=1e-6)
    assert (guide[..., :OBS] == 0).all() and (guide[..., OBS + A :] == 0).all()

    mean, std = 0.3, 2.0  # the states are read in their own units, and the chain rule brings the factor std
    guide = jax.jit(diffusion.policy_guide(unit_gaussian(policy), scale_of(mean, std)))(x)
    action = jnp.tanh(std * x[..., OBS : OBS + A] + mean)
    gradient = -(action - 0.5 * (std * x[..., :1] + mean)) * (1 - action**2) * std
    np.testing.assert_allclose(guide[..., OBS : OBS + A], gradient, atol=1e-5)


def test_normalised_guidance_has_norm_1_over_each_trajectory_and_0_where_there_is_no_direction():
    x = jax.random.normal(KEY, (3, 4, OBS + A + 2))
    make = functools.partial(diffusion.policy_guide, unit_gaussian(lambda obs: obs[:, :1]), scale_of())
    plain, unit = (jax.jit(make(normalize))(x) for normalize in (False, True))
    np.testing.assert_allclose(unit, plain / np.linalg.norm(plain, axis=(1, 2), keepdims=True), rtol=1e-5)
    nowhere = diffusion.policy_guide(lambda obs, action: 0 * action[:, 0], scale_of(), normalize=True)(x)
    assert (nowhere == 0).all()


def test_the_strength_of_guidance_falls_and_is_0_at_the_last_step():
    steps, eta = 8, 2.0
    schedule = diffusion.guidance_schedule(Sampler(denoising_steps=steps, guidance=eta))
    np.testing.assert_allclose(schedule[0], eta * (1 + 0.3 * math.sin(math.pi / steps)), rtol=1e-6)
    np.testing.assert_allclose(schedule[3], eta * (1 - 3 / steps + 0.3 * math.sin(4 * math.pi / steps)), rtol=1e-6)
    assert schedule[-1] == 0 and (schedule[:-1] > 0).all()


def test_guidance_is_added_before_each_step_with_the_strength_of_its_level():
    """A denoiser that believes what it sees moves nothing, so only the guidance is left."""
    believe = lambda x, sigma: x  # noqa: E731
    sampler = Sampler(denoising_steps=8, guidance=1.5, churn=0.0)
    ones = lambda x: jnp.ones_like(x)  # noqa: E731
    free, guided = (sample(believe, sampler, KEY, (1, 2, 3), guide) for guide in (None, ones))
    np.testing.assert_allclose(guided - free, diffusion.guidance_schedule(sampler).sum(), rtol=1e-4)


def test_denoised_guidance_judges_what_the_model_makes_of_x():
    halves = lambda x, sigma: x / 2  # noqa: E731
    seen = lambda x: x  # noqa: E731
    for denoised, share in ((False, 1.0), (True, 0.5)):
        sampler = Sampler(denoising_steps=2, guidance=1.0, guidance_bump=0.0, denoised_guidance=denoised, churn=0.0)
        moved = sample(halves, sampler, KEY, (1, 1, 1), seen)
        free = sample(halves, sampler, KEY, (1, 1, 1))
        np.testing.assert_allclose(moved / free, 1 + share, rtol=1e-4)  # eta_0 = 1, eta_1 = 0; all steps are linear


@pytree
class Still:
    """An agent that does the same everywhere: what its state says."""

    chunk: int = 1

    def act(self, state, obs, key, *, greedy=False):
        assert greedy
        return jnp.full((len(obs), 2, A), state).at[:, 1:].set(7.0)  # only the first action of a chunk counts


@pytree
class Known(Still):
    """An agent that knows its density."""

    def log_density(self, state, obs, action):
        return state * obs[:, 0] + action[:, 0]


def test_an_agents_own_density_counts_else_a_unit_gaussian_around_its_first_greedy_action():
    obs, action = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[0.1], [0.9]])
    density = log_density_of(Still(), jnp.float32(0.4))(obs, action)
    np.testing.assert_allclose(
        density, [-(0.3**2) / 2 - math.log(2 * math.pi) / 2, -(0.5**2) / 2 - 0.9189385], rtol=1e-5
    )
    np.testing.assert_allclose(log_density_of(Known(), jnp.float32(2.0))(obs, action), [2.1, 6.9], rtol=1e-6)


# The model


@pytree
class Slope(Generator):
    """A generator whose error has the gradient 1, so that Adam moves the parameter by the learning rate."""

    def error(self, params, tau, key):
        return params


def test_the_learning_rate_rises_and_falls_and_the_average_follows_slowly():
    generator = Slope(updates=100, lr=1e-2, ema=0.6, ema_every=10)
    start = jnp.float32(1)
    state = State(start, start, generator.optimizer.init(start), jnp.zeros((), jnp.int32), KEY)

    @jax.jit
    def train(state):
        def step(state, _):
            state, _ = generator.update(state, jnp.zeros((1, 8, 5)), KEY)
            return state, state

        return jax.lax.scan(step, state, None, 100)[1]

    states = train(state)
    moves = -np.diff(np.concatenate([[1.0], states.params]))
    rise = 1e-3 + np.arange(10) / 10 * 9e-3
    fall = 1e-2 * (1 + np.cos(np.pi * np.arange(90) / 90)) / 2
    np.testing.assert_allclose(moves, [*rise, *fall], atol=1e-6)
    average = 1.0
    for i in range(1, 11):  # a tenth, two elevenths, ... of the old one is kept, at most 0.6
        average += (1 - min(i / (i + 9), 0.6)) * (states.params[10 * i - 1] - average)
        np.testing.assert_allclose(states.ema[10 * i - 1 : 10 * i + 9], average, rtol=1e-5)


def test_updates_are_split_into_epochs_that_a_stop_need_not_wait_long_for():
    assert [Generator(updates=count).epochs for count in (1, 500, 501, 10_000)] == [
        (1, 1),
        (1, 500),
        (2, 251),
        (20, 500),
    ]


# Data


def file_of(*episodes) -> files.Dataset:
    """Returns a dataset of episodes, each a list of masks; the observation of row t is (t, -t), its reward t / 10."""
    masks = [[*masks, 1] for masks in episodes]
    flat = np.concatenate(masks).astype(np.float32)
    t = np.arange(len(flat), dtype=np.float32)
    columns = {
        "observations": np.stack([t, -t], axis=1),
        "actions": np.sin(t)[:, None],
        "rewards": t / 10,
        "masks": flat,
        "terminals": np.concatenate([np.arange(len(part)) == len(part) - 1 for part in masks]),
    }
    return files.from_columns(columns)


CLOCK = [1] * 10  # ten steps, then the clock runs out
TASK = [1] * 9 + [0]  # ten steps, of which the last ends the task


@pytest.mark.parametrize(
    ("episodes", "length", "stride", "starts"),
    [
        ([CLOCK], 4, 2, [0, 2, 4]),  # the last step is after which the clock ran out: 5..8 would be the last
        ([CLOCK], 4, 1, [0, 1, 2, 3, 4, 5]),
        ([CLOCK], 9, 8, [0]),
        ([TASK], 4, 2, [0, 2, 4, 6]),
        ([TASK], 4, 4, [0, 4, 6]),  # 6..9 ends with the task
        ([TASK], 10, 8, [0]),
        ([CLOCK, TASK], 9, 8, [0, 11, 12]),  # the rows of the second episode are 11 to 21
        ([[1, 1, 0, 1, 1, 1, 1]], 3, 1, [0, 3]),  # the task begins anew in the middle of an episode
        ([[0] * 5, TASK], 4, 4, [6, 10, 12]),  # ends in every step: nothing there is long enough
    ],
)
def test_sub_trajectories_hold_no_end_but_the_tasks_in_their_last_step(episodes, length, stride, starts):
    np.testing.assert_array_equal(segments.starts_of(file_of(*episodes), length, stride), starts)


def test_a_file_without_masks_has_time_limits_only():
    dataset = dataclasses.replace(file_of(TASK), masks=None)
    np.testing.assert_array_equal(segments.starts_of(dataset, 4, 4), [0, 4])


def test_features_are_standardised_over_all_sub_trajectories_and_constant_ones_only_shifted():
    dataset = file_of(TASK, CLOCK)
    learn, judge = segments.segments(dataset, 4, 3)
    assert len(judge.starts) == 0  # 5 % of two episodes
    rows = segments.features(dataset)
    np.testing.assert_allclose(rows[:, 2], np.arctanh(np.clip(np.sin(np.arange(22.0)), -0.999, 0.999)), rtol=1e-4)
    np.testing.assert_array_equal(np.flatnonzero(rows[:, 4]), [9])  # the end of the task, not that of an episode
    windows = rows[np.asarray(learn.starts)[:, None] + np.arange(4)].reshape(-1, 5)
    np.testing.assert_allclose(learn.scale.mean, windows.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(learn.scale.std, windows.std(axis=0), rtol=1e-5)
    drawn = learn.draw(KEY, 2)
    assert drawn.shape == (2, 4, 5)
    np.testing.assert_allclose(jnp.diff(drawn[..., 0], axis=1) * learn.scale.std[0], 1, rtol=1e-4)  # steps in a row
    never, _ = segments.segments(file_of(CLOCK), 4, 3)
    assert never.scale.std[4] == 1 and never.scale.mean[4] == 0


def test_one_episode_in_twenty_is_held_out():
    learn, judge = segments.segments(file_of(*[CLOCK] * 40), 4, 2)
    episode = lambda part: set(np.asarray(part.starts) // 11)  # noqa: E731
    assert len(episode(judge)) == 2 and len(episode(learn)) == 38 and not episode(judge) & episode(learn)


def test_a_dataset_without_a_long_enough_episode_is_refused():
    with pytest.raises(UserError, match="no episode has 10 steps in a row"):
        segments.segments(file_of(CLOCK), 10, 1)


def test_what_a_model_would_generate_perfectly_is_the_data_again():
    dataset = file_of(TASK, [1] * 11)
    learn, _ = segments.segments(dataset, 10, 1)
    generated = learn.rows[np.asarray(learn.starts)[:, None] + np.arange(10)]
    obs, actions, rewards, ended = map(np.asarray, learn.scale.read(generated))
    again = segments.to_dataset(obs, actions, rewards, ended)
    first, last = files.episodes(again)
    np.testing.assert_array_equal(last - first, [10, 9])  # the last state of the second leads nowhere
    steps = np.r_[0:10, 11:20]
    np.testing.assert_allclose(again.observations[steps], dataset.observations[steps], atol=1e-5)
    np.testing.assert_allclose(again.actions[steps], np.clip(dataset.actions[steps], -0.999, 0.999), atol=1e-5)
    np.testing.assert_allclose(again.rewards[steps], dataset.rewards[steps], atol=1e-5)
    np.testing.assert_array_equal(np.flatnonzero(again.masks == 0), [9])


def test_what_follows_a_generated_end_is_dropped():
    ended = np.array([[0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1]], bool)
    obs = np.arange(32.0).reshape(4, 4, 2)
    rewards = 1 + np.arange(16.0).reshape(4, 4)
    dataset = segments.to_dataset(obs, np.full((4, 4, 1), 0.5), rewards, ended)
    first, last = files.episodes(dataset)
    np.testing.assert_array_equal(last - first, [3, 1, 3, 4])
    np.testing.assert_array_equal(dataset.masks, [*[1, 1, 1, 1], *[0, 1], *[1, 1, 0, 1], *[1, 1, 1, 0, 1]])
    np.testing.assert_array_equal(dataset.rewards, [*[1, 2, 3, 0], *[5, 0], *[9, 10, 11, 0], *[13, 14, 15, 16, 0]])
    np.testing.assert_array_equal(dataset.observations[:, 0], [0, 2, 4, 6, 8, 10, 16, 18, 20, 22, 24, 26, 28, 30, 30])
    with pytest.raises(UserError, match="not finite"):
        segments.to_dataset(np.where(obs == 7, np.nan, obs), np.zeros((4, 4, 1)), rewards, ended)


# The network


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
    params = jax.eval_shape(net.init, KEY, x, t)
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


# A small model of a known linear system: s' = A s + B a


DYNAMICS = np.array([[0.9, 0.3], [-0.3, 0.9]], np.float32)
CONTROL = np.array([[0.0], [0.6]], np.float32)


def linear_system(count: int = 150, steps: int = 12) -> files.Dataset:
    """Returns episodes of random actions in the system, with rewards that are the first entry of the state."""
    random = np.random.default_rng(0)
    actions = random.uniform(-0.9, 0.9, (count, steps + 1, 1)).astype(np.float32)
    state, states = random.normal(size=(count, 2)).astype(np.float32), []
    for t in range(steps + 1):
        states.append(state)
        state = state @ DYNAMICS.T + actions[:, t] @ CONTROL.T
    obs = np.stack(states, axis=1)
    columns = {
        "observations": obs.reshape(-1, 2),
        "actions": actions.reshape(-1, 1),
        "rewards": obs[..., 0].ravel(),
        "terminals": np.tile(np.arange(steps + 1) == steps, count),
    }
    return files.from_columns(columns)


def surprise(dataset: files.Dataset, shuffled: bool = False) -> float:
    """Returns the mean distance of next states from what the system would have made of the state and the action."""
    rows = np.flatnonzero(~dataset.terminals)
    following = dataset.observations[np.random.default_rng(1).permutation(rows) + 1 if shuffled else rows + 1]
    expected = dataset.observations[rows] @ DYNAMICS.T + dataset.actions[rows] @ CONTROL.T
    return np.linalg.norm(following - expected, axis=-1).mean()


@pytree
class Steady(Still):
    """An agent that always does 0.8."""

    def act(self, state, obs, key, *, greedy=False):
        return jnp.full((len(obs), 1, A), 0.8)


MODEL = Generator(length=8, stride=2, widths=(32,), updates=600, ema_every=1)


def fit(folder, requested: bool = False):
    """Returns the scale and the parameters of the small model, trained on in a folder, or stops where that is asked."""
    parts = generate.prepare(MODEL, linear_system(), folder)
    stop: Any = types.SimpleNamespace(requested=requested)
    params, error = generate.fitted(MODEL, parts, folder, KEY, stop)
    return parts[0].scale, params, error


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of the small model, its scale and its parameters."""
    folder = tmp_path_factory.mktemp("model")
    with quick_to_compile():
        return folder, *fit(folder)


def test_training_that_was_stopped_goes_on_bit_for_bit_and_a_finished_one_is_used_again(model, tmp_path):
    folder, _, params, error = model
    with pytest.raises(StopRequested):
        fit(tmp_path, requested=True)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()] == ["1"]
    _, again, said = fit(tmp_path)
    assert same(again, params) and said == error
    _, again, said = fit(folder)
    assert same(again, params) and said == "trained before"


def generated(model, guidance: float, policy=None) -> files.Dataset:
    _, scale, params, _ = model
    sampler = Sampler(denoising_steps=24, guidance=guidance)
    return generate.generate(MODEL, sampler, params, scale, KEY, 100, policy)


def test_generated_trajectories_follow_the_system_and_guided_actions_the_policy(model):
    free, none = generated(model, 0.0), generated(model, 0.0, (Steady(), ()))
    assert same(files.to_columns(free), files.to_columns(none))  # guidance of strength 0
    guided = generated(model, 1.0, (Steady(), ()))
    for dataset in (free, guided):
        first, last = files.episodes(dataset)
        np.testing.assert_array_equal(last - first, [7] * 100)  # 8 states each
        assert surprise(dataset) < 0.5 * surprise(dataset, shuffled=True)
        rewards = dataset.rewards - dataset.observations[:, 0]
        assert np.abs(rewards[~dataset.terminals]).mean() < 0.3 * dataset.observations[:, 0].std()
    distance = lambda dataset: np.abs(dataset.actions[~dataset.terminals] - 0.8).mean()  # noqa: E731
    assert distance(guided) < 0.5 * distance(free)


# The command


def mistake(line: str, capsys) -> str:
    """Returns the one line that a mistake is answered with, having written nothing."""
    before = tiny.tree(Path.cwd())
    assert cli.main(["synthesize", *line.split()]) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n"), tiny.tree(Path.cwd())) == ("", 1, before)
    return error.removeprefix("jaxrl: ").removesuffix("\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "synthesize: name a dataset, for example `jaxrl synthesize DATA.npz --out new.npz`"),
        ("ok.npz", "--out: name the file to write"),
        ("okk.npz --out new.npz", "no file okk.npz: did you mean 'ok.npz'?"),
        ("ok.npz --out new.txt", "new.txt: the name of a dataset file ends in .npz"),
        ("ok.npz --out ok.npz", "ok.npz exists: name another file"),
        ("ok.npz --out new.npz --guidence 1", "unknown flag --guidence: did you mean --guidance? --help lists all"),
        ("ok.npz --out new.npz --guidance -1", "guidance = -1.0: must be at least 0 and finite"),
        ("ok.npz --out new.npz --guidance nan", "guidance = nan: must be at least 0 and finite"),
        ("ok.npz --out new.npz --denoising-steps 1", "denoising_steps = 1: must be at least 2"),
        ("ok.npz --out new.npz --trajectories 0", "trajectories = 0: must be at least 1 and below 2^63"),
        ("ok.npz --out new.npz --updates 0", "updates = 0: must be at least 1"),
        ("ok.npz --out new.npz --lr 0", "lr = 0.0: must be above 0 and finite"),
        ("ok.npz --out new.npz --ema 1", "ema = 1.0: must be at least 0 and below 1"),
        ("ok.npz --out new.npz --widths 20", "widths = (20,): must be multiples of 8, the first at least 16"),
        ("ok.npz --out new.npz --length 2 --widths 16 16 16", "length = 2: must be at least 4, since each of 3 widths"),
        ("ok.npz --out new.npz --length 13", "dataset ok.npz: no episode has 13 steps in a row in which neither"),
        ("bare.npz --out new.npz", "dataset bare.npz: has no rewards: name the environment that gives them with --env"),
        ("ok.npz --out new.npz --env pont", "unknown environment 'pont': did you mean 'point'?"),
        ("ok.npz --out new.npz --policy nothing", "nothing is not a run directory: config.json is missing"),
        ("ok.npz --out new.npz --length 8 --model other", "other exists, but holds no diffusion model: name another"),
        ("ok.npz --out new.npz --length 8 --model ok.npz", "ok.npz exists, but holds no diffusion model: name another"),
        ("ok.npz --out new.npz --length 16 --model model", "length = 16: the model in model has 8; leave it out, or"),
        ("less.npz --out new.npz --model model", "the model in model was trained on other data or rewards: name"),
        ("ok.npz --out new.npz --model cut", "cut/generator.json is damaged: 'generator' or 'dataset_digest' is miss"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(model, tmp_path, monkeypatch, capsys, line, message):
    monkeypatch.chdir(tmp_path)
    data = linear_system()
    files.save("ok.npz", data)
    files.save("bare.npz", dataclasses.replace(data, rewards=None))
    files.save("less.npz", dataclasses.replace(data, rewards=data.rewards - 1))
    for name, file in (("other", "file"), ("cut", "generator.json")):
        Path(name).mkdir()
        Path(name, file).write_text("{}")
    shutil.copytree(model[0], "model")
    assert mistake(line, capsys).startswith(message)


def test_a_policy_of_other_sizes_is_refused():
    env = types.SimpleNamespace(spec=Spec(observation=4, action=A))
    config: Any = types.SimpleNamespace(agent=Steady())
    with pytest.raises(UserError, match=r"sees observations of 4 entries and acts with 1, dataset x\.npz has 2 and 1"):
        generate.policy_for(dataclasses.replace(linear_system(), path="x.npz"), config, env, Path("run"))


def test_one_model_gives_datasets_with_guidance_and_without(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files.save("data.npz", linear_system())
    monkeypatch.setattr(directory, "read_config", lambda path: types.SimpleNamespace(env=str(path)))
    monkeypatch.setattr(cli.flags, "make", lambda name: None)
    monkeypatch.setattr(generate, "policy_for", lambda *arguments: (Steady(), ()))
    likely = {}
    for guidance in ("0", "1"):
        flags = f"--out new/{guidance}.npz --model {model[0]} --denoising-steps 24 --trajectories 100".split()
        assert cli.main(["synthesize", "data.npz", *flags, "--policy", "run", "--guidance", guidance]) == 0
        out, _ = capsys.readouterr()
        lines = dict(re.findall(r"^(\S.*?)  +(.+)$", out, re.M))
        assert lines["episodes"] == "100 (800 rows, 700 steps)"
        assert out.endswith(f"model in {model[0]}: trained before\n")
        data, likely[guidance] = map(float, lines["log pi(a | s), mean"].split())
        written = files.load(f"new/{guidance}.npz")
        actions = written.actions[~written.terminals]
        exact = -np.square(actions - 0.8).mean() / 2 - math.log(2 * math.pi) / 2
        np.testing.assert_allclose(likely[guidance], exact, atol=0.01)
        exact = -np.square(linear_system().actions - 0.8).mean() / 2 - math.log(2 * math.pi) / 2
        np.testing.assert_allclose(data, exact, atol=0.03)
        assert float(lines["step length, median"].split()[1]) > 0
    assert likely["1"] > likely["0"] + 0.1


def test_a_stop_is_told_and_exits_with_its_own_code(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files.save("data.npz", linear_system())

    def stopped(*arguments):
        raise StopRequested

    monkeypatch.setattr(generate, "fitted", stopped)
    assert cli.main(["synthesize", "data.npz", "--out=new.npz", "--length=8"]) == 75
    assert capsys.readouterr().err == "stopped and saved in new-model; the same command goes on\n"
