"""Replays `dqc_*`: decoupled Q-chunking, with and without the chunk critic."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxrl.agents.common import flat_actions

from jaxrl.agents import DQC
from jaxrl.networks import apply, repeat_for
from jaxrl.ops import flow, losses
from jaxrl.types import Batch
from tests.golden.recorded import Recorded


def replay(r: Recorded) -> dict[str, Any]:
    """Returns all that the file expects."""
    h = r.hparams
    agent = DQC(
        chunk=h["policy_chunk_size"],
        backup=h["backup_horizon"],
        chunk_critic=h["use_chunk_critic"],
        actor_hidden=r.hidden("actor_bc"),
        critic_hidden=r.hidden("action_critic"),
        activation=r.activation("action_critic"),
        actor_norm=r.norm("actor_bc"),
        critic_norm=r.norm("action_critic"),
        critics=r.critics("action_critic"),
        agg=h["q_agg"],
        lr=h["lr"],
        discount=h["discount"],
        tau=h["tau"],
        kappa_d=h["kappa_d"],
        distill=h["distill_method"],
        kappa_b=h["kappa_b"],
        implicit_backup=h["implicit_backup_type"],
        flow_steps=h["flow_steps"],
        num_samples=h["best_of_n"],
        valid_index="flat",
        **r.time("actor_bc"),
    )
    nets = {"actor": "actor_bc", "critic": "action_critic", "value": "value"}
    nets |= {"chunk_critic": "chunk_critic"} if agent.chunk_critic else {}
    state = r.state(agent, r.spec(r["batch/high_value_goals"].shape[1]), nets, "critic", "target_action_critic")
    batch = windows(r)

    def terms(total, metrics):
        parts = {
            "action_critic": metrics["critic/loss"],
            "value": metrics["value/loss"],
            "bc_flow": metrics["actor/flow_loss"],
        }
        if agent.chunk_critic:
            parts["chunk_critic"] = metrics["chunk_critic/loss"]
        return parts | {"total": total}

    got = r.updates(agent, state, batch, nets, terms, "target_action_critic")
    values = jax.jit(functools.partial(intermediate, agent))(state, batch, r.named("draws/step0/"))
    got |= {f"expected/step0/values/{name}": value for name, value in values.items()}

    obs = jnp.concatenate([r["sample/observations"], r["sample/goals"]], axis=-1)
    noise = jnp.asarray(r["draws/sample/noise"]).swapaxes(0, 1)  # the file's candidates come first
    candidates, scores = jax.jit(functools.partial(proposed, agent))(state, obs, noise)
    return got | {
        "expected/sample/candidates": candidates.swapaxes(0, 1),
        "expected/sample/scores": scores.swapaxes(0, 1),
        "expected/sample/index": scores.argmax(axis=1),
        "expected/sample/actions": jax.jit(agent.choose)(state, obs, noise),
    }


def proposed(agent: DQC, state, obs, noise) -> tuple[jax.Array, jax.Array]:
    """Returns the candidates [S, N, D] and their scores [S, N]."""
    candidates = agent.proposals(state, repeat_for(noise, obs), noise)
    return candidates, agent.scores(state, repeat_for(noise, obs), candidates)


def windows(r: Recorded) -> Batch:
    """Returns the batch: observations and goals together, and the success as a reward of the step where it came."""
    batch = r.named("batch/high_value_")
    goals, valid = batch["goals"], jnp.asarray(r["batch/valids"])
    count, length = valid.shape
    return Batch(
        obs=jnp.concatenate([r["batch/observations"], goals], axis=-1),
        actions=batch["action_chunks"].reshape(count, length, -1),
        rewards=jnp.zeros((count, length)).at[:, 0].set(batch["rewards"]),  # discounted already
        valid=valid,
        terminated=batch["masks"] == 0,
        next_obs=jnp.concatenate([batch["next_observations"], goals], axis=-1),
        steps=batch["backup_horizon"],
    )


def intermediate(agent: DQC, state, batch: Batch, draws) -> dict[str, Any]:
    """Returns the intermediate quantities of the first update."""
    params = state.params
    short = flat_actions(batch, agent.chunk)
    x_t = flow.interpolate(draws["x0"], short, draws["t"])
    q, v = apply(agent.critic(), params["critic"], batch.obs, short), apply(agent.value(), params["value"], batch.obs)
    distilled, backed_up = agent.distillation_target(state, batch), agent.backup_target(state, batch)
    values = {
        "next_v": losses.value_of(apply(agent.value(), params["value"], batch.next_obs), agent.head),
        "nstep_target": agent.td_target(state, batch),
        "distill_target": distilled if agent.chunk_critic else distilled[0],
        "action_critic_logit": q,
        "distill_weight": losses.tilt_weight(q, distilled, agent.kappa_d, agent.head),
        "target_action_q": backed_up,
        "value_logit": v,
        "backup_weight": losses.tilt_weight(v, backed_up, agent.kappa_b, agent.head),
        "valid_weight": agent.short_weight(batch),
        "bc_x_t": x_t,
        "bc_velocity_pred": agent.velocity(state.spec, params["actor"], batch.obs)(x_t, draws["t"], draws["t"]),
    }
    if agent.chunk_critic:
        values["chunk_critic_logit"] = apply(agent.critic(), params["chunk_critic"], batch.obs, flat_actions(batch))
    return values
