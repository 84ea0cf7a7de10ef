"""Training and evaluation in simulators that step on the CPU: decisions on the device, steps in worker processes.

An epoch is a Python loop here, of the same iterations as `train.epoch` compiles into one program: a jitted decision
for all environments, a chunk executed in each (`jaxrl.pool`), a jitted `learn`. The carry is the same as well, so
that logs, checkpoints and plans know no difference. But what goes on inside a simulator is not in it: a run that is
resumed begins new episodes, and only its offline phase is, bit for bit, what it would have been.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from jaxrl import rollout as ro
from jaxrl import train
from jaxrl.data.files import Dataset, from_columns
from jaxrl.data.ring import Ring, Steps
from jaxrl.errors import UserError
from jaxrl.pool import Pool, WorkerDied
from jaxrl.train import Carry, Phase
from jaxrl.types import HostEnv, Metrics, PyTree

FRAMES = 100  # pictures of an episode
EVALUATED = 8  # episodes that are evaluated side by side, or two per worker if that is more


class Interrupted(Exception):  # noqa: N818  (not a mistake)
    """A worker died amid an epoch. Holds the carry after the last iteration."""

    def __init__(self, carry: Carry) -> None:
        """Keeps the carry."""
        super().__init__()
        self.carry = carry


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


def act(agent: Any, state: PyTree, obs: jax.Array, key: jax.Array) -> jax.Array:
    """Returns chunks [N, H, A] for observations [N, O], as while collecting."""
    return agent.act(state, obs, key)


def act_greedily(agent: Any, state: PyTree, obs: jax.Array, key: jax.Array, turns: jax.Array) -> jax.Array:
    """Returns chunks [N, H, A] for observations [N, O], as in evaluation; turns [N, 2] are (episode, decision).

    What is random about a decision depends on its turn, not on which episodes happen to be played side by side.
    """

    def one(obs: jax.Array, turn: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(key, turn[0]), turn[1])
        return agent.act(state, obs[None], own, greedy=True)[0]

    return jax.vmap(one)(obs, turns)


def resume(carry: Carry) -> Carry:
    """Returns the carry for environments that begin anew: an episode that was under way ends as by a time limit."""
    if carry.world is None:
        return carry
    ring = carry.world.replay
    lanes, rows = ring.valid.shape
    before = (jnp.arange(lanes), (ring.head - 1) % rows)
    cut = (ring.count > 0) & ring.valid[before]  # else the row before the head has closed an episode
    replay = dataclasses.replace(
        ring,
        truncated=ring.truncated.at[before].set(ring.truncated[before] | cut),
        head=(ring.head + cut) % rows,
        count=jnp.minimum(ring.count + cut, rows - 1),
    )
    return dataclasses.replace(carry, world=dataclasses.replace(carry.world, replay=replay))


jitted_act = jax.jit(act)
jitted_act_greedily = jax.jit(act_greedily)
jitted_resume = jax.jit(resume, donate_argnames=("carry",))
jitted_learn = jax.jit(
    train.learn, static_argnames=("phase",), donate_argnames=("carry",), compiler_options=train.COMPILING
)
jitted_close = jax.jit(train.close, donate_argnames=("carry",))


def epoch(
    simulators: Simulators, agent: Any, phase: Phase, carry: Carry, dataset: Ring | None
) -> tuple[Carry, Metrics]:
    """Returns the carry after one epoch that collects, and its metrics, as `train.epoch` does.

    Raises Interrupted, with the carry as it was then, where a worker dies.
    """
    key, key_starts, key_iterations = jax.random.split(carry.key, 3)
    random = generator(key_starts)
    history: list[Any] = []
    sums: list[dict[str, Any]] = []
    try:
        if simulators.flight is None:
            carry = jitted_resume(carry)
            simulators.flight = take_off(simulators, random, lanes_of(carry))
        carry = dataclasses.replace(carry, key=key)
        if dataset is not None:
            (dataset,) = train.annotated(agent, (dataset,))
        for key_iteration in jax.random.split(key_iterations, phase.iterations):
            key_act, key_learn = jax.random.split(key_iteration)
            chunks = np.asarray(jitted_act(agent, carry.agent, simulators.flight.obs, key_act))
            steps, happened = advance(simulators, chunks, random)
            carry, metrics = jitted_learn(agent, phase, carry, dataset, steps, key_learn)
            history.append(metrics)
            sums.append(happened)
    except WorkerDied as error:
        simulators.flight = None
        raise Interrupted(carry) from error
    carry, word = jitted_close(carry)
    means: Metrics = {name: np.mean([values[name] for values in jax.device_get(history)]) for name in history[0]}
    totals = {name: jnp.asarray(np.sum([values[name] for values in sums])) for name in sums[0]}
    return carry, {**means, **train.episode_metrics(totals), "digest": word}


def lanes_of(carry: Carry) -> int:
    """Returns how many environments a run collects in: the lanes of its replay."""
    assert carry.world is not None
    return len(carry.world.replay.head)


def take_off(simulators: Simulators, random: np.random.Generator, count: int) -> Flight:
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


def lowered(agent: Any, env: HostEnv, phase: Phase, carry: Carry, dataset: Ring, key: jax.Array) -> Iterator[Any]:
    """Yields the programs of an epoch that collects, ready to be compiled, from the shapes of its arguments."""
    count, chunk, sizes = lanes_of(carry), agent.chunk, env.spec
    flag, reward = jnp.zeros((count, chunk), bool), jnp.zeros((count, chunk))
    obs, actions = jnp.zeros((count, chunk + 1, sizes.observation)), jnp.zeros((count, chunk, sizes.action))
    yield jitted_act.lower(agent, carry.agent, obs[:, 0], key)
    steps = Steps(obs, actions, reward, flag, flag, flag, flag, flag[:, 0])
    (dataset,) = jax.eval_shape(lambda agent, *data: train.annotated(agent, data), agent, dataset)
    yield jitted_learn.lower(agent, phase, carry, dataset, steps, key)


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
