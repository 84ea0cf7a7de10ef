"""Replays `bc_*`: behaviour cloning of QGF's repository."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxrl.agents import BC
from jaxrl.agents.parts import Adam, FlowPolicy, Windows
from jaxrl.ops import flow
from jaxrl.types import Batch
from tests.golden.recorded import Recorded

NETS = {"flow": "policy"}


def replay(r: Recorded) -> dict[str, Any]:
    """Returns all that the file expects."""
    agent = BC(
        Windows(r["batch/actions"].shape[1], r["batch/actions"].shape[1]),
        flow=FlowPolicy(r.net("policy"), steps=r.hparams["denoise_steps"], **r.time("policy")),
        adam=Adam(r.hparams["bc_lr"]),
    )
    state, batch = r.state(agent, r.spec(), NETS), windows(r)
    got = r.updates(agent, state, batch, NETS, lambda _, metrics: {"bc_flow": metrics["actor/flow_loss"]}, draws=drawn)
    draws = drawn(r.named("draws/step0/"))
    x_t = flow.interpolate(draws["x0"], batch.actions.reshape(len(batch.obs), -1), draws["t"])
    velocity = agent.flow.velocity(state.params["flow"], batch.obs)
    got["expected/step0/values/bc_x_t"] = x_t
    got["expected/step0/values/bc_velocity_pred"] = velocity(x_t, draws["t"], draws["t"])
    got["expected/sample/actions"] = jax.jit(agent.choose)(state, r["sample/observations"], r["draws/sample/noise"])
    return got


def windows(r: Recorded) -> Batch:
    """Returns the batch; the method reads observations and actions only."""
    obs, actions = jnp.asarray(r["batch/observations"]), jnp.asarray(r["batch/actions"])
    count, length, _ = actions.shape
    nothing = jnp.zeros((count, length))
    return Batch(obs, actions, nothing, nothing + 1, jnp.zeros(count, bool), obs, jnp.full(count, length))


def drawn(draws: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the random numbers of an update; the file's times are [B]."""
    return {"x0": draws["x0"], "t": draws["t"][:, None]}
