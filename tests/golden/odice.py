"""Replays `odice_*`: distribution correction with orthogonal, semi and true gradients."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl.agents import ODICE
from jaxrl.agents.parts import Adam, Critic, GaussianPolicy, Transitions
from jaxrl.types import Batch, Spec
from tests.golden.recorded import Recorded, distance, norm

GRADIENTS = {"orthogonal_true_g": "orthogonal", "semi_g": "semi", "true_g": "true"}
NETS = {"value": "value", "actor": "policy"}


def replay(r: Recorded) -> dict[str, Any]:
    """Returns all that the file expects."""
    h = r.hparams
    value = r.net("value")
    agent = ODICE(
        Transitions(discount=h["discount"]),
        GaussianPolicy(dataclasses.replace(ODICE().actor.net, hidden=r.hidden("policy")), std="learned"),
        Critic(value, r.critics("value") or 1, agg="min", tau=h["beta"], epsilon="1e-5"),
        Adam(h["policy_lr"]),
        Adam(h["value_lr"]),
        weight_decay=h["weight_decay"],
        gradient=GRADIENTS[h["kind"]],
        trade=h["Lambda"],
        eta=h["eta"],
        max_weight=h["weight_max"],
    )
    state = started(r, agent)
    got: dict[str, Any] = {}
    learn = jax.jit(agent.learn)
    for k in range(r.meta["num_update_steps"]):
        batch = transitions(r.named(f"batch/step{k}/"))
        terms = learned(r, agent, state, batch)
        before, (state, _) = networks(r, state), learn(state, batch)
        for name, params in networks(r, state).items():
            terms |= {f"after/param_norm/{name}": norm(params)}
            terms |= {f"after/update_norm/{name}": distance(params, before[name])}
        got |= {f"expected/step{k}/{name}": value for name, value in terms.items()}
    for name, params in networks(r, state).items():
        got |= {f"expected/final/params/{name}/{place}": leaf for place, leaf in params.items()}
    held = r.below("expected/")
    return {name: value for name, value in got.items() if "/grads/" not in name or name in held}


def started(r: Recorded, agent: ODICE) -> Any:
    """Returns the agent's state with the recorded parameters; of a single value, with the axis that ours has."""
    spec = Spec(r.layers("policy")[0]["dense"][0], r.layers("policy")[-1]["dense"][1])
    shapes = jax.eval_shape(lambda: agent.init(jax.random.key(0), spec))
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def read(net: str, like: Any) -> Any:
        leaf = lambda path, x: jnp.reshape(r[f"params/{net}/{place(r, net, path)}"], x.shape)  # noqa: E731
        return jax.tree_util.tree_map_with_path(leaf, like)

    params = {ours: read(theirs, shapes.params[ours]) for ours, theirs in NETS.items()}
    target = {"value": read("target_value", shapes.target["value"])}
    return dataclasses.replace(state, params=params, target=target)


def place(r: Recorded, net: str, path: tuple) -> str:
    """Returns the file's name of a parameter of ours."""
    return r.place(net, path).replace("log_stds", "log_std")


def transitions(batch: dict[str, jax.Array]) -> Batch:
    """Returns the recorded transitions as a batch."""
    return Batch(
        obs=batch["observations"],
        actions=batch["actions"][:, None],
        rewards=batch["rewards"][:, None],
        valid=jnp.ones((len(batch["rewards"]), 1)),
        terminated=batch["terminals"] > 0,
        next_obs=batch["next_observations"],
        steps=jnp.ones(len(batch["rewards"]), jnp.int32),
    )


def networks(r: Recorded, state: Any) -> dict[str, dict[str, jax.Array]]:
    """Returns the parameters of all networks under the file's names."""
    nets = {theirs: state.params[ours] for ours, theirs in NETS.items()} | {"target_value": state.target["value"]}
    return {name: named(r, name, params) for name, params in nets.items()}


def named(r: Recorded, net: str, params: Any) -> dict[str, jax.Array]:
    """Returns a network's parameters, or gradient, under the file's names; without the axis of a single value."""
    leaves = {place(r, net, path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    alone = net.endswith("value") and not r.critics(net)
    return {name: leaf[0] for name, leaf in leaves.items()} if alone else leaves


def learned(r: Recorded, agent: ODICE, state: Any, batch: Batch) -> dict[str, Any]:
    """Returns the residual and the gradients of an update."""
    residual = agent.residual(state.params["value"], state, batch)
    gradients = {"value": jax.jit(agent.value_gradient)(state, batch)[0]}
    actor = jax.jit(jax.grad(agent.actor_loss, has_aux=True))
    gradients["policy"] = actor(state.params["actor"], state, batch, residual)[0]
    terms: dict[str, Any] = {}
    if agent.gradient != "true":
        terms["values/forward_residual"] = residual if r.critics("value") else residual[0]
    for name, gradient in gradients.items():
        places = named(r, name, gradient)
        terms |= {f"grads/{name}/{at}": leaf for at, leaf in places.items()} | {f"grad_norm/{name}": norm(places)}
    return terms
