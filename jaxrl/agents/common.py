"""Small pieces that several agents share: views of a batch, one joint gradient step, the check of a field's range."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl import losses
from jaxrl.errors import UserError
from jaxrl.types import Batch, Metrics, PyTree, Scalar, Spec, pytree

CutWindows: TypeAlias = Literal["keep", "drop"]
"""Whether windows that an episode's end cuts short train the critic."""
Draws: TypeAlias = dict[str, jax.Array]
"""The random numbers of one update, by name. Who has them can repeat the update exactly."""


@pytree
class State:
    """What an update of an actor-critic changes."""

    spec: Spec
    params: dict[str, PyTree]  # by network
    target: PyTree  # the slow copy of the critic
    opt: PyTree
    step: jax.Array  # [] int32


def start(
    spec: Spec, params: dict[str, PyTree], optimizer: optax.GradientTransformation, slow: str = "critic"
) -> State:
    """Returns the state before the first update; the target begins as a copy of the network `slow`."""
    target = jax.tree.map(jnp.copy, params[slow])
    return State(spec, params, target, optimizer.init(params), jnp.zeros((), jnp.int32))


def descend(
    state: State,
    loss: Callable[[dict[str, PyTree]], tuple[jax.Array, Metrics]],
    optimizer: optax.GradientTransformation,
    tau: Scalar,
    slow: str = "critic",
) -> tuple[State, Metrics]:
    """Returns the state after one gradient step on a joint loss, then one Polyak step of the network `slow`.

    The target moves towards the parameters from before the step, as in the official code of FQL, QC, DQC and QGF.
    """
    gradient, metrics = jax.grad(loss, has_aux=True)(state.params)
    updates, opt = optimizer.update(gradient, state.opt, state.params)
    params = optax.apply_updates(state.params, updates)
    target = losses.polyak(state.params[slow], state.target, tau)
    return dataclasses.replace(state, params=params, target=target, opt=opt, step=state.step + 1), metrics


def flat_actions(batch: Batch, chunk: int | None = None) -> jax.Array:
    """Returns the windows' first `chunk` actions, by default all H, as flat chunks [B, chunk * A]."""
    return batch.actions[:, :chunk].reshape(len(batch.actions), -1)


def step_mask(batch: Batch, chunk: int | None = None) -> jax.Array:
    """Returns the validity of every entry of `flat_actions(batch, chunk)`, [B, chunk * A]."""
    return jnp.repeat(batch.valid[:, :chunk], batch.actions.shape[-1], axis=-1)


def critic_weight(batch: Batch, chunk: int, cut_windows: CutWindows) -> jax.Array:
    """Returns the weight [B] of each window in the critic's loss.

    "keep": 1 where all `chunk` actions that the critic sees happened, or the task ended on the way, after which
    nothing matters. "drop": 1 where the whole window happened, as in the official code of QC and its kin.
    """
    if cut_windows == "drop":
        return batch.valid[:, -1]
    return jnp.maximum(batch.valid[:, chunk - 1], batch.terminated)


def without_goal(obs: jax.Array, spec: Spec) -> jax.Array:
    """Returns what of observations [..., O] is not the goal, [..., O - G]: all that a behaviour may depend on."""
    return obs[..., : spec.observation - spec.goal]


def unflatten(chunk: jax.Array, action: int) -> jax.Array:
    """Returns flat chunks [B, H * A] as [B, H, A]."""
    return chunk.reshape(len(chunk), -1, action)


def check_goals(agent: Any) -> None:
    """Raises UserError where the law of the goals is out of range, or its rewards do not fit the values' head."""
    agent.goals.check()
    if agent.head == "bce" and agent.goals.negative:
        raise UserError(
            f"{type(agent).__name__}.goals.negative = True: values are probabilities, rewards must be 0 and 1"
        )


def check_range(agent: Any, **bounds: tuple[float | None, float | None]) -> None:
    """Raises UserError for the first field whose value lies outside its closed [low, high]; None leaves a side open."""
    for name, (low, high) in bounds.items():
        values = np.asarray(getattr(agent, name))
        if (low is not None and not (values >= low).all()) or (high is not None and not (values <= high).all()):
            allowed = f"at least {low}" if high is None else f"at most {high}" if low is None else f"in [{low}, {high}]"
            raise UserError(f"{type(agent).__name__}.{name} = {getattr(agent, name)}: must be {allowed}")
