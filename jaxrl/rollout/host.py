"""CPU simulators: decisions on the device, steps in worker processes, and evaluation.

Simulator states are not part of a run's carry: a resumed run starts new episodes. Training with simulators is in
`jaxrl.training.host_loop`.
"""

import contextlib
import dataclasses
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
from jaxrl.rollout.executors import OPEN_LOOP, Execution
from jaxrl.rollout.workers import Pool
from jaxrl.types import Agent, EnvState, HostEnv, Observation, PyTree, Recordable, Script, Spec

FRAMES = 100  # frames rendered per episode
EVALUATED = 8  # episodes evaluated in parallel, or two per worker if that is more
STARTING = np.uint32(2**32 - 1)  # fold-in value of the key for an episode's initial memory; beyond decision numbers


@dataclasses.dataclass
class Flight:
    """The environments in which a run collects, with unfinished episodes."""

    obs: Observation  # [N, O], NumPy
    returns: np.ndarray  # [N], of the unfinished episodes
    began: np.ndarray  # [N] bool: at the start of an episode
    memory: PyTree = None  # the policy's, on the device; None before its first decision


class Simulators:
    """The state of a run outside its carry: worker processes, and their unfinished episodes."""

    def __init__(self, env: HostEnv, workers: int | None = None, picture: int = 0) -> None:
        """Sets up the pool without starting processes; by default one worker per CPU core."""
        self.env, self.pool = env, Pool(env.builder(picture), env.horizon, workers)
        self.flight: Flight | None = None

    def close(self) -> None:
        """Stops the worker processes."""
        self.pool.close()

    def begin(self, group: str, slots: np.ndarray, seeds: np.ndarray, tasks: np.ndarray) -> Observation:
        """Returns the first observations [n, O] of new episodes of the given tasks [n].

        Task numbers start from 0 and wrap around at the number of tasks.
        """
        numbers = tasks % self.env.tasks + 1 if self.env.tasks else np.zeros_like(tasks)
        obs = self.pool.reset(group, slots, seeds, numbers)
        check_sizes(obs, self.env.spec)
        return obs


def check_sizes(obs: Observation, spec: Spec) -> None:
    """Raises UserError if simulators' observations [N, ...] are not those of the environment's spec."""
    found, wanted = (
        {jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape[lead:])}" for path, x in jax.tree.leaves_with_path(tree)}
        for tree, lead in ((obs, 1), (spec.example(), 0))
    )
    if wrong := [place for place in found | wanted if found.get(place) != wanted.get(place)]:
        place = wrong[0]
        raise UserError(
            f"the simulator's observation{place} is {found.get(place, 'absent')}, its spec says "
            f"{wanted.get(place, 'absent')}: correct one of them, `jaxrl doctor --env ...` checks both"
        )


def seeds_of(random: np.random.Generator, count: int) -> np.ndarray:
    """Returns seeds [count] for simulators."""
    return random.integers(2**32, size=count, dtype=np.int64)


def generator(key: jax.Array) -> np.random.Generator:
    """Returns a NumPy generator seeded by a key."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def start_greedily(
    agent: Agent, execution: Execution, state: PyTree, obs: Observation, key: jax.Array, at: jax.Array
) -> PyTree:
    """Returns the memory [N, 1, ...] for `act_greedily` at the start of N episodes."""
    policy = execution(ro.policy_of(agent, state, greedy=True))

    def one(obs: Observation, at: jax.Array) -> PyTree:
        return policy.start(alone(obs), jax.random.fold_in(jax.random.fold_in(key, at[0]), STARTING))

    return jax.vmap(one)(obs, at)


def act_greedily(
    agent: Agent,
    execution: Execution,
    state: PyTree,
    memory: PyTree,
    obs: Observation,
    key: jax.Array,
    at: jax.Array,
) -> tuple[PyTree, jax.Array]:
    """Returns memory and greedy chunks [N, H, A] for observations [N, O].

    Rows of `at` [N, 2] are (episode, decision). They determine the random key of a decision, so results do not depend
    on which episodes run in parallel. Decision 0 starts with a new memory.
    """
    policy = execution(ro.policy_of(agent, state, greedy=True))
    memory = ro.where(at[:, 1] == 0, start_greedily(agent, execution, state, obs, key, at), memory)

    def one(memory: PyTree, obs: Observation, at: jax.Array) -> tuple[PyTree, jax.Array]:
        own = jax.random.fold_in(jax.random.fold_in(key, at[0]), at[1])
        memory, chunks, _ = policy.act(memory, alone(obs), own)
        return memory, chunks[0]

    return jax.vmap(one)(memory, obs, at)


def alone(obs: Observation) -> EnvState:
    """Returns the state [1, ...] of a single environment with this observation."""
    return ro.observed(jax.tree.map(lambda x: x[None], obs))


jitted_start_greedily = jax.jit(start_greedily)
jitted_act_greedily = jax.jit(act_greedily)


def reset_all(simulators: Simulators, random: np.random.Generator, count: int) -> Flight:
    """Returns `count` environments at the start of their episodes."""
    slots = np.arange(count)
    obs = simulators.begin("training", slots, seeds_of(random, count), random.integers(2**31, size=count))
    return Flight(obs, np.zeros(count, np.float32), np.ones(count, bool))


def advance(simulators: Simulators, chunks: np.ndarray, random: np.random.Generator) -> tuple[Steps, dict[str, Any]]:
    """Returns the steps for the ring, and sums over the ended episodes, which are replaced by new ones."""
    flight, slots = simulators.flight, np.arange(len(chunks))
    assert flight is not None
    result = simulators.pool.execute("training", slots, chunks)
    success = result.pop("success")
    steps = Steps(**result)
    returns, over = flight.returns + steps.rewards.sum(axis=1), np.asarray(steps.ended)
    seeds, tasks = seeds_of(random, len(over)), random.integers(2**31, size=len(over))
    obs = jax.tree.map(lambda x: np.array(x[:, -1]), steps.obs)
    if over.any():
        put(obs, over, simulators.begin("training", slots[over], seeds[over], tasks[over]))
    simulators.flight = Flight(obs, np.where(over, 0, returns).astype(np.float32), over, flight.memory)
    return steps, dict(ro.sums_of(steps, success, returns))


def put(obs: Observation, rows: np.ndarray, values: Observation) -> None:
    """Writes observations into some rows of others, in place."""
    for target, value in zip(jax.tree.leaves(obs), jax.tree.leaves(values), strict=True):
        target[rows] = value


def evaluate(
    simulators: Simulators,
    agent: Agent,
    state: PyTree,
    key: jax.Array,
    episodes: int,
    execution: Execution = OPEN_LOOP,
) -> ro.Episodes:
    """Returns `episodes` complete episodes; equal keys give equal starts and tasks for any agent.

    Episodes cycle through the tasks in order. They run in parallel, one per slot; a slot whose episode ends starts the
    next one. As in OGBench, an episode is a success if the task was solved at any time.
    """
    key_starts, key_act = jax.random.split(key)
    seeds, numbers = seeds_of(generator(key_starts), episodes), np.arange(episodes)
    count = side_by_side(episodes, simulators.pool.workers)
    result = _no_episodes(episodes)
    at, following = np.stack([numbers[:count], np.zeros(count)], axis=1).astype(np.int32), count  # episode -1: idle
    obs = simulators.begin("evaluation", at[:, 0], seeds[:count], at[:, 0])
    memory = jitted_start_greedily(agent, execution, state, obs, key_act, at)
    track = [jax.tree.map(lambda x: x[:1].copy(), obs)]
    while (at[:, 0] >= 0).any():
        memory, chunks = jitted_act_greedily(agent, execution, state, memory, obs, key_act, at)
        slots = np.flatnonzero(at[:, 0] >= 0)
        steps = simulators.pool.execute("evaluation", slots, np.asarray(chunks)[slots])
        if at[0, 0] == 0:
            happened = slice(1, 1 + steps["taken"][0].sum())
            track.append(jax.tree.map(lambda x, happened=happened: x[0, happened], steps["obs"]))
        _record(result, at[slots, 0], steps)
        put(obs, slots, jax.tree.map(lambda x: x[:, -1], steps["obs"]))
        at[slots, 1] += 1
        over = slots[steps["ended"]]
        following, free = following + len(over), np.arange(following, following + len(over))
        at[over] = np.stack([np.where(free < episodes, free, -1), np.zeros(len(over))], axis=1)
        again = over[free < episodes]
        if len(again):
            put(obs, again, simulators.begin("evaluation", again, seeds[at[again, 0]], at[again, 0]))
    return dataclasses.replace(result, track=jax.tree.map(lambda *parts: np.concatenate(parts), *track))


def render(
    env: HostEnv,
    agent: Agent,
    state: PyTree,
    key: jax.Array,
    size: int = 320,
    execution: Execution = OPEN_LOOP,
) -> list[Image.Image]:
    """Returns about FRAMES frames of the first episode that `evaluate` runs with the same key.

    Raises UserError if the simulator cannot be rendered.
    """
    key_starts, key_act = jax.random.split(key)
    simulators, first, at, ended = Simulators(env, 1, size), np.zeros(1, np.int64), np.zeros((1, 2), np.int32), False
    frames: list[np.ndarray] = []
    with contextlib.closing(simulators):
        obs = simulators.begin("rendering", first, seeds_of(generator(key_starts), 1), first)
        memory = jitted_start_greedily(agent, execution, state, obs, key_act, at)
        while not ended:
            memory, chunks = jitted_act_greedily(agent, execution, state, memory, obs, key_act, at)
            every = max(env.horizon // FRAMES, 1)
            steps = simulators.pool.execute("rendering", first, np.asarray(chunks), frames=every)
            frames += steps["frames"][0]
            obs, ended = jax.tree.map(lambda x: x[:, -1], steps["obs"]), bool(steps["ended"][0])
            at = at + np.array([[0, 1]], np.int32)
    return [Image.fromarray(frame) for frame in frames]


def side_by_side(episodes: int, workers: int) -> int:
    """Returns the number of episodes evaluated in parallel."""
    return min(episodes, max(EVALUATED, 2 * workers))


def script_of(env: HostEnv, behaviour: str | None, steps: int) -> tuple[Script, int]:
    """Returns an environment's scripted behavior, and the number of its episodes for at least `steps` steps.

    Raises UserError if there is none.
    """
    if not isinstance(env, Recordable):
        raise UserError(f"{type(env).__name__} has no scripted behaviour to record")
    return env.recording(behaviour, steps)


def record(script: Script, episodes: int, seed: int) -> Dataset:
    """Returns episodes of a script, recorded in worker processes."""
    with Pool() as pool:
        jobs = pool.map(script, [(seed, episode) for episode in range(episodes)])
        parts = list(tqdm(jobs, "recording", episodes, unit="episode", disable=None))
    return from_columns({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def _no_episodes(count: int) -> Any:
    """Returns a mutable record of episodes that have not started."""
    kinds = {"success": bool, "returns": np.float32, "lengths": np.int32, "broken": bool}
    columns: dict[str, Any] = {name: np.zeros(count, kind) for name, kind in kinds.items()}
    return ro.Episodes(**columns, track=jnp.zeros(0))


def _record(result: Any, episodes: np.ndarray, steps: dict[str, np.ndarray]) -> None:
    """Adds the steps of these episodes to their record."""
    result.success[episodes] |= steps["success"]
    result.returns[episodes] += steps["rewards"].sum(axis=1)
    result.lengths[episodes] += steps["taken"].sum(axis=1, dtype=np.int32)
    result.broken[episodes] |= (steps["taken"] & ~steps["valid"]).any(axis=1)
