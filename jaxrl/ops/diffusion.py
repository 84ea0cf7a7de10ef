"""Diffusion over trajectories as functions of arrays: the denoiser, its error, the sampler, policy guidance.

Papers: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv 2206.00364 (EDM), with
data of standard deviation 1; Jackson et al., "Policy-Guided Diffusion", arXiv 2404.06356.

The noise level decreases from sigma_0 = 80 to 0, the data. During denoising, guidance moves the actions toward those
that are likely under a policy; the model then adapts the states.

Deliberate differences from the official code of policy-guided diffusion: the predictor of a step also starts from the
churned point; the network is never evaluated at noise level 0; the normalization of directions does not divide by 0.
"""

from collections.abc import Callable
from typing import Annotated, TypeAlias

import jax
import jax.numpy as jnp

from jaxrl.ranges import NonNegative, Range
from jaxrl.types import pytree

Denoiser: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
"""D(x [B, H, F], sigma [B]) -> [B, H, F]: the expected data, given noisy data x of level sigma."""
Guide: TypeAlias = Callable[[jax.Array], jax.Array]
"""x [B, H, F] -> the direction [B, H, F] in which guidance moves it."""
LogDensity: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
"""log pi(a | s): (observations [N, O], actions [N, A]) -> [N]."""

LOWEST, HIGHEST, CURVATURE = 0.002, 80.0, 7.0  # sigma_min, sigma_max and rho of the schedule
CHURNED = (0.05, 50.0)  # range of levels at which the sampler adds noise
LOG_LEVEL = (-1.2, 1.2)  # mean and standard deviation of ln sigma in training


@pytree
class Scale:
    """Layout and scale of standardized features [..., O + A + 2]."""

    observation: int  # O
    action: int  # A
    mean: jax.Array  # [O + A + 2]
    std: jax.Array  # [O + A + 2], 1 where a feature is constant

    @property
    def actions(self) -> slice:
        """The slice of the actions in the features."""
        return slice(self.observation, self.observation + self.action)

    def read(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Returns observations [..., O], actions [..., A] in [-1, 1], rewards [...] and ends of the task [...]."""
        lead = (1,) * (x.ndim - 1)
        raw = x * self.std.reshape(*lead, -1) + self.mean.reshape(*lead, -1)
        return raw[..., : self.observation], jnp.tanh(raw[..., self.actions]), raw[..., -2], raw[..., -1] > 0.5


@pytree
class Sampler:
    """Settings of the sampler and of policy guidance."""

    denoising_steps: Annotated[int, Range(2)] = 256  # T: number of noise levels
    guidance: NonNegative = 1.0  # eta: guidance strength at each level; used only with a policy
    guidance_bump: NonNegative = 0.3  # weight of the sine term that puts the peak of guidance inside the schedule
    normalize_guidance: bool = False  # whether the direction has norm 1 over each whole trajectory
    denoised_guidance: bool = False  # whether the policy sees the denoised x instead of x; 3 network calls, not 2
    churn: NonNegative = 80.0  # noise added during sampling
    churn_scale: NonNegative = 1.003  # standard deviation of that noise


# The denoiser and its error


def preconditioning(sigma: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns (c_skip, c_out, c_in, c_noise) of EDM's table 1 at noise levels sigma, above 0."""
    variance = jnp.square(sigma) + 1
    return 1 / variance, sigma / jnp.sqrt(variance), 1 / jnp.sqrt(variance), jnp.log(sigma) / 4


def denoiser_of(network: Callable[[jax.Array, jax.Array], jax.Array]) -> Denoiser:
    """Returns the denoiser c_skip x + c_out F(c_in x, c_noise) of a network F(x [B, H, F], time [B, 1])."""

    def denoise(x: jax.Array, sigma: jax.Array) -> jax.Array:
        skip, out, inside, time = (c[:, None, None] for c in preconditioning(sigma))
        return skip * x + out * network(inside * x, time[:, 0])

    return denoise


def training_levels(key: jax.Array, batch: int) -> jax.Array:
    """Returns log-normal noise levels [B] for training."""
    mean, std = LOG_LEVEL
    return jnp.exp(mean + std * jax.random.normal(key, (batch,)))


def denoising_error(denoise: Denoiser, tau: jax.Array, sigma: jax.Array, noise: jax.Array) -> jax.Array:
    """Returns (D(tau + sigma n; sigma) - tau)^2 (sigma^2 + 1) / sigma^2 per entry [B, H, F]; sigma is [B]."""
    sigmas = sigma[:, None, None]
    return jnp.square((denoise(tau + sigmas * noise, sigma) - tau) / sigmas) * (jnp.square(sigmas) + 1)


# Guidance


def policy_guide(log_density: LogDensity, scale: Scale, normalize: bool = False) -> Guide:
    """Returns the gradient of sum_t log pi(a_t | s_t) in the standardized actions before tanh, states held fixed.

    It is 0 at all other entries of x. With `normalize` it has norm 1 over each trajectory.
    """

    def guide(x: jax.Array) -> jax.Array:
        obs, *_ = scale.read(x)

        def likelihood(actions: jax.Array) -> jax.Array:
            _, action, *_ = scale.read(x.at[..., scale.actions].set(actions))
            return log_density(obs.reshape(-1, scale.observation), action.reshape(-1, scale.action)).sum()

        direction = jax.grad(likelihood)(x[..., scale.actions])
        if normalize:
            direction = direction / (jnp.linalg.norm(direction, axis=(1, 2), keepdims=True) + 1e-8)
        return jnp.zeros_like(x).at[..., scale.actions].set(direction)

    return guide


def guidance_schedule(sampler: Sampler) -> jax.Array:
    """Returns eta_i [T] = eta ((1 - i/T) + c sin(pi (i + 1) / T)), 0 at the last step."""
    i, steps = jnp.arange(sampler.denoising_steps), sampler.denoising_steps
    eta = sampler.guidance * (1 - i / steps + sampler.guidance_bump * jnp.sin(jnp.pi * (i + 1) / steps))
    return jnp.where(i < steps - 1, eta, 0)


# The sampler


def noise_schedule(steps: int) -> jax.Array:
    """Returns the levels sigma_0 = 80, ..., sigma_{T-1} = 0.002, sigma_T = 0, [T + 1] (EDM, equation 5)."""
    high, low = HIGHEST ** (1 / CURVATURE), LOWEST ** (1 / CURVATURE)
    return jnp.append((high + jnp.arange(steps) / (steps - 1) * (low - high)) ** CURVATURE, 0.0)


def churn_schedule(sampler: Sampler, sigma: jax.Array) -> jax.Array:
    """Returns gamma_i, the relative increase of each level before its step, at most sqrt(2) - 1."""
    low, high = CHURNED
    gamma = jnp.minimum(sampler.churn / sampler.denoising_steps, 2**0.5 - 1)
    return jnp.where((sigma >= low) & (sigma <= high), gamma, 0.0)


def heun_step(
    denoise: Denoiser, x: jax.Array, sigma: jax.Array, following: jax.Array, gamma: jax.Array, noise: jax.Array
) -> jax.Array:
    """Returns x at the next level: noise up to sigma (1 + gamma), then a second-order step down to `following`.

    The step to level 0 is first-order.
    """
    level = jnp.full(len(x), sigma * (1 + gamma))
    x = x + sigma * jnp.sqrt(gamma * (2 + gamma)) * noise  # sqrt(level^2 - sigma^2), never of a negative number
    distance = following - level[0]
    slope = (x - denoise(x, level)) / level[0]
    end = x + distance * slope
    last = jnp.where(following > 0, following, LOWEST)
    slope_there = (end - denoise(end, jnp.full(len(x), last))) / last
    return jnp.where(following > 0, x + distance * (slope + slope_there) / 2, end)


def sample(
    denoise: Denoiser, sampler: Sampler, key: jax.Array, shape: tuple[int, int, int], guide: Guide | None = None
) -> jax.Array:
    """Returns trajectories [B, H, F] sampled from the denoiser's data distribution, guided if there is a guide."""
    key_start, key_churn = jax.random.split(key)
    sigma = noise_schedule(sampler.denoising_steps)
    levels = (sigma[:-1], sigma[1:], churn_schedule(sampler, sigma[:-1]), guidance_schedule(sampler))

    def step(x: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        sigma, following, gamma, eta, key = inputs
        if guide is not None:
            seen = denoise(x, jnp.full(len(x), sigma)) if sampler.denoised_guidance else x
            x = x + eta * guide(seen)
        noise = sampler.churn_scale * jax.random.normal(key, shape)
        return heun_step(denoise, x, sigma, following, gamma, noise), None

    start = sigma[0] * jax.random.normal(key_start, shape)
    return jax.lax.scan(step, start, (*levels, jax.random.split(key_churn, sampler.denoising_steps)))[0]
