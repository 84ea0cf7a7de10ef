"""Checks of an environment against the protocol. One finding per rule; failures include a suggested fix."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from envs import HOST_PARTS, PARTS, missing_parts
from jaxrl.rollout import spaces
from jaxrl.rollout.workers import Pool
from jaxrl.types import Drawable, Env, EnvState, HasBehaviours, HostEnv, Observation, Relabels, Spec

STEPS, COPIES = 64, 8  # size of the checked rollout
SHOWN = 3  # maximum number of places named in one finding
DISCRETE = f"it takes an integer action: discrete actions are not supported, {spaces.CONTINUOUS}"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One rule, the problem with a suggested fix, empty if the rule is met, and what is to know about it."""

    rule: str
    problem: str = ""
    note: str = ""

    @property
    def ok(self) -> bool:
        """Returns whether the rule is met."""
        return not self.problem

    def __str__(self) -> str:
        """Returns the line of the report."""
        return (
            f"FAIL  {self.rule}: {self.problem}"
            if self.problem
            else f"ok    {self.rule}{self.note and ': '}{self.note}"
        )


def check(env: Any) -> list[Finding]:
    """Returns a finding per rule, in the order of checking. Stops early if the next rules cannot be checked."""
    findings = []
    for stage in (_sizes, _simulations) if isinstance(env, HostEnv) else (_sizes, _states, _rollouts):
        findings += stage(env)
        if not all(finding.ok for finding in findings):
            break
    return findings


def before_running(env: Any) -> list[Finding]:
    """Returns the findings that need no compiling and no worker process, for environments about to be trained in."""
    findings = list(_sizes(env))
    if all(finding.ok for finding in findings) and not isinstance(env, HostEnv):
        findings += _states(env)
    return findings


def _sizes(env: Any) -> Iterator[Finding]:
    parts, missing = HOST_PARTS if isinstance(env, HostEnv) else PARTS, missing_parts(env)
    yield Finding(f"has {', '.join(parts[:-1])} and {parts[-1]}", f"add {', '.join(missing)}" if missing else "")
    if missing:
        return
    yield Finding("spec holds sizes", _misfit(env.spec))
    whole = isinstance(env.horizon, int) and env.horizon > 0
    yield Finding("horizon is a positive int", "" if whole else f"it is {env.horizon!r}")
    yield Finding(
        "can be a static argument of jit",
        "" if _hashable(env) else "it has no hash: make it a dataclass with frozen=True, eq=False",
    )


def _misfit(spec: Any) -> str:
    """Returns the problem with an environment's sizes; empty if there is none."""
    if not isinstance(spec, Spec) or not spec.action > 0:
        return f"{spec!r} must be a jaxrl.types.Spec with positive sizes"
    if isinstance(spec.observation, int):
        if not 0 <= spec.goal < spec.observation:
            return f"{spec!r} must have positive sizes and goal < observation"
        keys = spec.actor_keys or spec.critic_keys
        return f"it names the keys {', '.join(keys)}, but observations are one array" if keys else ""
    leaves = {leaf.name: leaf for leaf in spec.observation}
    if not leaves or len(leaves) < len(spec.observation):
        return f"{spec!r} must list the arrays of an observation, with unique names"
    for leaf in spec.observation:
        if leaf.dtype not in ("float32", "uint8") or (leaf.dtype == "uint8" and len(leaf.shape) != 3):
            return f"{leaf!r}: arrays are float32, or images of dtype uint8 with the shape (height, width, channels)"
    if unknown := [key for key in (*spec.actor_keys, *spec.critic_keys) if key not in leaves]:
        return f"key {unknown[0]!r} is not one of the arrays {', '.join(leaves)}"
    goal = math.prod(leaves["goal"].shape) if "goal" in leaves else 0
    return "" if spec.goal == goal else f"goal is {spec.goal}, the array 'goal' has {goal} entries: they must agree"


def _simulations(env: HostEnv) -> Iterator[Finding]:
    """Checks four simulators in a worker process: two pairs with equal seeds and actions, one with bound actions."""
    slots, seeds = np.arange(4), np.zeros(4, np.int64)
    chunks = np.random.default_rng(0).uniform(-1, 1, (2, STEPS, env.spec.action)).astype(np.float32)
    chunks[1] = 1
    try:
        with Pool(env.builder(), env.horizon, workers=1) as pool:
            ((problem, note),) = pool.map(spaces.described, [env.builder()])
            yield Finding("actions are continuous, in [-1, 1]", problem, note)
            if problem:
                return
            start = pool.reset("check", slots, seeds, np.full(4, min(env.tasks, 1)))
            seen = pool.execute("check", slots, np.repeat(chunks, 2, axis=0))
    except Exception as error:
        yield Finding("simulators run in a worker process", _because(error))
        return
    yield Finding("simulators run in a worker process")
    found, wanted = _shapes(start, 1), _shapes(env.spec.example())
    theirs = ", ".join(f"{place} {_described(leaf)}" if place else str(leaf[0]) for place, leaf in found.items())
    yield Finding(
        "observations have the size of spec",
        "" if found == wanted else f"their shape is {theirs}: flatten, or correct spec",
    )
    finite = _finite(start, 0) and seen["valid"][seen["taken"]].all()
    yield Finding("all numbers are finite", "" if finite else "a step gave a non-finite number: end the episode there")
    same = _equal(start, jax.tree.map(lambda x: np.broadcast_to(x[0], x.shape), start))
    same &= _equal(*(jax.tree.map(lambda x, first=first: x[first::2], seen["obs"]) for first in (0, 1)))
    yield Finding(
        "an episode depends only on its seed and its actions",
        "" if same else "two differ: use a generator seeded by reset(seed=...), or NumPy's global random state",
    )


def _shapes(obs: Observation, lead: int = 0) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Returns shape and dtype of the arrays of observations by path, without `lead` leading axes."""
    return {jax.tree_util.keystr(path): (x.shape[lead:], x.dtype) for path, x in jax.tree.leaves_with_path(obs)}


def _finite(obs: Observation, lead: int) -> np.ndarray:
    """Returns whether all numbers of observations are finite, for each entry of `lead` leading axes."""
    finite = [np.isfinite(x).reshape(*x.shape[:lead], -1).all(-1) for x in jax.tree.leaves(obs)]
    return np.logical_and.reduce(finite)


def _equal(one: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


def _states(env: Env) -> Iterator[Finding]:
    """Checks the states as abstract values: nothing is compiled or run."""
    key, action = jax.random.key(0), jax.ShapeDtypeStruct((env.spec.action,), jnp.float32)
    try:
        # a new function each time, or the second trace would come from the cache
        first, again = (jax.make_jaxpr(lambda key: env.reset(key))(key) for _ in range(2))
        reset = jax.eval_shape(env.reset, key)
    except Exception as error:
        yield Finding("reset(key) can be traced", _because(error))
        return
    yield Finding("reset(key) can be traced")
    yield Finding(
        "reset is random only through its key",
        ""
        if _same_program(first, again)
        else "tracing it twice gives two programs: replace numpy's or Python's random",
    )
    if not isinstance(reset, EnvState):
        yield Finding("reset returns an EnvState", f"it returns {type(reset).__name__}: build a jaxrl.types.EnvState")
        return
    try:
        step = jax.eval_shape(env.step, reset, action)
    except Exception as error:
        number = _takes_a_number(env, reset)
        yield Finding("step(state, action) can be traced", DISCRETE if number else _because(error))
        return
    yield Finding("step(state, action) can be traced")
    yield Finding("shapes and dtypes are those of the contract", _misshapen(env.spec, reset))
    yield Finding("step returns the tree that reset returns", _differences(reset, step))
    yield Finding("no weak types", _weak({"reset": reset, "step": step}))


def _rollouts(env: Env) -> Iterator[Finding]:
    """Checks one vmapped rollout, past the end of episodes. The first two copies always act at the bounds."""
    key_reset, key_action = jax.random.split(jax.random.key(0))
    actions = jax.random.uniform(key_action, (STEPS, COPIES, env.spec.action), minval=-1.0, maxval=1.0)
    actions = actions.at[:, 0].set(1.0).at[:, 1].set(-1.0)
    program = jax.jit(lambda keys, actions: _rollout(env, keys, actions))
    try:
        start, seen = jax.device_get(program(jax.random.split(key_reset, COPIES), actions))
        _, again = jax.device_get(program(jax.random.split(key_reset, COPIES), actions))
    except Exception as error:
        yield Finding("vmap and scan work", _because(error))
        return
    yield Finding("vmap and scan work")

    finite = _finite(seen.obs, 2) & np.isfinite(seen.reward) & _finite(start.obs, 1)[None]
    advice = "guard divisions and square roots by a small number, or shorten the simulator's time step"
    yield Finding("finite under random actions", _first(~finite[:, 2:], advice))
    yield Finding("finite under actions at the bounds", _first(~finite[:, :2], advice))
    yield Finding(
        "the same key and actions give the same episode",
        "" if _equal(seen, again) else "take all randomness from the key of reset",
    )
    late = env.horizon + np.arange(-1, 1)[:, None]  # step counts at the start of the rollout's last two steps
    clock = np.concatenate(
        [np.broadcast_to(np.arange(STEPS - 2)[:, None], (STEPS - 2, COPIES)), late + 0 * start.steps]
    )
    yield Finding(
        "steps starts at 0 and counts every step",
        _first((seen.steps != clock + 1) | (start.steps != 0)[None], "return state.steps + 1 and do not reset in step"),
    )
    yield Finding(
        "truncates at the horizon and not before, unless terminated",
        _first(
            seen.truncated != ((clock + 1 >= env.horizon) & ~seen.terminated),
            "use truncated = (steps >= horizon) & ~terminated, with steps of the new state",
        ),
    )
    yield from _extras(env, start, seen, actions)


def _rollout(env: Env, keys: jax.Array, actions: jax.Array) -> tuple[EnvState, EnvState]:
    """Returns the first states [COPIES] and all later ones [STEPS, COPIES], without physics.

    The step count is set to just below the horizon before the last two steps, so that truncation is checked in long
    tasks too.
    """
    late = jnp.arange(STEPS) == STEPS - 2

    def step(states: EnvState, now: tuple[jax.Array, jax.Array]) -> tuple[EnvState, EnvState]:
        actions, late = now
        clock = jnp.where(late, jnp.int32(env.horizon - 1), states.steps)
        states = jax.vmap(env.step)(dataclasses.replace(states, steps=clock), actions)
        return states, dataclasses.replace(states, physics=())

    start = jax.vmap(env.reset)(keys)
    return dataclasses.replace(start, physics=()), jax.lax.scan(step, start, (actions, late))[1]


def _extras(env: Any, start: EnvState, seen: EnvState, actions: jax.Array) -> Iterator[Finding]:
    """Checks the optional methods that exist."""
    if isinstance(env, HasBehaviours):
        key = jax.random.key(0)
        behaviour, state = env.behaviour("good"), jax.jit(env.reset)(key)
        _, action = behaviour.act(behaviour.start(state, key), state, key)
        fits = action.shape == (env.spec.action,) and bool(jnp.all(jnp.abs(action) <= 1.0))
        yield Finding("behavior acts within the bounds", "" if fits else f"it returns {action}: clip to [-1, 1]")
    if isinstance(env, Relabels):
        reward, _ = env.relabel(start.obs, np.asarray(actions[0]), jax.tree.map(lambda x: x[0], seen.obs))
        fits = np.shape(reward) == (COPIES,) and np.allclose(reward, seen.reward[0], atol=1e-5)
        yield Finding(
            "relabel gives the reward of step", "" if fits else f"it gives {reward} where step gave {seen.reward[0]}"
        )
    if isinstance(env, Drawable):
        size = env.draw(jax.tree.map(lambda x: x[0], start.obs), 32).size
        yield Finding("draw returns an image of the requested size", "" if size == (32, 32) else f"it is {size}")


def _takes_a_number(env: Env, state: EnvState) -> bool:
    """Returns whether an environment can be stepped with an integer action."""
    try:
        jax.eval_shape(env.step, state, jax.ShapeDtypeStruct((), jnp.int32))
    except Exception:
        return False
    return True


def _hashable(env: Env) -> bool:
    try:
        hash(env)
    except TypeError:
        return False
    return True


def _because(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0]
    traced = isinstance(error, jax.errors.ConcretizationTypeError)
    advice = "; use jnp.where or jax.lax.cond instead of `if` on arrays" if traced else ""
    return f"{type(error).__name__}: {line}{advice}"


def _same_program(first: Any, again: Any) -> bool:
    same_constants = all(map(np.array_equal, first.consts, again.consts))
    return str(first) == str(again) and len(first.consts) == len(again.consts) and same_constants


def _misshapen(spec: Spec, state: EnvState) -> str:
    flag, number, clock = jnp.dtype(bool), jnp.dtype("float32"), jnp.dtype("int32")
    wanted = {f"obs{place}": leaf for place, leaf in _shapes(spec.example()).items()}
    wanted |= {"reward": ((), number), "steps": ((), clock)}
    wanted |= dict.fromkeys(("terminated", "truncated", "success"), ((), flag))
    named = {"reward": state.reward, "steps": state.steps, "terminated": state.terminated}
    named |= {"truncated": state.truncated, "success": state.success}
    found = {f"obs{place}": leaf for place, leaf in _shapes(state.obs).items()}
    found |= {name: (leaf.shape, leaf.dtype) for name, leaf in named.items()}
    places = [place for place in wanted | found if wanted.get(place) != found.get(place)]
    return "; ".join(f"{p} is {_described(found.get(p))}, must be {_described(wanted.get(p))}" for p in places)


def _described(leaf: tuple[tuple[int, ...], Any] | None) -> str:
    return f"{leaf[1]}{list(leaf[0])}" if leaf else "absent"


def _differences(reset: EnvState, step: EnvState) -> str:
    if not isinstance(step, EnvState):
        return f"step returns {type(step).__name__}: build a jaxrl.types.EnvState"
    before, after = (
        {
            jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
            for path, leaf in jax.tree.leaves_with_path(tree)
        }
        for tree in (reset, step)
    )
    places = [place for place in before | after if before.get(place) != after.get(place)]
    lines = [f"{place} is {before.get(place, 'absent')}, then {after.get(place, 'absent')}" for place in places]
    if not lines and jax.tree.structure(reset) != jax.tree.structure(step):
        lines = ["containers differ (for example, a tuple and a list)"]
    return "; ".join(lines[:SHOWN])


def _weak(states: dict[str, EnvState]) -> str:
    places = [
        f"{name}(...){jax.tree_util.keystr(path)}"
        for name, state in states.items()
        for path, leaf in jax.tree.leaves_with_path(state)
        if leaf.weak_type
    ]
    advice = "set the dtype, as in jnp.where(done, 0.0, -1.0).astype(jnp.float32), or the program compiles twice"
    return f"{', '.join(places[:SHOWN])}: {advice}" if places else ""


def _first(wrong: np.ndarray, advice: str) -> str:
    """Returns the first step at which `wrong` [STEPS, COPIES] is true, with the advice; empty if there is none."""
    return f"violated at step {int(np.argmax(wrong.any(1))) + 1}: {advice}" if wrong.any() else ""
