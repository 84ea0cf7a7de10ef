"""Correction of any policy's actions toward high data density: an independent design, not a reproduction.

The idea is that of "CDSA: Conservative Denoising Score-based Algorithm for Offline Reinforcement Learning" (Liu, Yang,
Li, arXiv 2406.07541), of which neither code nor details were available: networks, noise levels, the correction and its
constants are this project's own, so results do not carry over to the paper.

Denoising score matching learns the gradient of log p(s, a) from the dataset only. Its action part moves an action
directly; its state part is a change of the next state, which an inverse model converts to an action. States are in
units of the data's standard deviation. On poor data, moving toward density lowers the return, so strengths have no
defaults: compare with the uncorrected policy on the same seeds. With an agent, its state, its environment and its
data's ring:

    from jaxrl.synthesis import cdsa

    learn = jax.jit(cdsa.train, static_argnames=("spec", "updates"))
    models, losses = learn(cdsa.Training(), env.spec, ring, jax.random.key(0), updates=100_000)
    act = lambda obs, key: agent.act(state, obs, key, greedy=True)
    nearer = cdsa.correct(act, models.score, models.inverse, cdsa.Correction(action=0.3, state=0.1), env.spec)
    before, after = (rollout.evaluate(env, rollout.from_function(f), jax.random.key(1), 100) for f in (act, nearer))
"""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxrl import ranges
from jaxrl.errors import UserError
from jaxrl.networks import MLP, apply
from jaxrl.ops import losses, normalizer
from jaxrl.ops.closed_form import Act
from jaxrl.ops.normalizer import Normalizer
from jaxrl.ranges import Count, NonNegative, Positive, Widths, check_at_least
from jaxrl.replay.ring import Ring, Rings, windows
from jaxrl.training import loop
from jaxrl.types import Batch, Metrics, PyTree, Scalar, Spec, pytree

Score: TypeAlias = Callable[[jax.Array, jax.Array, Scalar], tuple[jax.Array, jax.Array]]
"""The gradient (g_s [B, S], g_a [B, A]) of log p_sigma at (states [B, S], actions [B, A], sigma)."""
Inverse: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
"""The actions [B, A] that change states [B, S] by an amount [B, S], in units of the states' standard deviation."""

LARGEST = 3.0  # largest input change of the inverse model, in root mean squares of the data's changes


@pytree
class Correction:
    """The strength of the correction."""

    action: NonNegative  # w_a: fraction of the way to the denoised action
    state: NonNegative  # w_s: fraction of the action that moves the next state along the state's gradient
    kappa: NonNegative = 0.01  # change of the next state per gradient of the state
    sigma: NonNegative = 0.1  # noise level at which the gradient is taken
    steps: Count = 1  # K: number of corrections


def correct(act: Act, score: Score, inverse: Inverse, correction: Correction, spec: Spec) -> Act:
    """Returns the policy with its actions moved toward data density within [-1, 1]; with strengths of 0, `act`.

    Raises UserError for a policy of chunks, since their later actions are taken in states that are not yet known.
    """
    ranges.check(correction)

    def corrected(obs: jax.Array, key: jax.Array) -> jax.Array:
        chunk = act(obs, key)
        if chunk.shape[1] != 1:
            raise UserError(f"CDSA corrects single actions, the policy has chunks of {chunk.shape[1]}: train chunk = 1")
        return moved(spec.behaviour(obs), chunk[:, 0], score, inverse, correction)[:, None]

    return corrected


def moved(states: jax.Array, actions: jax.Array, score: Score, inverse: Inverse, c: Correction) -> jax.Array:
    """Returns actions after K steps a <- clip(a + w_a sigma^2 g_a + w_s (I(s, kappa g_s) - I(s, 0)))."""
    still = inverse(states, jnp.zeros_like(states))
    moving = actions
    for _ in range(c.steps):
        g_s, g_a = score(states, moving, c.sigma)
        towards = inverse(states, c.kappa * g_s) - still
        moving = jnp.clip(moving + c.action * jnp.square(c.sigma) * g_a + c.state * towards, -1, 1)
    return jnp.where((jnp.asarray(c.action) == 0) & (jnp.asarray(c.state) == 0), actions, moving)


def kernel_score(x: jax.Array, data: jax.Array, sigma: Scalar) -> jax.Array:
    """Returns (E[x_0 | x] - x) / sigma^2 [B, D], the exact gradient at points x [B, D] for noisy data [N, D].

    Compares every point with all data: a reference for tests and small datasets.
    """
    apart = data[None] - x[:, None]
    weight = jax.nn.softmax(-jnp.square(apart).sum(axis=-1) / (2 * jnp.square(sigma)), axis=-1)
    return (weight[..., None] * apart).sum(axis=1) / jnp.square(sigma)


# The models


@pytree
class Models:
    """The models of a dataset, independent of the policy, and their training state."""

    spec: Spec
    score_hidden: tuple[int, ...]
    inverse_hidden: tuple[int, ...]
    params: dict[str, PyTree]
    opt: PyTree
    normalizer: Normalizer  # of states
    change: jax.Array  # [S], root mean square of the data's s' - s in units of the states' standard deviation

    def score(self, states: jax.Array, actions: jax.Array, sigma: Scalar) -> tuple[jax.Array, jax.Array]:
        """Returns (g_s, g_a) at raw states; g_s is in units of the states' standard deviation."""
        x = jnp.concatenate([self.normalizer(states), actions], axis=-1)
        level = jnp.broadcast_to(jnp.asarray(sigma, x.dtype), (len(x), 1))
        gradient = -denoised_noise(self.score_hidden, self.params["score"], x, level) / level
        return gradient[:, : states.shape[-1]], gradient[:, states.shape[-1] :]

    def inverse(self, states: jax.Array, change: jax.Array) -> jax.Array:
        """Returns the actions for a change of raw states, in units of their standard deviation; clips the change."""
        change = jnp.clip(change / self.change[None], -LARGEST, LARGEST)
        return action_between(self.inverse_hidden, self.spec, self.params["inverse"], self.normalizer(states), change)


@pytree
class Training:
    """A learner (`types.Learner`) of score and inverse model."""

    score_hidden: Widths = (256, 256, 256)  # widths of the score's network
    inverse_hidden: Widths = (256, 256)  # widths of the inverse model
    batch_size: Count = 256  # transitions per update
    lr: NonNegative = 3e-4  # learning rate of Adam
    sigma_low: Positive = 0.01  # lowest noise level, log-uniform
    sigma_high: Positive = 1.0  # highest noise level

    def check(self) -> None:
        """Raises UserError if the highest noise level is below the lowest."""
        check_at_least(self, sigma_high=self.sigma_low)

    def init(self, key: jax.Array, spec: Spec) -> Models:
        """Returns the models before the first update, for raw states. Raises UserError for dict observations."""
        if not isinstance(spec.observation, int):
            raise UserError("CDSA corrects policies that observe one vector; these observations are a dict of arrays")
        key_score, key_inverse = jax.random.split(key)
        states = spec.behaviour(spec.example())
        size = len(states)
        score = MLP((*self.score_hidden, size + spec.action), "none", "mish")
        inverse = MLP((*self.inverse_hidden, spec.action), "none", "relu")
        params = {
            "score": score.init(key_score, jnp.zeros(size + spec.action + 1)),
            "inverse": inverse.init(key_inverse, jnp.zeros(2 * size)),
        }
        opt, units = optax.adam(self.lr).init(params), normalizer.identity(states)
        return Models(spec, self.score_hidden, self.inverse_hidden, params, opt, units, jnp.ones(size))

    def fit(self, state: Models, data: Rings) -> Models:
        """Returns the models with the scales of the data's states and of their changes."""
        ring = data[0]
        units = normalizer.of_rows(ring.obs, ring.valid).normalizer()
        changes = (jnp.roll(ring.obs, -1, axis=1) - ring.obs) * ring.valid[..., None] / units.std.reshape(1, 1, -1)
        change = jnp.sqrt(jnp.square(changes).sum(axis=(0, 1)) / jnp.maximum(ring.valid.sum(), 1))
        return dataclasses.replace(state, normalizer=units, change=jnp.where(change > 0, change, 1.0))

    def sample(self, data: Rings, key: jax.Array) -> Batch:
        """Returns a batch of transitions."""
        return windows(data, key, self.batch_size, 1)

    def update(self, state: Models, batch: Batch, key: jax.Array, data: Rings = ()) -> tuple[Models, Metrics]:
        """Returns the models after one gradient step, and both losses."""
        gradient, metrics = jax.grad(loss, has_aux=True)(state.params, self, state, batch, key)
        change, opt = optax.adam(self.lr).update(gradient, state.opt)
        return dataclasses.replace(state, params=optax.apply_updates(state.params, change), opt=opt), metrics


def denoised_noise(hidden: tuple[int, ...], params: PyTree, x: jax.Array, sigma: jax.Array) -> jax.Array:
    """Returns the noise [B, D] in x [B, D] at levels [B, 1], in units of the levels: -sigma times the score."""
    return apply(MLP((*hidden, x.shape[-1]), "none", "mish"), params, jnp.concatenate([x, jnp.log(sigma)], axis=-1))


def action_between(
    hidden: tuple[int, ...], spec: Spec, params: PyTree, states: jax.Array, change: jax.Array
) -> jax.Array:
    """Returns the inverse model's actions [B, A] for normalized states and changes."""
    network = MLP((*hidden, spec.action), "none", "relu")
    return jnp.tanh(apply(network, params, jnp.concatenate([states, change], axis=-1)))


def train(training: Training, spec: Spec, data: Ring, key: jax.Array, updates: int) -> tuple[Models, Metrics]:
    """Returns the models after `updates` updates on a dataset, and the means of both losses; pure, one scan."""
    key_init, key_updates = jax.random.split(key)
    models = training.fit(training.init(key_init, spec), (data,))
    return loop.updates(training, models, (data,), key_updates, updates)


def loss(
    params: dict[str, PyTree], training: Training, models: Models, batch: Batch, key: jax.Array
) -> tuple[jax.Array, Metrics]:
    """Returns the sum of the losses of score and inverse model, and each loss."""
    key_sigma, key_noise = jax.random.split(key)
    states, after = (models.normalizer(models.spec.behaviour(obs)) for obs in (batch.obs, batch.next_obs))
    x = jnp.concatenate([states, batch.actions[:, 0]], axis=-1)
    low, high = jnp.log(training.sigma_low), jnp.log(training.sigma_high)
    sigma = jnp.exp(low + (high - low) * jax.random.uniform(key_sigma, (len(x), 1)))
    noise = jax.random.normal(key_noise, x.shape)
    found = denoised_noise(models.score_hidden, params["score"], x + sigma * noise, sigma)
    matching = losses.masked_mean(jnp.square(found - noise).sum(axis=-1), batch.valid[:, 0])
    action = action_between(
        models.inverse_hidden, models.spec, params["inverse"], states, (after - states) / models.change[None]
    )
    inversion = losses.masked_mean(jnp.square(action - batch.actions[:, 0]).sum(axis=-1), batch.valid[:, 0])
    return matching + inversion, {"score/loss": matching, "inverse/loss": inversion}
