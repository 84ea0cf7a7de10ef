"""Replays `bc_*`: behaviour cloning of QGF's repository."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl.agents import BC
from jaxrl.agents.bc import BCState
from jaxrl.ops import flow
from jaxrl.types import Batch
from tests.golden.recorded import Recorded, distance, norm

NET = "policy"


def replay(r: Recorded) -> dict[str, Any]:
    """Returns all that the file expects."""
    agent = BC(
        chunk=r["batch/actions"].shape[1],
        hidden=r.hidden(NET),
        norm=r.norm(NET),
        activation=r.activation(NET),
        flow_steps=r.hparams["denoise_steps"],
        lr=r.hparams["bc_lr"],
        **r.time(NET),
    )
    shapes = jax.eval_shape(lambda: agent.init(jax.random.key(0), r.spec()))
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    state = dataclasses.replace(state, params=r.params(NET, shapes.params))
    batch = windows(r)
    got = updates(r, agent, state, batch)
    draws = drawn(r, 0)
    x_t = flow.interpolate(draws["x0"], batch.actions.reshape(len(batch.obs), -1), draws["t"])
    got["expected/step0/values/bc_x_t"] = x_t
    got["expected/step0/values/bc_velocity_pred"] = agent.velocity(state.params, batch.obs)(x_t, draws["t"], draws["t"])
    got["expected/sample/actions"] = jax.jit(agent.choose)(state, r["sample/observations"], r["draws/sample/noise"])
    return got


def windows(r: Recorded) -> Batch:
    """Returns the batch; the method reads observations and actions only."""
    obs, actions = jnp.asarray(r["batch/observations"]), jnp.asarray(r["batch/actions"])
    count, length, _ = actions.shape
    nothing = jnp.zeros((count, length))
    return Batch(obs, actions, nothing, nothing + 1, jnp.zeros(count, bool), obs, jnp.full(count, length))


def drawn(r: Recorded, k: int) -> dict[str, jax.Array]:
    """Returns the random numbers of update k; the file's times are [B]."""
    draws = r.named(f"draws/step{k}/")
    return {"x0": draws["x0"], "t": draws["t"][:, None]}


def updates(r: Recorded, agent: BC, state: BCState, batch: Batch) -> dict[str, Any]:
    """Returns losses, gradients, and norms of parameters and their changes."""
    got: dict[str, Any] = {}
    first, loss, learn = state.params, jax.jit(jax.value_and_grad(agent.loss)), jax.jit(agent.learn)
    for k in range(r.meta["num_update_steps"]):
        draws, step = drawn(r, k), f"expected/step{k}"
        got[f"{step}/loss/bc_flow"], gradient = loss(state.params, batch, draws)
        got[f"{step}/grad_norm/{NET}"] = norm(gradient)
        got |= {f"{step}/grads/{NET}/{place}": leaf for place, leaf in r.by_place(NET, gradient).items()}
        before = state.params
        state, _ = learn(state, batch, draws)
        got[f"{step}/after/param_norm/{NET}"] = norm(state.params)
        got[f"{step}/after/update_norm/{NET}"] = distance(state.params, before)
    got[f"expected/final/drift_norm/{NET}"] = distance(state.params, first)
    return got
