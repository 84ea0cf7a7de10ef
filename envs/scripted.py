"""Scripted policies of several skill levels, for recording data without a trained agent."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from jaxrl.errors import unknown
from jaxrl.types import EnvState

# level: (weight of the planned action, half-width of the uniform noise on top); `random` is uniform in [-1, 1]
SKILLS = {"good": (1.0, 0.2), "medium": (0.8, 0.8), "bad": (0.3, 1.0), "random": (0.0, 1.0)}


class Task(Protocol):
    """The methods of an environment that scripted policies need."""

    def aim(self, obs: jax.Array, key: jax.Array) -> jax.Array:
        """Returns the goal: the task's own, or a random one for data collection."""
        ...

    def reached(self, obs: jax.Array, goal: jax.Array) -> jax.Array:
        """Returns whether the observation is at the goal."""
        ...

    def plan(self, obs: jax.Array, goal: jax.Array) -> jax.Array:
        """Returns the action [A] that leads toward the goal."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Scripted:
    """A behavior that follows `task.plan` with noise. Each episode draws one of `levels` and keeps it."""

    task: Task
    levels: tuple[str, ...]

    def start(self, state: EnvState, key: jax.Array) -> dict[str, jax.Array]:
        """Returns the memory at the start of an episode: goal, weight of the plan, noise."""
        key_goal, key_level = jax.random.split(key)
        skills = jnp.array([SKILLS[level] for level in self.levels], jnp.float32)
        weight, noise = skills[jax.random.randint(key_level, (), 0, len(self.levels))]
        return {"goal": self.task.aim(state.obs, key_goal), "weight": weight, "noise": noise}

    def act(self, memory: dict[str, jax.Array], state: EnvState, key: jax.Array) -> tuple[dict, jax.Array]:
        """Returns the memory, with a new goal if the old one was reached, and one action [A]."""
        key_goal, key_noise = jax.random.split(key)
        arrived = self.task.reached(state.obs, memory["goal"])
        goal = jnp.where(arrived, self.task.aim(state.obs, key_goal), memory["goal"])
        planned = self.task.plan(state.obs, goal)
        noise = jax.random.uniform(key_noise, planned.shape, minval=-1.0, maxval=1.0)
        action = jnp.clip(memory["weight"] * planned + memory["noise"] * noise, -1.0, 1.0)
        return memory | {"goal": goal}, action


def scripted(task: Task, level: str) -> Scripted:
    """Returns the behavior of `level`: good, medium, bad, random, or mixed (one of them per episode)."""
    if level != "mixed" and level not in SKILLS:
        raise unknown("behaviour level", level, [*SKILLS, "mixed"])
    return Scripted(task, tuple(SKILLS) if level == "mixed" else (level,))
