"""Replays `dqc_*`: decoupled Q-chunking, with and without the chunk critic."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl.agents import DQC
from jaxrl.agents.parts import Adam, Critic, FlowPolicy, Value, Windows
from jaxrl.networks import repeat_for
from jaxrl.ops import flow, losses
from jaxrl.types import Batch
from tests.golden.recorded import Recorded


def replay(r: Recorded) -> dict[str, Any]:
    """Returns all that the file expects."""
    agent = build(r)
    nets = {"flow": "actor_bc", "critic": "action_critic", "value": "value"}
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


def build(r: Recorded) -> DQC:
    """Returns the agent that the file describes."""
    h = r.hparams
    critic = Critic(r.net("action_critic"), r.critics("action_critic"), h["q_agg"], "bce", h["tau"])
    return DQC(
        Windows(h["policy_chunk_size"], h["backup_horizon"], discount=h["discount"]),
        FlowPolicy(r.net("actor_bc"), steps=h["flow_steps"], **r.time("actor_bc")),
        critic,
        Value(r.net("value"), "bce"),
        h["use_chunk_critic"],
        Adam(h["lr"]),
        kappa_d=h["kappa_d"],
        distill=h["distill_method"],
        kappa_b=h["kappa_b"],
        implicit_backup=h["implicit_backup_type"],
        num_samples=h["best_of_n"],
        valid_index="flat",
    )


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
    params, seen, head = state.params, state.spec.critic(batch.obs), agent.critic.head
    short = agent.windows.actions(batch)
    x_t = flow.interpolate(draws["x0"], short, draws["t"])
    q, v = agent.critic.outputs(params["critic"], seen, short), agent.value.output(params["value"], seen)
    distilled = agent.distillation_target(state, batch)
    backed_up = agent.critic.value(state.target["critic"], seen, short)
    velocity = agent.flow.velocity(params["flow"], state.spec.behaviour(batch.obs))
    values = {
        "next_v": agent.value.value(params["value"], state.spec.critic(batch.next_obs)),
        "nstep_target": agent.td_target(state, batch),
        "distill_target": distilled if agent.chunk_critic else distilled[0],
        "action_critic_logit": q,
        "distill_weight": losses.tilt_weight(q, distilled, agent.kappa_d, head),
        "target_action_q": backed_up,
        "value_logit": v,
        "backup_weight": losses.tilt_weight(v, backed_up, agent.kappa_b, head),
        "valid_weight": agent.weights(batch)[1],
        "bc_x_t": x_t,
        "bc_velocity_pred": velocity(x_t, draws["t"], draws["t"]),
    }
    if agent.chunk_critic:
        values["chunk_critic_logit"] = agent.critic.outputs(params["chunk_critic"], seen, agent.whole.actions(batch))
    return values
