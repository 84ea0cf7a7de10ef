"""Environments: the contract that all keep, what make() refuses, known physics and values, what the checker sees."""

import dataclasses
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from envs.adapters import Adapted
from envs.checker import check
from envs.point import Bandit, Point
from envs.scripted import SKILLS
from envs.template import Cart
from jaxrl.errors import UserError
from jaxrl.types import Env, EnvState, Leaf, Spec

ROOT = Path(__file__).parents[2]
simulator = pytest.mark.simulator
CONTRACT = [
    "point",
    "point?dimensions=1&goal_conditioned=true&horizon=3",
    "bandit",
    "envs.template:make",
    *(
        pytest.param(name, marks=simulator)
        for name in ("push?goal_conditioned=true", "brax/fast", "brax/inverted_pendulum", "maze-umaze", "pointmaze")
    ),
]


@pytest.fixture(scope="module", autouse=True)
def free_programs():
    """Drops compiled programs when this file is done."""
    yield
    jax.clear_caches()


def roll(env: Env, level: str, count: int, steps: int):
    """Returns (first states [N], later states [N, steps], actions, memories) of a behaviour, without resets."""
    behaviour = env.behaviour(level)

    def episode(key):
        key_reset, key_start, key_act = jax.random.split(key, 3)
        first = env.reset(key_reset)

        def step(carry, key):
            memory, action = behaviour.act(*carry, key)
            state = env.step(carry[1], action)
            return (memory, state), (state, action, memory)

        carry = (behaviour.start(first, key_start), first)
        return first, *jax.lax.scan(step, carry, jax.random.split(key_act, steps))[1]

    return jax.device_get(jax.jit(jax.vmap(episode))(jax.random.split(jax.random.key(0), count)))


def first_true(flags: np.ndarray) -> np.ndarray:
    """Returns in which step [N] a flag [N, T] is first true, counted from 1; 0 if it never is."""
    return np.where(flags.any(1), flags.argmax(1) + 1, 0)


# All environments


@pytest.mark.parametrize("name", CONTRACT)
def test_contract(name):
    env = envs.make(name)
    assert isinstance(env, Env)
    assert [str(finding) for finding in check(env) if not finding.ok] == []


def test_every_name_that_is_listed_can_be_made():
    for name, about in envs.names():
        assert about
        if "NAME" not in name and ":" not in name:
            assert isinstance(envs.make(name).spec, Spec), name


def test_importing_envs_imports_no_simulator():
    code = "import envs, sys; print({'mujoco', 'brax', 'mujoco_playground'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# make()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pont", r"unknown environment 'pont': did you mean 'point'\?"),
        ("brax/", "unknown environment"),
        ("brax/hoper", r"unknown Brax environment 'hoper': did you mean 'hopper'\?"),
        ("brax/swimmer?backend=spring", "brax/swimmer cannot be built with backend 'spring'"),
        ("brax/ant?backend=bullet", "backend is 'bullet', must be .*'spring'"),
        ("point?sped=1", r"unknown option 'sped': did you mean 'speed'\? known are dimensions, horizon"),
        ("maze?taks=2", r"unknown option 'taks': did you mean 'task'\?"),
        ("point?speed", "write options as key=value"),
        ("point?speed=fast", "option speed is 'fast', must be float"),
        ("point?horizon=1.5", "option horizon is 1.5, must be int"),
        ("point?goal_conditioned=1", "option goal_conditioned is 1, must be bool"),
        ("push?reward=shaped", r"option reward is 'shaped', must be Literal\['sparse', 'dense'\]"),
        ("point?horizon=0", "horizon is 0, must be 1 or more"),
        ("no_such_module:make", "cannot import 'no_such_module'"),
        ("envs.template:mak", r"'mak': did you mean 'make'\?"),
        ("envs.template:make?dt=1", "unknown option 'dt': known are horizon"),
        ("jaxrl.errors:unknown", "missing a required argument: 'kind'"),
        ("jaxrl.types:Spec?observation=1&action=1", "returned Spec, which lacks spec, horizon, reset, step"),
    ],
)
def test_make_refuses_in_words(name, says):
    with pytest.raises(UserError, match=says):
        envs.make(name)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco_playground", None)
    with pytest.raises(UserError, match=r"needs the package 'mujoco_playground': pip install 'jaxrl\[playground\]'"):
        envs.make("playground/CartpoleBalance")


def test_options_are_read_as_literals():
    env = envs.make("point?speed=2e-1&goal_conditioned=True&dimensions=3")
    assert (env.speed, env.goal_conditioned, env.dimensions) == (0.2, True, 3)
    assert envs.make("push?reward=dense").reward == "dense"


def test_the_users_own_module_is_found_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_cart.py").write_text(
        "from envs.template import Cart\ndef make(horizon: int = 5): return Cart(horizon)"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    assert envs.make("my_cart:make?horizon=7").horizon == 7


# Scripted behaviours


def test_mixed_draws_every_level_and_levels_differ_in_skill():
    _, states, actions, memory = roll(Point(), "mixed", 512, 50)
    assert np.array_equal(memory["noise"], np.broadcast_to(memory["noise"][:, :1], (512, 50))), "kept all episode"
    ended = first_true(states.terminated)
    lengths = {}
    for level, skill in SKILLS.items():
        drawn = np.isclose(memory["weight"][:, 0], skill[0]) & np.isclose(memory["noise"][:, 0], skill[1])
        assert 0.15 < drawn.mean() < 0.35
        lengths[level] = np.where(ended, ended, 50)[drawn].mean()
        uniform = actions[drawn]
    assert lengths["good"] < lengths["medium"] < lengths["bad"] < lengths["random"] and lengths["random"] > 49
    # the last level is random: actions are uniform in [-1, 1]
    assert abs(uniform.mean()) < 0.02 and abs(uniform.std() - 1 / np.sqrt(3)) < 0.02 and np.abs(uniform).max() <= 1


def test_exploring_moves_on_to_new_goals_and_never_terminates():
    env = Point().explore()
    first, states, _, memory = roll(env, "good", 32, 100)
    assert not states.terminated.any() and states.success[:, -1].any()
    assert first.obs.max() > 0.5, "starts lie in the whole box"
    assert min(len(np.unique(memory["goal"][i], axis=0)) for i in range(32)) >= 3
    settled = roll(Point(), "good", 4, 30)[3]["goal"]
    assert np.allclose(settled, 0.8)


@pytest.mark.parametrize("name", ["point", "bandit", pytest.param("push", marks=simulator)])
def test_an_unknown_level_is_refused(name):
    with pytest.raises(UserError, match=r"unknown behaviour level 'god': did you mean 'good'\?"):
        envs.make(name).behaviour("god")


# The point


def test_optimal_steps_are_those_of_the_best_policy():
    by_hand = Point(dimensions=1).optimal_steps(jnp.array([[-1.0], [0.0], [0.69], [0.75]]))
    assert by_hand.tolist() == [17, 7, 1, 1]

    env = Point(dimensions=2, goal_conditioned=True)

    def episode(key):
        first = env.reset(key)

        def step(state, _):
            state = env.step(state, env.plan(state.obs, env.aim(state.obs, key)))
            return state, (state.terminated, state.reward)

        return first.obs, *jax.lax.scan(step, first, length=env.horizon)[1]

    obs, terminated, rewards = jax.jit(jax.vmap(episode))(jax.random.split(jax.random.key(0), 64))
    steps = first_true(np.asarray(terminated))
    assert np.array_equal(steps, env.optimal_steps(obs))
    until = np.arange(env.horizon)[None] < steps[:, None]
    returns = (np.asarray(rewards) * until * 0.9 ** np.arange(env.horizon)[None]).sum(1)
    assert np.allclose(returns, env.optimal_value(obs, 0.9), atol=1e-5)


def test_termination_wins_over_truncation_and_both_stay_apart():
    state = Point(dimensions=1, horizon=3).reset(jax.random.key(0))

    def flags(horizon, start):
        env = Point(dimensions=1, horizon=horizon)
        now = dataclasses.replace(state, physics=state.physics | {"position": jnp.array([start])})
        seen = []
        for _ in range(horizon):
            now = env.step(now, jnp.ones(1))
            seen.append((bool(now.terminated), bool(now.truncated), float(now.reward)))
        return seen

    assert flags(3, -1.0) == [(False, False, -1), (False, False, -1), (False, True, -1)]
    assert flags(3, 0.45) == [(False, False, -1), (False, False, -1), (True, False, 0)]


@pytest.mark.parametrize("conditioned", [False, True])
def test_point_relabel_is_the_reward_of_step(conditioned):
    env = Point(goal_conditioned=conditioned)
    first, states, actions, _ = roll(env, "medium", 16, 50)
    before = np.concatenate([first.obs[:, None], states.obs[:, :-1]], 1)
    reward, terminated = env.relabel(*(x.reshape(-1, x.shape[-1]) for x in (before, actions, states.obs)))
    assert np.array_equal(reward, states.reward.ravel()) and np.array_equal(terminated, states.terminated.ravel())
    assert terminated.any() and not terminated.all()


def test_the_picture_shows_the_point_where_it_is():
    image = Point().draw(np.array([0.5, -0.5], np.float32), 220)
    assert image.getpixel((160, 160)) == (65, 105, 225)  # royal blue at 1.1 + 0.5 and 1.1 + 0.5 from the upper left
    assert image.getpixel((190, 20)) == (46, 139, 87)  # sea green: the upper rim of the ring around (0.8, 0.8)
    assert image.getpixel((60, 60)) == (255, 255, 255)


def test_bandit_rewards_two_modes_and_nothing_between():
    env = Bandit()
    state = env.reset(jax.random.key(0))
    ends = [env.step(state, jnp.array([a])) for a in (0.6, -0.6, 0.0)]
    assert np.allclose([end.reward for end in ends], [1.0, 0.5, 1.5 * np.exp(-18.0)], atol=1e-6)
    assert [bool(end.success) for end in ends] == [True, False, False]
    assert all(end.terminated and not end.truncated for end in ends)

    _, _, actions, _ = roll(env, "good", 256, 1)
    assert abs((actions > 0).mean() - 0.5) < 0.1 and np.abs(np.abs(actions) - 0.6).max() <= 0.2


# The push


@pytest.fixture(scope="module")
def pushed():
    """Episodes of all behaviour levels, run on past success."""
    return roll(envs.make("push"), "mixed", 192, 100)


@simulator
def test_push_is_solved_by_the_script_and_not_by_chance(pushed):
    _, states, _, memory = pushed
    solved = {level: states.terminated.any(1)[memory["weight"][:, 0] == SKILLS[level][0]] for level in SKILLS}
    assert min(len(episodes) for episodes in solved.values()) > 30
    assert solved["good"].mean() > 0.9 and solved["medium"].mean() > solved["bad"].mean() + 0.2
    assert solved["random"].mean() < 0.05


@simulator
def test_push_moves_as_mujoco_on_the_cpu_does(pushed):
    import mujoco

    from envs.push import MJCF, SUBSTEPS

    model = mujoco.MjModel.from_xml_string(MJCF)
    first, states, actions, memory = pushed
    good = np.flatnonzero(memory["weight"][:, 0] == 1.0)[:8]
    for i in good:
        data = mujoco.MjData(model)
        data.qpos[:] = first.physics["position"][i]
        for t in range(40):
            data.ctrl[:] = actions[i, t]
            mujoco.mj_step(model, data, SUBSTEPS)
            assert np.allclose(states.obs[i, t, :4], data.qpos, atol=1e-4), (i, t)
    # the comparison is of something: the disc was touched and moved in most of these episodes
    moved = np.linalg.norm(states.obs[good, 39, 2:4] - first.obs[good, 2:4], axis=-1)
    assert (moved > 0.1).sum() >= 4


@simulator
def test_push_keeps_its_bodies_where_they_can_be_reached(pushed):
    first, states, _, _ = pushed
    gap = np.linalg.norm(states.obs[..., :2] - states.obs[..., 2:4], axis=-1)
    assert gap.min() > 0.15, "pusher and disc, which touch at 0.2, overlap little"
    assert np.abs(states.obs[..., 2:4]).max() < 0.72 and np.abs(states.obs[..., :2]).max() < 1.05
    # away from the disc, whose recoil adds to it, the pusher's top speed is force over damping: 6.4 / 8
    assert np.isclose(np.abs(states.obs[gap > 0.35][:, 4:6]).max(), 0.8, atol=5e-3)
    assert np.linalg.norm(first.obs[:, 2:4] - np.array([[0.5, 0.0]]), axis=-1).min() >= 0.3
    assert np.linalg.norm(first.obs[:, :2] - first.obs[:, 2:4], axis=-1).min() >= 0.24


@simulator
def test_push_relabel_is_the_reward_of_step(pushed):
    first, states, actions, _ = pushed
    before = np.concatenate([first.obs[:, None], states.obs[:, :-1]], 1)
    windows = [x.reshape(-1, x.shape[-1]) for x in (before, actions, states.obs)]
    reward, terminated = envs.make("push").relabel(*windows)
    assert np.array_equal(reward, states.reward.ravel()) and np.array_equal(terminated, states.terminated.ravel())
    assert set(np.unique(reward)) == {-1.0, 0.0}

    # pusher 0.5 and goal 0.4 away from the disc: -0.4 - 0.2 * (0.5 - 0.2)
    obs = np.array([[-0.4, 0.0, 0.1, 0.0, 0, 0, 0, 0]], np.float32)
    dense, ended = envs.make("push?reward=dense").relabel(obs, actions[0, :1], obs)
    assert np.allclose(dense, -0.46) and not ended.any()


@simulator
def test_push_shows_its_random_goal_and_judges_by_it():
    env = envs.make("push?goal_conditioned=true&exploring=true")
    states = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), 32))
    assert np.array_equal(states.obs[:, -2:], states.physics["goal"]) and np.ptp(states.obs[:, -2:]) > 0.8
    there = states.obs.at[:, 2:4].set(states.obs[:, -2:] + jnp.array([[0.0, 0.09]]))
    reward, ended = env.relabel(states.obs, None, there)
    assert ended.all() and (reward == 0).all()


@simulator
def test_push_draws_pusher_disc_and_goal():
    image = envs.make("push").draw(np.array([-0.5, 0.5, 0.0, -0.5, 0, 0, 0, 0], np.float32), 220)
    assert image.getpixel((60, 60)) == (65, 105, 225)
    assert image.getpixel((110, 160)) == (218, 165, 32)
    assert image.getpixel((160, 100)) == (46, 139, 87)


# Adapters


@simulator
def test_brax_fast_moves_as_it_says_and_is_truncated_by_our_horizon():
    env = envs.make("brax/fast?horizon=3")
    state = env.reset(jax.random.key(0))
    for _ in range(3):
        assert not state.truncated
        state = env.step(state, jnp.ones(1))
    # velocities 0.02, 0.04, 0.06 for 0.02 each
    assert np.allclose(state.obs, [0.0024, 0.06]) and np.isclose(state.reward, 0.0024)
    assert state.truncated and not state.terminated and not state.success


class Stub:
    """A simulator as Brax and Playground have them: named observations, Python numbers, `done` as a float."""

    action_size = 1

    def reset(self, key):
        from brax.envs import State

        obs = {"velocity": jnp.array([3.0]), "angle": jnp.arange(2)}
        return State(None, obs, 0.0, jnp.zeros(()), {"success": jnp.zeros(())})

    def step(self, state, action):
        metrics = {"success": (action[0] > 0).astype(jnp.float32)}
        return state.replace(reward=2.0, done=jnp.where(action[0] < 0, 1.0, 0.0), metrics=metrics)


@simulator
def test_adapted_states_are_strong_and_tell_done_from_truncated():
    env = Adapted(Stub(), horizon=2)
    assert env.spec == Spec((Leaf("angle", (2,)), Leaf("velocity", (1,))), action=1)
    assert [str(finding) for finding in check(env) if not finding.ok] == []

    state = env.reset(jax.random.key(0))
    assert {name: x.tolist() for name, x in state.obs.items()} == {"angle": [0.0, 1.0], "velocity": [3.0]}
    assert {x.dtype for x in state.obs.values()} == {jnp.dtype("float32")}
    solved = env.step(state, jnp.ones(1))
    assert solved.success and not solved.terminated and float(solved.reward) == 2.0
    died = env.step(solved, -jnp.ones(1))
    assert died.terminated and not died.truncated and died.success


class Robot:
    """A simulator that observes as Playground's robots do, with a camera."""

    action_size = 2

    def __init__(self, *left_out):
        self.left_out = left_out

    def reset(self, key):
        from brax.envs import State

        obs = {
            "state": jnp.array([1.0, 2.0]),
            "privileged_state": {"state": jnp.array([1.0, 2.0]), "push": jnp.array([99.0])},
            "pixels/front": jnp.zeros((4, 5, 3), jnp.uint8),
        }
        seen = {name: part for name, part in obs.items() if name not in self.left_out}
        return State(None, seen, jnp.zeros(()), jnp.zeros(()))

    def step(self, state, action):
        return state


def seen_by(env: Adapted) -> tuple[list[str], list[str]]:
    """Returns the keys that policies and critics see."""
    obs = env.reset(jax.random.key(0)).obs
    return sorted(env.spec.actor(obs)), sorted(env.spec.critic(obs))


def test_a_privileged_state_is_for_critics_alone_unless_another_choice_is_made():
    env = Adapted(Robot(), 5)
    assert env.spec.observation == (
        Leaf("pixels/front", (4, 5, 3), "uint8"),
        Leaf("privileged_state", (3,)),
        Leaf("state", (2,)),
    )
    assert seen_by(env) == (["state"], ["privileged_state"])
    obs = env.spec.actor(env.reset(jax.random.key(0)).obs)
    assert 99.0 not in obs["state"]
    assert seen_by(Adapted(Robot("privileged_state"), 5)) == (["state"], ["state"])
    assert seen_by(Adapted(Robot("privileged_state", "state"), 5)) == (["pixels/front"], ["pixels/front"])
    assert seen_by(Adapted(Robot("state"), 5)) == (["pixels/front"], ["privileged_state"])
    assert seen_by(Adapted(Robot(), 5, ("privileged_state", "state"))) == (
        ["privileged_state", "state"],
        ["privileged_state"],
    )


@pytest.fixture
def playground(monkeypatch):
    """Has `playground/Robot` and `playground/Cart` built by a stand-in for MuJoCo Playground."""
    config = types.SimpleNamespace(episode_length=7, impl="warp")
    registry = types.SimpleNamespace(
        ALL_ENVS=("Robot", "Cart"),
        get_default_config=lambda name: config,
        load=lambda name, config: Robot() if name == "Robot" else Flat(),
    )
    monkeypatch.setitem(sys.modules, "mujoco_playground", types.SimpleNamespace(registry=registry))


class Flat(Robot):
    """One whose observation is an array."""

    def reset(self, key):
        return super().reset(key).replace(obs=jnp.arange(3.0))


@pytest.mark.parametrize(
    ("options", "actor", "critic"),
    [
        ("", ["state"], ["privileged_state"]),
        ("?actor=state&critic=state,privileged_state", ["state"], ["privileged_state", "state"]),
        ("?critic=state", ["state"], ["state"]),
        ("?obs=state", ["state"], ["state"]),
        ("?obs=state,privileged_state", ["state"], ["privileged_state"]),
        ("?actor=pixels/front,state", ["pixels/front", "state"], ["privileged_state"]),
    ],
)
def test_keys_are_chosen_by_options(playground, options, actor, critic):
    env = envs.make(f"playground/Robot{options}")
    assert seen_by(env) == (actor, critic)
    assert env.horizon == 7


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "Robot?actor=sate",
            r"playground/Robot: unknown observation key 'sate': did you mean 'state'\? known are pixels",
        ),
        ("Robot?obs=sate", "playground/Robot: unknown observation key 'sate': did you mean 'state'"),
        ("Cart?obs=state", "playground/Cart: observations are one array: there are no keys to select"),
        ("Robot?critic=state,secret", "playground/Robot: unknown observation key 'secret'"),
        ("Robot?see=state", "unknown option 'see'"),
        ("Cart?actor=state", "playground/Cart: observations are one array: there are no keys to select"),
    ],
)
def test_keys_that_do_not_exist_are_refused(playground, name, says):
    with pytest.raises(UserError, match=says):
        envs.make(f"playground/{name}")


def test_an_array_of_playground_stays_an_array(playground):
    assert envs.make("playground/Cart").spec == Spec(3, 2)


# The checker


class Broken(Cart):
    """The template with one thing wrong: `change(self, state, before, action)` returns the state that step gives."""

    def step(self, state: EnvState, action: jax.Array) -> EnvState:
        return self.change(super().step(state, action), state, action)


def broken(change) -> Cart:
    """Returns the template with its step's result changed."""
    return type("Changed", (Broken,), {"change": lambda self, after, before, action: change(after, before, action)})()


def replaced(**fields):
    """Returns a change that sets fields of the new state, each from (after, before, action)."""
    return lambda *args: dataclasses.replace(args[0], **{name: make(*args) for name, make in fields.items()})


def restarted(when):
    """Returns a change that resets inside step."""

    def change(after, before, action):
        fresh = Cart().reset(jax.random.key(7))
        return jax.tree.map(lambda a, b: jnp.where(when(after), a, b), fresh, after)

    return change


def numpy_start(self, key):
    return dataclasses.replace(Cart.reset(self, key), obs=jnp.asarray(np.random.uniform(size=2), jnp.float32))


@dataclasses.dataclass
class Unhashable:
    horizon: int = 5
    spec = Spec(2, 1)
    reset = Cart.reset
    step = Cart.step


class Chooser(Cart):
    """One that takes the number of a choice."""

    def step(self, state: EnvState, action: jax.Array) -> EnvState:
        return super().step(state, jnp.array([[-1.0], [1.0]])[action])


class Seeing(Cart):
    """One that observes a dict of a vector and an image; `spec` says what."""

    spec = Spec((Leaf("cart", (2,)), Leaf("image", (2, 2, 3), "uint8")), action=1)

    def seen(self, state: EnvState) -> EnvState:
        obs = {"cart": state.obs, "image": jnp.full((2, 2, 3), state.steps, jnp.uint8)}
        return dataclasses.replace(state, obs=obs)

    def reset(self, key: jax.Array) -> EnvState:
        return self.seen(super().reset(key))

    def step(self, state: EnvState, action: jax.Array) -> EnvState:
        return self.seen(super().step(dataclasses.replace(state, obs=state.obs["cart"]), action))


def seeing(*leaves: Leaf, **fields):
    """Returns one whose spec is another."""
    return type("Misled", (Seeing,), {"spec": Spec(leaves or Seeing.spec.observation, 1, **fields)})()


IMAGE = Leaf("image", (2, 2, 3), "uint8")
TREE, CLOCK = "step returns the tree that reset returns", "steps starts at 0 and counts every step"
CUT = "truncates at the horizon and not before, unless terminated"
FAULTS = {
    "part": (type("Partless", (), {"horizon": 3, "reset": None})(), "has spec, horizon, reset and step", "spec, step"),
    "sizes": (type("Sizeless", (Cart,), {"spec": Spec(2, 1, goal=2)})(), "spec holds sizes", "goal < observation"),
    "horizon": (Cart(horizon=0), "horizon is a positive int", "0"),
    "keys": (seeing(actor_keys=("card",)), "spec holds sizes", "key 'card' is not one of the arrays cart, image"),
    "no keys": (
        type("Keyed", (Cart,), {"spec": Spec(2, 1, critic_keys=("cart",))})(),
        "spec holds sizes",
        "it names the keys cart, but observations are one array",
    ),
    "twice": (seeing(IMAGE, IMAGE), "spec holds sizes", "with unique names"),
    "wide": (
        seeing(Leaf("cart", (2,), "float16"), IMAGE),
        "spec holds sizes",
        "arrays are float32, or images of dtype",
    ),
    "flat": (seeing(Leaf("image", (12,), "uint8")), "spec holds sizes", "with the shape (height, width, channels)"),
    "goal": (seeing(goal=2), "spec holds sizes", "goal is 2, the array 'goal' has 0 entries: they must agree"),
    "leaf": (
        seeing(Leaf("cart", (3,)), IMAGE),
        "shapes and dtypes are those of the contract",
        "obs['cart'] is float32[2], must be float32[3]",
    ),
    "no leaf": (
        seeing(Leaf("cart", (2,)), Leaf("eye", (1,))),
        "shapes and dtypes are those of the contract",
        "obs['eye'] is absent, must be float32[1]; obs['image'] is uint8[2, 2, 3], must be absent",
    ),
    "discrete": (
        Chooser(),
        "step(state, action) can be traced",
        "it takes an integer action: discrete actions are",
    ),
    "hash": (Unhashable(), "can be a static argument of jit", "eq=False"),
    "numpy": (type("Numpy", (Cart,), {"reset": numpy_start})(), "reset is random only through its key", "numpy"),
    "dict": (type("Dict", (Cart,), {"reset": lambda *_: {}})(), "reset returns an EnvState", "it returns dict"),
    "if": (broken(lambda a, b, u: a if u[0] > 0 else b), "step(state, action) can be traced", "jnp.where"),
    "obs": (
        type("Wide", (Cart,), {"spec": Spec(3, 1)})(),
        "shapes and dtypes are those of the contract",
        "obs is float32[2], must be float32[3]",
    ),
    "dtype": (
        broken(replaced(obs=lambda a, *_: a.obs.astype(jnp.float16))),
        TREE,
        ".obs is float32[2], then float16[2]",
    ),
    "tree": (broken(replaced(info=lambda a, *_: {"far": a.obs[0]})), TREE, ".info['far'] is absent, then float32[]"),
    "weak": (
        broken(replaced(reward=lambda a, *_: jnp.where(a.success, 0.0, -1.0))),
        "no weak types",
        "step(...).reward",
    ),
    "nan": (broken(replaced(reward=lambda a, *_: jnp.sqrt(a.obs[0] + 0.5))), "finite under random actions", "step"),
    "bound": (
        broken(replaced(reward=lambda a, b, u: jnp.where(u[0] == 1, jnp.nan, a.reward))),
        "finite under actions at the bounds",
        "violated at step 1",
    ),
    "callback": (
        broken(
            replaced(
                reward=lambda a, *_: jax.pure_callback(
                    lambda x: np.random.uniform(size=x.shape).astype(np.float32),
                    a.reward,
                    a.reward,
                    vmap_method="expand_dims",
                )
            )
        ),
        "the same key and actions give the same episode",
        "key of reset",
    ),
    "restart": (broken(restarted(lambda s: s.truncated)), CLOCK, "do not reset in step"),
    "clock": (broken(replaced(steps=lambda a, b, _: b.steps)), CLOCK, "violated at step 1"),
    "never": (broken(replaced(truncated=lambda a, *_: jnp.zeros((), bool))), CUT, "violated at step 63"),
    "both": (broken(replaced(terminated=lambda a, *_: a.truncated)), CUT, "~terminated"),
    "relabel": (
        type("Mislabelled", (Cart,), {"relabel": lambda self, *_: (np.zeros(1), np.zeros(1, bool))})(),
        "relabel gives the reward of step",
        "where step gave [-1. -1.",
    ),
}


def test_a_dict_of_a_vector_and_an_image_keeps_the_contract():
    assert [str(finding) for finding in check(Seeing(horizon=3)) if not finding.ok] == []
    blurred = type("Blurred", (Seeing,), {"seen": lambda self, state: Seeing.seen(self, broken_obs(state))})
    assert "finite under random actions" in [finding.rule for finding in check(blurred()) if not finding.ok]


def broken_obs(state: EnvState) -> EnvState:
    return dataclasses.replace(state, obs=jnp.sqrt(state.obs))


@pytest.mark.parametrize("fault", FAULTS)
def test_the_checker_sees_each_fault_and_tells_how_to_mend_it(fault):
    env, rule, says = FAULTS[fault]
    found = [finding for finding in check(env) if not finding.ok]
    assert [finding.rule for finding in found[:1]] == [rule]
    assert says in str(found[0]) and str(found[0]).startswith("FAIL  ")
