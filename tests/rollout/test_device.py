"""Facts about jaxrl.rollout.device: chunks in which environments end or break, resets, evaluation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs.point import Point
from jaxrl.replay import ring as rings
from jaxrl.rollout import device as ro
from jaxrl.types import EnvState, Leaf, Spec, pytree

NEVER = 99


@dataclasses.dataclass(frozen=True, eq=False)
class Clock:
    """Counts its steps, and ends, is cut off, is solved or breaks at steps that its state names.

    Observation: (name of the episode, steps). Reward of a step: 100 * name + steps + action.
    """

    horizon: int = NEVER
    dies: int = NEVER
    nan: int = NEVER
    solved: int = NEVER
    unsettled: float = 0.0  # share of the resets that are not finite

    @property
    def spec(self) -> Spec:
        return Spec(observation=2, action=1)

    def reset(self, key: jax.Array) -> EnvState:
        name = jax.random.uniform(key)
        state = clock(name, dies=self.dies, cut=self.horizon, nan=self.nan, solved=self.solved)
        return dataclasses.replace(state, obs=jnp.where(name < self.unsettled, jnp.nan, state.obs))

    def step(self, state: EnvState, action: jax.Array) -> EnvState:
        at, steps = state.physics, state.steps + 1
        nan = jnp.where(steps == at["nan"], jnp.nan, 0)
        return dataclasses.replace(
            state,
            obs=jnp.stack([at["name"], steps + nan]),
            reward=100 * at["name"] + steps + action[0] + jnp.where(steps == at["inf"], jnp.inf, 0),
            terminated=steps == at["dies"],
            truncated=steps == at["cut"],
            success=state.success | (steps == at["solved"]),
            steps=steps,
        )


def clock(name, dies=NEVER, cut=NEVER, nan=NEVER, inf=NEVER, solved=NEVER) -> EnvState:
    """Returns the start of the episode `name`."""
    name, no = jnp.asarray(name, jnp.float32), jnp.zeros((), bool)
    when = {"dies": dies, "cut": cut, "nan": nan, "inf": inf, "solved": solved}
    return EnvState(
        physics={"name": name} | {key: jnp.asarray(value, jnp.int32) for key, value in when.items()},
        obs=jnp.stack([name, jnp.zeros(())]),
        reward=jnp.zeros(()),
        terminated=no,
        truncated=no,
        success=no,
        steps=jnp.zeros((), jnp.int32),
    )


def side_by_side(*states: EnvState) -> EnvState:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def repeat(action: float, chunk: int) -> ro.Policy:
    """Returns the policy that always does the same, and counts its decisions per episode in its memory."""
    start = lambda states, key: jnp.zeros(len(states.reward), jnp.int32)  # noqa: E731
    act = lambda memory, states, key: (memory + 1, jnp.full((len(memory), chunk, 1), action), {})  # noqa: E731
    return ro.Policy(start, act, chunk)


@dataclasses.dataclass(frozen=True, eq=False)
class Sensed(Clock):
    """A clock that is observed as a dict, with a picture whose pixels are the steps."""

    @property
    def spec(self) -> Spec:
        return Spec((Leaf("clock", (2,)), Leaf("picture", (2, 3, 1), "uint8")), action=1)

    def reset(self, key: jax.Array) -> EnvState:
        return sensed(super().reset(key))

    def step(self, state: EnvState, action: jax.Array) -> EnvState:
        return sensed(super().step(dataclasses.replace(state, obs=state.obs["clock"]), action))


def sensed(state: EnvState) -> EnvState:
    picture = jnp.full((2, 3, 1), state.steps, jnp.uint8)
    return dataclasses.replace(state, obs={"clock": state.obs, "picture": picture})


@dataclasses.dataclass(frozen=True, eq=False)
class Restless:
    """A behaviour that draws each action [-1, 1] anew."""

    def start(self, state: EnvState, key: jax.Array) -> tuple:
        return ()

    def act(self, memory: tuple, state: EnvState, key: jax.Array) -> tuple[tuple, jax.Array]:
        return (), jax.random.uniform(key, (1,), minval=-1)


execute = jax.jit(ro.execute, static_argnums=0)
advance = jax.jit(ro.advance, static_argnums=(0, 1))
evaluate = jax.jit(ro.evaluate, static_argnums=(0, 1, 3))
CLOCK = Clock()


# A chunk


@pytest.fixture(scope="module")
def executed():
    """Returns the states and steps of six environments after a chunk of four: what happens to each is its name."""
    states = side_by_side(
        clock(0), clock(1, dies=2), clock(2, cut=3), clock(3, nan=2), clock(4, inf=1), clock(5, dies=4, cut=4)
    )
    return execute(CLOCK, states, jnp.tile(jnp.array([0.1, 0.2, 0.3, 0.4])[None, :, None], (6, 1, 1)))


def test_a_chunk_goes_on_until_something_ends_it(executed):
    _, steps = executed
    happened = [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    np.testing.assert_array_equal(steps.taken, happened)
    np.testing.assert_array_equal(steps.ended, [0, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(
        steps.terminated & steps.taken, np.eye(4, dtype=bool)[[0, 1, 0, 0, 0, 3]] * [[0], [1], [0], [0], [0], [1]]
    )
    np.testing.assert_array_equal(
        steps.truncated & steps.taken, np.eye(4, dtype=bool)[[0, 0, 2, 0, 0, 3]] * [[0], [0], [1], [0], [0], [1]]
    )


def test_rewards_and_observations_are_those_of_the_steps_that_happened(executed):
    _, steps = executed
    earned = np.arange(1, 5) * 1.1 + 100 * np.arange(6)[:, None]
    earned = np.where(np.asarray(steps.taken) & np.asarray(steps.valid), earned, 0)
    np.testing.assert_allclose(steps.rewards, earned, rtol=1e-6)
    count = [[0, 1, 2, 3, 4], [0, 1, 2, 2, 2], [0, 1, 2, 3, 3], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 2, 3, 4]]
    np.testing.assert_array_equal(steps.obs[..., 1], count)
    np.testing.assert_array_equal(steps.obs[..., 0], np.repeat(np.arange(6)[:, None], 5, axis=1))


def test_a_step_that_is_not_finite_is_invalid_and_undone(executed):
    states, steps = executed
    np.testing.assert_array_equal((steps.taken & ~steps.valid).sum(axis=1), [0, 0, 0, 1, 1, 0])
    np.testing.assert_array_equal(steps.valid[3, :2], [1, 0])
    np.testing.assert_array_equal(steps.valid[4, :1], [0])
    np.testing.assert_array_equal(states.steps, [4, 2, 3, 1, 0, 4])
    np.testing.assert_array_equal(states.obs[:, 1], [4, 2, 3, 1, 0, 4])
    assert np.isfinite(np.asarray(states.reward)).all()


def test_a_broken_step_ends_nothing_in_the_ring_and_leads_nowhere(executed):
    _, steps = executed
    ring = jax.jit(rings.add)(rings.empty(6, 12, Spec(2, 1)), steps)
    np.testing.assert_array_equal(ring.count, [4, 3, 4, 3, 2, 5])
    np.testing.assert_array_equal(ring.valid.sum(axis=1), [4, 2, 3, 1, 0, 4])
    np.testing.assert_array_equal(ring.terminated.sum(axis=1), [0, 1, 0, 0, 0, 1])
    batch = rings.window_at(ring, jnp.array([3]), jnp.array([0]), 4)
    np.testing.assert_array_equal(batch.valid, [[1, 0, 0, 0]])
    np.testing.assert_array_equal(batch.next_obs, [[3, 1]])


def test_flags_of_a_broken_step_do_not_count():
    states = side_by_side(clock(0, dies=1, nan=1), clock(1, cut=1, inf=1))
    _, steps = execute(CLOCK, states, jnp.zeros((2, 1, 1)))
    assert not steps.terminated.any() and not steps.truncated.any()
    np.testing.assert_array_equal(steps.ended, [1, 1])
    np.testing.assert_array_equal(steps.rewards, np.zeros((2, 1)))


# One decision after another


def test_advance_sums_up_the_episodes_that_ended():
    names = [clock(1, dies=5, solved=2), clock(2, cut=3), clock(3, nan=2), clock(4), clock(5, dies=2, solved=9)]
    policy, states = repeat(0.5, chunk=3), side_by_side(*names)
    bank = side_by_side(clock(60, dies=1), clock(70, dies=1))
    rollout = ro.Rollout(states, policy.start(states, jax.random.key(0)), jnp.zeros(5))
    rollout, steps, sums = advance(CLOCK, policy, rollout, bank, jax.random.key(1))

    earned = np.array([300 + 6 + 1.5, 600 + 6 + 1.5, 300 + 1 + 0.5, 1200 + 6 + 1.5, 1000 + 3 + 1])
    assert {name: int(total) for name, total in sums.items() if name != "returns"} == {
        "episodes": 3,
        "successes": 0,
        "steps": 3 + 3 + 2 + 3 + 2,
        "broken": 1,
    }
    np.testing.assert_allclose(sums["returns"], earned[[1, 2, 4]].sum(), rtol=1e-6)
    np.testing.assert_allclose(rollout.returns, earned * [1, 0, 0, 1, 0], rtol=1e-6)
    np.testing.assert_array_equal(rollout.memory, [1, 0, 0, 1, 0])
    names = np.asarray(rollout.states.obs[:, 0])
    np.testing.assert_array_equal(names[[0, 3]], [1, 4])
    assert set(names[[1, 2, 4]].tolist()) <= {60, 70}
    np.testing.assert_array_equal(rollout.states.steps, [3, 0, 0, 3, 0])
    np.testing.assert_array_equal(steps.obs[:, 0, 0], [1, 2, 3, 4, 5])

    rollout, _, sums = advance(CLOCK, policy, rollout, bank, jax.random.key(2))
    assert (int(sums["episodes"]), int(sums["successes"])) == (4, 1)  # the first, solved in the chunk before
    fresh = 100 * names[[1, 2, 4]] + 1.5
    np.testing.assert_allclose(sums["returns"], 307.5 + 200 + 9 + 1 + fresh.sum(), rtol=1e-6)
    np.testing.assert_allclose(rollout.returns, [0, 0, 0, 1207.5 + 1200 + 15 + 1.5, 0], rtol=1e-6)
    np.testing.assert_array_equal(rollout.memory, [0, 0, 0, 2, 0])


def test_fresh_starts_are_drawn_evenly_from_the_whole_bank():
    count, policy = 3000, repeat(0.0, chunk=1)
    states = jax.tree.map(lambda x: jnp.repeat(x[None], count, axis=0), clock(1, dies=1))
    bank = side_by_side(*[clock(name) for name in (10, 11, 12)])
    rollout = ro.Rollout(states, policy.start(states, jax.random.key(0)), jnp.zeros(count))
    rollout, *_ = advance(CLOCK, policy, rollout, bank, jax.random.key(3))
    drawn, counts = np.unique(np.asarray(rollout.states.physics["name"]), return_counts=True)
    np.testing.assert_array_equal(drawn, [10, 11, 12])
    assert np.abs(counts - 1000).max() < 4 * np.sqrt(3000 * 2 / 9)
    np.testing.assert_array_equal(rollout.states.obs[:, 0], rollout.states.physics["name"])  # states stay whole


def test_the_policy_is_asked_at_the_first_step_of_each_chunk_and_of_each_episode():
    policy, states = repeat(0.0, chunk=5), side_by_side(clock(0, dies=7))
    rollout = ro.Rollout(states, policy.start(states, jax.random.key(0)), jnp.zeros(1))
    asked = []
    for key in jax.random.split(jax.random.key(0), 3):
        asked.append((float(rollout.states.obs[0, 0]), int(rollout.states.steps[0])))
        rollout, *_ = advance(CLOCK, policy, rollout, side_by_side(clock(8)), key)
    assert asked == [(0, 0), (0, 5), (8, 0)]


def test_replay_holds_the_dynamics_of_the_environment_and_never_a_reset():
    point = Point(horizon=8)
    policy = ro.scripted(point.behaviour("bad"))
    key_start, *keys = jax.random.split(jax.random.key(4), 41)
    rollout = ro.start(point, policy, key_start, 3)
    bank = ro.resets(point, jax.random.key(5), 3)
    ring, add = rings.empty(3, 30, Spec(2, 2)), jax.jit(rings.add)
    for key in keys:
        rollout, steps, _ = advance(point, policy, rollout, bank, key)
        ring = add(ring, steps)
    lane, start = (jnp.asarray(x.ravel()) for x in np.indices((3, 29)))
    batch = jax.jit(rings.window_at, static_argnums=3)(ring, lane, start, 4)
    position = np.asarray(batch.obs)
    for j in range(4):
        moved = np.clip(position + 0.1 * np.asarray(batch.actions[:, j]), -1, 1)
        position = np.where(np.asarray(batch.valid[:, j, None]) > 0, moved, position)
    np.testing.assert_allclose(batch.next_obs, position, atol=1e-6)
    k = np.asarray(batch.valid).sum(axis=1)
    assert (k == 4).sum() > 30 and ((k > 0) & (k < 4)).sum() > 15


# Several decisions in a row


def test_an_unroll_is_one_decision_after_the_other_bit_for_bit():
    policy, bank = ro.policy_of(Counting(), jnp.asarray(0.25)), side_by_side(clock(8, dies=4), clock(9))
    rollout = first = ro.Rollout(
        states := side_by_side(clock(1, dies=6), clock(2)), start_of(policy, states), jnp.zeros(2)
    )
    key, happened = jax.random.key(5), []
    for each in jax.random.split(key, 4):
        rollout, *step = advance(CLOCK, policy, rollout, bank, each)
        happened.append(step)
    unroll = jax.jit(ro.unroll, static_argnums=(0, 1, 5))
    after, found = unroll(CLOCK, policy, first, bank, key, 4)
    steps, sums = jax.tree.map(lambda *x: jnp.stack(x), *happened)
    jax.tree.map(np.testing.assert_array_equal, after, rollout)
    jax.tree.map(np.testing.assert_array_equal, found.steps, steps)
    jax.tree.map(np.testing.assert_array_equal, found.sums, {name: total.sum() for name, total in sums.items()})
    np.testing.assert_array_equal(found.memory, first.memory)
    assert found.steps.rewards.shape == (4, 2, 3) and found.steps.extra["told"].shape == (4, 2, 3)


def test_the_last_observation_of_an_unroll_is_from_before_a_reset():
    policy, states = repeat(0.0, chunk=3), side_by_side(clock(1, dies=6), clock(2))
    rollout = ro.Rollout(states, start_of(policy, states), jnp.zeros(2))
    rollout, unroll = ro.unroll(CLOCK, policy, rollout, side_by_side(clock(8)), jax.random.key(0), 2)
    np.testing.assert_array_equal(unroll.last_obs, [[1, 6], [2, 6]])
    np.testing.assert_array_equal(rollout.states.obs, [[8, 0], [2, 6]])


# Observations that are dicts


def test_a_dict_is_observed_key_by_key_and_keeps_its_dtypes(executed):
    env, chunk = Sensed(), jnp.tile(jnp.array([0.1, 0.2, 0.3, 0.4])[None, :, None], (6, 1, 1))
    ends = clock(0), clock(1, dies=2), clock(2, cut=3), clock(3, nan=2), clock(4, inf=1), clock(5, dies=4, cut=4)
    states, steps = execute(env, side_by_side(*map(sensed, ends)), chunk)
    plain_states, plain = executed
    picture = steps.obs.pop("picture")
    assert picture.dtype == jnp.uint8 and picture.shape == (6, 5, 2, 3, 1)
    np.testing.assert_array_equal(picture, np.broadcast_to(plain.obs[..., 1, None, None, None], picture.shape))
    jax.tree.map(np.testing.assert_array_equal, dataclasses.replace(steps, obs=steps.obs["clock"]), plain)
    assert states.obs["picture"].dtype == jnp.uint8
    np.testing.assert_array_equal(states.obs["clock"], plain_states.obs)


def test_dicts_are_evaluated_and_collected_as_arrays_are():
    policy, key = repeat(0.5, chunk=3), jax.random.key(2)
    plain, env = Clock(horizon=20, dies=7), Sensed(horizon=20, dies=7)
    one, other = evaluate(plain, policy, key, 5), evaluate(env, policy, key, 5)
    jax.tree.map(np.testing.assert_array_equal, other, dataclasses.replace(one, track=other.track))
    np.testing.assert_array_equal(other.track["clock"], one.track)
    assert other.track["picture"].dtype == jnp.uint8 and other.track["picture"].shape == (22, 2, 3, 1)
    np.testing.assert_array_equal(other.track["picture"][:, 0, 0, 0], one.track[:, 1])
    rollouts = [ro.start(e, policy, key, 4) for e in (plain, env)]
    for seed in range(4):
        found = [
            advance(e, policy, r, ro.resets(e, key, 3), jax.random.key(seed))
            for e, r in zip((plain, env), rollouts, strict=True)
        ]
        rollouts = [rollout for rollout, _, _ in found]
        np.testing.assert_array_equal(rollouts[1].states.obs["clock"], rollouts[0].states.obs)
        np.testing.assert_array_equal(rollouts[1].states.obs["picture"][:, 0, 0, 0], rollouts[0].states.steps)
    assert int(rollouts[0].states.steps.max()) < 7


def test_only_floats_can_fail_to_be_finite():
    tree = {"a": jnp.array([[1.0, 2.0], [jnp.nan, 0.0], [0.0, 0.0]]), "b": jnp.array([0, 255, 3], jnp.uint8)}
    np.testing.assert_array_equal(ro.finite_of((tree, jnp.array([0.0, 0.0, jnp.inf]))), [True, False, False])


# Policies


@pytree
class Counting:
    """An agent that counts its decisions in an episode, does what its state says, and leaves both behind."""

    chunk: int = 3

    def start(self, state, obs, key):
        return jnp.full(len(obs), 10)

    def decide(self, state, memory, obs, key, *, greedy=False):
        chunks = jnp.full((len(obs), self.chunk, 1), state * (0 if greedy else 1))
        return memory + 1, chunks, {"told": memory, "pair": jnp.stack([obs[:, 1], obs[:, 0]], axis=1)}


def start_of(policy: ro.Policy, states: EnvState):
    return policy.start(states, jax.random.key(0))


def test_an_agent_that_remembers_decides_with_its_memory_and_leaves_extras_at_each_step():
    states = side_by_side(clock(1, dies=2), clock(2))
    policy = ro.policy_of(Counting(), jnp.asarray(0.5))
    rollout = ro.Rollout(states, start_of(policy, states), jnp.zeros(2))
    rollout, steps, _ = advance(CLOCK, policy, rollout, side_by_side(clock(8)), jax.random.key(0))
    np.testing.assert_array_equal(rollout.memory, [10, 11])
    np.testing.assert_array_equal(steps.extra["told"], [[10] * 3] * 2)
    np.testing.assert_array_equal(steps.extra["pair"], [[[0, 1]] * 3, [[0, 2]] * 3])
    _, steps, _ = advance(CLOCK, policy, rollout, side_by_side(clock(8)), jax.random.key(0))
    np.testing.assert_array_equal(steps.extra["told"], [[10] * 3, [11] * 3])
    np.testing.assert_array_equal(steps.extra["pair"], [[[0, 8]] * 3, [[3, 2]] * 3])
    np.testing.assert_array_equal(steps.actions, np.full((2, 3, 1), 0.5))
    greedy = ro.policy_of(Counting(), jnp.asarray(0.5), greedy=True)
    np.testing.assert_array_equal(
        greedy.act(start_of(greedy, states), states, jax.random.key(0))[1], np.zeros((2, 3, 1))
    )


def test_the_shapes_of_extras_are_known_before_anything_is_computed():
    shapes = ro.extras_of(ro.policy_of(Counting(), jnp.asarray(0.5)), CLOCK.spec)
    assert {name: (x.shape, str(x.dtype)) for name, x in shapes.items()} == {
        "told": ((), "int32"),
        "pair": ((2,), "float32"),
    }
    assert ro.extras_of(ro.policy_of(Planner(), jnp.asarray(0.5)), CLOCK.spec) == {}


@dataclasses.dataclass(frozen=True, eq=False)
class Planner:
    """The agent that goes straight to the goal of `Point`; it plans each chunk at its first step."""

    chunk: int = 1
    far: float = 0.8

    def act(self, state: jax.Array, obs: jax.Array, key: jax.Array, *, greedy: bool = False) -> jax.Array:
        where, plan = obs, []
        for _ in range(self.chunk):
            plan.append(jnp.clip((self.far - where) / 0.1, -1, 1))
            where = where + 0.1 * plan[-1]
        return jnp.stack(plan, axis=1) * (state if greedy else 0)


def test_policy_of_asks_the_agent_with_the_state_and_the_greedy_flag():
    states = ro.resets(Point(), jax.random.key(0), 4)
    for greedy, share in ((True, 0.5), (False, 0.0)):
        policy = ro.policy_of(Planner(chunk=2), jnp.asarray(0.5), greedy)
        memory, actions, extras = policy.act(policy.start(states, jax.random.key(1)), states, jax.random.key(2))
        assert (policy.chunk, memory, extras) == (2, (), {})
        np.testing.assert_array_equal(actions, np.full((4, 2, 2), share))


def test_scripted_policies_keep_a_memory_and_a_noise_of_their_own():
    policy = ro.scripted(Point().explore().behaviour("good"))
    states = ro.resets(Point(), jax.random.key(0), 5)
    states = jax.tree.map(lambda x: jnp.zeros_like(x), states)  # all alike
    memory = policy.start(states, jax.random.key(1))
    assert len(np.unique(np.asarray(memory["goal"])[:, 0])) == 5
    _, actions, extras = policy.act({**memory, "goal": jnp.zeros((5, 2))}, states, jax.random.key(2))
    assert actions.shape == (5, 1, 2) and policy.chunk == 1 and extras == {}
    assert len(np.unique(np.asarray(actions)[:, 0, 0])) == 5


def test_start_gives_each_environment_a_start_of_its_own():
    rollout = ro.start(CLOCK, repeat(0.0, chunk=1), jax.random.key(0), 6)
    assert len(np.unique(np.asarray(rollout.states.obs[:, 0]))) == 6
    np.testing.assert_array_equal(rollout.returns, np.zeros(6))
    np.testing.assert_array_equal(rollout.memory, np.zeros(6))


# Evaluation


@pytest.mark.parametrize("chunk", [1, 4, 5])
def test_evaluation_is_the_first_episode_and_nothing_after_it(chunk):
    env = Clock(horizon=20, dies=7, solved=3)
    result = evaluate(env, repeat(0.5, chunk), jax.random.key(0), 40)
    np.testing.assert_array_equal(result.lengths, np.full(40, 7))
    np.testing.assert_array_equal(result.success, np.ones(40, bool))
    assert not result.broken.any()
    names = (np.asarray(result.returns) - 28 - 3.5) / 700
    assert len(np.unique(names)) == 40 and 0 <= names.min() < 0.1 and 0.9 < names.max() < 1


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 9])
def test_evaluation_goes_on_to_the_horizon_also_where_chunks_do_not_divide_it(chunk):
    result = evaluate(Clock(horizon=7), repeat(0.0, chunk), jax.random.key(0), 2)
    np.testing.assert_array_equal(result.lengths, [7, 7])


def test_what_would_break_after_the_end_does_not_count():
    result = evaluate(Clock(horizon=9, dies=3, nan=4), repeat(0.0, 5), jax.random.key(0), 2)
    assert not result.broken.any() and not (result.lengths - 3).any()


@pytest.mark.parametrize("chunk", [1, 4])
def test_the_track_is_what_the_first_environment_saw_until_its_end(chunk):
    result = evaluate(Clock(horizon=12, dies=7), repeat(0.0, chunk), jax.random.key(3), 3)
    np.testing.assert_array_equal(result.track[:, 1], np.minimum(np.arange(13), 7))
    names = (np.asarray(result.returns) - 28) / 700
    np.testing.assert_allclose(result.track[:, 0], np.full(13, names[0]), atol=1e-6)


def test_solved_is_solved_also_when_it_is_not_the_last_step_that_did_it():
    solved = [
        evaluate(Clock(horizon=9, dies=6, solved=at), repeat(0.0, 4), jax.random.key(0), 3).success for at in (5, 6, 7)
    ]
    np.testing.assert_array_equal(solved, [[1, 1, 1], [1, 1, 1], [0, 0, 0]])


def test_a_broken_episode_is_told_and_ends_there():
    result = evaluate(Clock(horizon=9, nan=4), repeat(0.5, 3), jax.random.key(0), 5)
    np.testing.assert_array_equal(result.broken, np.ones(5, bool))
    np.testing.assert_array_equal(result.lengths, np.full(5, 4))
    names = (np.asarray(result.returns) - 6 - 1.5) / 300  # the three steps before
    assert ((names >= 0) & (names < 1)).all()


def test_a_reset_that_is_not_finite_is_a_broken_episode_of_one_step():
    result = evaluate(Clock(horizon=9, unsettled=0.5), repeat(0.5, 3), jax.random.key(0), 40)
    assert 10 < result.broken.sum() < 30
    np.testing.assert_array_equal(result.lengths, np.where(result.broken, 1, 9))
    np.testing.assert_array_equal(result.returns == 0, result.broken)


def test_resets_that_are_not_finite_are_counted_and_neither_seen_nor_stored():
    env, policy = Clock(horizon=4, unsettled=0.5), repeat(0.5, 2)
    sees = dataclasses.replace(policy, act=lambda memory, states, key: policy.act(memory, states, key))
    bank = ro.resets(env, jax.random.key(1), 40)
    rollout, ring = ro.start(env, sees, jax.random.key(0), 40), rings.empty(40, 30, env.spec)
    first, counted = np.asarray(rollout.states.truncated), 0
    for key in jax.random.split(jax.random.key(2), 4):
        assert np.isfinite(rollout.states.obs).all()
        rollout, steps, sums = ro.advance(env, sees, rollout, bank, key)
        ring, counted = rings.add(ring, steps), counted + int(sums["broken"])
        if first is not None:
            np.testing.assert_array_equal(~np.asarray(steps.valid[:, 0]), first)
            assert int(sums["broken"]) == first.sum() > 0 and steps.ended[first].all()
            first = None
    assert counted > 40 / 2 and np.isfinite(ring.obs).all() and np.isfinite(ring.rewards).all()
    assert (ring.valid.sum(axis=1) > 0).any()


def test_the_planner_earns_in_evaluation_what_the_point_is_worth():
    key = jax.random.key(7)
    planner = ro.policy_of(Planner(chunk=4), jnp.asarray(1.0), greedy=True)
    free = evaluate(Point(horizon=30), planner, key, 50)
    assert not free.broken.any() and free.success.all()
    assert 8 <= int(free.lengths.min()) < int(free.lengths.max()) <= 17
    np.testing.assert_array_equal(free.returns, 1.0 - free.lengths)

    cut = evaluate(Point(horizon=12), planner, key, 50)
    late = np.asarray(free.lengths) > 12
    assert 5 < late.sum() < 45
    np.testing.assert_array_equal(cut.success, ~late)
    np.testing.assert_array_equal(cut.lengths, np.minimum(free.lengths, 12))
    np.testing.assert_array_equal(cut.returns, np.where(late, -12.0, free.returns))


def test_one_key_gives_the_same_starts_to_every_agent():
    env = Clock(horizon=5, dies=5)
    still, scripted = repeat(0.0, chunk=1), ro.scripted(Restless())
    names = [
        (np.asarray(evaluate(env, policy, jax.random.key(seed), 10).returns) - 15) / 500
        for policy, seed in ((still, 1), (repeat(0.0, chunk=5), 1), (scripted, 1), (still, 2))
    ]
    np.testing.assert_allclose(names[1], names[0], atol=1e-6)
    np.testing.assert_allclose(names[2], names[0], atol=0.0101)  # its own actions move the return by 5 at most
    assert np.abs(names[3] - names[0]).max() > 0.1
