"""Correction of any policy's actions towards where the data are dense: an independent design, not a reproduction.

The idea is that of "CDSA: Conservative Denoising Score-based Algorithm for Offline Reinforcement Learning" (Liu, Yang,
Li, arXiv 2406.07541), of which neither code nor details were at hand: networks, noise levels, the correction and its
constants are this project's own, and its numbers say nothing about the paper's.

Denoising score matching learns the gradient field of log p(s, a) on the dataset alone. Its action part moves an action
directly; its state part says where the next state should lie, which an inverse model turns into an action. States are
in units of the data's spread. On poor data a move towards density lowers the return, so nothing is on by default:
compare with the uncorrected policy, on the same seeds. With an agent, its state, its environment and its data's ring:

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

from jaxrl.agents import common
from jaxrl.agents.common import Normalizer
from jaxrl.errors import UserError
from jaxrl.networks import MLP, apply
from jaxrl.ops import losses
from jaxrl.ops.closed_form import Act
from jaxrl.replay.ring import Ring, windows
from jaxrl.types import Batch, Metrics, PyTree, Scalar, Spec, pytree

Score: TypeAlias = Callable[[jax.Array, jax.Array, Scalar], tuple[jax.Array, jax.Array]]
"""The gradient (g_s [B, S], g_a [B, A]) of log p_sigma at (states [B, S], actions [B, A], sigma)."""
Inverse: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
"""The actions [B, A] that change states [B, S] by so much, in units of the states' spread, [B, S]."""

FURTHEST = 3.0  # root mean squares of the data's own changes that the inverse model is asked for at most


@pytree
class Correction:
    """How far actions are moved."""

    action: Scalar  # w_a: of the way to the denoised action
    state: Scalar  # w_s: of the action that moves the next state along the state's gradient
    kappa: Scalar = 0.01  # change of the next state per gradient of the state
    sigma: Scalar = 0.1  # level of the noise at which the gradient is taken
    steps: int = 1  # K: corrections in a row

    def check(self) -> None:
        """Raises UserError where a value is out of range."""
        common.check_range(self, action=(0, None), state=(0, None), kappa=(0, None), sigma=(0, None), steps=(1, None))


def correct(act: Act, score: Score, inverse: Inverse, correction: Correction, spec: Spec) -> Act:
    """Returns the policy whose single actions are moved towards density, and stay in [-1, 1]; without strengths, `act`.

    Raises UserError for a policy of chunks, whose later actions meet states that are not known yet.
    """
    correction.check()

    def corrected(obs: jax.Array, key: jax.Array) -> jax.Array:
        chunk = act(obs, key)
        if chunk.shape[1] != 1:
            raise UserError(f"CDSA corrects single actions, the policy has chunks of {chunk.shape[1]}: train chunk = 1")
        return moved(common.without_goal(obs, spec), chunk[:, 0], score, inverse, correction)[:, None]

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
    """Returns (E[x_0 | x] - x) / sigma^2 [B, D], the exact gradient for points x [B, D] near the data [N, D].

    Every point is compared with all of the data: a reference for tests and small sets.
    """
    apart = data[None] - x[:, None]
    weight = jax.nn.softmax(-jnp.square(apart).sum(axis=-1) / (2 * jnp.square(sigma)), axis=-1)
    return (weight[..., None] * apart).sum(axis=1) / jnp.square(sigma)


# The models


@pytree
class Training:
    """How the models learn."""

    score_hidden: tuple[int, ...] = (256, 256, 256)  # widths of the score's network
    inverse_hidden: tuple[int, ...] = (256, 256)  # widths of the inverse model
    batch_size: int = 256  # transitions per update
    lr: Scalar = 3e-4  # learning rate of Adam
    sigma_low: Scalar = 0.01  # the least noise, log-uniform
    sigma_high: Scalar = 1.0  # the most

    def check(self) -> None:
        """Raises UserError where a value is out of range."""
        common.check_range(self, score_hidden=(1, None), inverse_hidden=(1, None), batch_size=(1, None), lr=(0, None))
        common.check_range(self, sigma_low=(1e-6, None), sigma_high=(self.sigma_low, None))


@pytree
class Models:
    """What was learned from a dataset, for any policy."""

    spec: Spec
    score_hidden: tuple[int, ...]
    inverse_hidden: tuple[int, ...]
    params: dict[str, PyTree]
    normalizer: Normalizer  # of states
    change: jax.Array  # [S], root mean square of the data's s' - s in units of the states' spread

    def score(self, states: jax.Array, actions: jax.Array, sigma: Scalar) -> tuple[jax.Array, jax.Array]:
        """Returns (g_s, g_a) at raw states, the former in units of the states' spread."""
        x = jnp.concatenate([self.normalizer(states), actions], axis=-1)
        level = jnp.broadcast_to(jnp.asarray(sigma, x.dtype), (len(x), 1))
        gradient = -denoised_noise(self.score_hidden, self.params["score"], x, level) / level
        return gradient[:, : states.shape[-1]], gradient[:, states.shape[-1] :]

    def inverse(self, states: jax.Array, change: jax.Array) -> jax.Array:
        """Returns the actions that change raw states so, given in units of their spread, as far as the data show."""
        change = jnp.clip(change / self.change[None], -FURTHEST, FURTHEST)
        return action_between(self.inverse_hidden, self.spec, self.params["inverse"], self.normalizer(states), change)


def denoised_noise(hidden: tuple[int, ...], params: PyTree, x: jax.Array, sigma: jax.Array) -> jax.Array:
    """Returns the noise [B, D] in x [B, D] at levels [B, 1], in standard deviations: -sigma times the score."""
    return apply(MLP((*hidden, x.shape[-1]), "none", "mish"), params, jnp.concatenate([x, jnp.log(sigma)], axis=-1))


def action_between(
    hidden: tuple[int, ...], spec: Spec, params: PyTree, states: jax.Array, change: jax.Array
) -> jax.Array:
    """Returns the inverse model's actions [B, A] for normalised states and changes."""
    network = MLP((*hidden, spec.action), "none", "relu")
    return jnp.tanh(apply(network, params, jnp.concatenate([states, change], axis=-1)))


def train(training: Training, spec: Spec, data: Ring, key: jax.Array, updates: int) -> tuple[Models, Metrics]:
    """Returns the models after so many updates on a dataset, and both losses of each update; pure, one scan."""
    key_init, key_updates = jax.random.split(key)
    models = begin(training, spec, data, key_init)
    optimizer = optax.adam(training.lr)

    def update(carry: tuple[PyTree, PyTree], key: jax.Array) -> tuple[tuple[PyTree, PyTree], Metrics]:
        params, opt = carry
        key_batch, key_loss = jax.random.split(key)
        batch = windows((data,), key_batch, training.batch_size, 1)
        gradient, metrics = jax.grad(loss, has_aux=True)(params, training, models, batch, key_loss)
        change, opt = optimizer.update(gradient, opt)
        return (optax.apply_updates(params, change), opt), metrics

    carry = (models.params, optimizer.init(models.params))
    (params, _), metrics = jax.lax.scan(update, carry, jax.random.split(key_updates, updates))
    return dataclasses.replace(models, params=params), metrics


def begin(training: Training, spec: Spec, data: Ring, key: jax.Array) -> Models:
    """Returns the models before the first update, which know the spread of the data's states and of their changes."""
    key_score, key_inverse = jax.random.split(key)
    size = spec.observation - spec.goal
    whole = common.fit(common.start_each(Spec(size, spec.action), {}, {}), (data,)).normalizer
    assert whole is not None
    counts = data.valid[..., None]
    changes = (jnp.roll(data.obs, -1, axis=1) - data.obs) * counts / whole.std.reshape(1, 1, -1)
    change = jnp.sqrt(jnp.square(changes).sum(axis=(0, 1)) / jnp.maximum(data.valid.sum(), 1))
    params = {
        "score": MLP((*training.score_hidden, size + spec.action), "none", "mish").init(
            key_score, jnp.zeros(size + spec.action + 1)
        ),
        "inverse": MLP((*training.inverse_hidden, spec.action), "none", "relu").init(key_inverse, jnp.zeros(2 * size)),
    }
    change = jnp.where(change > 0, change, 1.0)
    return Models(spec, training.score_hidden, training.inverse_hidden, params, whole, change)


def loss(
    params: dict[str, PyTree], training: Training, models: Models, batch: Batch, key: jax.Array
) -> tuple[jax.Array, Metrics]:
    """Returns the sum of the losses of score and inverse model, and each."""
    key_sigma, key_noise = jax.random.split(key)
    states, after = (models.normalizer(common.without_goal(obs, models.spec)) for obs in (batch.obs, batch.next_obs))
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
