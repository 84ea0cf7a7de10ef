"""Simulators that step on the CPU: decisions on the device, steps in worker processes, and evaluation in them.

What goes on inside a simulator is not part of a run's carry: a run that is resumed begins new episodes. How a run
trains in them is in `jaxrl.training.host_loop`.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from jaxrl.data.files import Dataset, from_columns
from jaxrl.errors import UserError
from jaxrl.replay.ring import Steps
from jaxrl.rollout import device as ro
from jaxrl.rollout.workers import Pool
from jaxrl.types import HostEnv, PyTree

FRAMES = 100  # pictures of an episode
EVALUATED = 8  # episodes that are evaluated side by side, or two per worker if that is more


@dataclasses.dataclass
class Flight:
    """The environments that a run collects in: what they show, and what their unfinished episodes have earned."""

    obs: np.ndarray  # [N, O]
    returns: np.ndarray  # [N]


class Simulators:
    """All that a run has besides its carry: worker processes, and the episodes under way in them."""

    def __init__(self, env: HostEnv, workers: int | None = None, picture: int = 0) -> None:
        """Starts nothing yet; by default there is a worker for each processor core."""
        self.env, self.pool = env, Pool(env.builder(picture), env.horizon, workers)
        self.flight: Flight | None = None

    def close(self) -> None:
        """Ends the worker processes."""
        self.pool.close()

    def begin(self, group: str, slots: np.ndarray, seeds: np.ndarray, tasks: np.ndarray) -> np.ndarray:
        """Returns the first observations [n, O] of new episodes, each of the task that a number from 0 on stands for.

        The numbers count through the tasks again and again.
        """
        numbers = tasks % self.env.tasks + 1 if self.env.tasks else np.zeros_like(tasks)
        return self.pool.reset(group, slots, seeds, numbers)


def seeds_of(random: np.random.Generator, count: int) -> np.ndarray:
    """Returns seeds [count] for simulators."""
    return random.integers(2**32, size=count, dtype=np.int64)


def generator(key: jax.Array) -> np.random.Generator:
    """Returns a NumPy generator that depends on a key alone."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def act_greedily(agent: Any, state: PyTree, obs: jax.Array, key: jax.Array, turns: jax.Array) -> jax.Array:
    """Returns chunks [N, H, A] for observations [N, O], as in evaluation; turns [N, 2] are (episode, decision).

    What is random about a decision depends on its turn, not on which episodes happen to be played side by side.
    """

    def one(obs: jax.Array, turn: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(key, turn[0]), turn[1])
        return agent.act(state, obs[None], own, greedy=True)[0]

    return jax.vmap(one)(obs, turns)


jitted_act_greedily = jax.jit(act_greedily)


def reset_all(simulators: Simulators, random: np.random.Generator, count: int) -> Flight:
    """Returns `count` environments at the start of their episodes."""
    slots = np.arange(count)
    obs = simulators.begin("training", slots, seeds_of(random, count), random.integers(2**31, size=count))
    return Flight(obs, np.zeros(count, np.float32))


def advance(simulators: Simulators, chunks: np.ndarray, random: np.random.Generator) -> tuple[Steps, dict[str, Any]]:
    """Returns the steps for the ring, and sums over the episodes that ended, which are followed by new ones."""
    flight, slots = simulators.flight, np.arange(len(chunks))
    assert flight is not None
    result = simulators.pool.execute("training", slots, chunks)
    success = result.pop("success")
    steps = Steps(**result)
    returns, over = flight.returns + steps.rewards.sum(axis=1), np.asarray(steps.ended)
    sums = {
        "episodes": over.sum(),
        "successes": (over & success).sum(),
        "returns": np.sum(returns * over),
        "steps": steps.taken.sum(),
        "broken": (steps.taken & ~steps.valid).sum(),
    }
    seeds, tasks = seeds_of(random, len(over)), random.integers(2**31, size=len(over))
    obs = np.array(steps.obs[:, -1])
    if over.any():
        obs[over] = simulators.begin("training", slots[over], seeds[over], tasks[over])
    simulators.flight = Flight(obs, np.where(over, 0, returns).astype(np.float32))
    return steps, sums


def evaluate(simulators: Simulators, agent: Any, state: PyTree, key: jax.Array, episodes: int) -> ro.Episodes:
    """Returns `episodes` whole episodes; the same key gives the same starts and tasks to any agent.

    The tasks are gone through in turn. As many episodes as there are slots are played side by side, and a slot whose
    episode is over goes on with the next one that nobody has begun. An episode counts as a success where the task was
    solved at any time, as OGBench counts.
    """
    key_starts, key_act = jax.random.split(key)
    seeds, numbers = seeds_of(generator(key_starts), episodes), np.arange(episodes)
    count = side_by_side(episodes, simulators.pool.workers)
    result = _no_episodes(episodes)
    playing, turn, following = numbers[:count].copy(), np.zeros(count, np.int64), count  # -1 plays nothing
    obs = simulators.begin("evaluation", playing, seeds[playing], playing)
    track = [obs[0].copy()]
    while (playing >= 0).any():
        turns = np.stack([playing, turn], axis=1).astype(np.int32)
        chunks = np.asarray(jitted_act_greedily(agent, state, obs, key_act, turns))
        slots = np.flatnonzero(playing >= 0)
        steps = simulators.pool.execute("evaluation", slots, chunks[slots])
        if playing[0] == 0:
            track += list(steps["obs"][0, 1 : 1 + steps["taken"][0].sum()])
        _record(result, playing[slots], steps)
        obs[slots], turn[slots] = steps["obs"][:, -1], turn[slots] + 1
        over = slots[steps["ended"]]
        following, free = following + len(over), np.arange(following, following + len(over))
        playing[over], turn[over] = np.where(free < episodes, free, -1), 0
        again = over[free < episodes]
        if len(again):
            obs[again] = simulators.begin("evaluation", again, seeds[playing[again]], playing[again])
    return dataclasses.replace(result, track=np.stack(track))


def film(env: HostEnv, agent: Any, state: PyTree, key: jax.Array, size: int = 320) -> list[Image.Image]:
    """Returns pictures of the first episode that `evaluate` plays with the same key, at most FRAMES or so.

    Raises UserError where the simulator cannot be rendered.
    """
    key_starts, key_act = jax.random.split(key)
    simulators, first, turn, ended = Simulators(env, 1, size), np.zeros(1, np.int64), 0, False
    frames: list[np.ndarray] = []
    with contextlib.closing(simulators):
        obs = simulators.begin("film", first, seeds_of(generator(key_starts), 1), first)
        while not ended:
            turns = np.array([[0, turn]], np.int32)
            chunks = np.asarray(jitted_act_greedily(agent, state, obs, key_act, turns))
            steps = simulators.pool.execute("film", first, chunks, frames=max(env.horizon // FRAMES, 1))
            frames += steps["frames"][0]
            obs, turn, ended = steps["obs"][:, -1], turn + 1, bool(steps["ended"][0])
    return [Image.fromarray(frame) for frame in frames]


def side_by_side(episodes: int, workers: int) -> int:
    """Returns how many episodes are evaluated at a time."""
    return min(episodes, max(EVALUATED, 2 * workers))


def script_of(env: Any, behaviour: str | None, steps: int) -> tuple[Any, int]:
    """Returns an environment's scripted behaviour, and how many of its episodes have so many steps.

    A script names its `dataset`, and script((seed, episode)) are an episode's columns. Raises UserError where there is
    none.
    """
    if not hasattr(env, "recording"):
        raise UserError(f"{type(env).__name__} has no scripted behaviour to record")
    return env.recording(behaviour, steps)


def record(script: Callable[[tuple[int, int]], dict[str, np.ndarray]], episodes: int, seed: int) -> Dataset:
    """Returns episodes of a script, recorded in worker processes."""
    with Pool() as pool:
        jobs = pool.map(script, [(seed, episode) for episode in range(episodes)])
        parts = list(tqdm(jobs, "recording", episodes, unit="episode", disable=None))
    return from_columns({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def _no_episodes(count: int) -> Any:
    """Returns the record of episodes that have not begun, to be written into."""
    kinds = {"success": bool, "returns": np.float32, "lengths": np.int32, "broken": bool}
    columns: dict[str, Any] = {name: np.zeros(count, kind) for name, kind in kinds.items()}
    return ro.Episodes(**columns, track=jnp.zeros(0))


def _record(result: Any, episodes: np.ndarray, steps: dict[str, np.ndarray]) -> None:
    """Writes what happened in these episodes into their record."""
    result.success[episodes] |= steps["success"]
    result.returns[episodes] += steps["rewards"].sum(axis=1)
    result.lengths[episodes] += steps["taken"].sum(axis=1, dtype=np.int32)
    result.broken[episodes] |= (steps["taken"] & ~steps["valid"]).any(axis=1)
