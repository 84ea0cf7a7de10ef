"""Small pieces that several agents share: a state and its gradient steps, a normaliser, views of a batch, checks."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl.errors import UserError
from jaxrl.ops import losses
from jaxrl.replay.ring import Rings
from jaxrl.types import Batch, Metrics, PyTree, Scalar, Spec, pytree

CutWindows: TypeAlias = Literal["keep", "drop"]
"""Whether windows that an episode's end cuts short train the critic."""
Draws: TypeAlias = dict[str, jax.Array]
"""The random numbers of one update, by name. Who has them can repeat the update exactly."""


@pytree
class Normalizer:
    """What observations are measured in."""

    mean: jax.Array  # [O]
    std: jax.Array  # [O]

    def __call__(self, obs: jax.Array) -> jax.Array:
        """Returns observations [..., O] less their mean, in standard deviations."""
        lead = (1,) * (obs.ndim - 1)
        return (obs - self.mean.reshape(*lead, -1)) / self.std.reshape(*lead, -1)


@pytree
class State:
    """What an update of an actor-critic changes."""

    spec: Spec
    params: dict[str, PyTree]  # by network
    target: PyTree  # the slow copy of the critic, or slow copies by network
    opt: PyTree  # of one optimiser for all networks, or of each network's by its name
    step: jax.Array  # [] int32
    normalizer: Normalizer | None = None
    online: bool = False  # of agents that learn differently there


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


# One gradient step per network, in turn


def start_each(
    spec: Spec, params: dict[str, PyTree], optimizers: Mapping[str, optax.GradientTransformation], *slow: str
) -> State:
    """Returns the state before the first update of networks with an optimiser each; the networks `slow` have a target.

    Observations stand as they are, until `fit` knows the data.
    """
    target = {name: jax.tree.map(jnp.copy, params[name]) for name in slow}
    opt = {name: optimizer.init(params[name]) for name, optimizer in optimizers.items()}
    as_it_is = Normalizer(jnp.zeros(spec.observation), jnp.ones(spec.observation))
    return State(spec, params, target, opt, jnp.zeros((), jnp.int32), as_it_is)


def step(
    state: State,
    name: str,
    loss: Callable[[PyTree], tuple[jax.Array, Metrics]],
    optimizer: optax.GradientTransformation,
) -> tuple[State, Metrics]:
    """Returns the state after one gradient step of one network on a loss of its parameters."""
    gradient, metrics = jax.grad(loss, has_aux=True)(state.params[name])
    updates, opt = optimizer.update(gradient, state.opt[name], state.params[name])
    params = state.params | {name: optax.apply_updates(state.params[name], updates)}
    return dataclasses.replace(state, params=params, opt=state.opt | {name: opt}), metrics


def counted(state: State) -> State:
    """Returns the state with one more update counted."""
    return dataclasses.replace(state, step=state.step + 1)


def follow(state: State, tau: Scalar, *slow: str) -> State:
    """Returns the state after one Polyak step of the targets of some networks, towards what these are now."""
    target = {name: losses.polyak(state.params[name], state.target[name], tau) for name in slow}
    return dataclasses.replace(state, target=state.target | target)


def every(period: int, state: State, change: Callable[[State], tuple[State, Metrics]]) -> tuple[State, Metrics]:
    """Returns the state after a change that only every `period`-th update makes; NaN as the metrics of the others."""
    if period == 1:
        return change(state)
    _, shapes = jax.eval_shape(change, state)
    nothing = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), shapes)
    return jax.lax.cond((state.step + 1) % period == 0, change, lambda state: (state, nothing), state)


# Observations in units of the data's spread


def fit(state: State, data: Rings, epsilon: float = 1e-3) -> State:
    """Returns the state with the normaliser that a dataset asks for: mean, and standard deviation plus epsilon.

    Rows from which no transition leaves do not count. A column that never changes is left in its own units: divided
    by epsilon, the least deviation from it would drown all others. What is read are the offline data, `data[0]`; in
    tasks with goals the goal's part is measured as a goal of any row.
    """
    ring = data[0]
    obs = ring.obs
    if obs.shape[-1] < state.spec.observation:
        goals = obs[0] if ring.hindsight is None or ring.hindsight.goals is None else ring.hindsight.goals
        obs = jnp.concatenate([obs, goals[None]], axis=-1)
    counts = ring.valid[..., None]
    rows = jnp.maximum(ring.valid.sum(), 1)
    mean = jnp.sum(obs * counts, axis=(0, 1)) / rows
    spread = (obs - mean[None, None]) * counts
    mean = mean + spread.sum(axis=(0, 1)) / rows  # float32 sums of a million rows err: a second pass mends the first
    std = jnp.sqrt(jnp.sum(jnp.square(obs - mean[None, None]) * counts, axis=(0, 1)) / rows)
    constant = std <= 1e-6 * jnp.maximum(1, jnp.abs(mean))
    return dataclasses.replace(state, normalizer=Normalizer(mean, jnp.where(constant, 1.0, std + epsilon)))


def normalized(state: State, batch: Batch) -> Batch:
    """Returns a batch with its observations normalised."""
    assert state.normalizer is not None
    obs, next_obs = state.normalizer(batch.obs), state.normalizer(batch.next_obs)
    return dataclasses.replace(batch, obs=obs, next_obs=next_obs)


# Views of a batch


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


def check_range(agent: Any, **bounds: tuple[Scalar | None, Scalar | None]) -> None:
    """Raises UserError for the first field whose value lies outside its closed [low, high]; None leaves a side open."""
    for name, (low, high) in bounds.items():
        values = np.asarray(getattr(agent, name))
        if (low is not None and not (values >= low).all()) or (high is not None and not (values <= high).all()):
            allowed = f"at least {low}" if high is None else f"at most {high}" if low is None else f"in [{low}, {high}]"
            raise UserError(f"{type(agent).__name__}.{name} = {getattr(agent, name)}: must be {allowed}")
