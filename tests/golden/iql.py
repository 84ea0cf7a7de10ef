"""Replays `iql_*`: implicit Q-learning of FQL's and of QGF's repositories."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl.agents import IQL
from jaxrl.agents.parts import Adam, Critic, GaussianPolicy, Value, Windows
from jaxrl.ops import losses
from tests.golden.recorded import Recorded

NETS = {"actor": "actor", "critic": "critic", "value": "value"}


def replay(r: Recorded) -> dict[str, Any]:
    """Returns all that the file expects."""
    h = r.hparams
    agent = IQL(
        Windows(discount=h["discount"]),
        actor=GaussianPolicy(r.net("actor"), "unit" if h["const_std"] else "learned"),
        critic=Critic(r.net("critic"), r.critics("critic"), "min", tau=h["tau"]),
        value=Value(r.net("value")),
        adam=Adam(h["lr"]),
        expectile=h["expectile"],
        extraction=h["actor_loss"],
        alpha=h["alpha"],
        advantage_of="target" if h.get("target_extraction") else "online",
        num_samples=h.get("rejection_samples", 1),
    )
    state = r.state(agent, r.spec(), NETS, "critic", "target_critic")
    batch = r.one_step()

    def drawn(draws):
        return {"actor_noise": draws.get("actor_noise", jnp.zeros(batch.actions[:, 0].shape))}

    def terms(total, metrics):
        parts = {"value": metrics["value/loss"], "critic": metrics["critic/loss"]}
        parts |= {"bc_loss": metrics["actor/bc_loss"], "q_loss": metrics["actor/q_loss"]}
        return parts | {"actor": parts["bc_loss"] + parts["q_loss"], "total": total}

    got = r.updates(agent, state, batch, NETS, terms, "target_critic", drawn)
    noise = drawn(r.named("draws/step0/"))["actor_noise"]
    got |= {
        f"expected/step0/values/{k}": v
        for k, v in jax.jit(functools.partial(values, agent))(state, batch, noise).items()
    }
    choose = jax.jit(agent.choose)
    obs, noise = r["sample/observations"], jnp.asarray(r["draws/sample/noise"])
    if noise.ndim == 3:  # of several samples: [n, S, A]
        got["expected/sample/actions"] = choose(state, obs, noise.swapaxes(0, 1))
    for key in r.below("expected/sample/temperature_"):
        temperature = float(key.split("_")[1].split("/")[0])
        got[key] = choose(state, obs, noise[:, None], temperature)
    return got


def values(agent: IQL, state, batch, noise) -> dict[str, Any]:
    """Returns the intermediate quantities of the first update."""
    action, params = batch.actions[:, 0], state.params
    mean, log_std = agent.actor.moments(params["actor"], batch.obs)
    policy_action = jnp.clip(mean if agent.actor.std == "unit" else mean + jnp.exp(log_std) * noise, -1, 1)
    q, v = agent.critic.value, agent.value.value(params["value"], batch.obs)
    critic = params["critic"] if agent.advantage_of == "online" else state.target["critic"]
    return {
        "target_q_min": q(state.target["critic"], batch.obs, action),
        "v": v,
        "next_v": agent.value.value(params["value"], batch.next_obs),
        "q_target": agent.td_target(state, batch),
        "q": agent.critic.outputs(params["critic"], batch.obs, action),
        "mean": mean,
        "log_prob": losses.gaussian_log_density(action, mean, log_std),
        "advantage": q(critic, batch.obs, action) - v,
        "awr_weight": agent.advantage_weight(state, batch),
        "policy_actions": policy_action,
        "policy_q": q(params["critic"], batch.obs, policy_action),
    }
