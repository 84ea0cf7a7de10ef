"""Replays `qc_*`: Q-chunking, best-of-N or distilled."""

import functools
from typing import Any

import jax

from jaxrl.agents import QC
from jaxrl.agents.parts import AdamW, Critic, FlowPolicy, OneStepPolicy, Windows
from jaxrl.networks import repeat_for
from jaxrl.ops import flow
from tests.golden.recorded import Recorded


def replay(r: Recorded) -> dict[str, Any]:
    """Returns all that the file expects."""
    h = r.hparams
    length = r["batch/actions"].shape[1]
    distilled = h["actor_type"] == "distill-ddpg"
    agent = QC(
        Windows(length if h["action_chunking"] else 1, length, discount=h["discount"], cut="drop"),
        actor="distill" if distilled else "best_of_n",
        flow=FlowPolicy(r.net("actor_bc_flow"), steps=h["flow_steps"], **r.time("actor_bc_flow")),
        policy=OneStepPolicy(r.net("actor_bc_flow")),
        critic=Critic(r.net("critic"), r.critics("critic"), h["q_agg"], tau=h["tau"]),
        adam=AdamW(h["lr"], h["weight_decay"]),
        num_samples=1 if distilled else r["draws/sample/noise"].shape[1],
        alpha=h["alpha"],
    )
    nets = {"flow": "actor_bc_flow", "critic": "critic"} | ({"policy": "actor_onestep_flow"} if distilled else {})
    state = r.state(agent, r.spec(), nets, "critic", "target_critic")
    batch = r.chunked()

    def drawn(draws):
        return draws | {"next_noise": draws["next_noise"][:, None]} if distilled else draws

    def terms(total, metrics):
        parts = {"critic": metrics["critic/loss"], "bc_flow": metrics["actor/flow_loss"]}
        if distilled:
            parts["distill"] = metrics["actor/distillation_loss"]
        return parts | {"actor": total - parts["critic"], "total": total}

    got = r.updates(agent, state, batch, nets, terms, "target_critic", drawn)
    first = jax.jit(functools.partial(values, agent))(state, batch, drawn(r.named("draws/step0/")))
    got |= {f"expected/step0/values/{name}": value for name, value in first.items()}
    obs, noise = r["sample/observations"], r["draws/sample/noise"]
    noise = noise[:, None] if distilled else noise
    return got | jax.jit(functools.partial(samples, agent))(state, obs, noise)


def samples(agent: QC, state, obs, noise) -> dict[str, Any]:
    """Returns the sampled actions and, where there are several, what they were chosen from."""
    got = {"expected/sample/actions": agent.choose(state, obs, noise)}
    if agent.actor == "best_of_n":
        candidates = agent.proposals(state, repeat_for(noise, obs), noise)
        got["expected/sample/candidates"] = candidates
        got["expected/sample/scores"] = agent.scores(state, repeat_for(noise, obs), candidates)
    return got


def values(agent: QC, state, batch, draws) -> dict[str, Any]:
    """Returns the intermediate quantities of the first update."""
    action, next_action = agent.windows.actions(batch), agent.choose(state, batch.next_obs, draws["next_noise"])
    velocity = agent.flow.velocity(state.params["flow"], batch.obs)
    x_t = flow.interpolate(draws["x0"], action, draws["t"])
    result = {
        "next_actions": next_action,
        "next_q": agent.critic.value(state.target["critic"], batch.next_obs, next_action),
        "q_target": agent.td_target(state, batch, draws),
        "valid_weight": agent.windows.weight(batch),
        "q": agent.critic.outputs(state.params["critic"], batch.obs, action),
        "bc_x_t": x_t,
        "bc_velocity_pred": velocity(x_t, draws["t"], draws["t"]),
    }
    if agent.actor == "best_of_n":
        obs = repeat_for(draws["next_noise"], batch.next_obs)
        result["next_scores"] = agent.scores(state, obs, agent.proposals(state, obs, draws["next_noise"]))
        return result
    onestep = agent.policy.sample(state.params["policy"], batch.obs, draws["distill_noise"])
    q = agent.critic.outputs(state.params["critic"], batch.obs, onestep.clip(-1, 1))
    flowed = agent.proposals(state, batch.obs, draws["distill_noise"])
    return result | {"flow_actions": flowed, "onestep_actions": onestep, "actor_q": q.mean(axis=0)}
