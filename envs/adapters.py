"""Environments of Brax and MuJoCo Playground, unwrapped, behind the protocol of jaxrl.

Their wrappers are not used: the episode wrapper of either hides which episodes were cut by the clock, and the
auto-reset wrapper hands the observation after the reset to the learner. Without them `done` means that the task ended,
and the horizon here is what truncates. Nothing of `brax.training` is imported.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Generator
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxrl.errors import UserError, unknown
from jaxrl.types import EnvState, Spec


@dataclasses.dataclass(frozen=True, eq=False)
class Adapted:
    """An environment whose `reset(key)` and `step(state, action)` give states with obs, reward, done and metrics.

    That state is our `physics`. Observations in a dictionary are joined in the order of their names. Success is
    `metrics["success"]` where the simulator reports it, else False.
    """

    simulator: Any
    horizon: int

    @property
    def spec(self) -> Spec:
        """Sizes of observation and action, found without running the simulator."""
        state = jax.eval_shape(self.reset, jax.random.key(0))
        return Spec(observation=state.obs.shape[0], action=self.simulator.action_size)

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
            obs=_flat(physics.obs),
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


def playground_env(name: str, horizon: int | None = None) -> Adapted:
    """Returns MuJoCo Playground's task `name` on the JAX simulator, with Playground's own horizon unless given.

    The tasks of its dm_control suite need nothing else; locomotion and manipulation tasks clone a repository of
    robot models when the first of them is built.
    """
    with _quiet():
        from mujoco_playground import registry  # ty: ignore[import-not-found]

        if name not in registry.ALL_ENVS:
            raise unknown("Playground task", name, registry.ALL_ENVS)
        config = registry.get_default_config(name)
        config.impl = "jax"  # the default, warp, is slow on a CPU and not deterministic
        return Adapted(registry.load(name, config=config), config.episode_length if horizon is None else horizon)


def _flat(obs: Any) -> jax.Array:
    """Returns the observation as one float32 vector [O]."""
    return jnp.concatenate([jnp.ravel(part).astype(jnp.float32) for part in jax.tree.leaves(obs)])


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
