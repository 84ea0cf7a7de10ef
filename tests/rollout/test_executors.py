"""Executors of chunks: which prediction is executed when, and that each is the open loop at its neutral setting."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import ranges
from jaxrl.errors import UserError
from jaxrl.rollout import device as ro
from jaxrl.rollout import executors, host
from jaxrl.rollout.executors import Execution
from jaxrl.training import host_loop
from jaxrl.types import pytree
from tests import walk
from tests.rollout.scribe import CHUNK, EXECUTIONS, NEUTRAL, Noisy, Scribe, expected, name
from tests.rollout.test_device import Clock, clock, side_by_side
from tests.rollout.test_host import WalkEnv

pytestmark = pytest.mark.usefixtures("quick")

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def simulators():
    with contextlib.closing(host.Simulators(WalkEnv(), 2)) as some:
        yield some


def collected(agent, execution, env, states, decisions: int, bank=None):
    """Returns the steps of some decisions, [N, T * h, ...] field by field, and the rollout after them."""
    policy = execution(ro.policy_of(agent, ()))
    rollout = ro.Rollout(states, policy.start(states, KEY), jnp.zeros(len(states.reward)))
    bank = clock(9) if bank is None else bank
    bank = jax.tree.map(lambda x: x[None], bank)
    go = jax.jit(lambda rollout, key: ro.unroll(env, policy, rollout, bank, key, decisions))
    rollout, unroll = go(rollout, jax.random.key(1))
    flat = lambda x: np.swapaxes(np.asarray(x), 0, 1).reshape(x.shape[1], -1, *x.shape[3:])  # noqa: E731
    steps = unroll.steps
    return {
        "actions": flat(steps.actions)[..., 0],
        "taken": flat(steps.taken),
        **{name: flat(values) for name, values in steps.extra.items()},
    }, rollout


def same(a, b) -> None:
    """Asserts that two trees are equal, leaf by leaf and bit by bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), (_, y) in zip(jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes(), jax.tree_util.keystr(path)


# Which prediction is executed when


@pytest.mark.parametrize("execution", EXECUTIONS, ids=name)
def test_each_step_executes_what_the_definition_says(execution):
    length = execution.length(CHUNK)
    decisions = -(-14 // length)
    steps, _ = collected(Scribe(), execution, Clock(), side_by_side(clock(0), clock(1)), decisions)
    wanted = [expected(execution, t) for t in range(decisions * length)]
    np.testing.assert_allclose(steps["actions"], [wanted] * 2, rtol=0, atol=1e-6)
    assert steps["taken"].all()
    np.testing.assert_array_equal(steps["decision"], [[t // length for t in range(decisions * length)]] * 2)


@pytest.mark.parametrize("execution", EXECUTIONS, ids=name)
def test_an_episode_that_ends_starts_its_memory_anew_and_that_of_no_other(execution):
    """The first episode of the first environment has 5 steps, later ones have 9; the second environment has more."""
    length = execution.length(CHUNK)
    states = side_by_side(clock(0, dies=5), clock(1))
    steps, _rollout = collected(Scribe(), execution, Clock(), states, 24 // length, clock(7, dies=9))
    one, two = (steps["actions"][i][steps["taken"][i]] for i in range(2))
    np.testing.assert_allclose(two, [expected(execution, t) for t in range(len(two))], rtol=0, atol=1e-6)
    clocks = [*range(5), *range(9), *range(9), *range(9)][: len(one)]
    np.testing.assert_allclose(one, [expected(execution, t) for t in clocks], rtol=0, atol=1e-6)
    assert len(one) > 14 and len(two) == 24 // length * length


def test_the_ensemble_is_that_of_action_chunking_with_transformers():
    """As its official code has it: queries at every step, weights exp(-m * i) from the oldest prediction on."""
    steps, _ = collected(Scribe(), Execution("ensemble", 1, decay=-0.01), Clock(), side_by_side(clock(0)), 15)
    table = np.full((15, 15 + CHUNK), np.nan)
    for t in range(15):
        table[t, t : t + CHUNK] = [t / 50 + i / 1000 for i in range(CHUNK)]
        actions = table[:, t][~np.isnan(table[:, t])]
        weights = np.exp(-0.01 * np.arange(len(actions)))
        np.testing.assert_allclose(steps["actions"][0, t], (actions * weights / weights.sum()).sum(), atol=1e-6)


def test_an_ensemble_stays_within_bounds():
    ones = executors.TemporalEnsemble(1, 0.1)(ro.from_function(lambda obs, key: jnp.ones((len(obs), 40, 1)), 40))
    states = side_by_side(clock(0))
    memory = ones.start(states, KEY)
    for _ in range(50):
        memory, actions, _ = ones.act(memory, states, KEY)
        assert actions[0, 0, 0] <= 1
    assert actions[0, 0, 0] == pytest.approx(1, abs=1e-6)


@pytree
class Doubtful:
    """An agent whose samples agree on as many first actions as the observed name says; the first one tells the step."""

    chunk: int = CHUNK

    def act(self, state, obs, key, *, greedy=False):
        noise = jax.random.uniform(key, (len(obs), self.chunk), minval=-1)
        sure = jnp.arange(self.chunk)[None] < obs[:, :1]
        return jnp.where(sure, obs[:, 1:] / 50 + jnp.arange(self.chunk)[None] / 1000, noise)[..., None]


@pytest.mark.parametrize(
    ("execute", "threshold", "agreed", "queries"),
    [
        (1, 0.1, 4, [0, 4, 8]),
        (2, 0.1, 4, [0, 4, 8]),
        (3, 0.1, 4, [0, 3, 6, 9]),  # the samples disagree on steps 4 and 5
        (2, 0.1, 5, [0, 4, 8]),
        (1, 0.1, 5, [0, 5, 10]),
        (2, 0.1, 1, [0, 2, 4, 6, 8, 10]),  # at least two steps each
        (4, 0.1, 6, [0, 4, 8]),  # a third and a fourth step after those would need a longer chunk
        (2, 1.0, 1, [0, 6]),
        (2, float("inf"), 1, [0, 6]),
    ],
)
def test_an_adaptive_execution_queries_where_the_samples_disagree(execute, threshold, agreed, queries):
    execution = Execution("adaptive", execute, threshold=threshold, samples=5)
    steps, _ = collected(Doubtful(), execution, Clock(), side_by_side(clock(agreed), clock(6)), 12 // execute)
    first = steps["actions"][0] * 1000
    known = [(q, t - q) for q, stop in zip(queries, [*queries[1:], 12], strict=True) for t in range(q, stop)]
    for t, (query, entry) in enumerate(known):
        if entry < agreed:
            assert first[t] == pytest.approx(query * 20 + entry, abs=0.01)
        else:
            assert abs(first[t] - query * 20 - entry) > 0.1  # random
    # the other environment's samples always agree, on all of each chunk
    whole = CHUNK // execute * execute
    np.testing.assert_allclose(
        steps["actions"][1], [(t - t % whole) / 50 + t % whole / 1000 for t in range(12)], rtol=0, atol=1e-6
    )


def test_the_memory_of_an_adaptive_agent_advances_with_its_queries():
    execution = Execution("adaptive", 2)
    steps, rollout = collected(Scribe(), execution, Clock(), side_by_side(clock(0)), 7)
    np.testing.assert_array_equal(steps["decision"][0], [0] * 6 + [1] * 6 + [2] * 2)
    np.testing.assert_allclose(steps["actions"][0, :6] * 1000, np.arange(6), atol=1e-3)
    assert rollout.memory.policy.tolist() == [3]


def test_settings_on_the_way_to_neutral_are_each_other_bit_for_bit():
    states = side_by_side(clock(0, dies=5), clock(1))
    two = [Execution("receding", 2), Execution("real_time", 2), Execution("ensemble", 2, decay=1e9)]
    first, *others = [collected(Noisy(), e, Clock(), states, 8, clock(7, dies=9))[0] for e in two]
    for other in others:
        same(first, other)
    assert len(np.unique(first["noise"])) > 20


# At neutral settings, bit for bit


def on_device(execution):
    """Returns what an evaluation and some collecting give, with episodes that end inside chunks."""
    policy = lambda greedy: execution(ro.policy_of(Noisy(), (), greedy))  # noqa: E731
    env = Clock(horizon=20, dies=8)

    def go(key):
        rollout, bank = ro.start(env, policy(False), key, 3), ro.resets(env, key, 4)
        return ro.unroll(env, policy(False), rollout, bank, key, 5), ro.evaluate(env, policy(True), key, 3)

    return jax.device_get(jax.jit(go)(jax.random.key(3)))


def on_host(simulators, execution):
    """Returns the same of simulators in worker processes."""
    episodes = host.evaluate(simulators, Noisy(), (), KEY, 5, execution)
    return jax.device_get((episodes, decided(simulators, Noisy(), execution, 6), simulators.flight.memory))


def decided(simulators, agent, execution, decisions):
    """Returns the memory before, the steps and the sums of decisions in three simulators."""
    random = np.random.default_rng(0)
    simulators.flight = host.reset_all(simulators, random, 3)
    keys = jax.random.split(KEY, (decisions, 2))
    return [host_loop.decide(simulators, agent, execution, (), random, *pair) for pair in keys]


@pytest.fixture(scope="module")
def open_loop(simulators):
    return on_device(Execution()), on_host(simulators, Execution())


@pytest.mark.parametrize("execution", NEUTRAL, ids=name)
def test_on_device_a_neutral_setting_is_the_open_loop(execution, open_loop):
    same(on_device(execution), open_loop[0])


@pytest.mark.parametrize("execution", NEUTRAL, ids=name)
def test_in_simulators_a_neutral_setting_is_the_open_loop(execution, simulators, open_loop):
    same(on_host(simulators, execution), open_loop[1])


def test_other_settings_are_not(open_loop):
    for execution in (Execution("receding", 3), Execution("ensemble", 3), Execution("real_time", 3, delay=3)):
        (_, unroll), episodes = on_device(execution)
        assert unroll.steps.actions.shape == (5, 3, 3, 1) and (episodes.returns != open_loop[0][1].returns).all()


def test_a_chunk_that_is_followed_to_its_end_in_pieces_is_the_open_loop():
    """A policy that is a function of the observation acts alike however its chunks are cut, if it is followed."""
    act = lambda obs, key: jnp.sin(obs[:, 1:, None] + jnp.arange(CHUNK)[None, :, None])  # noqa: E731
    policy, env = ro.from_function(act, CHUNK), Clock(horizon=20, dies=17)
    evaluate = jax.jit(ro.evaluate, static_argnums=(0, 1, 3))
    whole = evaluate(env, policy, KEY, 4)
    for execute in (1, 2, 3):
        pieces = evaluate(env, executors.Adaptive(execute)(policy), KEY, 4)
        same(dataclasses.replace(pieces, returns=0, track=0), dataclasses.replace(whole, returns=0, track=0))
        np.testing.assert_allclose(pieces.returns, whole.returns, rtol=1e-6)  # summed in another order


# In simulators on CPU cores


@pytest.mark.parametrize("execution", EXECUTIONS[1::2], ids=name)
def test_simulators_execute_what_the_definition_says(execution, simulators):
    track = host.evaluate(simulators, Scribe(), (), KEY, 5, execution).track[:, 0]
    found = decided(simulators, Scribe(), execution, 24 // execution.length(CHUNK))
    wanted = [expected(execution, t) for t in range(walk.HORIZON)]
    assert len(track) == walk.HORIZON + 1
    np.testing.assert_allclose(np.diff(track) / walk.STEP, wanted, rtol=0, atol=2e-6)
    actions = np.concatenate([steps.actions for _, steps, _ in found], axis=1)
    taken = np.concatenate([steps.taken for _, steps, _ in found], axis=1)
    for slot in range(3):  # episodes of eight steps, one after the other
        done = actions[slot, taken[slot], 0]
        np.testing.assert_allclose(done, [wanted[t % walk.HORIZON] for t in range(len(done))], rtol=0, atol=1e-6)
        assert len(done) > walk.HORIZON


def test_an_evaluation_in_simulators_depends_on_its_seed_alone_whatever_the_executor(simulators):
    with contextlib.closing(host.Simulators(WalkEnv(), 5)) as others:
        same(*(host.evaluate(some, Noisy(), (), KEY, 20, Execution("ensemble", 2)) for some in (simulators, others)))


def test_pictures_are_of_the_episode_that_is_evaluated(simulators):
    execution = Execution("real_time", 2, delay=2)
    track = host.evaluate(simulators, Scribe(), (), KEY, 1, execution).track
    frames = host.render(WalkEnv(), Scribe(), (), KEY, 4, execution)
    assert [frame.getpixel((0, 0))[0] for frame in frames] == [int(255 * min(abs(x), 1)) for x in track[1:, 0]]


# Lengths


@pytest.mark.parametrize("execute", [1, 2, 4, 5])
def test_an_evaluation_lasts_to_the_horizon_whatever_is_executed(execute):
    policy = Execution("receding", execute)(ro.policy_of(Scribe(), ()))
    assert policy.chunk == execute
    result = jax.jit(ro.evaluate, static_argnums=(0, 1, 3))(Clock(horizon=7), policy, KEY, 2)
    np.testing.assert_array_equal(result.lengths, [7, 7])
    assert len(result.track) == -(-7 // execute) * execute + 1


# Settings


@pytest.mark.parametrize(
    ("execution", "chunk", "said"),
    [
        (
            Execution("receding", 7),
            6,
            r"execution.execute = 7: must be at most 6, .*\(agent.windows.chunk\); 0 executes all",
        ),
        (Execution("real_time", 3, delay=4), 6, r"execution.delay = 4: must be at most 3, the steps between queries"),
        (Execution("real_time", 4, delay=3), 6, r"execution.delay = 3: must be at most 2, what a chunk of 6 has left"),
        (Execution("real_time", delay=1), 6, r"execution.delay = 1: must be at most 0"),
        (Execution(execute=2), 6, r"execution.execute = 2: has no effect .*'open_loop': leave it at 0, or choose"),
        (Execution("receding", delay=2), 6, r"execution.delay = 2: .*or choose --execution.kind real_time$"),
        (Execution("receding", threshold=0.5), 6, r"execution.threshold = 0.5: .*leave it at 1.0, .*adaptive$"),
        (Execution("adaptive", samples=1), 6, r"execution.samples = 1: must be at least 2"),
        (Execution("adaptive", threshold=-0.1), 6, r"execution.threshold = -0.1: must be in \[0, inf\]"),
        (Execution("adaptive", threshold=float("nan")), 6, r"execution.threshold = nan: must be in \[0, inf\]"),
        (Execution("ensemble", decay=float("inf")), 6, r"execution.decay = inf: must be finite"),
        (Execution("receding", -1), 6, r"execution.execute = -1: must be at least 0"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused_in_words(execution, chunk, said):
    with pytest.raises(UserError, match=said):
        ranges.check(execution, "execution")
        execution.check_fits(chunk)


@pytest.mark.parametrize("execution", [*EXECUTIONS, *NEUTRAL, Execution("adaptive", 2, threshold=0.2)], ids=name)
def test_settings_that_fit_are_not(execution):
    ranges.check(execution, "execution")
    execution.check_fits(CHUNK)


def test_executors_themselves_refuse_chunks_that_are_too_short():
    policy = ro.policy_of(Scribe(), ())
    for executor in (executors.RecedingHorizon(7), executors.RealTime(4, 3), executors.RealTime(2, 3)):
        with pytest.raises(UserError, match="must be at most"):
            executor(policy)


@pytree
class Chooser(Noisy):
    """An agent that learns from what it did."""

    unroll: int = 2

    def learn_from(self, state, unroll, key):
        return state, {}


def test_an_on_policy_agent_is_trained_open_loop():
    executors.check_learning(Noisy(), Execution("receding", 2))
    executors.check_learning(Chooser(), Execution("receding", CHUNK))
    with pytest.raises(UserError, match=r"'ensemble': Chooser learns .* jaxrl eval RUN --execution.kind ensemble"):
        executors.check_learning(Chooser(), Execution("ensemble", 2))


def test_numbers_of_a_setting_do_not_recompile():
    traced = []

    @jax.jit
    def act(execution, obs):
        traced.append(1)
        policy = execution(ro.policy_of(Noisy(), ()))
        states = ro.observed(obs)
        return policy.act(policy.start(states, KEY), states, KEY)[1]

    for decay in (0.1, 0.2, -1.0):
        act(Execution("ensemble", 2, decay=decay), jnp.zeros((3, 2)))
    assert len(traced) == 1
