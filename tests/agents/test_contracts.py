"""The contract that every agent in jaxrl.agents.AGENTS fulfils, in each of its phases."""

import dataclasses
import functools
import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs.point import BUMPS, Bandit
from jaxrl import ranges
from jaxrl.agents import AGENTS
from jaxrl.data.files import Dataset
from jaxrl.errors import UserError
from jaxrl.ops.closed_form import ClosedForm
from jaxrl.replay import ring as rings
from jaxrl.replay.hindsight import Goals
from jaxrl.replay.loading import from_dataset
from jaxrl.training.loop import on_device
from jaxrl.types import Agent, Phase, Spec, Staged
from tests.known import KEY, WIDE, random_batch, same, some_data, values_of, with_fields

pytestmark = pytest.mark.usefixtures("quick")

TASKS = Spec(observation=5, action=2, goal=2)
SMALL = {
    "hidden": (32, 32),
    "chunk": 3,
    "backup": 3,
    "batch": 16,
    "num_samples": 4,
    "target_samples": 4,
    "warmup": 0,
    "curriculum": 4,
}
OFFLINE = Phase("offline", epochs=1, iterations=1, collects=False, updates=1, data="dataset")
ONLINE = Phase("online", epochs=1, iterations=1, collects=True, updates=1)


def small(name: str, **fields):
    """Returns an agent with tiny networks, few samples and short schedules, and with these fields, its parts' too."""
    return on_device(changed(AGENTS[name](), **(SMALL | fields)))


def changed(agent, **fields):
    """Returns an agent with these fields, its parts' too; those that it does not have are ignored."""
    return with_fields(agent, **{name: value for name, value in fields.items() if values_of(agent, name)})


def entered(agent, state, phase: Phase):
    """Returns the state at the start of a phase."""
    return agent.enter(state, phase) if isinstance(agent, Staged) else state


def period(agent) -> int:
    """Returns how many updates there are per update of the actor."""
    return max(values_of(agent, "delay"), default=1)


PHASES = [
    (name, phase) for name, cls in AGENTS.items() for phase in ("offline", "online")[: 1 + isinstance(cls(), Staged)]
]
every_agent = pytest.mark.parametrize("name", AGENTS)
every_phase = pytest.mark.parametrize(("name", "phase"), PHASES)


@functools.cache
def compiled(name: str) -> types.SimpleNamespace:
    """Returns the agent's methods, jitted with the agent as an argument, once for all tests.

    `traced` has one entry for each time that its update was traced.
    """
    cls, traced = AGENTS[name], []

    def update(agent, state, batch, key, data):
        traced.append(name)
        return cls.update(agent, state, batch, key, data)

    program = jax.jit(update)
    return types.SimpleNamespace(
        init=jax.jit(cls.init, static_argnums=2),
        update=lambda agent, state, batch, key: program(agent, state, batch, key, (some_data(state.spec),)),
        act=jax.jit(cls.act, static_argnames="greedy"),
        traced=traced,
    )


@functools.cache
def started(name: str, phase: str):
    """Returns an agent and its state after a few updates, in the phase."""
    agent, methods = small(name), compiled(name)
    state = entered(agent, methods.init(agent, KEY, WIDE), OFFLINE)
    for i in range(2):
        state, _ = methods.update(agent, state, random_batch(i), jax.random.key(i))
    return agent, entered(agent, state, ONLINE) if phase == "online" else state


def close(a, b, **tolerance) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


# Shape of an agent


@every_agent
def test_it_is_an_agent_of_frozen_fields_whose_defaults_pass_its_own_check(name):
    agent = AGENTS[name]()
    assert isinstance(agent, Agent)
    ranges.check(agent)
    with pytest.raises(dataclasses.FrozenInstanceError):
        agent.chunk = 2


@every_agent
@pytest.mark.parametrize("field", ["chunk", "batch"])
def test_it_refuses_a_size_of_zero_by_name(name, field):
    agent = AGENTS[name]()
    if not values_of(agent, field):
        pytest.skip("decides on single actions only")
    with pytest.raises(UserError, match=rf"^{type(agent).__name__}(\.\w+)*\.{field} = 0: must be at least 1$"):
        ranges.check(with_fields(agent, **{field: 0}))


@every_agent
def test_its_numbers_are_leaves_and_its_sizes_are_not(name):
    leaves = jax.tree.leaves(AGENTS[name]())
    assert leaves and all(type(leaf) is float for leaf in leaves)


@every_agent
def test_its_initial_state_depends_on_the_key_alone(name):
    agent, init = small(name), compiled(name).init
    one, again, other = init(agent, KEY, WIDE), init(agent, KEY, WIDE), init(agent, jax.random.key(1), WIDE)
    assert same(one, again) and not same(one, other)


@every_agent
def test_it_samples_windows_of_its_own_sizes(name):
    agent = small(name)
    ids = np.arange(40, dtype=np.float32)
    data = Dataset(np.repeat(ids[:, None], 3, 1), np.repeat(ids[:, None], 2, 1) / 40, np.arange(40) % 20 == 19)
    ring = from_dataset(data, ids, np.zeros(40, bool))
    batch = jax.jit(AGENTS[name].sample)(agent, (ring,), KEY)
    assert batch.actions.shape == (16, agent.chunk, 2) and len(np.unique(batch.obs[:, 0])) > 8
    np.testing.assert_array_equal(batch.next_obs[:, 0], batch.obs[:, 0] + batch.valid.sum(axis=1))
    np.testing.assert_allclose(batch.actions[:, 0, 0], batch.obs[:, 0] / 40, rtol=1e-6)


# Updates


@every_phase
def test_an_update_is_deterministic_and_leaves_its_input_alone(name, phase):
    (agent, state), update = started(name, phase), compiled(name).update
    before = jax.tree.map(np.array, state)
    after, metrics = update(agent, state, random_batch(2), KEY)
    again, metrics_again = update(agent, state, random_batch(2), KEY)
    assert same(after, again) and same(metrics, metrics_again)
    assert same(before, jax.tree.map(np.asarray, state))
    assert not same(after.params, state.params)
    other, _ = update(agent, state, random_batch(2), jax.random.key(5))
    assert same(after.params, other.params) is (name in ("iql", "odice"))  # whose losses are no average over any noise


@every_phase
def test_a_state_keeps_its_structure_so_that_it_can_be_scanned(name, phase):
    agent, state = started(name, phase)
    after, _ = jax.eval_shape(compiled(name).update, agent, state, random_batch(0), KEY)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        assert (x.shape, x.dtype, getattr(x, "weak_type", False)) == (y.shape, y.dtype, getattr(y, "weak_type", False))


@every_phase
def test_metrics_are_finite_numbers_with_a_group(name, phase):
    (agent, state), rows = started(name, phase), []
    for _ in range(period(agent)):  # what only some updates do is NaN in the others
        state, metrics = compiled(name).update(agent, state, random_batch(3), KEY)
        rows.append(metrics)
    assert metrics and all("/" in key for key in metrics)
    for key in metrics:
        assert all(row[key].shape == () for row in rows) and np.isfinite([row[key] for row in rows]).any()
    assert all(np.isfinite(value) for value in rows[-1].values())


@every_phase
def test_many_values_of_its_scalars_are_one_program(name, phase):
    agent, state = started(name, phase)
    update, traced = compiled(name).update, compiled(name).traced
    outcomes = [update(agent, state, random_batch(4), KEY)[0]]
    before = len(traced)
    for factor in (0.9, 0.5):
        other = jax.tree.map(lambda x, factor=factor: x * factor, agent)
        outcomes.append(update(other, state, random_batch(4), KEY)[0])
    assert len(traced) == before
    assert not same(outcomes[0], outcomes[1]) and not same(outcomes[1], outcomes[2])


@every_phase
def test_a_member_of_a_sweep_learns_what_it_would_alone(name, phase):
    agent, state = started(name, phase)
    members = [jax.tree.map(lambda x, factor=factor: x * factor, agent) for factor in (1.0, 0.5)]
    stack = lambda *leaves: jnp.stack(leaves)  # noqa: E731
    keys = jax.random.split(KEY, 2)
    together = jax.jit(jax.vmap(compiled(name).update, in_axes=(0, None, None, 0)))
    states, metrics = together(jax.tree.map(stack, *members), state, random_batch(5), keys)
    for i, member in enumerate(members):
        alone = compiled(name).update(member, state, random_batch(5), keys[i])
        close(jax.tree.map(lambda x, i=i: x[i], (states, metrics)), alone, rtol=1e-4, atol=2e-5)


@every_phase
def test_four_updates_are_two_and_then_two(name, phase):
    (agent, state), keys = started(name, phase), jax.random.split(KEY, 4)
    batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[random_batch(i) for i in range(4)])

    @jax.jit
    def train(agent, state, keys, batches):
        data = (some_data(WIDE),)
        return jax.lax.scan(lambda state, x: agent.update(state, x[1], x[0], data), state, (keys, batches))[0]

    two = train(agent, state, keys[:2], jax.tree.map(lambda x: x[:2], batches))
    stored = jax.device_put(jax.tree.map(np.asarray, two))  # all that goes on is in the state
    rest = train(agent, stored, keys[2:], jax.tree.map(lambda x: x[2:], batches))
    assert same(rest, train(agent, state, keys, batches))


@every_phase
def test_windows_without_any_valid_step_teach_nothing(name, phase):
    agent, state = started(name, phase)
    fresh = dataclasses.replace(state, opt=jax.tree.map(jnp.zeros_like, state.opt))  # no momentum
    batch = random_batch(6)
    void = {"valid": jnp.zeros_like(batch.valid), "terminated": jnp.zeros_like(batch.terminated)}
    agent = on_device(changed(agent, weight_decay=0.0))  # which needs no data
    for _ in range(period(agent)):
        fresh, _ = compiled(name).update(agent, fresh, dataclasses.replace(batch, **void), KEY)
    assert same(fresh.params, state.params)


@every_phase
def test_termination_cuts_the_bootstrap_and_truncation_does_not(name, phase):
    (agent, state), update = started(name, phase), compiled(name).update
    batch = random_batch(7, probabilities=True)
    metrics = update(agent, state, batch, KEY)[1]
    loss_name = next((name for name in ("chunk_critic/loss", "critic/loss", "value/loss") if name in metrics), None)
    if loss_name is None:
        pytest.skip("has no critic")

    def loss(terminated: bool, next_obs) -> float:
        windows = dataclasses.replace(
            batch, valid=jnp.ones_like(batch.valid), terminated=jnp.full(16, terminated), next_obs=next_obs
        )
        return float(update(agent, state, windows, KEY)[1][loss_name])

    elsewhere = batch.next_obs + 3
    assert loss(True, batch.next_obs) == loss(True, elsewhere)
    assert abs(loss(False, batch.next_obs) - loss(False, elsewhere)) > 1e-4


@every_phase
def test_a_slow_target_is_moved_by_tau_alone(name, phase):
    agent, state = started(name, phase)
    if not values_of(agent, "tau"):
        pytest.skip("has no target")
    frozen, copied = (on_device(with_fields(agent, tau=tau)) for tau in (0.0, 1.0))
    state = dataclasses.replace(state, target=jax.tree.map(lambda x: x + 1, state.target))
    still = whole = state
    for _ in range(period(agent)):
        still, _ = compiled(name).update(frozen, still, random_batch(8), KEY)
        whole, _ = compiled(name).update(copied, whole, random_batch(8), KEY)
    assert same(still.target, state.target) and not same(whole.target, state.target)


# Acting


@every_phase
@pytest.mark.parametrize("greedy", [False, True])
def test_actions_are_chunks_in_the_box_and_the_key_alone_is_chance(name, phase, greedy):
    (agent, state), act = started(name, phase), compiled(name).act
    obs = jnp.asarray(np.random.default_rng(0).normal(size=(7, 3)), jnp.float32)
    action = act(agent, state, obs, KEY, greedy=greedy)
    assert action.shape == (7, agent.chunk, 2) and action.dtype == jnp.float32
    assert float(jnp.abs(action).max()) <= 1 and len(np.unique(action)) > 7
    np.testing.assert_array_equal(act(agent, state, obs, KEY, greedy=greedy), action)
    assert not np.array_equal(act(agent, state, obs, jax.random.key(1)), act(agent, state, obs, KEY))


# Settings that some agents have


def having(*fields: str, method: str = "init"):
    """Returns the mark that runs a test for every agent that has a method and, itself or in a part, these fields."""
    having = {name: cls for name, cls in AGENTS.items() if all(values_of(cls(), field) for field in fields)}
    names = [name for name, cls in having.items() if method in vars(cls)]
    assert names
    return pytest.mark.parametrize("name", names)


@having("chunk", "backup")
def test_a_backup_shorter_than_the_chunk_is_refused_by_name(name):
    cls = AGENTS[name]
    with pytest.raises(UserError, match=rf"^{cls.__name__}\.(\w+\.)?windows\.backup = 3: must be at least 4"):
        ranges.check(with_fields(cls(), chunk=4, backup=3))
    ranges.check(with_fields(cls(), chunk=4, backup=4))


@having("backup", "critic")
def test_single_actions_learn_from_returns_of_several_steps(name):
    agent = small(name, chunk=1, backup=4)
    batch = random_batch(0, length=4, probabilities=True)
    state = jax.jit(agent.init, static_argnums=1)(KEY, WIDE)
    update = jax.jit(agent.update)
    after, metrics = update(state, batch, KEY)
    assert not same(after.params, state.params) and all(np.isfinite(value) for value in metrics.values())
    losses = [name for name in metrics if name.endswith("critic/loss")]
    last = dataclasses.replace(batch, rewards=batch.rewards.at[:, 3].add(0.3 * batch.valid[:, 3]))
    rewarded = update(state, last, KEY)[1]
    assert any(abs(float(rewarded[name] - metrics[name])) > 1e-4 for name in losses)
    assert agent.act(state, jnp.zeros((7, 3)), KEY).shape == (7, 1, 2)


@having("head", "backup", method="td_target")
def test_probabilities_are_learned_from_targets_that_are_probabilities(name):
    agent = small(name, head="bce")
    state, batch = jax.jit(agent.init, static_argnums=1)(KEY, WIDE), random_batch(0)  # rewards of any size

    @jax.jit
    def learned(state, batch):
        draws = agent.draw(WIDE, batch, KEY)
        more = [draws] if "draws" in inspect.signature(agent.td_target).parameters else []
        return agent.td_target(state, batch, *more), agent.learn(state, batch, draws)

    target, (after, metrics) = learned(state, batch)
    assert float(target.min()) == 0 and float(target.max()) == 1 and len(np.unique(target)) > 4
    assert all(np.isfinite(value) for value in metrics.values()) and not same(after.params, state.params)


# Tasks with goals


@functools.cache
def pursuing(name: str):
    """Returns an agent of a task with goals, its state after an update and how it acts."""
    agent, batch = small(name), random_batch(0, spec=TASKS, probabilities=True)

    methods = compiled(name)
    first = state = entered(agent, methods.init(agent, KEY, TASKS), OFFLINE)
    for _ in range(period(agent)):
        state, metrics = methods.update(agent, state, batch, KEY)
    return agent, first, state, metrics, functools.partial(methods.act, agent)


def with_goals(goal: float) -> jax.Array:
    """Returns 20 observations of a task with goals, all towards one goal."""
    obs = np.random.default_rng(0).normal(size=(20, 5))
    obs[:, 3:] = goal
    return jnp.asarray(obs, jnp.float32)


@every_agent
def test_an_agent_learns_and_acts_in_a_task_with_goals(name):
    agent, before, after, metrics, act = pursuing(name)
    assert not same(before.params, after.params) and all(np.isfinite(value) for value in metrics.values())
    action = act(after, with_goals(2.0), KEY)
    assert action.shape == (20, agent.chunk, 2) and float(jnp.abs(action).max()) <= 1
    assert not np.array_equal(action, act(after, with_goals(-2.0), KEY))


@pytest.mark.parametrize("name", ["qgf", "fql", "qc", "dqc"])
def test_a_behaviour_does_not_see_the_goal(name):
    agent, before, after, _, _ = pursuing(name)
    noise = jax.random.normal(KEY, (20, 6))
    play = jax.jit(lambda obs: agent.flow.sample(after.params["flow"], TASKS.behaviour(obs), noise))
    one = play(with_goals(2.0))
    np.testing.assert_array_equal(one, play(with_goals(-2.0)))
    assert np.abs(one - play(with_goals(2.0) + 1)).max() > 1e-3  # but it sees the rest
    batch = random_batch(0, spec=TASKS, probabilities=True)
    elsewhere = dataclasses.replace(batch, obs=batch.obs.at[:, 3:].add(1.0))
    learned, _ = compiled(name).update(agent, before, elsewhere, KEY)
    assert same(learned.params["flow"], after.params["flow"])
    assert not same(learned.params, after.params)


@having("goals")
def test_goals_are_drawn_by_the_agents_own_law(name):
    rows = np.arange(40, dtype=np.float32)[:, None]
    data = Dataset(rows, rows / 40, np.arange(40) % 20 == 19)
    nothing = np.zeros(40, bool)
    ring = from_dataset(data, nothing, nothing, goals=10 * rows)
    for law, reached in ((Goals(current=1.0, future=0.0), True), (Goals(current=0.0, future=0.0), False)):
        agent = on_device(with_fields(small(name), goals=law))
        batch = jax.jit(agent.sample)((ring,), KEY)
        assert batch.obs.shape == (16, 2) and batch.actions.shape == (16, agent.chunk, 1)
        assert (batch.obs[:, 1] == 10 * batch.obs[:, 0]).all() == reached
        np.testing.assert_array_equal(batch.next_obs[:, 1], batch.obs[:, 1])


# Learning


def bandit_data() -> rings.Ring:
    """Returns 1000 episodes of the bandit, half at each bump."""
    rng = np.random.default_rng(0)
    actions = np.repeat(rng.choice(BUMPS, 1000) + rng.uniform(-0.2, 0.2, 1000), 2)[:, None].astype(np.float32)
    data = Dataset(np.ones((2000, 1), np.float32), actions, np.arange(2000) % 2 == 1)
    rewards, terminated = Bandit().relabel(data.observations, data.actions, data.observations)
    return from_dataset(data, np.asarray(rewards), np.asarray(terminated))


@functools.cache
def bandit_player(name: str) -> dict[str, np.ndarray]:
    """Returns 1000 actions of the agent before and after learning from the data, in each of its phases."""
    fields = {"chunk": 1, "backup": 1, "batch": 128, "num_samples": 16, "target_samples": 1, "curriculum": 500}
    near = ClosedForm(delta=0.01, delta_high=0.01)  # a bump is narrow
    judgement = {"eta": 0.1, "temperature": 0.1, "max_weight": 1e6, "trade": 0.5, "operator": near}  # of small rewards
    agent, data = small(name, **fields, lr=3e-3, **judgement), bandit_data()

    @functools.partial(jax.jit, static_argnums=2)
    def train(agent, state, updates):
        def step(state, key):
            key_batch, key_step = jax.random.split(key)
            return agent.update(state, agent.sample((data,), key_batch), key_step, (data,))[0], None

        return jax.lax.scan(step, state, jax.random.split(KEY, updates))[0]

    play = lambda state: np.asarray(act(agent, state, jnp.ones((1000, 1)), KEY)).ravel()  # noqa: E731
    init, act = compiled(name).init, compiled(name).act
    state = entered(agent, init(agent, KEY, Bandit().spec), OFFLINE)
    actions = {"untrained": play(state)}
    state = train(agent, state, 1000)
    actions["offline"] = play(state)
    if isinstance(agent, Staged):
        actions["online"] = play(train(agent, agent.enter(state, ONLINE), 500))
    return actions


def share(actions: np.ndarray, bump: float) -> float:
    """Returns the share of the actions that lie at a bump."""
    return float((np.abs(actions - bump) < 0.25).mean())


@every_phase
def test_it_earns_more_at_the_bandit_than_before_learning(name, phase):
    actions = bandit_player(name)
    earned = {when: float(Bandit().relabel(None, a[:, None], None)[0].mean()) for when, a in actions.items()}
    assert earned[phase] > earned["untrained"] + 0.2


def test_behaviour_cloning_keeps_both_bumps_of_the_data():
    both, before = ([share(bandit_player("bc")[when], bump) for bump in BUMPS] for when in ("offline", "untrained"))
    assert min(both) > 0.3 and sum(both) > 0.75 > 2 * sum(before)


def test_fmq_plays_the_higher_bump():
    actions = {when: share(played, max(BUMPS)) for when, played in bandit_player("fmq").items()}
    assert actions["untrained"] < 0.75 and actions["offline"] > 0.95 and actions["online"] > 0.98
