"""A diffusion model of a dataset's sub-trajectories: a frozen dataclass of settings, trained and sampled by functions.

Paper: Jackson et al., "Policy-Guided Diffusion", arXiv 2404.06356; the mathematics is in `jaxrl.ops.diffusion`.

Deliberate differences from the official code: batches are drawn with replacement; the average of the parameters grows
slow gradually, so that after a short training it does not remember how they began.
"""

import dataclasses
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxrl.errors import UserError
from jaxrl.networks import TemporalUNet, apply
from jaxrl.ops import diffusion, losses
from jaxrl.ops.diffusion import LogDensity, Sampler, Scale
from jaxrl.synthesis.segments import Segments
from jaxrl.types import Agent, Density, Metrics, PyTree, Scalar, pytree

EPOCH = 500  # updates in one program, after which a request to stop is heard
JUDGED = 256  # held-out sub-trajectories on which the error is estimated after each epoch

GuidingPolicy: TypeAlias = tuple[Agent, PyTree]
"""An agent and its state."""


@pytree
class State:
    """What training changes."""

    params: PyTree
    ema: PyTree  # their slow average, which is sampled from
    opt: PyTree
    step: jax.Array  # [] int32
    key: jax.Array


@pytree
class Generator:
    """A diffusion model of sub-trajectories. The defaults are for CPUs; published: widths 1024 2048 4096."""

    length: int = 32  # H: steps of each trajectory, in training and when it is generated
    stride: int = 8  # steps between the beginnings of the data's sub-trajectories
    widths: tuple[int, ...] = (64, 128)  # channels of the U-Net's levels, each half as long as the one before
    updates: int = 10_000  # gradient steps
    batch_size: int = 32  # sub-trajectories per gradient step
    lr: Scalar = 2e-3  # highest learning rate of Adam, reached after a tenth of the updates
    ema: Scalar = 0.995  # how slow the average of the parameters is
    ema_every: int = 10  # gradient steps between two updates of it

    def check(self) -> None:
        """Raises UserError where a value is out of range."""
        for name, low in (("length", 2), ("stride", 1), ("updates", 1), ("batch_size", 1), ("ema_every", 1)):
            if getattr(self, name) < low:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least {low}")
        if not self.widths or any(width % 8 for width in self.widths) or min(self.widths) < 8 or self.widths[0] < 16:
            raise UserError(f"widths = {self.widths}: must be multiples of 8, the first at least 16")
        if self.length < 2 ** (len(self.widths) - 1):
            raise UserError(
                f"length = {self.length}: must be at least {2 ** (len(self.widths) - 1)}, since each of "
                f"{len(self.widths)} widths but the last halves it"
            )
        if not 0 < self.lr < float("inf"):
            raise UserError(f"lr = {self.lr}: must be above 0 and finite")
        if not 0 <= self.ema < 1:
            raise UserError(f"ema = {self.ema}: must be at least 0 and below 1")

    @property
    def epochs(self) -> tuple[int, int]:
        """(Epochs, updates of each): at least as many updates as were asked for."""
        count = -(-self.updates // EPOCH)
        return count, -(-self.updates // count)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """Adam, warmed up and then decaying to 0."""
        total = self.epochs[0] * self.epochs[1]
        rise = optax.linear_schedule(self.lr / 10, self.lr, total // 10)
        fall = optax.cosine_decay_schedule(self.lr, total - total // 10)
        return optax.adam(optax.join_schedules([rise, fall], [total // 10]))

    def denoiser(self, params: PyTree) -> diffusion.Denoiser:
        """Returns D(x; sigma)."""
        return diffusion.denoiser_of(lambda x, time: apply(TemporalUNet(self.widths), params, x, time))

    def init(self, key: jax.Array, features: int) -> State:
        """Returns the state before training, for so many features per step."""
        key, key_params = jax.random.split(key)
        params = TemporalUNet(self.widths).init(key_params, jnp.zeros((1, self.length, features)), jnp.zeros((1, 1)))
        opt = self.optimizer.init(params)
        return State(params, jax.tree.map(jnp.copy, params), opt, jnp.zeros((), jnp.int32), key)

    def error(self, params: PyTree, tau: jax.Array, key: jax.Array) -> jax.Array:
        """Returns the mean weighted error of denoising trajectories [B, H, F] at random levels."""
        key_level, key_noise = jax.random.split(key)
        sigma, noise = diffusion.training_levels(key_level, len(tau)), jax.random.normal(key_noise, tau.shape)
        return diffusion.denoising_error(self.denoiser(params), tau, sigma, noise).mean()

    def update(self, state: State, tau: jax.Array, key: jax.Array) -> tuple[State, jax.Array]:
        """Returns the state after one gradient step on trajectories [B, H, F], and their error before it."""
        error, gradient = jax.value_and_grad(self.error)(state.params, tau, key)
        updates, opt = self.optimizer.update(gradient, state.opt, state.params)
        params, step = optax.apply_updates(state.params, updates), state.step + 1
        averaged = step // self.ema_every
        keep = jnp.minimum(self.ema, averaged / (averaged + 9))
        mixture = optax.incremental_update(params, state.ema, 1 - keep)
        ema = jax.tree.map(lambda new, old: jnp.where(step % self.ema_every == 0, new, old), mixture, state.ema)
        return State(params, ema, opt, step, state.key), error


def epoch(generator: Generator, state: State, learn: Segments, judge: Segments) -> tuple[State, Metrics]:
    """Returns the state after an epoch's updates, their mean error and that of the average on held-out data."""
    key, key_updates, key_judge, key_noise = jax.random.split(state.key, 4)

    def update(state: State, key: jax.Array) -> tuple[State, jax.Array]:
        key_draw, key_update = jax.random.split(key)
        return generator.update(state, learn.draw(key_draw, generator.batch_size), key_update)

    state, errors = jax.lax.scan(update, state, jax.random.split(key_updates, generator.epochs[1]))
    metrics = {"error": errors.mean()}
    if len(judge.starts):
        metrics["held_out"] = generator.error(state.ema, judge.draw(key_judge, JUDGED), key_noise)
    return dataclasses.replace(state, key=key), metrics


def trajectories(
    generator: Generator,
    sampler: Sampler,
    params: PyTree,
    scale: Scale,
    key: jax.Array,
    count: int,
    policy: GuidingPolicy | None = None,
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

    It is the agent's own if it is a `types.Density`, else that of a Gaussian of standard deviation 1 around the first
    action of its chunk in evaluation, as the paper has it for deterministic actors.
    """
    if isinstance(agent, Density):
        return lambda obs, action: agent.log_density(state, obs, action)

    def near_greedy(obs: jax.Array, action: jax.Array) -> jax.Array:
        mean = agent.act(state, obs, jax.random.key(0), greedy=True)[:, 0]
        return losses.gaussian_log_density(action, mean, jnp.zeros_like(mean))

    return near_greedy


def mean_log_density(policy: GuidingPolicy, obs: jax.Array, actions: jax.Array) -> jax.Array:
    """Returns the mean log pi(a | s), []."""
    return log_density_of(*policy)(obs, actions).mean()


jitted_init = jax.jit(Generator.init, static_argnames=("features",))
jitted_epoch = jax.jit(epoch, donate_argnames=("state",))
jitted_trajectories = jax.jit(trajectories, static_argnames=("count",))
jitted_mean_log_density = jax.jit(mean_log_density)
