"""Facts about jaxrl.ops.diffusion: closed forms of the denoiser, its error, the sampler and guidance by a policy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.ops import diffusion
from jaxrl.ops.diffusion import Sampler, Scale
from tests.known import KEY, quick_to_compile

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


def test_guidance_is_the_gradient_in_standardized_actions_before_tanh():
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


def test_normalized_guidance_has_norm_1_over_each_trajectory_and_0_where_there_is_no_direction():
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


def test_denoised_guidance_judges_the_denoised_x():
    halves = lambda x, sigma: x / 2  # noqa: E731
    seen = lambda x: x  # noqa: E731
    for denoised, share in ((False, 1.0), (True, 0.5)):
        sampler = Sampler(denoising_steps=2, guidance=1.0, guidance_bump=0.0, denoised_guidance=denoised, churn=0.0)
        moved = sample(halves, sampler, KEY, (1, 1, 1), seen)
        free = sample(halves, sampler, KEY, (1, 1, 1))
        np.testing.assert_allclose(moved / free, 1 + share, rtol=1e-4)  # eta_0 = 1, eta_1 = 0; all steps are linear
