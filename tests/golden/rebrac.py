"""Replays `rebrac_*`: TD3 with penalties, as FQL's authors have it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl.agents import TD3, ReBRAC
from jaxrl.agents.parts import Adam, Critic, DeterministicPolicy, Transitions
from jaxrl.agents.rebrac import continued
from tests.golden.recorded import Recorded, distance, norm
from tests.golden.td3 import due, networks, started, whole_updates


def replay(r: Recorded) -> dict[str, Any]:
    """Returns all that the file expects."""
    h = r.hparams
    td3 = TD3(
        DeterministicPolicy(r.net("actor")),
        Critic(r.net("critic"), agg="min", tau=h["tau"]),
        Adam(h["lr"]),
        transitions=Transitions(discount=h["discount"]),
        delay=h["actor_freq"],
        target_noise=h["actor_noise"],
        noise_clip=h["actor_noise_clip"],
        exploration=h["actor_noise"],
    )
    agent = ReBRAC(td3, beta_actor=h["alpha_actor"], beta_critic=h["alpha_critic"], joint=True)
    followed = jnp.ones_like(r["batch/masks"])
    batch = dataclasses.replace(r.one_step(), next_action=r["batch/next_actions"], followed=followed)
    state = started(r, agent)
    got = sampled(r, agent, state)
    draws = {"target_noise": r["draws/step0/next_noise"]}
    values = jax.jit(functools.partial(intermediate, agent))(state, batch, draws)
    got |= {f"expected/step0/values/{name}": value for name, value in values.items()}
    first, learn = networks(r, state), jax.jit(agent.learn)
    for k, whole in enumerate(whole_updates(r, td3.delay)):
        draws = {"target_noise": r[f"draws/step{k}/next_noise"]}
        got |= {f"expected/step{k}/{name}": x for name, x in losses(r, agent, state, batch, draws, whole).items()}
        before = networks(r, state)
        state, _ = learn(due(state, td3.delay, whole), batch, draws)
        for name, params in networks(r, state).items():
            got[f"expected/step{k}/after/param_norm/{name}"] = norm(params)
            got[f"expected/step{k}/after/update_norm/{name}"] = distance(params, before[name])
    for name, params in networks(r, state).items():
        got[f"expected/final/drift_norm/{name}"] = distance(params, first[name])
    return got


def sampled(r: Recorded, agent: ReBRAC, state) -> dict[str, Any]:
    """Returns the actions at temperatures of 0 and 1, which scale the noise of exploration."""
    action = agent.td3.choose(state, r["sample/observations"])
    noisy = agent.td3.noisy(action, r["draws/sample/noise"], agent.td3.exploration)
    return {"expected/sample/temperature_0/actions": action, "expected/sample/temperature_1/actions": noisy}


def losses(r: Recorded, agent: ReBRAC, state, batch, draws, whole: bool) -> dict[str, Any]:
    """Returns the losses, gradients and their norms before an update."""
    y = agent.td_target(state, batch, draws)
    critic = lambda params: agent.td3.critic_loss(params, state, batch, y, continued(batch)) / 2  # noqa: E731
    total, gradient = jax.jit(jax.value_and_grad(critic))(state.params["critic"])
    got, gradients = {"loss/critic": total}, {"critic": gradient}
    gradients["actor"] = jax.tree.map(jnp.zeros_like, state.params["actor"])
    if whole:
        actor = jax.jit(jax.value_and_grad(agent.actor_loss, has_aux=True))
        (value, metrics), gradients["actor"] = actor(state.params["actor"], state, batch)
        got |= {"loss/actor_q": metrics["actor/q_loss"], "loss/actor_bc": metrics["actor/bc_loss"]}
        total = total + value
    for name, gradient in gradients.items():
        got[f"grad_norm/{name}"] = norm(gradient)
        got |= {f"grads/{name}/{place}": leaf for place, leaf in r.by_place(name, gradient).items()}
    return got | {"loss/total": total}


def intermediate(agent: ReBRAC, state, batch, draws) -> dict[str, Any]:
    """Returns the intermediate quantities of the first update."""
    td3, chosen = agent.td3, agent.td3.choose(state, batch.obs)
    action = td3.target_action(state, batch, draws)
    return {
        "next_actions": action,
        "next_q_min": td3.critic.value(state.target["critic"], batch.next_obs, action),
        "next_action_penalty": agent.penalty(batch, action) / agent.beta_critic,
        "target_q": agent.td_target(state, batch, draws),
        "q": td3.critic.values(state.params["critic"], batch.obs, batch.actions[:, 0]),
        "policy_actions": chosen,
        "policy_q": td3.critic.value(state.params["critic"], batch.obs, chosen),
    }
