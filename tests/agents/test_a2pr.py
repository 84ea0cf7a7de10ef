"""Facts about jaxrl.agents.a2pr, with networks of one layer, so that every number is known by hand."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import ranges
from jaxrl.agents import A2PR, TD3BC
from jaxrl.agents.parts import Adam, Autoencoder, Value
from jaxrl.errors import UserError
from jaxrl.types import Spec
from tests.known import KEY, batch_of, bias_of, one_layer_each, random_batch, with_fields

pytestmark = pytest.mark.usefixtures("quick")

AGENT = with_fields(A2PR(alpha=1.5, mask=0.4, vae_weight=3.0), hidden=())
CLIMB = ([[0, 1], [0, 0]], 0)  # Q_1 = a
STATE = (1, 0)  # V = s


def known(pi=0.5, critic=CLIMB, value=STATE, encoder=(0, 0), decoder=(0, 0), agent=AGENT, **more):
    """Returns the state with pi(s) = `pi`, by default Q_1 = a, V = s, and an autoencoder that says 0."""
    layers = {"critic": critic, "value": value, "encoder": encoder, "decoder": decoder}
    return one_layer_each(agent, actor=(0, np.arctanh(pi)), **(layers | more))


def at(values, actions):
    """Returns transitions at states of these values, with these actions."""
    return batch_of(np.zeros((len(values), 1)), obs=[[v] for v in values], actions=[[[a]] for a in actions])


def zeros(count):
    """Returns random numbers of an update that are all zero."""
    latent = jnp.zeros((count, 2))
    return {"target_noise": jnp.zeros((count, 1)), "vae_noise": latent, "actor_noise": latent}


# The autoencoder


@jax.jit
def vae_graded(agent, state, batch, v, draws):
    return jax.value_and_grad(agent.vae_loss, has_aux=True)(state.params["vae"], state, batch, v, draws)


def vae_terms(state, batch, v, draws=None, agent=AGENT):
    """Returns the loss, its terms and its gradient."""
    (loss, metrics), slope = vae_graded(agent, state, batch, jnp.asarray(v), draws or zeros(len(v)))
    return float(loss), {name: float(x) for name, x in metrics.items()}, slope


@pytest.mark.parametrize(
    ("bias", "divergence"),
    [
        ((0, 0, 0, 0), 0.0),
        ((0, 0, 1, 1), -0.5 * (1 + 2 - math.e**2)),  # 2.1945
        ((2, 0, 0, 0), 0.5 * 4 / 2),
        ((0, 0, -9, -9), -0.5 * (1 - 8 - math.exp(-8))),  # the deviation is at least e^-4
    ],
)
def test_the_divergence_from_the_standard_normal_is_a_mean_over_latent_entries(bias, divergence):
    batch = at([0.0] * 4, [0.5] * 4)
    loss, metrics, _ = vae_terms(known(encoder=(0, bias)), batch, [9.0] * 4)
    assert metrics["vae/divergence"] == pytest.approx(divergence, rel=1e-5, abs=1e-7)
    assert loss == pytest.approx(0.5 * divergence, rel=1e-5, abs=1e-7)


def test_without_any_advantage_nothing_is_reconstructed():
    batch, v = at([0.0] * 4, [0.5, -0.5, 0.5, -0.5]), [0.5, 0.0, 0.6, 0.6]  # where Q = V there is no advantage either
    state = known(encoder=(0.3, (0.1, 0.2, 0.3, 0.4)), decoder=(0.5, 0.2))
    _, metrics, slope = vae_terms(state, batch, v)
    assert metrics["vae/reconstruction"] == metrics["vae/share"] == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(slope["decoder"]))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(slope["encoder"]))  # which the divergence still moves


def test_actions_of_positive_advantage_are_reconstructed_in_the_mean_over_all():
    state = known(decoder=(0, np.arctanh(0.2)))
    batch = dataclasses.replace(at([0.0] * 4, [0.5, -0.5, 0.9, 0.9]), valid=jnp.array([[1.0], [1.0], [1.0], [0.0]]))
    _, metrics, _ = vae_terms(state, batch, [0.4, 0.4, -1.0, -1.0])
    assert metrics["vae/reconstruction"] == pytest.approx(3.0 * (0.3**2 + 0.7**2) / 4, rel=1e-5)
    assert metrics["vae/share"] == 0.5


def test_the_latent_has_the_encoders_mean_and_deviation_and_the_decoder_sees_the_state():
    encoder = (np.array([[0, 0, 0, 0], [0.4, 0, 0, 0]]), (0, 0.1, math.log(0.5), math.log(2)))
    state = known(encoder=encoder, decoder=([0.7, 1, 10], 0.05))
    draws = zeros(4) | {"vae_noise": jnp.array([[1.0, -0.1]] * 4)}
    rebuilt = math.tanh(0.7 * 0.3 + (0.4 * 0.5 + 0.5 * 1) + 10 * (0.1 - 2 * 0.1) + 0.05)
    _, metrics, _ = vae_terms(state, at([0.3] * 4, [0.5] * 4), [0.0] * 4, draws)
    assert metrics["vae/reconstruction"] == pytest.approx(3.0 * (rebuilt - 0.5) ** 2, rel=1e-4)


# The value


def test_the_value_is_the_lower_of_the_target_and_the_same_of_the_updated_critics():
    agent = with_fields(AGENT, discount=0.5)
    state = known(critic=([[0, 4], [0, 0]], (1, 2)), agent=agent)
    batch = dataclasses.replace(at([0.3, 0.3, 0.3], [0, 0, 0]), terminated=jnp.array([False, False, True]))
    y, next_action = jnp.array([0.8, 5.0, 7.0]), jnp.array([[0.1], [0.5], [0.5]])
    lower = agent.lower_target(state, batch, y, next_action)
    loss, _ = agent.value_loss(state.params["value"], state, batch, lower)
    goal = np.minimum([0.8, 5.0, 7.0], [0.5 * 1.4, 0.5 * 2, 0])
    np.testing.assert_allclose(lower, goal, rtol=1e-6)
    assert float(loss) == pytest.approx(np.square(0.3 - goal).mean(), rel=1e-5)


# What the actor is held to


held_to = jax.jit(A2PR.held_to)


def held(state, values, actions, draws=None, agent=AGENT):
    """Returns the action that each pi(s) is pulled to, and the weight of the pull."""
    batch = at(values, actions)
    pi, draws = agent.td3.choose(state, batch.obs), draws or zeros(len(values))
    goal, gate = held_to(agent, state, batch, pi, agent.v(state, batch), draws)
    return np.asarray(goal)[:, 0].tolist(), np.asarray(gate).tolist()


CASES = {  # value, the data's action, which is its value, whether there is an advantage; the autoencoder's action is 0
    "neither": (0.3, 0.1, False),
    "the data alone": (0.3, 0.5, True),
    "the autoencoder alone": (-0.3, -0.5, True),
    "both": (-0.3, 0.5, True),
    "the data's value is the state's": (0.5, 0.5, False),
    "the autoencoder's value is the state's": (0.0, -0.5, True),
}


def test_the_pull_is_to_the_better_action_and_only_where_one_of_them_has_an_advantage():
    values, actions, advantage = zip(*CASES.values(), strict=True)
    goal, gate = held(known(), values, actions)
    assert goal == pytest.approx([max(a, 0) for a in actions])
    assert gate == pytest.approx([0.4 * x for x in advantage])  # of both still once


def test_of_equally_good_actions_the_autoencoders_is_taken():
    state = known(critic=(0, 2.0), decoder=(0, np.arctanh(-0.6)))
    goal, gate = held(state, [2.0, 2.5], [0.5, 0.5])
    assert goal == pytest.approx([-0.6, -0.6]) and gate == pytest.approx([0.4, 0])


def test_the_autoencoder_imitates_the_policys_action_with_noise_of_its_own():
    encoder = (np.array([[0, 0, 0, 0], [1, 0, 0, 0]]), 0)
    state = known(pi=0.5, encoder=encoder, decoder=([0, 1, 0], 0))
    noise = jnp.array([[0.3, 9.0]])
    goal, _ = held(state, [0.0], [-0.9], zeros(1) | {"actor_noise": noise, "vae_noise": -noise})
    assert goal == pytest.approx([math.tanh(0.5 + 0.3)])


# The actor's loss


VALUES, DATA = zip(*((value, action) for value, action, _ in CASES.values()), strict=True)
OPEN = np.array([advantage for *_, advantage in CASES.values()])


@jax.jit
def actor_graded(agent, state, batch, v, draws):
    return jax.value_and_grad(agent.actor_loss, has_aux=True)(state.params["actor"], state, batch, v, draws)


def actor_terms(agent, state, batch):
    """Returns the loss, its terms, and its slope in the action before the tanh, the layer's bias."""
    v = agent.v(state, batch)
    (loss, metrics), slope = actor_graded(agent, state, batch, v, zeros(len(batch.obs)))
    return float(loss), {name: float(x) for name, x in metrics.items()}, bias_of(slope)[0]


def test_the_actor_climbs_the_normalized_critic_and_is_pulled_where_the_gate_is_open():
    state = known(critic=([[1, 1], [0, 0]], 0))  # Q_1 = s + a
    batch = at(VALUES, DATA)
    value = dataclasses.replace(state, params=state.params | {"value": known(value=(2, 0)).params["value"]})  # V = 2 s
    loss, metrics, slope = actor_terms(AGENT, value, batch)
    q, goal = np.array(VALUES) + 0.5, np.maximum(DATA, 0)  # all advantages are as they were
    weight, gated = 1.5 / np.abs(q).mean(), 0.4 * OPEN
    assert metrics["actor/lambda"] == pytest.approx(weight, rel=1e-5)
    assert metrics["actor/bc_loss"] == pytest.approx((gated * (0.5 - goal) ** 2).mean(), rel=1e-5)
    assert metrics["actor/gate"] == pytest.approx(gated.mean(), rel=1e-5)
    assert loss == pytest.approx((gated * (0.5 - goal) ** 2).mean() - weight * q.mean(), rel=1e-5)
    assert slope == pytest.approx(((gated * 2 * (0.5 - goal)).mean() - weight) * (1 - 0.25), rel=1e-5)


def test_where_no_gate_is_open_only_the_critic_counts():
    loss, metrics, slope = actor_terms(AGENT, known(), at([0.9, 0.8] * 3, [0.1, -0.3] * 3))
    assert (loss, metrics["actor/bc_loss"], metrics["actor/gate"]) == pytest.approx((-1.5, 0, 0))
    assert slope == pytest.approx(-1.5 / 0.5 * (1 - 0.25), rel=1e-5)


def test_where_the_data_are_better_it_is_the_mask_times_the_penalty_of_td3bc():
    state, batch = (
        known(decoder=(0, np.arctanh(-0.9))),
        at([0.3, 0.3, 0.0, -0.5, 0.9, 0.9], [0.9, 0.1, 0.2, -0.2, 0, 0]),
    )
    gated = dataclasses.replace(batch, valid=jnp.array([[1.0], [0.0], [1.0], [1.0], [0.0], [0.0]]))
    plain = with_fields(TD3BC(alpha=0.0), hidden=())
    penalty, slope = jax.value_and_grad(lambda actor: plain.actor_loss(actor, state, gated)[0])(state.params["actor"])
    for detach in (False, True):
        agent = dataclasses.replace(AGENT, alpha=0.0, detach_target=detach)
        loss, _, found = actor_terms(agent, state, batch)
        assert loss == pytest.approx(0.4 * float(penalty), rel=1e-5)
        assert found == pytest.approx(0.4 * bias_of(slope)[0], rel=1e-5)


def test_without_a_mask_it_is_td3_on_a_normalized_critic():
    state, batch = known(critic=([[1, 1], [0, 0]], 0.2)), at(VALUES, DATA)
    plain = with_fields(TD3BC(alpha=1.5), hidden=())
    climb = lambda actor: plain.actor_loss(actor, state, batch)[1]["actor/q_loss"]  # noqa: E731
    wanted, slope = jax.value_and_grad(climb)(state.params["actor"])
    loss, metrics, found = actor_terms(dataclasses.replace(AGENT, mask=0.0), state, batch)
    assert loss == pytest.approx(float(wanted), rel=1e-5) and metrics["actor/bc_loss"] == 0
    assert found == pytest.approx(bias_of(slope)[0], rel=1e-5)


def test_a_critic_twice_as_large_with_its_value_changes_nothing():
    one, two = (actor_terms(AGENT, known(critic=([[0, x], [0, 0]], 0), value=(x, 0)), at(VALUES, DATA)) for x in (1, 2))
    assert two[0] == pytest.approx(one[0], rel=1e-6) and two[2] == pytest.approx(one[2], rel=1e-5)


@pytest.mark.parametrize("detach", [False, True])
def test_the_gradient_passes_through_the_autoencoders_action_unless_detached(detach):
    agent = dataclasses.replace(AGENT, alpha=0.0, mask=1.0, detach_target=detach)
    encoder = (np.array([[0, 0, 0, 0], [0.8, 0, 0, 0]]), 0)
    state = known(critic=([[0, -1], [0, 0]], 0), encoder=encoder, decoder=([0, 1.5, 0], -0.4))
    imitated = math.tanh(1.5 * 0.8 * 0.5 - 0.4)
    loss, _, slope = actor_terms(agent, state, at([-9.0] * 6, [0.9] * 6))  # the lower the action the better
    assert loss == pytest.approx((0.5 - imitated) ** 2, rel=1e-5)
    through = 0.0 if detach else 1.5 * 0.8 * (1 - imitated**2)
    assert slope == pytest.approx(2 * (0.5 - imitated) * (1 - through) * (1 - 0.25), rel=1e-4)


# An update


learn = jax.jit(A2PR.learn)


def updated(agent, state, batch):
    """Returns the state after an update with no noise, and its metrics."""
    return learn(agent, state, batch, zeros(len(batch.obs)))


def test_advantages_are_over_the_value_of_before_its_step():
    agent = with_fields(AGENT, delay=1, value_adam=Adam(1.0), critic_adam=Adam(0.0))
    state = known(value=(0, 0), agent=agent, target={"critic": (0, 50.0)}, critic=([[0, 1], [0, 0]], 0))
    state = dataclasses.replace(state, params=state.params | {"critic": known(critic=([[0, 1]], 0)).params["critic"]})
    batch = dataclasses.replace(at([0.0, 0.0], [0.5, 0.5]), rewards=jnp.full((2, 1), 9.0))
    after, metrics = updated(agent, state, batch)
    assert float(agent.v(after, batch).min()) > 0.9  # above the value of 0.5 that the action has
    assert float(metrics["vae/share"]) == 1 and float(metrics["actor/gate"]) == pytest.approx(0.4)


def test_value_autoencoder_and_actor_see_the_critics_after_their_step():
    agent = with_fields(AGENT, delay=1, value_adam=Adam(0.0), critic_adam=Adam(1.0), discount=0.5)
    state = known(value=(0, 0.5), critic=(0, 0), agent=agent, target={"critic": (0, 50.0)})
    batch = dataclasses.replace(at([0.0, 0.0], [0.0, 0.0]), rewards=jnp.full((2, 1), 9.0))
    after, metrics = updated(agent, state, batch)
    q = float(agent.td3.first_q(after, batch, batch.actions[:, 0])[0])
    assert q == pytest.approx(1, rel=1e-3)  # one step of Adam from 0
    assert float(metrics["value/loss"]) == pytest.approx((9 + 0.5 * q - 0.5) ** 2, rel=1e-5)  # not towards 9 + 25
    assert float(metrics["vae/share"]) == 1 and float(metrics["actor/gate"]) == pytest.approx(0.4)
    assert float(metrics["actor/lambda"]) == pytest.approx(1.5 / q, rel=1e-5)


def test_the_autoencoder_is_updated_before_the_actor_and_by_its_own_loss_alone():
    rates = {"vae_adam": Adam(0.3), "critic_adam": Adam(0.0), "value_adam": Adam(0.0)}
    agent = with_fields(AGENT, delay=1, alpha=0.0, mask=1.0, **rates)
    state = known(agent=agent, encoder=(0.1, 0), decoder=([0, 0.2, 0.2], 0))
    batch = at([-9.0, -9.0], [0.4, 0.4])
    after, metrics = updated(agent, state, batch)
    whole = dataclasses.replace(state, params=state.params | {"vae": after.params["vae"]})
    goal, _ = held(whole, [-9.0, -9.0], [0.4, 0.4], agent=agent)
    assert goal != pytest.approx(held(state, [-9.0, -9.0], [0.4, 0.4], agent=agent)[0], abs=0.01)
    assert float(metrics["actor/bc_loss"]) == pytest.approx(np.square(0.5 - np.array(goal)).mean(), rel=1e-5)
    _, _, slope = vae_terms(state, batch, [-9.0, -9.0], agent=agent)
    for x, y, g in zip(*map(jax.tree.leaves, (state.params["vae"], after.params["vae"], slope)), strict=True):
        np.testing.assert_allclose(y - x, -0.3 * np.sign(g) * (np.abs(g) > 0), atol=1e-3)


def test_every_random_number_of_an_update_is_its_own():
    draws = AGENT.draw(Spec(3, 2), random_batch(0, 2000, 1), KEY)
    assert {name: x.shape for name, x in draws.items()} == {
        "target_noise": (2000, 2),
        "vae_noise": (2000, 4),
        "actor_noise": (2000, 4),
    }
    columns = np.concatenate([np.asarray(x) for x in draws.values()], axis=1)
    np.testing.assert_allclose(np.cov(columns, rowvar=False), np.eye(10), atol=0.12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vae": Autoencoder((8, 0))}, "vae.hidden = (8, 0): must be at least 1"),
        *(({name: -1.0}, f"{name} = -1.0: must be at least 0") for name in ("alpha", "mask", "vae_weight")),
        *(({name: Adam(-1.0)}, f"{name}.lr = -1.0: must be at least 0") for name in ("value_adam", "vae_adam")),
        ({"value": Value(head="bce")}, "value.head = 'bce': must be that of td3.critic.head, 'mse'"),
    ],
)
def test_values_that_do_not_fit_are_refused_by_name(fields, message):
    with pytest.raises(UserError, match=re.escape(f"A2PR.{message}")):
        ranges.check(A2PR(**fields))
