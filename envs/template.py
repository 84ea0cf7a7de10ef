"""An environment to copy: park a cart at the origin of a track.

Copy this file, change what it simulates, then

    jaxrl doctor --env my_package.my_module:make              # reports problems and suggests fixes
    jaxrl train --env my_package.my_module:make
    jaxrl train --env "my_package.my_module:make?horizon=50"    # the arguments of `make` are options

Without success to report, keep `success` false and add the field `score: str = "return"`: then runs are compared by it.

`reset` and `step` are pure functions of ONE environment: jaxrl vmaps them. They are compiled, so use `jnp.where`
instead of `if` on arrays, and take all randomness from the key.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxrl.types import EnvState, Spec


@dataclasses.dataclass(frozen=True, eq=False)  # eq=False: hash by identity, required for static arguments of jit
class Cart:
    """Drive a cart with bounded force until it stands at the origin."""

    horizon: int = 100
    dt: float = 0.1  # s

    @property
    def spec(self) -> Spec:
        """Sizes of observation (position in m, velocity in m/s) and action (force in N)."""
        return Spec(observation=2, action=1)

    def reset(self, key: jax.Array) -> EnvState:
        """Returns a cart at rest somewhere on the track."""
        position = jax.random.uniform(key, minval=-1.0, maxval=1.0)
        no = jnp.zeros((), bool)
        return EnvState(
            physics=(),  # state that `step` needs beyond the observation: any tree of arrays
            obs=jnp.stack([position, jnp.zeros(())]),
            reward=jnp.zeros(()),
            terminated=no,
            truncated=no,
            success=no,
            steps=jnp.zeros((), jnp.int32),
        )

    def step(self, state: EnvState, action: jax.Array) -> EnvState:
        """Returns the cart 0.1 seconds later. The action [1] is in [-1, 1]. Never reset here."""
        position, velocity = state.obs
        velocity = velocity + self.dt * action[0]
        position = position + self.dt * velocity
        parked = (jnp.abs(position) < 0.05) & (jnp.abs(velocity) < 0.1)
        steps = state.steps + 1
        return dataclasses.replace(
            state,
            obs=jnp.stack([position, velocity]),
            reward=jnp.where(parked, 0.0, -1.0).astype(jnp.float32),
            terminated=parked,  # the task is over: no bootstrap
            truncated=(steps >= self.horizon) & ~parked,  # only the time limit: bootstrap
            success=parked,
            steps=steps,
        )


def make(horizon: int = 100) -> Cart:
    """Returns the environment that `--env envs.template:make` names."""
    return Cart(horizon)
