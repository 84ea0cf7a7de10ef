"""Critic-based improvement of actions: best-of-N, Q-guided flow, the trust-region step, Q-guided beam search.

A critic is given as `heads(actions) -> [K, ...]` with its observations closed over; actions are flat chunks.
Source, unless another is named: Ziakas, Russo, Bose, "Aligning Flow Map Policies with Optimal Q-Guidance", arXiv
2605.12416.
"""

from collections.abc import Callable
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxrl.ops.flow import AverageVelocity, euler, euler_from, interpolate
from jaxrl.ranges import Count, Natural, NonNegative
from jaxrl.types import Scalar, pytree

Heads: TypeAlias = Callable[[jax.Array], jax.Array]
Value: TypeAlias = Callable[[jax.Array], jax.Array]
"""One value [...] per flat action [..., D], its observations closed over."""
GradientOf: TypeAlias = Literal["first", "min", "mean"]

KAPPA = 1e-8  # makes the step vanish with the critic's gradient (Algorithm 1, line 7)


def best_of(candidates: Float[Array, "b n d"], scores: Float[Array, "b n"]) -> Float[Array, "b d"]:
    """Returns the candidate with the highest score in each row of N candidates."""
    best = jnp.argmax(scores, axis=-1)
    return jnp.take_along_axis(candidates, best[:, None, None], axis=1)[:, 0]


def ascent_direction(heads: Heads, actions: Float[Array, "*n d"], of: GradientOf = "first") -> Float[Array, "*n d"]:
    """Returns grad_a Q / (||grad_a Q|| + kappa), with the norm over the whole flat chunk; 0 if Q is flat."""
    pick = {"first": lambda q: q[0], "min": lambda q: q.min(axis=0), "mean": lambda q: q.mean(axis=0)}[of]
    gradient = jax.grad(lambda a: pick(heads(a)).sum())(actions)
    return gradient / (jnp.linalg.norm(gradient, axis=-1, keepdims=True) + KAPPA)


def adaptive_radius(eta: Scalar, beta: Scalar, heads: Float[Array, "k b"]) -> Float[Array, " b"]:
    """Returns eta / (1 + beta d), d the disagreement of the heads relative to its batch mean (Eq. 13).

    The heads' standard deviation replaces |Q_1 - Q_2| / sqrt(2): a constant factor cancels.
    """
    disagreement = heads.std(axis=0)
    return eta / (1 + beta * disagreement / (disagreement.mean() + KAPPA))


def trust_region_target(
    anchor: Float[Array, "b d"], direction: Float[Array, "b d"], radius: Float[Array, " b"]
) -> Float[Array, "b d"]:
    """Returns u_off + eta_eff grad Q / ||grad Q||, the best velocity within `radius` of the anchor (Theorem 3.2)."""
    return jax.lax.stop_gradient(anchor + radius[:, None] * direction)


@pytree
class QGuidance:
    """Q-guided flow: every Euler step of a behavior flow adds a critic gradient, x <- x + (v(x, t) + w g) / T.

    Requires no training ("Q-Guided Flow", arXiv 2606.11087, Algorithm 1). Choices of the gradient g:

    one_step  at the one-step denoised action, clip(x + (1 - t) v), which is in-distribution for the critic; without
              its Jacobian in x (QGF)
    jacobian  the same, with its Jacobian, including that of clip (QGF-Jacobian)
    noisy     at x itself, which is out of distribution for the critic (QFQL)
    bptt      through all remaining Euler steps (BPTT)
    after     none during denoising: the final action takes `ascent_steps` clipped steps of `ascent_size` (GradStep)
    """

    weight: NonNegative = 1.0  # w = 1 / beta; the gradient is not normalized
    gradient: Literal["one_step", "jacobian", "noisy", "bptt", "after"] = "one_step"  # where and how it is computed
    ascent_steps: Natural = 3  # of "after"
    ascent_size: NonNegative = 0.01  # of "after"

    def sample(self, v: AverageVelocity, value: Value, noise: Float[Array, "*n d"], steps: int) -> Float[Array, "*n d"]:
        """Returns actions from noise in `steps` Euler steps, clipped. With weight 0 they are the behavior flow's."""
        if self.gradient != "after":
            return jnp.clip(euler(self.guided(v, value, steps), noise, steps), -1, 1)
        action = jnp.clip(euler(v, noise, steps), -1, 1)
        climb = jax.grad(lambda a: value(a).sum())
        for _ in range(self.ascent_steps):
            action = jnp.clip(action + self.ascent_size * climb(action), -1, 1)
        return action

    def guided(self, v: AverageVelocity, value: Value, steps: int) -> AverageVelocity:
        """Returns the velocity v + w g as a function (x, r, t) of flat chunks."""

        def velocity(x: jax.Array, r: jax.Array, t: jax.Array) -> jax.Array:
            speed = v(x, r, t)
            return speed + self.weight * self.ascent(v, value, x, r, speed, steps)

        return velocity

    def ascent(
        self, v: AverageVelocity, value: Value, x: jax.Array, t: jax.Array, speed: jax.Array, steps: int
    ) -> jax.Array:
        """Returns g at points x and times t, where the behavior flow's velocity is `speed`."""
        climb = jax.grad(lambda a: value(a).sum())
        if self.gradient == "noisy":
            return climb(x)
        if self.gradient == "one_step":
            return climb(jnp.clip(x + (1 - t) * speed, -1, 1))
        ahead = 1 if self.gradient == "jacobian" else steps

        def finish(x: jax.Array) -> jax.Array:
            end = x + (1 - t) * v(x, t, t) if ahead == 1 else euler_from(v, x, t, steps)
            return value(jnp.clip(end, -1, 1)).sum()

        return jax.grad(finish)(x)


@pytree
class BeamSearch:
    """Q-guided beam search (QGBS, Algorithm 2), a test-time search that needs no training.

    Each round renoises every beam `branches` times to t' = snr / (1 + snr) (Eq. 14), completes the branches to time 1,
    keeps the best by the minimum over heads, and moves those by `eta` along the normalized gradient. Without rounds
    the beams are moved once. Costs width (1 + rounds * branches) actor calls, including those for the initial beams.
    """

    width: Count = 4  # M: beams kept
    rounds: Natural = 1  # K
    branches: Count = 4  # B: renoised copies per beam
    eta: NonNegative = 0.3  # length of the step along the critic's gradient
    snr: NonNegative = 1.5  # rho
    completion: Literal["jump", "euler"] = "jump"  # X_{t',1} (paper), or one step along the diagonal (official code)
    keep_parents: bool = False  # whether unperturbed beams compete with their branches

    def search(
        self, key: Key[Array, ""], beams: Float[Array, "b m d"], heads: Heads, u: AverageVelocity
    ) -> Float[Array, "b d"]:
        """Returns the best action found from M one-step samples."""
        for key_round in jax.random.split(key, self.rounds):
            pool = self.renoise(key_round, jnp.repeat(beams, self.branches, axis=1), u)
            if self.keep_parents:
                pool = jnp.concatenate([pool, beams], axis=1)
            _, best = jax.lax.top_k(heads(pool).min(axis=0), self.width)
            beams = self.climb(jnp.take_along_axis(pool, best[..., None], axis=1), heads)
        if self.rounds == 0:
            beams = self.climb(beams, heads)
        return best_of(beams, heads(beams).min(axis=0))

    def climb(self, actions: Float[Array, "b m d"], heads: Heads) -> Float[Array, "b m d"]:
        """Returns the actions moved by `eta` along the gradient of the lowest head, clipped."""
        return jnp.clip(actions + self.eta * ascent_direction(heads, actions, "min"), -1, 1)

    def renoise(self, key: Key[Array, ""], actions: Float[Array, "b n d"], u: AverageVelocity) -> Float[Array, "b n d"]:
        """Returns the actions renoised to time t' with independent noise, completed to time 1 and clipped."""
        time = jnp.broadcast_to(jnp.asarray(self.snr / (1 + self.snr), actions.dtype), (*actions.shape[:-1], 1))
        noisy = interpolate(jax.random.normal(key, actions.shape), actions, time)
        end = jnp.ones_like(time) if self.completion == "jump" else time
        return jnp.clip(noisy + (1 - time) * u(noisy, time, end), -1, 1)
