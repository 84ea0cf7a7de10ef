"""An agent of one's own, in a module whose annotations are strings: it learns from data, collects, and distills."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp

from jaxrl.agents.parts import Adam, DeterministicPolicy, Net
from jaxrl.ranges import Count, Positive
from jaxrl.replay.ring import Rings, windows
from jaxrl.types import Batch, Metrics, Observation, Phase, PyTree, Requirements, Spec, pytree

if TYPE_CHECKING:
    from jaxrl.training.schedule import Schedule


@pytree
class OwnState:
    """What an update changes."""

    spec: Spec
    actor: PyTree
    opt: PyTree
    step: jax.Array  # [] int32
    begun: jax.Array  # [] int32, phases that it was told of
    anchor: PyTree | None = None  # the actor as it was when the first phase that collects began


@pytree
class Own:
    """Regression onto the data's actions; only every second update measures its loss."""

    chunk: Count = 1
    batch_size: Count = 8
    rate: Positive = 1e-3  # weight of the anchor
    measured: Literal["all", "half", "none"] = "half"  # which updates measure the loss
    actor: DeterministicPolicy = DeterministicPolicy(Net((8,), "relu", "none", "torch"))
    adam: Adam = Adam()

    def requires(self) -> Requirements:
        return Requirements(window=self.chunk, batch=self.batch_size)

    def phases(self, schedule: Schedule, length: int, reward: tuple[float, float]) -> tuple[Phase, ...]:
        collect = Phase("collect", 2, 3, True, 0, reward, data="none", evaluated=False)
        return (*schedule.offline("pretrain"), collect, Phase("distill", 2, 4, False, 2, data="replay"))

    def enter(self, state: OwnState, phase: Phase) -> OwnState:
        anchor = jax.tree.map(jnp.copy, state.actor) if phase.collects else state.anchor
        return dataclasses.replace(state, anchor=anchor, begun=state.begun + 1)

    def init(self, key: jax.Array, spec: Spec) -> OwnState:
        actor, zero = self.actor.init(key, spec.example(), jnp.zeros(spec.action)), jnp.zeros((), jnp.int32)
        return OwnState(spec, actor, self.adam.transformation().init(actor), zero, zero)

    def sample(self, data: Rings, key: jax.Array) -> Batch:
        return windows(data, key, self.batch_size, self.chunk)

    def update(self, state: OwnState, batch: Batch, key: jax.Array, data: Any = ()) -> tuple[OwnState, Metrics]:
        loss, gradient = jax.value_and_grad(self.loss)(state.actor, state, batch)
        change, opt = self.adam.transformation().update(gradient, state.opt)
        state = dataclasses.replace(
            state, actor=jax.tree.map(jnp.add, state.actor, change), opt=opt, step=state.step + 1
        )
        period = {"all": 1, "half": 2, "none": 2**30}[self.measured]
        return state, {"own/loss": jnp.where(state.step % period == 0, loss, jnp.nan), "own/step": state.step}

    def loss(self, actor: PyTree, state: OwnState, batch: Batch) -> jax.Array:
        action = self.actor.action(actor, batch.obs)
        near = 0.0 if state.anchor is None else jnp.square(action - self.actor.action(state.anchor, batch.obs)).mean()
        return jnp.square(action - batch.actions[:, 0]).mean() + self.rate * near

    def act(self, state: OwnState, obs: Observation, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        return self.actor.action(state.actor, obs)[:, None]
