"""Replays `td3bc_*`, `prdc_*` and `a2pr_*`: the descendants of TD3 on a dataset of single transitions."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.agents import A2PR, PRDC, TD3, TD3BC, learner
from jaxrl.agents.learner import State
from jaxrl.agents.parts import Adam, Autoencoder, Critic, DeterministicPolicy, Transitions, Value
from jaxrl.data import files
from jaxrl.ops import normalizer
from jaxrl.replay import ring
from jaxrl.replay.loading import from_dataset
from jaxrl.types import Spec
from tests.golden.recorded import Recorded, distance, norm

DRAWS = {"target_noise": "target_action_noise", "vae_noise": "vae_noise", "actor_noise": "vae_pi_noise"}
VAE = ("vae_encoder", "vae_mean", "vae_log_std", "vae_decoder")
Terms = Callable[..., dict[str, Any]]


def td3_of(r: Recorded) -> TD3:
    """Returns the TD3 that all agents of the family have."""
    h = r.hparams
    return TD3(
        DeterministicPolicy(r.net("actor")),
        Critic(r.net("critic"), agg="min", tau=h["tau"]),
        Adam(h["optimizer"]["lr"]["actor"]),
        Adam(h["optimizer"]["lr"]["critic"]),
        Transitions(h["batch_size"], h["discount"]),
        delay=h["policy_freq"],
        target_noise=h["policy_noise"],
        noise_clip=h["noise_clip"],
        normalize=True,
    )


def td3bc(r: Recorded) -> dict[str, Any]:
    """Returns all that a file of TD3+BC expects."""
    agent = TD3BC(td3_of(r), r.hparams["alpha"])
    return replay(r, agent, lambda data: (), critic_terms, actor_terms)


def prdc(r: Recorded) -> dict[str, Any]:
    """Returns all that a file of PRDC expects."""
    h = r.hparams
    agent = PRDC(td3_of(r), h["alpha"], h["beta"], h["k"])
    return replay(r, agent, lambda data: (data,), critic_terms, constrained_terms)


def a2pr(r: Recorded) -> dict[str, Any]:
    """Returns all that a file of A2PR expects."""
    h = r.hparams
    agent = A2PR(
        td3_of(r),
        Value(r.net("value")),
        Autoencoder(r.hidden("vae_decoder")),
        Adam(h["optimizer"]["lr"]["value"]),
        Adam(h["optimizer"]["lr"]["vae"]),
        alpha=h["alpha"],
        mask=h["mask"],
        vae_weight=h["vae_weight"],
    )
    return replay(r, agent, lambda data: (), learners_terms, regularized_terms)


def whole_updates(r: Recorded, period: int) -> list[bool]:
    """Returns which of the recorded updates move the actor: as the file says, or else every so many."""
    every = [(k + 1) % period == 0 for k in range(r.meta["num_update_steps"])]
    return r.hparams.get("full_update_per_step", every)


def due(state: State, delay: int, whole: bool) -> State:
    """Returns the state with its count of updates such that the next one moves the actor, or does not."""
    assert delay > 1 or whole
    return dataclasses.replace(state, step=jnp.asarray(delay - 1 if whole else 0, jnp.int32))


def replay(r: Recorded, agent: Any, lookup: Callable[[ring.Ring], tuple], learners: Terms, actor: Terms):
    """Returns all that the file expects, {key: number}. `learners` and `actor` give the terms of an update before its
    first gradient step, and before the actor's; `lookup` what the agent's updates see of the dataset.
    """
    data = dataset(r)
    state = agent.fit(started(r, agent), (data,))
    got = {
        "expected/normalizer/mean": state.normalizer.mean,
        "expected/normalizer/std_plus_eps": state.normalizer.std,
    }
    learn, more = jax.jit(agent.learn), [rings] if (rings := lookup(data)) else []
    for k, whole in enumerate(whole_updates(r, agent.td3.delay)):
        batch = transitions(data, r[f"batch/step{k}/indices"])
        recorded = r.named(f"draws/step{k}/")
        draws = {ours: recorded[theirs] for ours, theirs in DRAWS.items() if theirs in recorded}
        draws.setdefault("actor_noise", draws.get("vae_noise"))  # of an update that does not use it
        state = due(state, agent.td3.delay, whole)
        after, _ = learn(state, batch, draws, *more)
        terms = learners(r, agent, state, after, batch, draws)
        if whole:
            learned = {name: params for name, params in after.params.items() if name != "actor"}
            improved = dataclasses.replace(state, params=state.params | learned)
            terms |= actor(r, agent, improved, state, batch, draws, *more)
        before, now = networks(r, state), networks(r, after)
        for name, params in now.items():
            terms |= {f"after/param_norm/{name}": norm(params)}
            terms |= {f"after/update_norm/{name}": distance(params, before[name])}
        got |= {f"expected/step{k}/{name}": value for name, value in terms.items()}
        state = after
    for name, params in networks(r, state).items():
        got |= {f"expected/final/params/{name}/{place}": leaf for place, leaf in params.items()}
    held = r.below("expected/")
    return {name: value for name, value in got.items() if "/grads/" not in name or name in held}


def dataset(r: Recorded) -> ring.Ring:
    """Returns the recorded transitions as episodes of one step: transition i leaves row 2 i."""
    columns = {name: r[f"dataset/{name}"] for name in ("observations", "next_observations", "actions", "rewards")}
    ended = np.asarray(r["dataset/terminals"]) > 0
    columns |= {"terminals": np.ones(len(ended), bool), "masks": 1 - ended.astype(np.float32)}
    data = files.from_columns(columns)
    return from_dataset(data, r.hparams["scale"] * data.rewards + r.hparams["shift"], data.masks == 0)


def transitions(data: ring.Ring, rows: np.ndarray) -> Any:
    """Returns the batch of these transitions."""
    start = 2 * jnp.asarray(rows, jnp.int32)
    return ring.window_at(data, jnp.zeros_like(start), start, 1)


# Parameters


def started(r: Recorded, agent: Any) -> State:
    """Returns the agent's state with the recorded parameters, for raw observations."""
    spec = Spec(r.layers("actor")[0]["dense"][0], r.layers("actor")[-1]["dense"][1])
    shapes = jax.eval_shape(lambda: agent.init(jax.random.key(0), spec))
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    params = {name: r.params(name, like) for name, like in shapes.params.items() if name != "vae"}
    if "vae" in shapes.params:
        params["vae"] = autoencoder(r, shapes.params["vae"])
    target = {name: r.params(f"target_{name}", like) for name, like in shapes.target.items()}
    unchanged = normalizer.identity(spec.example())
    return dataclasses.replace(state, params=params, target=target, normalizer=unchanged)


def autoencoder(r: Recorded, like: Any) -> Any:
    """Returns the recorded autoencoder as ours: the encoder's two last layers are one, side by side."""
    *_, last = like["encoder"]["params"]["MLP_0"]

    def leaf(path: tuple, _: Any) -> jax.Array:
        *_, layer, kind = (part.key for part in path)
        if layer == last:
            return jnp.concatenate([r[f"params/vae_{half}/layer0/{kind}"] for half in ("mean", "log_std")], axis=-1)
        return jnp.asarray(r[f"params/vae_encoder/{r.place('vae_encoder', path)}"])

    encoder = jax.tree_util.tree_map_with_path(leaf, like["encoder"])
    return {"encoder": encoder, "decoder": r.params("vae_decoder", like["decoder"])}


def named(r: Recorded, params: dict[str, Any]) -> dict[str, dict[str, jax.Array]]:
    """Returns parameters, or a gradient, of some networks under the file's names."""
    found = {name: r.by_place(name, part) for name, part in params.items() if name != "vae"}
    if "vae" in params:
        layers = r.by_place("vae_encoder", params["vae"]["encoder"])
        last = f"layer{len(r.layers('vae_encoder'))}/"
        found["vae_encoder"] = {place: leaf for place, leaf in layers.items() if not place.startswith(last)}
        for i, half in enumerate(("vae_mean", "vae_log_std")):
            both = {place.removeprefix(last): leaf for place, leaf in layers.items() if place.startswith(last)}
            found[half] = {f"layer0/{kind}": jnp.split(leaf, 2, axis=-1)[i] for kind, leaf in both.items()}
        found["vae_decoder"] = r.by_place("vae_decoder", params["vae"]["decoder"])
    return found


def networks(r: Recorded, state: State) -> dict[str, Any]:
    """Returns the parameters of all networks under the file's names."""
    return named(r, state.params) | named(r, {f"target_{name}": params for name, params in state.target.items()})


def gradients(r: Recorded, name: str, gradient: Any) -> dict[str, Any]:
    """Returns a network's gradient and its norm under the file's names."""
    nets = named(r, {name: gradient})
    places = {f"grads/{net}/{place}": leaf for net, leaves in nets.items() for place, leaf in leaves.items()}
    return places | {f"grad_norm/{name}": norm(gradient)}


# Terms of an update


def graded(loss: Callable[..., Any], *inputs: Any) -> tuple[Any, Any, Any]:
    """Returns a loss with its metrics, and its gradient in the first input."""
    (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(*inputs)
    return value, metrics, gradient


def critic_terms(r: Recorded, agent: Any, state: State, after: Any, batch: Any, draws: dict) -> dict[str, Any]:
    """Returns the critics' loss and gradient."""
    batch, td3 = learner.normalized(state, batch), agent.td3
    y = td3.td_target(state, state.target["critic"], batch, td3.target_action(state, batch, draws))
    return critic_graded(r, agent, state, batch, y)


def critic_graded(r: Recorded, agent: Any, state: State, batch: Any, y: jax.Array) -> dict[str, Any]:
    """Returns the critics' loss and gradient, given their target."""
    loss = lambda critic: (agent.td3.critic_loss(critic, state, batch, y, batch.valid[:, 0]), None)  # noqa: E731
    value, _, gradient = graded(loss, state.params["critic"])
    return {"loss/critic": value} | gradients(r, "critic", gradient)


def actor_terms(r: Recorded, agent: Any, state: State, before: Any, batch: Any, draws: dict) -> dict[str, Any]:
    """Returns the actor's loss and gradient."""
    value, _, gradient = graded(agent.actor_loss, state.params["actor"], state, learner.normalized(state, batch))
    return {"loss/actor_total": value} | gradients(r, "actor", gradient)


def climbed(agent: Any, state: State, batch: Any, metrics: dict) -> dict[str, Any]:
    """Returns the terms that have to do with the critic."""
    q = agent.td3.first_q(state, learner.normalized(state, batch), agent.td3.choose(state, batch.obs))
    return {"loss/q_term": metrics["actor/q_loss"], "loss/lambda": metrics["actor/lambda"], "loss/mean_q_pi": q.mean()}


def constrained_terms(r: Recorded, agent: PRDC, state: State, before: Any, batch: Any, draws: dict, data: tuple):
    """Returns the loss and gradient of PRDC's actor, and its neighbors."""
    squared, row = jax.jit(agent.nearest)(state, batch, data)
    near = agent.nearest_action(state, batch, data)
    value, metrics, gradient = graded(
        agent.actor_loss, state.params["actor"], state, learner.normalized(state, batch), near
    )
    second = dataclasses.replace(agent, neighbours=2).nearest(state, batch, data)[0]
    query = [agent.beta * state.normalizer(batch.obs), agent.td3.choose(state, batch.obs)]
    values = {
        "values/nn_query": jnp.concatenate(query, axis=-1),
        "values/nn_index": row[:, 0] // 2,
        "values/nn_distance": jnp.sqrt(squared[:, 0]),
        "values/nn_gap_squared": second[:, 1] - second[:, 0],
        "values/nn_action": near,
    }
    losses = {"loss/actor_total": value, "loss/dataset_constraint": metrics["actor/constraint"]}
    return losses | climbed(agent, state, batch, metrics) | values | gradients(r, "actor", gradient)


def learners_terms(r: Recorded, agent: A2PR, state: State, after: Any, batch: Any, draws: dict):
    """Returns the losses and gradients of A2PR's critics, value and autoencoder, each at the state that it sees."""
    batch, td3 = learner.normalized(state, batch), agent.td3
    action = td3.target_action(state, batch, draws)
    y, v = td3.td_target(state, state.target["critic"], batch, action), agent.v(state, batch)
    judged = dataclasses.replace(state, params=state.params | {"critic": after.params["critic"]})
    online = td3.td_target(state, judged.params["critic"], batch, action)
    lower = agent.lower_target(judged, batch, y, action)
    value, _, g_value = graded(agent.value_loss, state.params["value"], judged, batch, lower)
    vae, metrics, g_vae = graded(agent.vae_loss, state.params["vae"], judged, batch, v, draws)
    losses = {
        "value": value,
        "vae": vae,
        "vae_recon": metrics["vae/reconstruction"],
        "vae_kl": metrics["vae/divergence"],
        "mean_target": y.mean(),
        "mean_online_target": online.mean(),
    }
    terms = critic_graded(r, agent, state, batch, y) | {f"loss/{name}": term for name, term in losses.items()}
    q_data = td3.first_q(judged, batch, batch.actions[:, 0])
    terms |= {"values/value": v[:, None], "values/q_data": q_data[:, None]}
    return terms | gradients(r, "value", g_value) | gradients(r, "vae", g_vae)


def regularized_terms(r: Recorded, agent: A2PR, state: State, before: Any, batch: Any, draws: dict):
    """Returns the loss and gradient of A2PR's actor, and what it is pulled to; v is that of before the update."""
    raw, batch = batch, learner.normalized(state, batch)
    v = agent.v(before, batch)
    value, metrics, gradient = graded(agent.actor_loss, state.params["actor"], state, batch, v, draws)
    action = agent.td3.choose(state, raw.obs)
    imitated, *_ = agent.vae.rebuild(state.params["vae"], batch.obs, action, draws["actor_noise"])
    goal, gate = agent.held_to(state, batch, action, v, draws)
    values = {
        "values/pi": action,
        "values/vae_action": imitated,
        "values/q_vae_action": agent.td3.first_q(state, batch, imitated)[:, None],
        "values/use_vae_action": (goal == imitated).all(axis=-1),
        "values/gate": gate / agent.mask,
    }
    losses = {"loss/actor_total": value, "loss/bc": metrics["actor/bc_loss"]}
    return losses | climbed(agent, state, raw, metrics) | values | gradients(r, "actor", gradient)
