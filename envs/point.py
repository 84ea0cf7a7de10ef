"""Two tiny environments without a simulator. They compile in a second and their optimal values are known exactly."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from envs.picture import Disc, discs
from envs.scripted import Scripted, scripted
from jaxrl.types import EnvState, Spec

GOAL = 0.8  # in every coordinate, unless random
BUMPS = (-0.6, 0.6)  # of the bandit: the lower, the higher


@dataclasses.dataclass(frozen=True, eq=False)
class Point:
    """A point moves in the box [-1, 1]^D, each coordinate by at most `speed` per step, and stops at the walls.

    Reward is -1 per step, and 0 on the step that brings every coordinate within `tolerance` of the goal, which ends
    the task. The coordinates are independent, so the optimal number of steps is that of the farthest coordinate.
    """

    dimensions: int = 2
    horizon: int = 50
    speed: float = 0.1
    tolerance: float = 0.1
    goal_conditioned: bool = False  # a random goal, shown as the trailing D entries of the observation
    exploring: bool = False  # start anywhere and never terminate, to collect data

    @property
    def spec(self) -> Spec:
        """Sizes of observation, action and goal."""
        goal = self.dimensions if self.goal_conditioned else 0
        return Spec(observation=self.dimensions + goal, action=self.dimensions, goal=goal)

    def reset(self, key: jax.Array) -> EnvState:
        """Returns an episode that starts in the lower corner, [-1, 0]^D, with the goal at 0.8 (or random)."""
        key_start, key_goal = jax.random.split(key)
        highest = 1.0 if self.exploring else 0.0
        position = jax.random.uniform(key_start, (self.dimensions,), minval=-1.0, maxval=highest)
        goal = self._anywhere(key_goal)
        never = jnp.zeros((), bool)
        return EnvState(
            physics={"position": position, "goal": goal},
            obs=self._observe(position, goal),
            reward=jnp.zeros((), jnp.float32),
            terminated=never,
            truncated=never,
            success=never,
            steps=jnp.zeros((), jnp.int32),
        )

    def step(self, state: EnvState, action: jax.Array) -> EnvState:
        """Returns the state after moving by `speed * action`, action [D] in [-1, 1]."""
        goal = state.physics["goal"]
        position = jnp.clip(state.physics["position"] + self.speed * jnp.clip(action, -1.0, 1.0), -1.0, 1.0)
        obs = self._observe(position, goal)
        steps = state.steps + 1
        reward, ended = self.relabel(state.obs[None], action[None], obs[None])
        terminated = ended[0] & (not self.exploring)
        return EnvState(
            physics={"position": position, "goal": goal},
            obs=obs,
            reward=reward[0],
            terminated=terminated,
            truncated=(steps >= self.horizon) & ~terminated,
            success=state.success | ended[0],
            steps=steps,
        )

    def relabel(self, obs: jax.Array, actions: jax.Array, next_obs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the task's reward [N] and termination [N], which depend only on next observations [N, O]."""
        del obs, actions
        reached = self._distance(jnp.asarray(next_obs)) <= self.tolerance
        return reached.astype(jnp.float32) - 1.0, reached

    def optimal_steps(self, obs: jax.Array) -> jax.Array:
        """Returns the fewest steps [N] from observations [N, O] to the goal, one if it is already there."""
        # the slack compensates for rounding of positions that are whole steps away
        away = self._distance(obs) - self.tolerance - 1e-5
        return jnp.maximum(jnp.ceil(away / self.speed), 1.0).astype(jnp.int32)

    def optimal_value(self, obs: jax.Array, discount: float) -> jax.Array:
        """Returns the optimal discounted return [N], discount below 1: -1 for each step before the last."""
        return -(1.0 - discount ** (self.optimal_steps(obs) - 1.0)) / (1.0 - discount)

    def explore(self) -> "Point":
        """Returns the variant for data collection: random starts, no termination, changing goals."""
        return dataclasses.replace(self, exploring=True)

    def behaviour(self, level: str) -> Scripted:
        """Returns the policy that goes straight to the goal, with the noise of `level`."""
        return scripted(self, level)

    def aim(self, obs: jax.Array, key: jax.Array) -> jax.Array:
        """Returns a scripted policy's goal: the task's goal, or a random one while exploring."""
        return jax.random.uniform(key, (self.dimensions,), minval=-1.0) if self.exploring else self._goal(obs)

    def reached(self, obs: jax.Array, goal: jax.Array) -> jax.Array:
        """Returns whether the point is within `tolerance` of `goal` in every coordinate."""
        return jnp.abs(obs[..., : self.dimensions] - goal).max(-1) <= self.tolerance

    def plan(self, obs: jax.Array, goal: jax.Array) -> jax.Array:
        """Returns the action that moves every coordinate to `goal` as fast as possible."""
        return jnp.clip((goal - obs[..., : self.dimensions]) / self.speed, -1.0, 1.0)

    def draw(self, state_obs: np.ndarray, size: int) -> Image.Image:
        """Returns an image of one observation [O]; one dimension is drawn along x."""
        x, y = np.append(state_obs[: self.dimensions], 0.0)[:2]
        goal_x, goal_y = np.append(np.asarray(self._goal(jnp.asarray(state_obs))), 0.0)[:2]
        return discs(
            size, 1.1, [Disc(goal_x, goal_y, self.tolerance, "seagreen", hollow=True), Disc(x, y, 0.05, "royalblue")]
        )

    def _anywhere(self, key: jax.Array) -> jax.Array:
        if self.goal_conditioned:
            return jax.random.uniform(key, (self.dimensions,), minval=-1.0, maxval=1.0)
        return jnp.full((self.dimensions,), GOAL, jnp.float32)

    def _observe(self, position: jax.Array, goal: jax.Array) -> jax.Array:
        return jnp.concatenate([position, goal]) if self.goal_conditioned else position

    def _goal(self, obs: jax.Array) -> jax.Array:
        if self.goal_conditioned:
            return obs[..., self.dimensions :]
        return jnp.full_like(obs, GOAL)

    def _distance(self, obs: jax.Array) -> jax.Array:
        return jnp.abs(obs[..., : self.dimensions] - self._goal(obs)).max(-1)


@dataclasses.dataclass(frozen=True, eq=False)
class Bandit:
    """One step, one action. Two reward bumps: height 1 at +0.6 and `lesser` at -0.6; almost 0 in between.

    A policy that averages its data (half of it at each bump) acts at 0 and gets exp(-18) of a bump's height.
    """

    lesser: float = 0.5
    horizon: int = 1

    @property
    def spec(self) -> Spec:
        """Sizes of observation (a constant 1) and action."""
        return Spec(observation=1, action=1)

    def reset(self, key: jax.Array) -> EnvState:
        """Returns the only state."""
        del key
        never = jnp.zeros((), bool)
        return EnvState(
            physics=(),
            obs=jnp.ones((1,), jnp.float32),
            reward=jnp.zeros((), jnp.float32),
            terminated=never,
            truncated=never,
            success=never,
            steps=jnp.zeros((), jnp.int32),
        )

    def step(self, state: EnvState, action: jax.Array) -> EnvState:
        """Returns the terminal state, with the reward of `action` [1]; choosing the higher bump is success."""
        reward, terminated = self.relabel(state.obs[None], action[None], state.obs[None])
        return dataclasses.replace(
            state,
            reward=reward[0],
            terminated=terminated[0],
            success=jnp.abs(action[0] - BUMPS[1]) < 0.2,
            steps=state.steps + 1,
        )

    def relabel(self, obs: jax.Array, actions: jax.Array, next_obs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns reward [N] and termination [N], always true, of actions [N, 1]."""
        del obs, next_obs
        left, right = (jnp.exp(-0.5 * ((jnp.asarray(actions)[:, 0] - at) / 0.1) ** 2) for at in BUMPS)
        return right + self.lesser * left, jnp.ones(left.shape, bool)

    def explore(self) -> "Bandit":
        """Returns itself: there is only one state and one step."""
        return self

    def behaviour(self, level: str) -> Scripted:
        """Returns the policy that picks either bump with equal probability, with the noise of `level`."""
        return scripted(self, level)

    def aim(self, obs: jax.Array, key: jax.Array) -> jax.Array:
        """Returns one of the two bumps [1] at random."""
        del obs
        return jnp.where(jax.random.bernoulli(key, shape=(1,)), BUMPS[1], BUMPS[0])

    def reached(self, obs: jax.Array, goal: jax.Array) -> jax.Array:
        """Returns False: an episode keeps the bump that it drew."""
        del obs, goal
        return jnp.zeros((), bool)

    def plan(self, obs: jax.Array, goal: jax.Array) -> jax.Array:
        """Returns the bump itself."""
        del obs
        return goal

    def draw(self, state_obs: np.ndarray, size: int) -> Image.Image:
        """Returns an image of the two bumps on the action axis, sized by their reward."""
        del state_obs
        return discs(
            size,
            1.1,
            [Disc(BUMPS[1], 0.0, 0.2, "seagreen"), Disc(BUMPS[0], 0.0, 0.2 * self.lesser, "goldenrod")],
        )
