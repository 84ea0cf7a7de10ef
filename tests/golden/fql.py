"""Replays `fql_*`: flow Q-learning."""

import functools
from typing import Any

import jax

from jaxrl.agents import FQL
from jaxrl.agents.parts import Adam, Critic, FlowPolicy, OneStepPolicy, Windows
from jaxrl.ops import flow
from tests.golden.recorded import Recorded

NETS = {"flow": "actor_bc_flow", "policy": "actor_onestep_flow", "critic": "critic"}


def replay(r: Recorded) -> dict[str, Any]:
    """Returns all that the file expects."""
    h = r.hparams
    agent = FQL(
        Windows(discount=h["discount"]),
        flow=FlowPolicy(r.net("actor_bc_flow"), steps=h["flow_steps"], **r.time("actor_bc_flow")),
        policy=OneStepPolicy(r.net("actor_onestep_flow")),
        critic=Critic(r.net("critic"), r.critics("critic"), h["q_agg"], tau=h["tau"]),
        adam=Adam(h["lr"]),
        alpha=h["alpha"],
        normalize_q=h["normalize_q_loss"],
    )
    state = r.state(agent, r.spec(), NETS, "critic", "target_critic")
    batch, draws = r.one_step(), r.named("draws/step0/")

    def terms(total, metrics):
        parts = {
            "critic": metrics["critic/loss"],
            "bc_flow": metrics["actor/flow_loss"],
            "distill": metrics["actor/distillation_loss"],
            "q_loss": metrics["actor/q_loss"],
        }
        return parts | {"actor": total - parts["critic"], "total": total}

    got = r.updates(agent, state, batch, NETS, terms, "target_critic")
    values = jax.jit(functools.partial(intermediate, agent))(state, batch, draws)
    got |= {f"expected/step0/values/{name}": value for name, value in values.items()}
    obs, noise = r["sample/observations"], r["draws/sample/noise"]
    got["expected/sample/actions"] = jax.jit(agent.choose)(state, obs, noise)
    got["expected/sample/flow_actions"] = jax.jit(agent.flow.sample)(state.params["flow"], obs, noise)
    return got


def intermediate(agent: FQL, state, batch, draws) -> dict[str, Any]:
    """Returns the intermediate quantities of the first update."""
    action, next_action = batch.actions[:, 0], agent.choose(state, batch.next_obs, draws["next_noise"])
    x_t = flow.interpolate(draws["x0"], action, draws["t"])
    params, obs, noise = state.params, batch.obs, draws["distill_noise"]
    onestep = agent.policy.sample(params["policy"], obs, noise)
    return {
        "next_actions": next_action,
        "next_q": agent.critic.value(state.target["critic"], batch.next_obs, next_action),
        "target_q": agent.td_target(state, batch, draws),
        "q": agent.critic.values(params["critic"], obs, action),
        "bc_x_t": x_t,
        "bc_velocity_pred": agent.flow.velocity(params["flow"], obs)(x_t, draws["t"], draws["t"]),
        "flow_actions": agent.flow.sample(params["flow"], obs, noise),
        "onestep_actions": onestep,
        "actor_q": agent.critic.values(params["critic"], obs, onestep.clip(-1, 1)).mean(axis=0),
    }
