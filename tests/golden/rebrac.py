"""Replays `rebrac_*`: TD3 with penalties, as FQL's authors have it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl.agents import ReBRAC, td3
from jaxrl.networks import apply
from tests.golden.recorded import Recorded, distance, norm
from tests.golden.td3 import networks, started

NETS = ("actor", "critic")


def replay(r: Recorded) -> dict[str, Any]:
    """Returns all that the file expects."""
    h = r.hparams
    agent = ReBRAC(
        actor_hidden=r.hidden("actor"),
        critic_hidden=r.hidden("critic"),
        activation=r.activation("critic"),
        actor_norm=r.norm("actor"),
        critic_norm=r.norm("critic"),
        actor_lr=h["lr"],
        discount=h["discount"],
        tau=h["tau"],
        delay=h["actor_freq"],
        target_noise=h["actor_noise"],
        noise_clip=h["actor_noise_clip"],
        beta_actor=h["alpha_actor"],
        beta_critic=h["alpha_critic"],
        exploration=h["actor_noise"],
        joint=True,
    )
    whole = h["full_update_per_step"]
    followed = jnp.ones_like(r["batch/masks"])
    batch = dataclasses.replace(r.one_step(), next_action=r["batch/next_actions"], followed=followed)
    state = started(r, agent)
    state = dataclasses.replace(state, step=jnp.asarray(int(whole[0]), jnp.int32), normalizer=unchanged(r))
    draws = {"target_noise": r["draws/step0/next_noise"]}
    values = jax.jit(functools.partial(intermediate, agent))(state, batch, draws)
    got = {f"expected/step0/values/{name}": value for name, value in values.items()}
    action = td3.choose(agent, state, r["sample/observations"])
    noisy = td3.noisy(agent, action, r["draws/sample/noise"], agent.exploration)
    got |= {"expected/sample/temperature_0/actions": action, "expected/sample/temperature_1/actions": noisy}
    first, learn = networks(r, state), jax.jit(agent.learn)
    for k, complete in enumerate(whole):
        draws = {"target_noise": r[f"draws/step{k}/next_noise"]}
        got |= {f"expected/step{k}/{name}": x for name, x in losses(r, agent, state, batch, draws, complete).items()}
        before = networks(r, state)
        state, _ = learn(state, batch, draws)
        for name, params in networks(r, state).items():
            got[f"expected/step{k}/after/param_norm/{name}"] = norm(params)
            got[f"expected/step{k}/after/update_norm/{name}"] = distance(params, before[name])
    for name, params in networks(r, state).items():
        got[f"expected/final/drift_norm/{name}"] = distance(params, first[name])
    return got


def unchanged(r: Recorded) -> Any:
    """Returns the normaliser that changes nothing."""
    size = r.spec().observation
    return td3.common.Normalizer(jnp.zeros(size), jnp.ones(size))


def losses(r: Recorded, agent: ReBRAC, state, batch, draws, whole: bool) -> dict[str, Any]:
    """Returns the losses, gradients and their norms before an update."""
    critic = jax.jit(jax.value_and_grad(agent.critic_loss, has_aux=True))
    (total, _), gradient = critic(state.params["critic"], state, batch, draws)
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
    action = td3.target_action(agent, state, batch, draws)
    q = lambda params, obs, action: apply(td3.critics(agent), params, obs, action)  # noqa: E731
    chosen = td3.choose(agent, state, batch.obs)
    return {
        "next_actions": action,
        "next_q_min": q(state.target["critic"], batch.next_obs, action).min(axis=0),
        "next_action_penalty": agent.penalty(batch, action) / agent.beta_critic,
        "target_q": td3.td_target(agent, state.target["critic"], batch, action, agent.penalty(batch, action)),
        "q": q(state.params["critic"], batch.obs, batch.actions[:, 0]),
        "policy_actions": chosen,
        "policy_q": q(state.params["critic"], batch.obs, chosen).min(axis=0),
    }
