"""What one update learns from: windows or transitions of the data."""

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

from jaxrl.ops import losses
from jaxrl.ranges import Count, Fraction, check_at_least
from jaxrl.replay.hindsight import Goals
from jaxrl.replay.ring import Rings, windows
from jaxrl.types import Batch, Requirements, Scalar, pytree

CutWindows: TypeAlias = Literal["keep", "drop"]
"""Whether windows shortened by an episode's end train the critic."""


@pytree
class Windows:
    """The training data of one update: windows of the data, and their returns."""

    chunk: Count = 1  # H: actions per decision, executed open loop
    backup: Count = 1  # steps of a window and of the return in the TD target, at least `chunk`
    batch: Count = 256  # windows per update
    discount: Fraction = 0.99  # gamma, per environment step
    cut: CutWindows = "keep"  # whether windows shortened by termination train the critic
    goals: Goals = Goals()  # how goals are sampled, if the task has goals

    def check(self) -> None:
        """Raises UserError if the return is shorter than a chunk."""
        check_at_least(self, backup=self.chunk)

    def requires(self, head: losses.Head = "mse") -> Requirements:
        """Returns the requirements on the data for a type of value head."""
        return Requirements(window=self.backup, unit_rewards=head == "bce", batch=self.batch)

    def sample(self, data: Rings, key: jax.Array, share: Scalar | None = None) -> Batch:
        """Returns a batch of windows, uniform over the rows of all rings, or with a fraction `share` from the first."""
        return windows(data, key, self.batch, self.backup, self.goals, share)

    def actions(self, batch: Batch) -> jax.Array:
        """Returns the first `chunk` actions of each window as flat chunks [B, H * A]."""
        return batch.actions[:, : self.chunk].reshape(len(batch.actions), -1)

    def mask(self, batch: Batch) -> jax.Array:
        """Returns 1 for the entries of `actions(batch)` that were executed and 0 for the others, [B, H * A]."""
        return jnp.repeat(batch.valid[:, : self.chunk], batch.actions.shape[-1], axis=-1)

    def weight(self, batch: Batch) -> jax.Array:
        """Returns the weight [B] of each window in the critic's loss.

        "keep": 1 if all `chunk` actions of the critic's input were executed, or the task ended within them. "drop": 1
        if the whole window was executed, as in the official code of QC and related methods.
        """
        if self.cut == "drop":
            return batch.valid[:, -1]
        return jnp.maximum(batch.valid[:, self.chunk - 1], batch.terminated)

    def target(self, batch: Batch, next_value: jax.Array) -> jax.Array:
        """Returns the TD target [B]: the discounted return of each window plus the discounted value [B] after it."""
        return losses.td_target(batch.rewards, batch.steps, batch.terminated, next_value, self.discount)


@pytree
class Transitions:
    """The training data of one update of a one-step method: transitions of the data."""

    batch: Count = 256  # transitions per update
    discount: Fraction = 0.99  # gamma, per environment step
    goals: Goals = Goals()  # how goals are sampled, if the task has goals

    def requires(self, head: losses.Head = "mse") -> Requirements:
        """Returns the requirements on the data for a type of value head."""
        return Requirements(unit_rewards=head == "bce", batch=self.batch)

    def sample(self, data: Rings, key: jax.Array, share: Scalar | None = None) -> Batch:
        """Returns a batch of transitions, uniform over all rings, or with a fraction `share` from the first."""
        return windows(data, key, self.batch, 1, self.goals, share)

    def target(self, batch: Batch, next_value: jax.Array) -> jax.Array:
        """Returns the TD target [B]: the reward plus the discounted value [B] after it."""
        return losses.td_target(batch.rewards, batch.steps, batch.terminated, next_value, self.discount)
