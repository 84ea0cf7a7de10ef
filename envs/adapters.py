"""Adapters of unwrapped Brax and MuJoCo Playground environments to jaxrl's protocol.

Their wrappers are not used: the episode wrappers hide which episodes were truncated, and the auto-reset wrapper passes
the observation after the reset to the learner. Without them, `done` means termination, and truncation follows from the
horizon here. Nothing of `brax.training` is imported.

Dict observations are kept, and the arrays that policies and critics see are selected by name:

    playground/Go1JoystickFlatTerrain                                 policies see "state", critics "privileged_state"
    playground/Go1JoystickFlatTerrain?obs=state                       both see "state", and nothing else is stored
    playground/Go1JoystickFlatTerrain?critic=state                    both see "state"
    playground/Go1JoystickFlatTerrain?critic=state,privileged_state   critics see both arrays

Neither declares a range of actions: all of their tasks take [-1, 1], and those whose actuators have other ranges scale
actions themselves, so nothing is scaled here.
"""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Generator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxrl.errors import UserError, unknown
from jaxrl.types import EnvState, Leaf, Observation, Score, Spec

STATE, PRIVILEGED = (
    "state",
    "privileged_state",
)  # Playground's keys of what a robot senses, and of what a critic may see


@dataclasses.dataclass(frozen=True, eq=False)
class Adapted:
    """An environment whose `reset(key)` and `step(state, action)` return states with obs, reward, done and metrics.

    That state is our `physics`. A dict of observations is kept: images, uint8 [H, W, C], are unchanged, everything else
    is float32, and a tree below a key is flattened to one vector. Any other tree is flattened to one vector. Success is
    `metrics["success"]` if the simulator reports it, else False.
    """

    simulator: Any
    horizon: int
    actor: tuple[str, ...] = ()
    """Keys that policies see; by default "state", or all keys but "privileged_state" if there is none."""
    critic: tuple[str, ...] = ()
    """Keys that critics see; by default "privileged_state", or those of policies if there is none."""
    kept: tuple[str, ...] = ()
    """Keys that an observation keeps; by default all."""

    @functools.cached_property
    def spec(self) -> Spec:
        """Sizes of observation and action, traced without running the simulator. Raises UserError for unknown keys."""
        obs, action = jax.eval_shape(self.reset, jax.random.key(0)).obs, self.simulator.action_size
        if not isinstance(obs, Mapping):
            if self.actor or self.critic or self.kept:
                raise UserError("observations are one array: there are no keys to select, omit obs=, actor=, critic=")
            return Spec(obs.shape[0], action)
        for key in (*self.actor, *self.critic):
            if key not in obs:
                raise unknown("observation key", key, obs)
        plain = tuple(key for key in sorted(obs) if key != PRIVILEGED) if PRIVILEGED in obs else ()
        actor = self.actor or ((STATE,) if STATE in obs else plain)
        critic = self.critic or ((PRIVILEGED,) if PRIVILEGED in obs else actor)
        leaves = tuple(Leaf(name, leaf.shape, leaf.dtype.name) for name, leaf in sorted(obs.items()))
        return Spec(leaves, action, actor_keys=actor, critic_keys=critic)

    @functools.cached_property
    def score(self) -> Score:
        """Success if the simulator reports it, else return."""
        with _quiet():
            state = jax.eval_shape(self.simulator.reset, jax.random.key(0))
        return "success" if "success" in state.metrics else "return"

    def reset(self, key: jax.Array) -> EnvState:
        """Returns a fresh episode."""
        with _quiet():
            return self._state(self.simulator.reset(key), jnp.zeros((), jnp.int32), jnp.zeros((), bool))

    def step(self, state: EnvState, action: jax.Array) -> EnvState:
        """Returns the environment after one action [A] in [-1, 1]."""
        with _quiet():
            return self._state(self.simulator.step(state.physics, action), state.steps + 1, state.success)

    def _chosen(self, obs: Any) -> Any:
        """Returns an observation with the kept keys. Raises UserError for a key that it does not have."""
        if not self.kept or not isinstance(obs, Mapping):
            return obs
        if missing := [key for key in self.kept if key not in obs]:
            raise unknown("observation key", missing[0], obs)
        return {key: obs[key] for key in self.kept}

    def _state(self, physics: Any, steps: jax.Array, succeeded: jax.Array) -> EnvState:
        physics = jax.tree.map(_strong, physics)
        terminated = physics.done.astype(bool)
        success = physics.metrics.get("success", jnp.zeros(()))
        return EnvState(
            physics=physics,
            obs=_observed(self._chosen(physics.obs)),
            reward=physics.reward.astype(jnp.float32),
            terminated=terminated,
            truncated=(steps >= self.horizon) & ~terminated,
            success=succeeded | (success > 0),
            steps=steps,
        )


def brax_env(
    name: str, backend: Literal["generalized", "mjx", "positional", "spring"] = "spring", horizon: int = 1000
) -> Adapted:
    """Returns Brax's environment `name`, simulated by `backend`. Raises UserError if Brax has no such pair."""
    with _quiet():
        import brax.envs

        # Brax has no public list of names
        if name not in brax.envs._envs:
            raise unknown("Brax environment", name, brax.envs._envs)
        try:
            return Adapted(brax.envs.get_environment(name, backend=backend), horizon)
        except (ValueError, AssertionError) as error:
            raise UserError(f"brax/{name} cannot be built with backend {backend!r}: {error}") from error


def playground_env(name: str, horizon: int | None = None, actor: str = "", critic: str = "", obs: str = "") -> Adapted:
    """Returns MuJoCo Playground's task `name` on the JAX simulator, with Playground's own horizon unless given.

    `actor` and `critic` are comma-separated keys of dict observations that policies and critics see, `obs` those that
    are kept at all. The tasks of its dm_control suite need nothing else; locomotion and manipulation tasks clone a
    repository of robot models when the first of them is built.

    Raises UserError for an unknown task or key.
    """
    with _quiet():
        from mujoco_playground import registry  # ty: ignore[import-not-found]

        if name not in registry.ALL_ENVS:
            raise unknown("Playground task", name, registry.ALL_ENVS)
        config = registry.get_default_config(name)
        config.impl = "jax"  # the default, warp, is slow on a CPU and not deterministic
        simulator = registry.load(name, config=config)
    length, keys = config.episode_length if horizon is None else horizon, map(keys_of, (actor, critic, obs))
    env = Adapted(simulator, length, *keys)
    try:
        env.spec  # noqa: B018  (raises for unknown keys)
    except UserError as error:
        raise UserError(f"playground/{name}: {error}") from error
    return env


def keys_of(text: str) -> tuple[str, ...]:
    """Returns the keys in a comma-separated list."""
    return tuple(key.strip() for key in text.split(",") if key.strip())


def _observed(obs: Any) -> Observation:
    """Returns an observation: a dict of vectors and images, or a tree flattened to one float32 vector [O]."""
    if not isinstance(obs, Mapping):
        return _vector(obs)
    return {name: part if _is_image(part) else _vector(part) for name, part in obs.items()}


def _is_image(part: Any) -> bool:
    return isinstance(part, jax.Array) and part.dtype == jnp.uint8 and part.ndim == 3


def _vector(tree: Any) -> jax.Array:
    """Returns a tree flattened to one float32 vector."""
    return jnp.concatenate([jnp.ravel(part).astype(jnp.float32) for part in jax.tree.leaves(tree)])


def _strong(leaf: Any) -> jax.Array:
    """Returns the leaf as a strongly typed array; both simulators have Python floats and weak types in their states."""
    return leaf if isinstance(leaf, jax.Array) and not leaf.weak_type else jnp.asarray(leaf, jnp.result_type(leaf))


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Suppresses Brax's warnings on every build, import and trace, and no others."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "JAXopt is no longer maintained", DeprecationWarning)
        warnings.filterwarnings("ignore", "Brax System", UserWarning)
        warnings.filterwarnings("ignore", "Accessing .* directly from `Data` is deprecated", DeprecationWarning)
        yield
