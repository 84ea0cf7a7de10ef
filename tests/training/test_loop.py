"""Facts about jaxrl.training.loop: what a schedule amounts to, what an epoch does and counts."""

import dataclasses
import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs.point import Point
from jaxrl.agents import FMQ
from jaxrl.data.files import Dataset
from jaxrl.errors import UserError
from jaxrl.replay import ring as rings
from jaxrl.replay.loading import from_dataset
from jaxrl.replay.ring import windows
from jaxrl.training import loop
from jaxrl.training.schedule import Schedule, Timeline, phases
from jaxrl.types import Phase, PyTree, Scalar, Spec, pytree
from tests import tiny
from tests.known import with_fields

KEY = jax.random.key(0)
ELSEWHERE = 50.0  # the data's observations, where no environment ever is


@pytree
class ToyState:
    w: jax.Array  # [A]
    anchor: jax.Array | None = None
    begun: int | jax.Array = 0  # how many phases it was told of


@pytree
class Toy:
    """The cheapest agent there is: it acts by a weight that drifts, and its metrics describe its batch."""

    chunk: int = 2
    rate: Scalar = 0.125
    noise: Scalar = 0.0

    def init(self, key: jax.Array, spec: Spec) -> ToyState:
        return ToyState(jax.random.normal(key, (spec.action,)), begun=jnp.zeros((), jnp.int32))

    def sample(self, data, key):
        return windows(data, key, 8, self.chunk)

    def update(self, state, batch, key, data=()):
        w = state.w + self.rate * (batch.rewards.mean() - state.w) + 0.01 * jax.random.normal(key, state.w.shape)
        offline = (batch.obs[:, 0] > 40).mean()
        metrics = {"toy/w": w.mean(), "toy/offline": offline, "toy/valid": batch.valid[:, 0].mean()}
        return dataclasses.replace(state, w=w), metrics

    def act(self, state, obs, key, *, greedy=False):
        shape = (len(obs), self.chunk, len(state.w))
        mean = jnp.broadcast_to(jnp.tanh(state.w)[None, None], shape)
        return jnp.clip(1.0 if greedy else mean + self.noise * jax.random.normal(key, shape), -1, 1) * jnp.ones(shape)


@pytree
class Phased(Toy):
    """A toy that keeps its weight from before the first phase that collects."""

    def enter(self, state: ToyState, phase: Phase) -> ToyState:
        anchor = jnp.copy(state.w) if phase.collects and state.anchor is None else state.anchor
        return dataclasses.replace(state, anchor=anchor, begun=state.begun + 1)


@pytree
class Planned(Phased):
    """A toy with phases of its own: it learns from data, collects, and learns from what it has collected."""

    def phases(self, schedule: Schedule, length: int, reward: tuple[float, float]) -> tuple[Phase, ...]:
        learn = Phase("distill", 2, 3, False, 2, data="replay")
        collect = Phase("collect", 2, 2, True, 0, reward, data="none", evaluated=False)
        return (*schedule.offline("pretrain"), collect, learn)


@pytree
class Watching(Toy):
    """A toy that collects and stores nothing."""

    def phases(self, schedule: Schedule, length: int, reward: tuple[float, float]) -> tuple[Phase, ...]:
        return (Phase("watch", 1, 1, True, 0, reward, data="none"),)


@pytree
class Deriving(Toy):
    """A toy that wants to know of each row how many transitions its ring holds."""

    def derive_columns(self, data):
        known = [ring.extra or {"held": jnp.full(ring.valid.shape, ring.valid.sum())} for ring in data]
        return tuple(dataclasses.replace(ring, extra=extra) for ring, extra in zip(data, known, strict=True))

    def update(self, state, batch, key, data=()):
        state, _ = super().update(state, batch, key, data)
        in_data, held = batch.obs[:, 0] > 40, batch.extra["held"]
        return state, {"toy/data": (held * in_data).max(), "toy/replay": (held * ~in_data).max()}


@pytree
class Delayed(Toy):
    """A toy that measures its weight in every second update alone."""

    def update(self, state, batch, key, data=()):
        state, metrics = super().update(state, batch, key, data)
        state = dataclasses.replace(state, begun=state.begun + 1)
        measured = jnp.where(state.begun % 2 == 0, metrics["toy/w"], jnp.nan)
        return state, {"toy/w": measured, "toy/never": jnp.nan * measured}


ENV = Point(horizon=7)
TOY = loop.on_device(Toy(noise=0.5))
SCHEDULE = Schedule(
    offline_updates=6, online_steps=48, warmup_steps=10, envs=4, replay=400, updates_per_epoch=3, steps_per_epoch=24
)
OFFLINE, WARMUP, ONLINE = phases(SCHEDULE, TOY)


@pytest.fixture(scope="module")
def dataset() -> rings.Ring:
    """Returns five episodes that are ELSEWHERE."""
    rng = np.random.default_rng(0)
    columns = [rng.uniform(ELSEWHERE, ELSEWHERE + 1, (40, 2)), rng.uniform(-1, 1, (40, 2))]
    data = Dataset(*(column.astype(np.float32) for column in columns), np.arange(40) % 8 == 7)
    return from_dataset(data, rng.random(40), np.zeros(40, bool))


def begin(agent=TOY, schedule=SCHEDULE, key=KEY) -> loop.Carry:
    return loop.jitted_begin(agent, ENV, schedule, key)


def epoch(phase: Phase, carry: loop.Carry, dataset=None, agent=TOY):
    return loop.jitted_epoch(agent, ENV, phase, carry, dataset)


def host(tree: PyTree) -> PyTree:
    """Returns a copy of the tree in numpy, keys as their data."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda x: np.array(jax.random.key_data(x) if is_key(x) else x), tree)


def same(a: PyTree, b: PyTree) -> bool:
    """Returns whether two trees are equal, bit for bit."""
    a, b = host(a), host(b)
    equal = lambda x, y: x.dtype == y.dtype and x.tobytes() == y.tobytes()  # noqa: E731
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(equal, a, b))


def close(a: PyTree, b: PyTree, **tolerance) -> None:
    for x, y in zip(jax.tree.leaves(host(a)), jax.tree.leaves(host(b)), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


# Schedules


@pytest.mark.parametrize(
    ("schedule", "chunk", "expected"),
    [
        (
            Schedule(),
            5,
            (
                Phase("offline", epochs=200, iterations=5000, collects=False, updates=1, data="dataset"),
                Phase("warmup", 1, 16, True, 0, data="none", evaluated=False, start=200),  # 16 * 320 >= 5000
                Phase("online", 51, 62, True, 320, data="both", last=25, start=201),  # (50 * 62 + 25) * 320 = 1e6
            ),
        ),
        (
            Schedule(offline_updates=7, online_steps=0, updates_per_epoch=3),
            5,
            (Phase("offline", 3, 3, False, 1, data="dataset", last=1),),
        ),
        (
            Schedule(offline_updates=7, online_steps=0, updates_per_epoch=50),
            5,
            (Phase("offline", 1, 7, False, 1, data="dataset"),),
        ),
        (
            Schedule(offline_updates=0, online_steps=100, warmup_steps=0, envs=4, steps_per_epoch=50, utd=0.5),
            3,
            (Phase("online", 3, 4, True, 6, data="replay", last=1),),  # 12 steps per iteration, 9 iterations
        ),
        (
            Schedule(offline_updates=0, online_steps=10, warmup_steps=1, envs=8, steps_per_epoch=1000, utd=0.01),
            5,
            (  # one iteration at least
                Phase("warmup", 1, 1, True, 0, data="none", evaluated=False),
                Phase("online", 1, 1, True, Fraction(2, 5), data="replay", start=1),
            ),
        ),
        (
            Schedule(offline_updates=0, online_steps=80, warmup_steps=0, envs=8, steps_per_epoch=1000, utd=0),
            5,
            (Phase("online", 1, 2, True, 0, data="replay"),),
        ),
    ],
)
def test_a_schedule_is_rounded_up_to_whole_iterations(schedule, chunk, expected):
    assert phases(schedule, Toy(chunk)) == expected


@pytest.mark.parametrize("epochs", [1, 3])
def test_the_last_epoch_holds_what_is_left(epochs):
    phase = Phase("offline", epochs, 5, False, 1, last=2)
    assert phase.total == 5 * (epochs - 1) + 2
    assert [phase.size(before) for before in range(epochs)] == [5] * (epochs - 1) + [2]


@pytest.mark.parametrize(
    ("envs", "chunk", "utd", "updates"),
    [
        (1, 1, 0.05, Fraction(1, 20)),
        (1, 5, 0.05, Fraction(1, 4)),
        (8, 5, 0.01, Fraction(2, 5)),
        (1, 1, 2.5, Fraction(5, 2)),
        (1, 1, 1e-4, Fraction(1, 10_000)),
        (4, 1, 0.25, 1),
        (1, 1, 0.0, 0),
    ],
)
def test_updates_per_step_are_those_that_were_asked(envs, chunk, utd, updates):
    schedule = Schedule(offline_updates=0, online_steps=1000, warmup_steps=0, envs=envs, utd=utd)
    (phase,) = phases(schedule, Toy(chunk))
    assert phase.updates == updates == Fraction(str(utd)) * envs * chunk
    assert isinstance(phase.updates, int) == (Fraction(updates).denominator == 1)


@pytest.mark.parametrize("u", [Fraction(1, 20), Fraction(5, 2), Fraction(65533, 65535), Fraction(7, 3)])
def test_fractions_of_updates_accumulate_over_iterations(u):
    """After n iterations, floor(n u) updates are made, also far beyond the numbers whose products fit into int32."""
    phase = Phase("online", 1, 1, True, u)
    for first in (0, 2**31 - 201):
        due = jax.vmap(lambda number: loop.updates_due(phase, number))(first + jnp.arange(200, dtype=jnp.int32))
        exact = [int((first + n + 1) * u) - int((first + n) * u) for n in range(200)]
        assert due.tolist() == exact


def test_no_updates_at_all_are_not_a_small_ratio():
    with pytest.raises(UserError, match=r"schedule.utd = 1e-09: must be 0 or at least"):
        phases(dataclasses.replace(SCHEDULE, utd=1e-9), TOY)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"offline_updates": 2**31, "online_steps": 0}, "2,147,483,648 updates, must be at most 2,147,483,647"),
        ({"online_steps": 2**31, "utd": 0.0}, "environment steps, must be at most 2,147,483,647"),
        ({"online_steps": 2**30, "utd": 2.0}, "updates, must be at most 2,147,483,647"),
    ],
)
def test_a_run_that_counts_beyond_its_counters_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        phases(dataclasses.replace(SCHEDULE, **fields), TOY)


@pytest.mark.parametrize(
    ("updates", "asked", "dataset", "data"),
    [
        (6, "auto", False, "both"),
        (6, "replay", False, "replay"),
        (0, "auto", False, "replay"),
        (0, "auto", True, "both"),
        (0, "both", False, "both"),
        (0, "replay", True, "replay"),
    ],
)
def test_online_updates_learn_from_the_dataset_where_there_is_one_unless_told_otherwise(updates, asked, dataset, data):
    schedule = dataclasses.replace(SCHEDULE, offline_updates=updates, online_data=asked)
    assert phases(schedule, TOY, dataset=dataset)[-1].data == data


def test_an_agent_can_name_phases_of_its_own():
    reward = (2.0, 1.0)
    assert phases(SCHEDULE, Planned(), reward) == (
        Phase("pretrain", 2, 3, False, 1, data="dataset"),
        Phase("collect", 2, 2, True, 0, reward, "none", evaluated=False, start=2),
        Phase("distill", 2, 3, False, 2, data="replay", start=4),
    )


@pytree
class Wrong(Toy):
    """A toy whose phases are those of the test."""

    wrong: tuple[str, ...] = ()

    def phases(self, schedule, length, reward):
        return {
            "behaviour": (Phase("behaviour", 1, 1, True, 0, data="none"),),
            "no epochs": (Phase("no epochs", 0, 1, True, 0, data="none"),),
            "nothing yet": (Phase("nothing yet", 1, 1, False, 1, data="replay"),),
            "no data": (Phase("no data", 1, 1, True, 1, data="none"),),
            "unseen": (Phase("unseen", 1, 1, True, 0, data="none", evaluated=False),),
        }[self.wrong[0]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("behaviour", "this name is reserved for the behavior"),
        ("no epochs", "needs at least one epoch of one iteration"),
        ("nothing yet", "learns from the replay, but nothing was collected before"),
        ("no data", "makes updates, but has no data to learn from"),
        ("unseen", "the last phase must be evaluated"),
    ],
)
def test_phases_that_no_run_can_have_are_refused(name, message):
    with pytest.raises(UserError, match=f"phase '{name}': {message}"):
        phases(SCHEDULE, Wrong(wrong=(name,)))


def test_a_timeline_knows_which_phases_have_begun():
    timeline = Timeline(phases(SCHEDULE, Planned()))
    names = [[phase.name for phase in timeline.begun(done)] for done in range(timeline.epochs + 1)]
    first, second, third = ["pretrain"], ["pretrain", "collect"], ["pretrain", "collect", "distill"]
    assert names == [[], first, first, second, second, third, third]


@pytest.mark.parametrize(
    ("field", "low"),
    [(name, 0) for name in ("offline_updates", "online_steps", "utd", "warmup_steps", "eval_seed")]
    + [(name, 1) for name in ("envs", "replay", "updates_per_epoch", "steps_per_epoch", "eval_every", "eval_episodes")],
)
def test_a_schedule_refuses_what_is_too_small(field, low):
    dataclasses.replace(Schedule(), **{field: low}).check()
    with pytest.raises(UserError, match=rf"schedule\.{field} = {low - 1}: must be at least {low}"):
        dataclasses.replace(Schedule(), **{field: low - 1}).check()


def test_a_schedule_must_have_something_to_do():
    with pytest.raises(UserError, match="nothing to do"):
        phases(Schedule(offline_updates=0, online_steps=0), TOY)


def test_a_schedule_refuses_data_that_do_not_exist():
    with pytest.raises(UserError, match="online_data = 'dataset': must be one of"):
        Schedule(online_data="dataset").check()  # ty: ignore[invalid-argument-type]


# The carry


def test_a_run_begins_with_empty_replay_and_fresh_environments():
    carry = begin()
    assert [int(x) for x in (carry.updates, carry.steps, carry.epoch)] == [0, 0, 0]
    replay, rollout = carry.world.replay, carry.world.rollout
    assert replay.obs.shape == (4, 2 * 48 // 4 + 2 + 2, 2) and int(replay.count.sum()) == 0
    assert len(np.unique(np.asarray(rollout.states.obs))) == 8 and int(rollout.states.steps.sum()) == 0
    assert begin(schedule=dataclasses.replace(SCHEDULE, replay=40)).world.replay.obs.shape == (4, 40 // 4 + 2 + 2, 2)
    assert begin(schedule=dataclasses.replace(SCHEDULE, online_steps=0)).world is None
    assert same(begin(), carry) and not same(begin(key=jax.random.key(1)).agent, carry.agent)


def test_nothing_is_allocated_that_no_phase_needs():
    agent = loop.on_device(Watching())
    carry = begin(agent)
    assert carry.world is not None and carry.world.replay is None and carry.world.rollout is not None
    carry, metrics = epoch(Phase("watch", 1, 3, True, 0, data="none"), carry, None, agent)
    assert int(carry.steps) == 4 * 6 and set(metrics) >= {"collect/episodes", "digest"}
    planned = begin(Planned(), dataclasses.replace(SCHEDULE, online_steps=0))
    assert planned.world.replay.obs.shape == (4, 2 * 2 * 2 + 2 + 2, 2)  # for two epochs of two chunks of two steps


def test_an_offline_epoch_counts_its_updates_and_leaves_the_world_alone(dataset):
    before = begin()
    world, agent, key = host(before.world), host(before.agent), host(before.key)
    carry, metrics = epoch(OFFLINE, before, dataset)
    assert [int(x) for x in (carry.updates, carry.steps, carry.epoch)] == [3, 0, 1]
    assert same(carry.world, world) and not same(carry.agent, agent) and not same(carry.key, key)
    assert set(metrics) == {"toy/w", "toy/offline", "toy/valid", "digest"}


def test_a_warm_up_collects_and_does_not_learn(dataset):
    before = begin()
    agent = host(before.agent)
    carry, metrics = epoch(WARMUP, before, dataset)
    assert (WARMUP.iterations, int(carry.updates), int(carry.epoch)) == (2, 0, 1)
    assert same(carry.agent, agent) and not [name for name in metrics if name.startswith("toy")]
    assert 8 < int(carry.steps) <= 16 and int(carry.world.replay.valid.sum()) == int(carry.steps)


def test_an_online_epoch_counts_and_stores_every_step(dataset):
    carry, metrics = epoch(ONLINE, begin(), dataset)
    assert (ONLINE.iterations, ONLINE.updates) == (3, 8)
    assert int(carry.updates) == 24
    carry, more = epoch(ONLINE, carry, dataset)
    assert [int(carry.updates), int(carry.epoch)] == [48, 2]
    ended = float(metrics["collect/episodes"] + more["collect/episodes"])
    # of 4 environments and 6 chunks of 2 steps, each episode of 7 steps waits for the last of its fourth chunk
    assert (ended, int(carry.steps)) == (4, 4 * 12 - 4)
    assert int(carry.world.replay.valid.sum()) == int(carry.steps)
    np.testing.assert_array_equal(carry.world.replay.count, np.full(4, 11 + 1))
    np.testing.assert_array_equal(carry.world.rollout.states.steps, np.full(4, 4))


def test_fractions_of_updates_and_a_shorter_last_epoch_are_kept_exactly(dataset):
    """By hand: 8 steps and 3.2 updates per iteration, 7 iterations in epochs of 3, 3 and 1."""
    schedule = dataclasses.replace(SCHEDULE, offline_updates=5, warmup_steps=0, online_steps=50, utd=0.4)
    offline, online = phases(schedule, TOY)
    assert (offline.last, online.updates, online.last, online.start) == (2, Fraction(16, 5), 1, 2)
    carry, counted = begin(schedule=schedule), []
    for phase in (offline, online):
        for before in range(phase.epochs):
            rows = int(carry.steps)
            carry, metrics = epoch(phase, carry, dataset)
            counted.append((int(carry.updates), int(carry.steps) - rows <= 8 * phase.size(before)))
            assert np.isfinite(metrics["toy/w"]) and metrics["toy/valid"] == 1
    assert counted == [(3, True), (5, True), (5 + 9, True), (5 + 19, True), (5 + 22, True)]
    alone, _ = jax.jit(lambda agent, data: loop.run(agent, ENV, schedule, KEY, data))(TOY, dataset)
    close(carry.agent, alone.agent, rtol=1e-5)
    assert (int(alone.updates), int(alone.steps)) == (int(carry.updates), int(carry.steps))


def test_a_mean_over_fewer_rows_is_that_of_these_rows():
    values = jnp.array([1.0, jnp.nan, 5.0, 100.0])
    assert (float(loop.mean(values, jnp.int32(3))), float(loop.mean(values[:3]))) == (3.0, 3.0)
    assert np.isnan(loop.mean(values, jnp.int32(0)))
    assert float(loop.mean(jnp.array([1, 2, 100]), jnp.int32(2))) == 1.5


def test_actions_are_those_of_the_agent_as_it_learns(dataset):
    agent = loop.on_device(Toy(noise=0.0))
    phase = dataclasses.replace(ONLINE, iterations=1)
    carry = begin(agent)
    for i in range(3):
        acting = np.tanh(np.asarray(carry.agent.w))
        carry, _ = epoch(phase, carry, dataset, agent)
        stored = np.asarray(carry.world.replay.actions[:, 2 * i : 2 * i + 2])
        np.testing.assert_allclose(stored, np.broadcast_to(acting, (4, 2, 2)), rtol=1e-6)


def test_a_phase_learns_from_what_it_says(dataset):
    """The share of the batches that are the dataset's: all, a part, none."""
    carry, _ = epoch(WARMUP, begin(), dataset)
    carry, metrics = epoch(OFFLINE, carry, dataset)
    assert float(metrics["toy/offline"]) == 1 and float(metrics["toy/valid"]) == 1
    carry, metrics = epoch(ONLINE, carry, dataset)
    assert 0.2 < float(metrics["toy/offline"]) < 0.9
    for given in (dataset, None):
        carry, metrics = epoch(dataclasses.replace(ONLINE, data="replay"), carry, given)
        assert float(metrics["toy/offline"]) == 0
    carry, metrics = epoch(Phase("distill", 1, 3, False, 2, data="replay"), carry, None)
    assert float(metrics["toy/offline"]) == 0 and float(metrics["toy/valid"]) == 1


def test_a_phase_without_its_data_is_refused(dataset):
    with pytest.raises(UserError, match="phase 'online' learns from the dataset, but there is none"):
        epoch(ONLINE, begin(), None)
    offline = begin(schedule=dataclasses.replace(SCHEDULE, online_steps=0))
    with pytest.raises(UserError, match="phase 'distill' learns from the replay, but there is none"):
        epoch(Phase("distill", 1, 3, False, 2, data="replay"), offline, dataset)


def test_what_an_iteration_collects_it_learns_from_at_once():
    _, metrics = epoch(dataclasses.replace(ONLINE, iterations=1, data="replay"), begin(), None)
    assert float(metrics["toy/valid"]) == 1


def test_columns_are_derived_for_the_data_and_for_what_was_just_collected(dataset):
    agent = loop.on_device(Deriving(noise=0.5))
    carry, metrics = epoch(OFFLINE, begin(agent), dataset, agent)
    assert (metrics["toy/data"], metrics["toy/replay"]) == (35, 0)
    for _ in range(3):
        carry, metrics = epoch(Phase("online", 1, 1, True, 1), carry, dataset, agent)
        assert metrics["toy/replay"] in (0, carry.world.replay.valid.sum())
    assert metrics["toy/replay"] > 16 and dataset.extra == {} == carry.world.replay.extra


def test_metrics_are_means_over_updates_and_over_the_episodes_that_ended(dataset):
    # one update at a time, as the same keys would give them
    carry = begin(schedule=dataclasses.replace(SCHEDULE, online_steps=0))
    key, _, key_iterations = jax.random.split(carry.key, 3)
    state, w = carry.agent, []
    for key in jax.random.split(key_iterations, 3):
        (key_step,) = jax.random.split(jax.random.split(key)[1], 1)
        key_batch, key_update = jax.random.split(key_step)
        state, metrics = jax.jit(Toy.update)(TOY, state, jax.jit(Toy.sample)(TOY, (dataset,), key_batch), key_update)
        w.append(float(metrics["toy/w"]))
    after, metrics = epoch(OFFLINE, carry, dataset)
    assert float(metrics["toy/w"]) == pytest.approx(np.mean(w), rel=1e-5)
    close(after.agent, state, rtol=1e-5)


def test_updates_that_measure_nothing_do_not_count_in_a_mean(dataset):
    """By hand: of four updates, the second and the fourth measure; of none, nothing is measured."""
    agent = loop.on_device(Delayed())
    carry = begin(agent, schedule=dataclasses.replace(SCHEDULE, online_steps=0))
    state, metrics = jax.jit(loop.updates, static_argnums=4)(agent, carry.agent, (dataset,), KEY, 4)
    by_hand, weights = carry.agent, []
    for key in jax.random.split(KEY, 4):
        key_batch, key_step = jax.random.split(key)
        by_hand, one = agent.update(by_hand, agent.sample((dataset,), key_batch), key_step)
        weights.append(float(one["toy/w"]))
    assert np.isnan(weights).tolist() == [True, False, True, False]
    assert float(metrics["toy/w"]) == pytest.approx((weights[1] + weights[3]) / 2, rel=1e-5)
    assert np.isnan(metrics["toy/never"]) and int(state.begun) == 4
    close(state, by_hand, rtol=1e-5)
    unchanged, nothing = loop.updates(agent, carry.agent, (), KEY, 0)
    assert unchanged is carry.agent and nothing == {}


def test_collection_is_told_as_means_over_the_episodes_that_ended(dataset):
    sums = {"episodes": 4, "successes": 3, "returns": -10.0, "steps": 99, "broken": 2}
    metrics = loop.episode_metrics({name: jnp.asarray(x) for name, x in sums.items()})
    assert {name: float(x) for name, x in metrics.items()} == {
        "collect/success": 0.75,
        "collect/return": -2.5,
        "collect/episodes": 4,
        "collect/broken": 2,
    }
    none = loop.episode_metrics({name: jnp.asarray(0 * x) for name, x in sums.items()})
    assert np.isnan(none["collect/success"]) and np.isnan(none["collect/return"]) and none["collect/episodes"] == 0
    assert loop.episode_metrics({}) == {}

    carry, first = epoch(ONLINE, begin(), dataset)  # 6 steps in 4 environments: no episode ends
    assert float(first["collect/episodes"]) == 0 and np.isnan(first["collect/return"])
    _, second = epoch(ONLINE, carry, dataset)
    assert (float(second["collect/return"]), float(second["collect/success"])) == (-7, 0)


# Phases


def test_an_agent_is_told_of_each_phase_once(dataset):
    agent = loop.on_device(Phased())
    enter = functools.partial(loop.jitted_enter, agent)
    carry, _ = epoch(OFFLINE, enter(OFFLINE, begin(agent)), dataset, agent)
    assert carry.agent.anchor is None
    carry = enter(WARMUP, carry)
    np.testing.assert_array_equal(carry.agent.anchor, carry.agent.w)
    kept = np.array(carry.agent.anchor)
    carry, _ = epoch(WARMUP, carry, dataset, agent)
    carry, _ = epoch(ONLINE, enter(ONLINE, carry), dataset, agent)
    np.testing.assert_array_equal(carry.agent.anchor, kept)
    assert int(carry.agent.begun) == 3 and not np.array_equal(carry.agent.w, kept)


def test_an_agent_without_stages_goes_on_as_it_is():
    before = begin()
    assert same(loop.enter(TOY, ONLINE, before), before)


def test_stages_of_several_kinds_follow_each_other(dataset):
    agent = loop.on_device(Planned(noise=0.5))
    carry, history = jax.jit(lambda agent, data: loop.run(agent, ENV, SCHEDULE, KEY, data))(agent, dataset)
    pretrain, collect, distill = history
    assert [int(x) for x in (carry.epoch, carry.updates, carry.agent.begun)] == [6, 6 + 12, 3]
    assert (pretrain["toy/offline"] == 1).all() and "toy/w" not in collect and (distill["toy/offline"] == 0).all()
    assert int(carry.steps) == int(carry.world.replay.valid.sum()) > 0
    timeline = Timeline(phases(SCHEDULE, agent))
    for done, anchored in ((2, False), (3, True), (6, True)):
        shapes = loop.abstract_carry(agent, ENV, SCHEDULE, timeline, done)
        assert (shapes.agent.anchor is not None) is anchored
    assert jax.tree.map(jnp.shape, carry) == jax.tree.map(jnp.shape, shapes)


# The two drivers


def whole_run(agent, dataset, key=KEY):
    """Returns what the epoch-by-epoch driver makes of the schedule."""
    carry, history = begin(agent, key=key), []
    for phase in phases(SCHEDULE, agent):
        carry = loop.jitted_enter(agent, phase, carry)
        epochs = []
        for _ in range(phase.epochs):
            carry, metrics = epoch(phase, carry, dataset, agent)
            epochs.append(metrics)
        history.append(jax.tree.map(lambda *x: jnp.stack(x), *epochs))
    return carry, history


@pytest.fixture(scope="module")
def scanned(dataset):
    """Returns the whole schedule as one compiled call, for two rates side by side."""
    rates = jnp.array([0.125, 0.5])
    agents = jax.tree.map(lambda x: jnp.stack([x, x]), loop.on_device(Phased(noise=0.5)))
    agents = dataclasses.replace(agents, rate=rates)

    def run_alone(agent, data):
        return loop.run(agent, ENV, SCHEDULE, KEY, data)

    together = jax.jit(jax.vmap(run_alone, in_axes=(0, None)))(agents, dataset)
    alone = jax.jit(run_alone)
    with tiny.compiled() as names:
        singles = [alone(jax.tree.map(lambda x, i=i: x[i], agents), dataset) for i in range(2)]
    assert names.count("jit(run_alone)") == 1
    return agents, together, singles


def test_run_is_the_same_as_epoch_after_epoch_bit_for_bit(dataset, scanned):
    agents, _, singles = scanned
    for i, single in enumerate(singles):
        carry, history = whole_run(jax.tree.map(lambda x, i=i: x[i], agents), dataset)
        assert same(carry, single[0]) and same(history, single[1])
        assert [int(x) for x in (carry.updates, carry.epoch)] == [6 + 2 * 24, 2 + 1 + 2]


def test_members_of_a_vmapped_run_are_the_single_runs(scanned):
    _, (carries, history), singles = scanned
    for i, (carry, metrics) in enumerate(singles):
        member = jax.tree.map(lambda x, i=i: x[i], (carries, history))
        drop = lambda history: [{k: v for k, v in phase.items() if k != "digest"} for phase in history]  # noqa: E731
        close(member[0], carry, rtol=1e-4, atol=1e-5)
        close(drop(member[1]), drop(metrics), rtol=1e-4, atol=1e-5)
    assert not np.allclose(singles[0][0].agent.w, singles[1][0].agent.w)


def test_two_epochs_and_three_after_a_pause_are_five_bit_for_bit(dataset):
    straight, paused = begin(), begin()
    for _ in range(5):
        straight, expected = epoch(ONLINE, straight, dataset)
    for _ in range(2):
        paused, _ = epoch(ONLINE, paused, dataset)
    stored = host(dataclasses.replace(paused, key=jax.random.key_data(paused.key)))
    paused = jax.device_put(dataclasses.replace(stored, key=jax.random.wrap_key_data(stored.key)))
    for _ in range(3):
        paused, metrics = epoch(ONLINE, paused, dataset)
    assert same(paused, straight) and same(metrics, expected)
    assert int(metrics["digest"]) == int(loop.digest(straight))


def test_other_scalars_and_later_epochs_are_the_same_program(dataset):
    carry, _ = epoch(ONLINE, begin(), dataset)
    with tiny.compiled() as names:
        for rate in (0.1, 0.2, 0.3):
            agent = loop.on_device(Toy(rate=rate, noise=0.1))
            carry, _ = epoch(ONLINE, carry, dataset, agent)
            begin(agent)
        assert not {"jit(epoch)", "jit(begin)"} & set(names)
        epoch(ONLINE, begin(Toy(chunk=3)), dataset, loop.on_device(Toy(chunk=3)))
    assert names.count("jit(epoch)") == names.count("jit(begin)") == 1  # a size is another program


def test_nothing_crosses_between_host_and_device_during_an_epoch(dataset):
    carry, _ = epoch(ONLINE, begin(), dataset)  # compiled before
    with jax.transfer_guard("disallow"):
        carry, metrics = epoch(ONLINE, carry, dataset)
        jax.block_until_ready(metrics)
    assert int(carry.epoch) == 2


def test_an_epoch_takes_over_the_memory_of_its_carry(dataset):
    carry = begin()
    after, _ = epoch(ONLINE, carry, dataset)
    big = [carry.world.replay.obs, carry.world.replay.actions, carry.world.rollout.states.obs, carry.agent.w]
    assert all(leaf.is_deleted() for leaf in big)
    assert not dataset.obs.is_deleted() and not after.world.replay.obs.is_deleted()


def test_evaluation_is_greedy_and_counts_first_episodes():
    result = loop.jitted_evaluate(TOY, ENV, 5, begin().agent, KEY)  # greedy: as fast as it can to the upper corner
    np.testing.assert_array_equal(result.lengths, np.full(5, 7))
    assert not result.success.any()
    far = loop.jitted_evaluate(TOY, Point(horizon=40, tolerance=0.25), 50, begin().agent, KEY)
    assert int(far.lengths.max()) <= 19 and float(far.success.mean()) > 0.1


def test_scalars_go_to_the_device_as_floats_and_sizes_stay():
    agent = loop.on_device(Toy(chunk=3, rate=1))
    assert agent.rate.dtype == jnp.float32 and agent.chunk == 3


# The digest

TREE = {
    "a": jnp.array([0.0, -0.0, 1.5, jnp.nan, jnp.inf, 1e-38]),
    "b": jnp.arange(-3, 3, dtype=jnp.int32).reshape(2, 3),
    "c": jnp.array([True, False, False]),
    "d": jax.random.key(3),
    "e": jnp.array(7, jnp.uint32),
    "f": jnp.array([-128, 5], jnp.int8),
}
digest = jax.jit(loop.digest)


def with_bit_flipped(leaf: jax.Array, at: int) -> jax.Array:
    """Returns the leaf with one of its bits changed."""
    raw = np.array(jax.random.key_data(leaf) if leaf.dtype == TREE["d"].dtype else leaf)
    if raw.dtype == bool:
        raw.reshape(-1)[at] ^= True
    else:
        bits = raw.reshape(-1).view(np.uint8)
        bits[at // 8] ^= np.uint8(1 << at % 8)
    return jax.random.wrap_key_data(jnp.asarray(raw)) if leaf.dtype == TREE["d"].dtype else jnp.asarray(raw)


def bits_of(leaf: jax.Array) -> int:
    raw = np.asarray(jax.random.key_data(leaf) if leaf.dtype == TREE["d"].dtype else leaf)
    return raw.size if raw.dtype == bool else raw.nbytes * 8


def test_the_digest_sees_every_bit_of_every_leaf():
    whole = int(digest(TREE))
    assert int(digest(jax.tree.map(jnp.copy, TREE))) == whole == int(loop.digest(TREE))
    for name, leaf in TREE.items():
        assert whole not in {int(digest(TREE | {name: with_bit_flipped(leaf, at)})) for at in range(bits_of(leaf))}, (
            name
        )


def test_the_digest_sees_what_changes_places():
    x = jnp.array([1.0, 2.0, 3.0])
    digests = [
        int(loop.digest(tree))
        for tree in ((x, x), (x[::-1], x), (x, x[::-1]), (x[jnp.array([1, 0, 2])], x), (x + 1, x - 1))
    ]
    assert len(set(digests)) == len(digests)
    assert int(loop.digest((x, x + 1))) != int(loop.digest((x + 1, x)))


def test_the_digest_sees_two_signs_that_change():
    x = jnp.array([1.0, 2.0, 3.0])
    assert int(loop.digest(x)) != int(loop.digest(x * jnp.array([-1.0, -1.0, 1.0])))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_the_digest_sees_half_precision(dtype):
    assert int(loop.digest(jnp.array([0.25], dtype))) != int(loop.digest(jnp.array([0.5], dtype)))


# A method with two phases


def test_fmq_goes_online_with_its_actor_as_the_anchor(dataset):
    agent = with_fields(FMQ(), chunk=2, backup=2, hidden=(8,), batch=8, num_samples=2, target_samples=2)
    agent = loop.on_device(agent)
    before = begin(agent)
    assert before.agent.anchor is None
    carry = loop.jitted_enter(agent, ONLINE, before)
    actor, critic = host(carry.agent.params["actor"]), host(carry.agent.params["critic"])
    assert same(carry.agent.anchor, actor)
    carry, metrics = epoch(dataclasses.replace(ONLINE, updates=2), carry, dataset, agent)
    assert same(carry.agent.anchor, actor) and int(carry.agent.step) == 3 * 2
    assert not same(carry.agent.params["actor"], actor) and not same(carry.agent.params["critic"], critic)
    assert float(metrics["actor/fmq_loss"]) > 0
