"""What turns a critic into better actions: best-of-N, the trust-region step of FMQ, and Q-guided beam search.

A critic is given as `heads(actions) -> [K, ...]` with its observations closed over; actions are flat chunks.
Source: Ziakas, Russo, Bose, "Aligning Flow Map Policies with Optimal Q-Guidance", arXiv 2605.12416.
"""

from collections.abc import Callable
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxrl.flow import AverageVelocity, interpolate
from jaxrl.types import Scalar, pytree

Heads: TypeAlias = Callable[[jax.Array], jax.Array]
GradientOf: TypeAlias = Literal["first", "min", "mean"]

KAPPA = 1e-8  # keeps a vanishing critic gradient a vanishing step (Algorithm 1, line 7)


def best_of(candidates: Float[Array, "b n d"], scores: Float[Array, "b n"]) -> Float[Array, "b d"]:
    """Returns the best-scored of each row's N candidates."""
    best = jnp.argmax(scores, axis=-1)
    return jnp.take_along_axis(candidates, best[:, None, None], axis=1)[:, 0]


def ascent_direction(heads: Heads, actions: Float[Array, "*n d"], of: GradientOf = "first") -> Float[Array, "*n d"]:
    """Returns grad_a Q / (||grad_a Q|| + kappa), the norm over the whole flat chunk; 0 where Q is flat."""
    pick = {"first": lambda q: q[0], "min": lambda q: q.min(axis=0), "mean": lambda q: q.mean(axis=0)}[of]
    gradient = jax.grad(lambda a: pick(heads(a)).sum())(actions)
    return gradient / (jnp.linalg.norm(gradient, axis=-1, keepdims=True) + KAPPA)


def adaptive_radius(eta: Scalar, beta: Scalar, heads: Float[Array, "k b"]) -> Float[Array, " b"]:
    """Returns eta / (1 + beta d), d the disagreement of the heads relative to its batch mean (Eq. 13).

    The heads' standard deviation stands in for |Q_1 - Q_2| / sqrt(2): a constant factor cancels.
    """
    disagreement = heads.std(axis=0)
    return eta / (1 + beta * disagreement / (disagreement.mean() + KAPPA))


def trust_region_target(
    anchor: Float[Array, "b d"], direction: Float[Array, "b d"], radius: Float[Array, " b"]
) -> Float[Array, "b d"]:
    """Returns u_off + eta_eff grad Q / ||grad Q||, the best velocity within `radius` of the anchor (Theorem 3.2)."""
    return jax.lax.stop_gradient(anchor + radius[:, None] * direction)


@pytree
class BeamSearch:
    """Q-guided beam search (QGBS, Algorithm 2), a test-time search that needs no training.

    Each round renoises every beam `branches` times to t' = snr / (1 + snr) (Eq. 14), completes the branches to time 1,
    keeps the best by the minimum over heads, and moves those by `eta` along the normalised gradient. Without rounds
    the beams are moved once. Costs width (1 + rounds * branches) actor calls, the initial beams' own included.
    """

    width: int = 4  # M: beams kept
    rounds: int = 1  # K
    branches: int = 4  # B: renoised copies per beam
    eta: Scalar = 0.3  # length of the step along the critic's gradient
    snr: Scalar = 1.5  # rho
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
        """Returns the actions thrown back to time t', each with noise of its own, completed to time 1 and clipped."""
        time = jnp.broadcast_to(jnp.asarray(self.snr / (1 + self.snr), actions.dtype), (*actions.shape[:-1], 1))
        noisy = interpolate(jax.random.normal(key, actions.shape), actions, time)
        end = jnp.ones_like(time) if self.completion == "jump" else time
        return jnp.clip(noisy + (1 - time) * u(noisy, time, end), -1, 1)
