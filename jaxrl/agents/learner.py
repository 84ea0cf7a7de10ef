"""Shared code of agents' updates: a state and its gradient steps, an observation normalizer, views of a batch."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxrl.ops import losses, normalizer
from jaxrl.ops.normalizer import Normalizer
from jaxrl.replay.hindsight import goals_of, with_goals
from jaxrl.replay.ring import Rings
from jaxrl.types import Batch, Metrics, PyTree, Scalar, Spec, pytree

Draws: TypeAlias = dict[str, jax.Array]
"""The random numbers of one update, by name. They make the update exactly repeatable."""
Loss: TypeAlias = Callable[[PyTree], tuple[jax.Array, Metrics]]
"""A loss of parameters, with metrics."""
Optimizers: TypeAlias = Mapping[str, optax.GradientTransformation]
"""An optimizer per network, by name."""


@pytree
class State:
    """The training state of an actor-critic."""

    spec: Spec
    params: dict[str, PyTree]  # by network
    target: dict[str, PyTree]  # target networks of some of them, by network
    opt: PyTree  # state of one optimizer for all networks, or of one per network by name
    step: jax.Array  # [] int32
    normalizer: Normalizer | None = None
    online: bool = False  # for agents that learn differently online
    anchor: PyTree | None = None  # parameters from before going online, for agents that stay near them


def create(
    spec: Spec,
    params: dict[str, PyTree],
    optimizer: optax.GradientTransformation | Optimizers,
    *slow: str,
    normalized: bool = False,
) -> State:
    """Returns the state before the first update, with one optimizer for all networks or one for each.

    The targets of the networks `slow` start as copies. The normalizer, for agents whose observations are `normalized`,
    is the identity until `fit` is called with the data.
    """
    if isinstance(optimizer, Mapping):
        opt = {name: optimizer[name].init(params[name]) for name in params}
    else:
        opt = optimizer.init(params)
    target = {name: jax.tree.map(jnp.copy, params[name]) for name in slow}
    identity = normalizer.identity(spec.example()) if normalized else None
    return State(spec, params, target, opt, jnp.zeros((), jnp.int32), identity)


# Gradient steps


def descend(
    state: State, loss: Loss, optimizer: optax.GradientTransformation, tau: Scalar, *slow: str
) -> tuple[State, Metrics]:
    """Returns the state after one gradient step of all networks on a joint loss, and one Polyak step of some targets.

    Targets move toward the parameters from before the step, as in the official code of FQL, QC, DQC and QGF.
    """
    gradient, metrics = jax.grad(loss, has_aux=True)(state.params)
    updates, opt = optimizer.update(gradient, state.opt, state.params)
    params = optax.apply_updates(state.params, updates)
    return dataclasses.replace(follow(state, tau, *slow), params=params, opt=opt, step=state.step + 1), metrics


def step(state: State, name: str, loss: Loss, optimizer: optax.GradientTransformation) -> tuple[State, Metrics]:
    """Returns the state after one gradient step of one network on a loss of its parameters."""
    gradient, metrics = jax.grad(loss, has_aux=True)(state.params[name])
    return step_along(state, name, gradient, optimizer), metrics


def step_along(state: State, name: str, gradient: PyTree, optimizer: optax.GradientTransformation) -> State:
    """Returns the state after one step of one network along a gradient."""
    updates, opt = optimizer.update(gradient, state.opt[name], state.params[name])
    params = state.params | {name: optax.apply_updates(state.params[name], updates)}
    return dataclasses.replace(state, params=params, opt=state.opt | {name: opt})


def follow(state: State, tau: Scalar, *slow: str) -> State:
    """Returns the state after one Polyak step of the targets of some networks toward the current parameters."""
    target = {name: losses.polyak(state.params[name], state.target[name], tau) for name in slow}
    return dataclasses.replace(state, target=state.target | target)


def counted(state: State) -> State:
    """Returns the state with its update count incremented."""
    return dataclasses.replace(state, step=state.step + 1)


def every(period: int, state: State, change: Callable[[State], tuple[State, Metrics]]) -> tuple[State, Metrics]:
    """Returns the state after a change applied only in every `period`-th update; other updates have NaN metrics."""
    if period == 1:
        return change(state)
    _, shapes = jax.eval_shape(change, state)
    nothing = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), shapes)
    return jax.lax.cond((state.step + 1) % period == 0, change, lambda state: (state, nothing), state)


# Normalization of observations


def fit(state: State, data: Rings) -> State:
    """Returns the state with the normalizer of the offline data, `data[0]`.

    Rows without a transition do not count; in tasks with goals, the statistics of the goal are over the goals of all
    rows.
    """
    ring = data[0]
    obs = ring.obs
    if ring.hindsight is not None:
        goals = goals_of(jax.tree.map(lambda x: x[0], obs), ring.hindsight)
        obs = with_goals(obs, goals[None])
    return dataclasses.replace(state, normalizer=normalizer.of_rows(obs, ring.valid).normalizer())


def normalized(state: State, batch: Batch) -> Batch:
    """Returns a batch with normalized observations."""
    assert state.normalizer is not None
    obs, next_obs = state.normalizer(batch.obs), state.normalizer(batch.next_obs)
    return dataclasses.replace(batch, obs=obs, next_obs=next_obs)


# Views of a batch


def unflatten(chunk: jax.Array, action: int) -> jax.Array:
    """Returns flat chunks [B, H * A] as [B, H, A]."""
    return chunk.reshape(len(chunk), -1, action)
