"""A diffusion model of a dataset's sub-trajectories: a learner (`types.Learner`), and functions that sample from it.

Paper: Jackson et al., "Policy-Guided Diffusion", arXiv 2404.06356; the mathematics is in `jaxrl.ops.diffusion`.

Deliberate differences from the official code: batches are drawn with replacement; the EMA decay is warmed up, so that
after a short training the average does not depend on the initial parameters.
"""

import dataclasses
from typing import Annotated, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxrl.errors import UserError
from jaxrl.networks import TemporalUNet, apply
from jaxrl.ops import diffusion, losses
from jaxrl.ops.diffusion import LogDensity, Sampler, Scale
from jaxrl.ranges import Count, Positive, Range
from jaxrl.synthesis.segments import Segments
from jaxrl.training import loop
from jaxrl.types import Agent, Density, Metrics, PyTree, Scalar, Spec, pytree

EPOCH = 500  # maximum number of updates per program; stop requests are handled in between
HELD_OUT = 256  # held-out sub-trajectories on which the error is estimated after each epoch

TrainedAgent: TypeAlias = tuple[Agent, PyTree]
"""An agent and its state."""


@pytree
class State:
    """The training state."""

    params: PyTree
    ema: PyTree  # exponential moving average of the parameters, used for sampling
    opt: PyTree
    step: jax.Array  # [] int32
    key: jax.Array  # for future epochs


@pytree
class Generator:
    """A diffusion model of sub-trajectories. The defaults are for CPUs; published: widths 1024 2048 4096."""

    length: Annotated[int, Range(2)] = 32  # H: steps per trajectory, in training and generation
    stride: Count = 8  # steps between the starts of the data's sub-trajectories
    widths: Annotated[tuple[int, ...], Range(8)] = (64, 128)  # channels of the U-Net's levels, each half as long
    updates: Count = 10_000  # gradient steps
    batch_size: Count = 32  # sub-trajectories per gradient step
    lr: Positive = 2e-3  # peak learning rate of Adam, reached after 10 % of the updates
    ema: Annotated[Scalar, Range(0, 0.999999)] = 0.995  # decay of the parameters' moving average
    ema_every: Count = 10  # gradient steps between two updates of the average

    def check(self) -> None:
        """Raises UserError for invalid widths of the U-Net, or too many for the trajectory's length."""
        if not self.widths or any(width % 8 for width in self.widths) or self.widths[0] < 16:
            raise UserError(f"Generator.widths = {self.widths}: must be multiples of 8, the first at least 16")
        least = 2 ** (len(self.widths) - 1)
        if self.length < least:
            raise UserError(
                f"Generator.length = {self.length}: must be at least {least}, since each of {len(self.widths)} widths "
                "but the last halves it"
            )

    @property
    def epochs(self) -> tuple[int, int]:
        """(Epochs, updates per epoch), rounded up to at least `updates` in total."""
        count = -(-self.updates // EPOCH)
        return count, -(-self.updates // count)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """Adam with learning-rate warmup and cosine decay to 0."""
        total = self.epochs[0] * self.epochs[1]
        rise = optax.linear_schedule(self.lr / 10, self.lr, total // 10)
        fall = optax.cosine_decay_schedule(self.lr, total - total // 10)
        return optax.adam(optax.join_schedules([rise, fall], [total // 10]))

    def denoiser(self, params: PyTree) -> diffusion.Denoiser:
        """Returns D(x; sigma)."""
        return diffusion.denoiser_of(lambda x, time: apply(TemporalUNet(self.widths), params, x, time))

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the state before training, for trajectories of observations and actions of these sizes."""
        assert isinstance(spec.observation, int)
        key, key_params = jax.random.split(key)
        tau = jnp.zeros((1, self.length, spec.observation + spec.action + 2))
        params = TemporalUNet(self.widths).init(key_params, tau, jnp.zeros((1, 1)))
        opt = self.optimizer.init(params)
        return State(params, jax.tree.map(jnp.copy, params), opt, jnp.zeros((), jnp.int32), key)

    def sample(self, data: Segments, key: jax.Array) -> jax.Array:
        """Returns a batch of trajectories [B, H, F]."""
        return data.draw(key, self.batch_size)

    def error(self, params: PyTree, tau: jax.Array, key: jax.Array) -> jax.Array:
        """Returns the mean weighted error of denoising trajectories [B, H, F] at random levels."""
        key_level, key_noise = jax.random.split(key)
        sigma, noise = diffusion.training_levels(key_level, len(tau)), jax.random.normal(key_noise, tau.shape)
        return diffusion.denoising_error(self.denoiser(params), tau, sigma, noise).mean()

    def update(self, state: State, batch: jax.Array, key: jax.Array, data: object = ()) -> tuple[State, Metrics]:
        """Returns the state after one gradient step on trajectories [B, H, F], and their error before it."""
        error, gradient = jax.value_and_grad(self.error)(state.params, batch, key)
        updates, opt = self.optimizer.update(gradient, state.opt, state.params)
        params, step = optax.apply_updates(state.params, updates), state.step + 1
        averaged = step // self.ema_every
        keep = jnp.minimum(self.ema, averaged / (averaged + 9))
        mixture = optax.incremental_update(params, state.ema, 1 - keep)
        ema = jax.tree.map(lambda new, old: jnp.where(step % self.ema_every == 0, new, old), mixture, state.ema)
        return State(params, ema, opt, step, state.key), {"error": error}


def epoch(generator: Generator, state: State, learn: Segments, held_out: Segments) -> tuple[State, Metrics]:
    """Returns the state after an epoch's updates, their mean error, and the EMA's error on held-out data."""
    key, key_updates, key_draw, key_error = jax.random.split(state.key, 4)
    state, metrics = loop.updates(generator, state, learn, key_updates, generator.epochs[1])
    if len(held_out.starts):
        error = generator.error(state.ema, held_out.draw(key_draw, HELD_OUT), key_error)
        metrics = {**metrics, "held_out": error}
    return dataclasses.replace(state, key=key), metrics


def trajectories(
    generator: Generator,
    sampler: Sampler,
    params: PyTree,
    scale: Scale,
    key: jax.Array,
    count: int,
    policy: TrainedAgent | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns observations [count, H, O], actions [count, H, A], rewards and ends [count, H] of generated trajectories.

    A policy guides them, see `jaxrl.ops.diffusion.policy_guide`.
    """
    guide = None
    if policy is not None:
        guide = diffusion.policy_guide(log_density_of(*policy), scale, sampler.normalize_guidance)
    shape = (count, generator.length, len(scale.mean))
    return scale.read(diffusion.sample(generator.denoiser(params), sampler, key, shape, guide))


def log_density_of(agent: Agent, state: PyTree) -> LogDensity:
    """Returns log pi(a | s) [N] of observations [N, O] and actions [N, A].

    Agents with `types.Density` use their own. For other agents it is a Gaussian of standard deviation 1 around the
    first action of the greedy chunk, as in the paper for deterministic actors.
    """
    if isinstance(agent, Density):
        return lambda obs, action: agent.log_density(state, obs, action)

    def near_greedy(obs: jax.Array, action: jax.Array) -> jax.Array:
        mean = agent.act(state, obs, jax.random.key(0), greedy=True)[:, 0]
        return losses.gaussian_log_density(action, mean, jnp.zeros_like(mean))

    return near_greedy


def mean_log_density(policy: TrainedAgent, obs: jax.Array, actions: jax.Array) -> jax.Array:
    """Returns the mean log pi(a | s), []."""
    return log_density_of(*policy)(obs, actions).mean()


jitted_init = jax.jit(Generator.init, static_argnames=("spec",))
jitted_epoch = jax.jit(epoch, donate_argnames=("state",))
jitted_trajectories = jax.jit(trajectories, static_argnames=("count",))
jitted_mean_log_density = jax.jit(mean_log_density)
