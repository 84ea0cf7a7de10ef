"""A small manipulation task with real MJX physics: a round pusher moves a disc over a table to a goal.

Both bodies are spheres that slide in the plane, whose contacts are those of discs at the lowest cost. Joint damping
models the table's friction. The only contact is between the two; joint limits are the table's edge, and keep the disc
far enough from it for the pusher to get behind. The disc does not rotate: without friction, contact exerts no torque.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from PIL import Image

from envs.picture import Disc, discs
from envs.quiet import mjx
from envs.scripted import Scripted, scripted
from jaxrl.errors import UserError
from jaxrl.types import EnvState, Spec

PUSHER, DISC, TOLERANCE = 0.08, 0.12, 0.1  # radii, and the distance to the goal that counts as success
TOUCH = PUSHER + DISC
SUBSTEPS = 2  # of 0.05 s per action
GOAL = (0.5, 0.0)  # unless random

# damping / mass is 8 per second for both: the disc stops within 0.07 of where contact ends
MJCF = f"""
<mujoco model="push">
  <option timestep="0.05" gravity="0 0 0" integrator="Euler" iterations="1" ls_iterations="4">
    <flag eulerdamp="disable"/>
  </option>
  <default>
    <joint type="slide" limited="true"/>
    <geom type="sphere" contype="0" conaffinity="0"/>
    <motor gear="6.4" ctrllimited="true" ctrlrange="-1 1"/>
  </default>
  <worldbody>
    <body>
      <joint name="pusher_x" axis="1 0 0" range="-1 1" damping="8"/>
      <joint name="pusher_y" axis="0 1 0" range="-1 1" damping="8"/>
      <geom name="pusher" size="{PUSHER}" mass="1"/>
    </body>
    <body>
      <joint name="disc_x" axis="1 0 0" range="-0.7 0.7" damping="4"/>
      <joint name="disc_y" axis="0 1 0" range="-0.7 0.7" damping="4"/>
      <geom name="disc" size="{DISC}" mass="0.5"/>
    </body>
  </worldbody>
  <contact>
    <pair geom1="pusher" geom2="disc" condim="1" solref="0.1 1"/>
  </contact>
  <actuator>
    <motor joint="pusher_x"/>
    <motor joint="pusher_y"/>
  </actuator>
</mujoco>
"""


@dataclasses.dataclass(frozen=True, eq=False)
class Push:
    """Push the disc to within 0.1 of the goal, which ends the task. The action is the pusher's force.

    Observation: positions of pusher and disc, their velocities, and the goal if `goal_conditioned`; the table is
    [-1, 1]^2 and the pusher's top speed 0.8 per second, 0.08 per step.
    """

    reward: Literal["sparse", "dense"] = "sparse"  # -1 until success and then 0; or minus distances
    goal_conditioned: bool = False  # a random goal, shown as the trailing two entries of the observation
    horizon: int = 100
    exploring: bool = False  # start anywhere and never terminate, to collect data
    model: Any = dataclasses.field(init=False, repr=False)
    data: Any = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Builds the model once; must not run inside a trace."""
        if self.reward not in ("sparse", "dense"):
            raise UserError(f"push: reward is {self.reward!r}, allowed are 'sparse' and 'dense'")
        model = mujoco.MjModel.from_xml_string(MJCF)  # ty: ignore[missing-attribute]
        object.__setattr__(self, "model", mjx.put_model(model, impl="jax"))
        object.__setattr__(self, "data", mjx.make_data(model, impl="jax"))

    @property
    def spec(self) -> Spec:
        """Sizes of observation, action and goal."""
        goal = 2 if self.goal_conditioned else 0
        return Spec(observation=8 + goal, action=2, goal=goal)

    def reset(self, key: jax.Array) -> EnvState:
        """Returns an episode at rest: the pusher not touching the disc, the disc at least 0.3 away from the goal."""
        key_goal, key_disc, key_pusher = jax.random.split(key, 3)
        goal = jax.random.uniform(key_goal, (2,), minval=-0.6, maxval=0.6) if self.goal_conditioned else jnp.array(GOAL)
        disc = _away(key_disc, 0.0 if self.exploring else 0.3, goal, 0.6)
        pusher = _away(key_pusher, 1.2 * TOUCH, disc, 0.9)
        position, still = jnp.concatenate([pusher, disc]), jnp.zeros((4,), jnp.float32)
        never = jnp.zeros((), bool)
        return EnvState(
            physics={"position": position, "velocity": still, "acceleration": still, "goal": goal},
            obs=self._observe(position, still, goal),
            reward=jnp.zeros((), jnp.float32),
            terminated=never,
            truncated=never,
            success=never,
            steps=jnp.zeros((), jnp.int32),
        )

    def step(self, state: EnvState, action: jax.Array) -> EnvState:
        """Returns the state 0.1 seconds later, action [2] in [-1, 1]."""
        before, goal = state.physics, state.physics["goal"]
        # the solver is warm-started from the last acceleration; the simulator's data has no other state
        data = self.data.replace(
            qpos=before["position"],
            qvel=before["velocity"],
            qacc_warmstart=before["acceleration"],
            ctrl=jnp.clip(action, -1.0, 1.0),
        )
        data = jax.lax.fori_loop(0, SUBSTEPS, lambda _, data: mjx.step(self.model, data), data)
        obs = self._observe(data.qpos, data.qvel, goal)
        steps = state.steps + 1
        reward, ended = self.relabel(state.obs[None], action[None], obs[None])
        terminated = ended[0] & (not self.exploring)
        return EnvState(
            physics={"position": data.qpos, "velocity": data.qvel, "acceleration": data.qacc_warmstart, "goal": goal},
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
        next_obs = jnp.asarray(next_obs)
        pusher, disc = next_obs[:, :2], next_obs[:, 2:4]
        away = _norm(disc - self._goal(next_obs))
        ended = away <= TOLERANCE
        if self.reward == "sparse":
            return ended.astype(jnp.float32) - 1.0, ended
        return -away - 0.2 * jnp.maximum(_norm(disc - pusher) - TOUCH, 0.0), ended

    def explore(self) -> "Push":
        """Returns the variant for data collection: random starts, no termination, changing goals."""
        return dataclasses.replace(self, exploring=True)

    def behaviour(self, level: str) -> Scripted:
        """Returns the policy that moves behind the disc and pushes it to the goal, with the noise of `level`."""
        return scripted(self, level)

    def aim(self, obs: jax.Array, key: jax.Array) -> jax.Array:
        """Returns a scripted policy's goal: the task's goal, or a random one while exploring."""
        return jax.random.uniform(key, (2,), minval=-0.6, maxval=0.6) if self.exploring else self._goal(obs)

    def reached(self, obs: jax.Array, goal: jax.Array) -> jax.Array:
        """Returns whether the disc is at `goal`."""
        return _norm(obs[..., 2:4] - goal) <= TOLERANCE

    def plan(self, obs: jax.Array, goal: jax.Array) -> jax.Array:
        """Returns the force that circles the disc until it is between pusher and goal, then pushes."""
        outward = obs[:2] - obs[2:4]
        distance = _norm(outward)
        outward = outward / (distance + 1e-6)
        along = jnp.stack([-outward[1], outward[0]])
        ahead = (obs[2:4] - goal) / (_norm(obs[2:4] - goal) + 1e-6)  # direction from the disc to the pusher's target
        angle = jnp.arctan2(jnp.dot(along, ahead), jnp.dot(outward, ahead))  # remaining angle around the disc
        clear = 1.5 * TOUCH * jnp.clip(2.0 * jnp.abs(angle), 0.0, 1.0)  # distance to keep: 0 once behind the disc
        force = 4.0 * angle * distance * along + 8.0 * (clear - distance) * outward
        return force / jnp.maximum(_norm(force), 1.0)

    def draw(self, state_obs: np.ndarray, size: int) -> Image.Image:
        """Returns a top-view image of one observation [O]."""
        goal_x, goal_y = np.asarray(self._goal(jnp.asarray(state_obs)))
        pusher_x, pusher_y, disc_x, disc_y = state_obs[:4]
        shapes = [
            Disc(goal_x, goal_y, TOLERANCE, "seagreen", hollow=True),
            Disc(disc_x, disc_y, DISC, "goldenrod"),
            Disc(pusher_x, pusher_y, PUSHER, "royalblue"),
        ]
        return discs(size, 1.1, shapes)

    def _observe(self, position: jax.Array, velocity: jax.Array, goal: jax.Array) -> jax.Array:
        return jnp.concatenate([position, velocity, goal] if self.goal_conditioned else [position, velocity])

    def _goal(self, obs: jax.Array) -> jax.Array:
        if self.goal_conditioned:
            return obs[..., 8:]
        return jnp.broadcast_to(jnp.array(GOAL), (*obs.shape[:-1], 2))


def _away(key: jax.Array, distance: float, other: jax.Array, extent: float) -> jax.Array:
    """Returns the first of 16 random points in [-extent, extent]^2 that is at least `distance` from `other`."""
    points = jax.random.uniform(key, (16, 2), minval=-extent, maxval=extent)
    return points[jnp.argmax(_norm(points - other[None]) >= distance)]


def _norm(vector: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.square(vector).sum(-1))
