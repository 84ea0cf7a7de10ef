"""Facts about jaxrl.agents.rebrac, with networks of one layer, so that every number is known by hand."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import ranges
from jaxrl.agents import TD3BC, ReBRAC, learner
from jaxrl.agents.parts import Adam
from jaxrl.data.files import Dataset
from jaxrl.errors import UserError
from jaxrl.replay import ring as rings
from jaxrl.replay.loading import from_dataset
from jaxrl.types import Spec
from tests.known import KEY, WIDE, batch_of, bias_of, one_layer_each, random_batch, same, with_fields

pytestmark = pytest.mark.usefixtures("quick")

PAIR = Spec(observation=1, action=2)
AGENT = with_fields(ReBRAC(beta_actor=0.3, beta_critic=0.2), hidden=(), discount=0.5)
TRUNCATED = {"followed": [0.0], "next_action": [[9.0, 9.0]]}
window_at = jax.jit(rings.window_at, static_argnums=3)
learn = jax.jit(lambda agent, *update: agent.learn(*update))


def known(pi=(0.5, -0.2), critic=([[0, 1, 0], [0, 0, 1]], (2, 2)), spec=PAIR):
    """Returns the state with pi(s) = `pi`, by default Q_1 = 2 + a_1 and Q_2 = 2 + a_2, and slow copies of them."""
    return one_layer_each(AGENT, spec, actor=(0, np.arctanh(pi)), critic=critic)


def transitions(count=1, **fields):
    """Returns transitions with reward 1 that are followed by the action (0.1, 0.2)."""
    more = {"actions": np.zeros((count, 1, 2)), "next_action": [[0.1, 0.2]] * count, "followed": [1.0] * count}
    return batch_of(np.ones((count, 1)), **(more | fields))


def critic_loss(agent, state, batch) -> float:
    """Returns the critics' loss in an update without noise."""
    draws = {"target_noise": jnp.zeros((len(batch.obs), state.spec.action))}
    return float(learn(agent, state, batch, draws)[1]["critic/loss"])


# The critics (Eq. 3)


def test_the_target_is_lowered_by_the_squared_distance_to_the_datas_next_action_summed_over_entries():
    state, batch = known(), transitions()
    y = 1 + 0.5 * (min(2.5, 1.8) - 0.2 * (0.4**2 + 0.4**2))
    assert critic_loss(AGENT, state, batch) == pytest.approx(2 * (2 - y) ** 2, rel=1e-5)
    noisy = AGENT.penalty(batch, AGENT.td3.noisy(jnp.array([[0.5, -0.2]]), jnp.array([[1.0, -9.0]]), 0.2))
    np.testing.assert_allclose(noisy, [0.2 * (0.6**2 + 0.9**2)], rtol=1e-5)  # of the noisy action


def test_a_task_that_is_over_has_neither_bootstrap_nor_penalty_and_counts():
    batch = transitions(terminated=[True], **TRUNCATED)
    assert critic_loss(AGENT, known(), batch) == pytest.approx(2 * (2 - 1) ** 2)


def test_a_transition_without_a_next_action_trains_the_actor_and_not_the_critics():
    alone, cut = transitions(), transitions(**TRUNCATED)
    assert critic_loss(AGENT, known(), cut) == 0
    both = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), alone, cut)
    assert critic_loss(AGENT, known(), both) == pytest.approx(critic_loss(AGENT, known(), alone) / 2)
    ours, others = (AGENT.actor_loss(known().params["actor"], known(), batch)[0] for batch in (alone, cut))
    assert float(ours) == float(others) != 0
    never = dataclasses.replace(cut, valid=jnp.zeros((1, 1)), terminated=jnp.ones(1, bool))
    assert critic_loss(AGENT, known(), never) == 0


def test_without_penalties_it_is_td3_on_a_normalized_critic():
    agent = dataclasses.replace(AGENT, beta_actor=0.0, beta_critic=0.0)
    state, batch = known(), transitions()
    plain = with_fields(TD3BC(alpha=1.0), hidden=(), discount=0.5)
    assert critic_loss(agent, state, batch) == pytest.approx(critic_loss(plain, state, batch))
    graded = lambda loss, state: jax.value_and_grad(loss)(state.params["actor"], state, batch)  # noqa: E731
    loss, slope = graded(lambda *inputs: agent.actor_loss(*inputs)[0], state)
    lower = known(critic=([[0, 0, 1]], 2))  # both critics, so that the first is the lower
    wanted, theirs = graded(lambda *inputs: plain.actor_loss(*inputs)[1]["actor/q_loss"], lower)
    assert float(loss) == pytest.approx(float(wanted)) == pytest.approx(-1.0)
    for x, y in zip(jax.tree.leaves(slope), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


# The actor (Eq. 4)


def test_the_actor_climbs_the_lower_critic_over_its_mean_size_and_is_held_by_a_sum_over_entries():
    batch = transitions(2, obs=[[0.0], [-5.0]], actions=[[[0.9, 0.1]], [[0.1, -0.2]]])
    state = known(critic=([[1, 1, 0], [1, 0, 1]], (2, 2)))
    (loss, metrics), slope = jax.value_and_grad(AGENT.actor_loss, has_aux=True)(state.params["actor"], state, batch)
    q = np.array([1.8, -3.2])  # 2 + a_2 + s
    apart = np.array([[-0.4, -0.3], [0.4, 0.0]])
    assert float(metrics["actor/lambda"]) == pytest.approx(1 / 2.5)
    held = 0.3 * np.square(apart).sum(axis=1).mean()
    assert float(metrics["actor/bc_loss"]) == pytest.approx(held, rel=1e-5)
    assert float(loss) == pytest.approx(held - q.mean() / 2.5, rel=1e-5)
    wanted = (0.3 * 2 * apart.mean(axis=0) - np.array([0, 1 / 2.5])) * (1 - np.square([0.5, -0.2]))
    np.testing.assert_allclose(bias_of(slope), wanted, rtol=1e-5, atol=1e-7)
    mean = with_fields(TD3BC(), hidden=()).actor_loss(state.params["actor"], state, batch)[1]["actor/bc_loss"]
    assert held == pytest.approx(0.3 * 2 * float(mean), rel=1e-5)  # a factor of the action's two entries


# The next action


ENDS = np.isin(np.arange(12), (3, 8, 11))  # the closing rows of three episodes, the first of which the task ended


def data(noise=0.0) -> rings.Ring:
    """Returns three episodes in which row i takes the action i / 20; closing rows, that take none, something else."""
    actions = np.where(ENDS, 0.99 - noise, np.arange(12) / 20)[:, None].astype(np.float32)
    dataset = Dataset(np.arange(12, dtype=np.float32)[:, None], actions, ENDS)
    return from_dataset(dataset, np.ones(12), np.arange(12) == 2)


def test_the_next_action_is_the_next_rows_and_there_is_none_where_an_episode_ends():
    start = np.flatnonzero(~ENDS)
    batch = window_at(data(), jnp.zeros_like(start), start, 1)
    last = np.isin(start, (2, 7, 10))
    np.testing.assert_array_equal(batch.followed, 1 - last)
    np.testing.assert_allclose(batch.next_action[~last, 0], (start[~last] + 1) / 20, rtol=1e-6)
    np.testing.assert_array_equal(batch.next_obs[:, 0], start + 1)
    np.testing.assert_array_equal(batch.terminated, start == 2)
    longer = window_at(data(), jnp.zeros(3, int), jnp.array([0, 1, 4]), 2)
    np.testing.assert_array_equal(longer.followed, [1, 0, 1])
    np.testing.assert_allclose(longer.next_action[::2, 0], [0.1, 0.3], rtol=1e-6)


def test_there_is_no_next_action_where_a_ring_writes_next():
    steps = rings.Steps(
        obs=jnp.arange(4.0).reshape(1, 4, 1),
        actions=jnp.arange(3.0).reshape(1, 3, 1) / 10,
        rewards=jnp.ones((1, 3)),
        **dict.fromkeys(("terminated", "truncated"), jnp.zeros((1, 3), bool)),
        **dict.fromkeys(("valid", "taken"), jnp.ones((1, 3), bool)),
        ended=jnp.zeros(1, bool),
    )
    add = jax.jit(rings.add)
    ring = add(add(rings.empty(1, 6, Spec(1, 1)), steps), steps)  # six steps, of which five rows are left
    batch = window_at(ring, jnp.zeros(5, int), jnp.arange(5), 1)
    np.testing.assert_array_equal(batch.followed, [1, 1, 1, 1, 0])
    np.testing.assert_allclose(batch.actions[:, 0, 0], [0.1, 0.2, 0.0, 0.1, 0.2], atol=1e-7)
    np.testing.assert_allclose(batch.next_action[:4, 0], [0.2, 0.0, 0.1, 0.2], atol=1e-7)


def test_goals_in_hindsight_leave_the_next_action_to_the_episode():
    nothing = np.zeros(12, bool)
    dataset = Dataset(np.arange(12, dtype=np.float32)[:, None], np.arange(12, dtype=np.float32)[:, None] / 20, ENDS)
    ring = from_dataset(dataset, nothing, nothing, goals=dataset.observations)
    batch = jax.jit(functools.partial(rings.windows, batch=64, length=1))((ring,), KEY)
    row = np.asarray(batch.next_obs[:, 0]).astype(int)
    np.testing.assert_array_equal(batch.followed, ~ENDS[row])
    np.testing.assert_allclose(batch.next_action[:, 0], row / 20, rtol=1e-6)
    assert 0 < batch.followed.sum() < 64


def test_no_loss_depends_on_an_action_that_was_not_taken():
    start = np.flatnonzero(~ENDS)
    agent = dataclasses.replace(AGENT, beta_critic=5.0)
    state = one_layer_each(agent, critic=([[0.1, 1], [0.2, 2]], 0.5))
    one, other = (
        critic_loss(agent, state, window_at(data(noise), jnp.zeros_like(start), start, 1)) for noise in (0.0, 1.5)
    )
    assert one == other > 0


# The order of FQL's authors


def test_one_optimiser_moves_the_actor_on_its_momentum_in_updates_that_do_not_train_it():
    agent = with_fields(AGENT, joint=True, actor_adam=Adam(0.01), critic_adam=Adam(0.0), tau=0.25)
    start, update = one_layer_each(agent, WIDE, critic=([[1, 2, 3, -2, 1], [3, 2, 1, 1, -2]], 0)), jax.jit(agent.update)
    states = [dataclasses.replace(start, target=jax.tree.map(lambda x: x + 1, start.target))]
    for i in range(3):
        states.append(update(states[-1], random_batch(i, length=1), KEY)[0])
    moved = [not same(x.params["actor"], y.params["actor"]) for x, y in itertools.pairwise(states)]
    assert moved == [False, True, True]  # it is trained in the second alone
    followed = [not same(x.target, y.target) for x, y in itertools.pairwise(states)]
    assert followed == [False, True, False]
    lagging = jax.tree.map(lambda slow, fast: 0.75 * slow + 0.25 * fast, states[1].target, states[1].params)
    for x, y in zip(jax.tree.leaves(states[2].target), jax.tree.leaves(lagging), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)  # of before the step
    first, second = (jax.tree.leaves(state.params["critic"]) for state in states[:2])
    for x, y in zip(first, second, strict=True):
        np.testing.assert_allclose(np.abs(x - y), np.full(x.shape, 0.01), rtol=1e-3)  # the one rate is the actor's
    assert jax.tree.structure(states[0].opt) == jax.tree.structure(states[3].opt)


def test_errors_are_averaged_over_the_critics_there():
    joint = dataclasses.replace(AGENT, joint=True)
    started = one_layer_each(joint, PAIR, actor=(0, np.arctanh((0.5, -0.2))), critic=([[0, 1, 0], [0, 0, 1]], (2, 2)))
    assert critic_loss(joint, started, transitions()) == pytest.approx(critic_loss(AGENT, known(), transitions()) / 2)


@pytest.mark.parametrize("name", ["beta_actor", "beta_critic"])
def test_a_negative_penalty_is_refused_by_name(name):
    with pytest.raises(UserError, match=re.escape(f"ReBRAC.{name} = -1.0: must be at least 0")):
        ranges.check(ReBRAC(**{name: -1.0}))


def test_observations_stay_as_they_are_unless_asked():
    state, asked = known(), with_fields(AGENT, normalize=True)
    assert AGENT.fit(state, (data(),)) is state
    assert float(asked.fit(state, (data(),)).normalizer.mean[0]) == pytest.approx(np.arange(12)[~ENDS].mean())
    assert same(learner.normalized(state, transitions()).obs, transitions().obs)
