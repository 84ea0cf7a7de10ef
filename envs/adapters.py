"""Environments of Brax and MuJoCo Playground, unwrapped, behind the protocol of jaxrl.

Their wrappers are not used: the episode wrapper of either hides which episodes were cut by the clock, and the
auto-reset wrapper hands the observation after the reset to the learner. Without them `done` means that the task ended,
and the horizon here is what truncates. Nothing of `brax.training` is imported.

Observations that are a dict stay one, and which of its arrays policies and critics see is chosen by name:

    playground/Go1JoystickFlatTerrain                                 policies see "state", critics "privileged_state"
    playground/Go1JoystickFlatTerrain?critic=state                    both see "state"
    playground/Go1JoystickFlatTerrain?critic=state,privileged_state   critics see both arrays
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
from jaxrl.types import EnvState, Leaf, Observation, Spec

STATE, PRIVILEGED = (
    "state",
    "privileged_state",
)  # Playground's keys of what a robot senses, and of what a critic may see


@dataclasses.dataclass(frozen=True, eq=False)
class Adapted:
    """An environment whose `reset(key)` and `step(state, action)` give states with obs, reward, done and metrics.

    That state is our `physics`. A dict of observations stays one: its images, uint8 [H, W, C], as they are, everything
    else in float32, and trees below a key as one vector. Any other tree is one vector of all its numbers. Success is
    `metrics["success"]` where the simulator reports it, else False.
    """

    simulator: Any
    horizon: int
    actor: tuple[str, ...] = ()
    """Keys that policies see; by default "state", or all of them where there is no such key."""
    critic: tuple[str, ...] = ()
    """Keys that critics see; by default "privileged_state", or what policies see where there is no such key."""

    @functools.cached_property
    def spec(self) -> Spec:
        """Sizes of observation and action, found without running the simulator. Raises UserError for unknown keys."""
        obs, action = jax.eval_shape(self.reset, jax.random.key(0)).obs, self.simulator.action_size
        if not isinstance(obs, Mapping):
            if self.actor or self.critic:
                raise UserError("observations are one array: there are no keys to choose, leave out actor= and critic=")
            return Spec(obs.shape[0], action)
        for key in (*self.actor, *self.critic):
            if key not in obs:
                raise unknown("observation key", key, obs)
        actor = self.actor or ((STATE,) if STATE in obs else ())
        critic = self.critic or ((PRIVILEGED,) if PRIVILEGED in obs else actor)
        leaves = tuple(Leaf(name, leaf.shape, leaf.dtype.name) for name, leaf in sorted(obs.items()))
        return Spec(leaves, action, actor_keys=actor, critic_keys=critic)

    def reset(self, key: jax.Array) -> EnvState:
        """Returns a fresh episode."""
        with _quiet():
            return self._state(self.simulator.reset(key), jnp.zeros((), jnp.int32), jnp.zeros((), bool))

    def step(self, state: EnvState, action: jax.Array) -> EnvState:
        """Returns the environment after one action [A] in [-1, 1]."""
        with _quiet():
            return self._state(self.simulator.step(state.physics, action), state.steps + 1, state.success)

    def _state(self, physics: Any, steps: jax.Array, succeeded: jax.Array) -> EnvState:
        physics = jax.tree.map(_strong, physics)
        terminated = physics.done.astype(bool)
        success = physics.metrics.get("success", jnp.zeros(()))
        return EnvState(
            physics=physics,
            obs=_observed(physics.obs),
            reward=physics.reward.astype(jnp.float32),
            terminated=terminated,
            truncated=(steps >= self.horizon) & ~terminated,
            success=succeeded | (success > 0),
            steps=steps,
        )


def brax_env(
    name: str, backend: Literal["generalized", "mjx", "positional", "spring"] = "spring", horizon: int = 1000
) -> Adapted:
    """Returns Brax's environment `name`, simulated by `backend`. Raises UserError where Brax has no such pair."""
    with _quiet():
        import brax.envs

        # brax publishes no list of its names
        if name not in brax.envs._envs:
            raise unknown("Brax environment", name, brax.envs._envs)
        try:
            return Adapted(brax.envs.get_environment(name, backend=backend), horizon)
        except (ValueError, AssertionError) as error:
            raise UserError(f"brax/{name} cannot be built with backend {backend!r}: {error}") from error


def playground_env(name: str, horizon: int | None = None, actor: str = "", critic: str = "") -> Adapted:
    """Returns MuJoCo Playground's task `name` on the JAX simulator, with Playground's own horizon unless given.

    `actor` and `critic` are the keys of a dict of observations that policies and critics see, separated by commas. The
    tasks of its dm_control suite need nothing else; locomotion and manipulation tasks clone a repository of robot
    models when the first of them is built.

    Raises UserError for a task or a key that does not exist.
    """
    with _quiet():
        from mujoco_playground import registry  # ty: ignore[import-not-found]

        if name not in registry.ALL_ENVS:
            raise unknown("Playground task", name, registry.ALL_ENVS)
        config = registry.get_default_config(name)
        config.impl = "jax"  # the default, warp, is slow on a CPU and not deterministic
        simulator = registry.load(name, config=config)
    env = Adapted(simulator, config.episode_length if horizon is None else horizon, keys_of(actor), keys_of(critic))
    try:
        env.spec  # noqa: B018  (refuses keys that do not exist)
    except UserError as error:
        raise UserError(f"playground/{name}: {error}") from error
    return env


def keys_of(text: str) -> tuple[str, ...]:
    """Returns the keys in a list separated by commas."""
    return tuple(key.strip() for key in text.split(",") if key.strip())


def _observed(obs: Any) -> Observation:
    """Returns an observation: a dict of vectors and images, or one float32 vector [O] of all numbers of a tree."""
    if not isinstance(obs, Mapping):
        return _vector(obs)
    return {name: part if _is_image(part) else _vector(part) for name, part in obs.items()}


def _is_image(part: Any) -> bool:
    return isinstance(part, jax.Array) and part.dtype == jnp.uint8 and part.ndim == 3


def _vector(tree: Any) -> jax.Array:
    """Returns the numbers of a tree as one float32 vector."""
    return jnp.concatenate([jnp.ravel(part).astype(jnp.float32) for part in jax.tree.leaves(tree)])


def _strong(leaf: Any) -> jax.Array:
    """Returns the leaf as an array of fixed type; both simulators leave Python floats and weak types in theirs."""
    return leaf if isinstance(leaf, jax.Array) and not leaf.weak_type else jnp.asarray(leaf, jnp.result_type(leaf))


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Silences what Brax says on every build, import and trace, and only that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "JAXopt is no longer maintained", DeprecationWarning)
        warnings.filterwarnings("ignore", "Brax System", UserWarning)
        warnings.filterwarnings("ignore", "Accessing .* directly from `Data` is deprecated", DeprecationWarning)
        yield
