"""Replays `qgf_*`, `grad_step_*` and `edp_*`: Q-guided flow, its modes and its relatives."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl.agents import EDP, QGF
from jaxrl.agents.parts import Adam, Critic, FlowPolicy, Value, Windows
from jaxrl.networks import time_features
from jaxrl.ops import flow
from jaxrl.ops.guidance import QGuidance
from tests.golden.recorded import Recorded

NETS = {"flow": "policy", "critic": "critic", "value": "value"}


def replay(r: Recorded) -> dict[str, Any]:
    """Returns all that the file expects."""
    agent = build(r)
    state = r.state(agent, r.spec(), NETS, "critic", "target_critic")
    batch = r.chunked()

    def terms(total, metrics):
        return losses(metrics)

    got = r.updates(agent, state, batch, NETS, terms, "target_critic", drawn)
    values = jax.jit(functools.partial(intermediate, agent))(state, batch, drawn(r.named("draws/step0/")))
    got |= {f"expected/step0/values/{name}": value for name, value in values.items()}
    return got | samples(r, agent, state)


def edp(r: Recorded) -> dict[str, Any]:
    """Returns all that a file of EDP expects."""
    agent = EDP(build(r), r.hparams["bc_weight"])
    state = r.state(agent, r.spec(), NETS, "critic", "target_critic")
    batch = r.chunked()

    def terms(total, metrics):
        losses = {
            "actor_q": "actor/q_loss",
            "bc_flow": "actor/flow_loss",
            "critic": "critic/loss",
            "value": "value/loss",
        }
        named = {name: metrics[ours] for name, ours in losses.items()}
        return named | {"actor": total - metrics["critic/loss"] - metrics["value/loss"]}

    def values(state, batch, draws):
        action = agent.one_step(*agent.velocity(state.params, state, batch, draws), draws)
        one_step = {"one_step_actions": action, "one_step_q": agent.qgf.score(state, batch.obs)(action)}
        return intermediate(agent.qgf, state, batch, draws) | one_step

    got = r.updates(agent, state, batch, NETS, terms, "target_critic", drawn)
    first = jax.jit(values)(state, batch, drawn(r.named("draws/step0/")))
    got |= {f"expected/step0/values/{name}": value for name, value in first.items()}
    return got | plain_samples(r, agent.qgf, state)


def losses(metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the losses that all files hold by their names there."""
    return {"bc_flow": metrics["actor/flow_loss"], "critic": metrics["critic/loss"], "value": metrics["value/loss"]}


def drawn(draws: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the random numbers of an update as ours are called."""
    return {"x0": draws["x0"], "t": draws["t"][:, None]}


def build(r: Recorded) -> QGF:
    """Returns the agent that the file describes."""
    h = r.hparams
    length = r["batch/actions"].shape[1]
    if h["agent_name"] == "qgf":
        gradient = {"noisy": "noisy", "one_euler_step_approx": "one_step"}[h["denoised_action_approx"]]
        guide = QGuidance(gradient="jacobian" if h["apply_jacobian"] else gradient)
    elif h["agent_name"] == "grad_step":
        guide = QGuidance(gradient="after", ascent_steps=h["qgrad_steps"], ascent_size=h["qgrad_step_size"])
    else:
        guide = QGuidance(weight=0.0)
    return QGF(
        Windows(length if h["action_chunking"] else 1, length, discount=h["discount"], cut="drop"),
        flow=FlowPolicy(r.net("policy"), steps=h["denoise_steps"], **r.time("policy")),
        critic=Critic(r.net("critic"), r.critics("critic"), h["q_aggregation"], tau=h["tau"]),
        value=Value(r.net("value")),
        flow_adam=Adam(h["optimizer"]["lr"]["policy"]),
        critic_adam=Adam(h["critic_lr"]),
        value_adam=Adam(h["value_lr"]),
        expectile=h["expectile"],
        guide=guide,
        mask_actor=False,
    )


def intermediate(agent: QGF, state, batch, draws) -> dict[str, Any]:
    """Returns the intermediate quantities of the first update."""
    action, params = agent.windows.actions(batch), state.params
    x_t = flow.interpolate(draws["x0"], action, draws["t"])
    return {
        "next_v": agent.value.value(params["value"], batch.next_obs),
        "q_target": agent.td_target(state, batch),
        "q": agent.critic.values(params["critic"], batch.obs, action),
        "target_q": agent.critic.value(state.target["critic"], batch.obs, action),
        "v": agent.value.value(params["value"], batch.obs),
        "valid_weight": agent.windows.weight(batch),
        "bc_x_t": x_t,
        "bc_velocity_pred": agent.flow.velocity(params["flow"], batch.obs)(x_t, draws["t"], draws["t"]),
    }


def samples(r: Recorded, agent: QGF, state) -> dict[str, Any]:
    """Returns the sampled actions at every weight, and for the largest the way that they went and what pushed them."""
    obs = jnp.asarray(r["sample/observations"])
    noise, many = r["draws/sample/noise"], r["draws/sample/rejection_noise"]
    choose = jax.jit(lambda agent, noise: agent.choose(state, obs, noise))
    if agent.guide.gradient == "after":
        return plain_samples(r, agent, state)
    got: dict[str, Any] = {}
    for key in [key for key in r.below("expected/sample/") if key.endswith("/actions")]:
        name = key.split("/")[2]
        weighted = weigh(agent, float(name.rpartition("_")[2]))
        got[key] = choose(weighted, many if name.startswith("rejection") else noise[:, None])
    for key in r.below("expected/sample/"):
        if key.endswith("/trajectory"):
            name = key.split("/")[2]
            path, push = jax.jit(way)(weigh(agent, float(name.removeprefix("w_"))), state, obs, noise)
            got |= {f"expected/sample/{name}/trajectory": path, f"expected/sample/{name}/guidance": push}
    return got


def plain_samples(r: Recorded, agent: QGF, state) -> dict[str, Any]:
    """Returns the sampled actions of a file with one weight, and the best of several."""
    choose = jax.jit(lambda noise: agent.choose(state, jnp.asarray(r["sample/observations"]), noise))
    return {
        "expected/sample/actions": choose(r["draws/sample/noise"][:, None]),
        "expected/sample/rejection/actions": choose(r["draws/sample/rejection_noise"]),
    }


def weigh(agent: QGF, weight: float) -> QGF:
    """Returns the agent with a guidance weight."""
    return dataclasses.replace(agent, guide=dataclasses.replace(agent.guide, weight=weight))


def way(agent: QGF, state, obs, noise) -> tuple[jax.Array, jax.Array]:
    """Returns the points [T + 1, S, D] on the way from noise to action, and the gradients [T, S, D] met there."""
    velocity, steps = agent.flow.velocity(state.params["flow"], obs), agent.flow.steps
    score = agent.score(state, obs)
    step = flow.euler_step(agent.guide.guided(velocity, score, steps))
    points, gradients = [jnp.asarray(noise)], []
    for i in range(steps):
        x, t = points[-1], jnp.full((len(noise), 1), i / steps)
        gradients.append(agent.guide.ascent(velocity, score, x, t, velocity(x, t, t), steps))
        points.append(step(x, t, jnp.full_like(t, (i + 1) / steps)))
    return jnp.stack(points), jnp.stack(gradients)


def time_table(r: Recorded) -> tuple[Any, jax.Array]:
    """Returns the recorded time features for t = k / T, and ours."""
    wanted = r["aux/time_embedding_table"]
    t = jnp.arange(len(wanted))[:, None] / (len(wanted) - 1)
    return wanted, time_features(t, "sinusoidal", wanted.shape[1])
