"""Training with simulators on CPU cores: the epoch of `jaxrl.training.loop` as a Python loop of the same iterations."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.replay.ring import Ring, Steps
from jaxrl.rollout import host
from jaxrl.rollout.host import Simulators
from jaxrl.rollout.workers import WorkerDied
from jaxrl.training import loop
from jaxrl.training.compiling import Jitted
from jaxrl.training.loop import Carry
from jaxrl.training.schedule import reads_dataset
from jaxrl.types import Agent, HostEnv, Metrics, Phase, PyTree


class Interrupted(Exception):  # noqa: N818  (not an error)
    """A worker died during an epoch. Holds the carry after the last iteration."""

    def __init__(self, carry: Carry) -> None:
        """Keeps the carry."""
        super().__init__()
        self.carry = carry


def act(agent: Agent, state: PyTree, obs: jax.Array, key: jax.Array) -> jax.Array:
    """Returns chunks [N, H, A] for observations [N, O], as while collecting."""
    return agent.act(state, obs, key)


def resume(carry: Carry) -> Carry:
    """Returns the carry for environments that begin anew: an episode that was under way ends as by a time limit."""
    if carry.world is None or carry.world.replay is None:
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


jitted_resume = jax.jit(resume, donate_argnames=("carry",))


jitted_learn = Jitted(loop.learn, static_argnames=("phase",), donate_argnames=("carry",))


jitted_close = jax.jit(loop.close, donate_argnames=("carry",))


def epoch(
    simulators: Simulators, agent: Agent, phase: Phase, carry: Carry, dataset: Ring | None, envs: int
) -> tuple[Carry, Metrics]:
    """Returns the carry after one epoch that collects in `envs` environments, and its metrics, as `loop.epoch` does.

    Raises Interrupted, with the carry as it was then, where a worker dies.
    """
    key, key_starts, key_iterations = jax.random.split(carry.key, 3)
    random = host.generator(key_starts)
    history: list[Any] = []
    sums: list[dict[str, Any]] = []
    try:
        if simulators.flight is None:
            carry = jitted_resume(carry)
            simulators.flight = host.reset_all(simulators, random, envs)
        carry = dataclasses.replace(carry, key=key)
        if dataset is not None and reads_dataset(phase):
            (dataset,) = loop.derived(agent, (dataset,))
        for key_iteration in jax.random.split(key_iterations, phase.iterations):
            key_act, key_learn = jax.random.split(key_iteration)
            chunks = np.asarray(jitted_act(agent, carry.agent, simulators.flight.obs, key_act))
            steps, happened = host.advance(simulators, chunks, random)
            carry, metrics = jitted_learn(agent, phase, carry, dataset, steps, key_learn)
            history.append(metrics)
            sums.append(happened)
    except WorkerDied as error:
        simulators.flight = None
        raise Interrupted(carry) from error
    carry, word = jitted_close(carry)
    totals = {name: jnp.asarray(np.sum([values[name] for values in sums])) for name in sums[0]}
    found: Metrics = {**means(jax.device_get(history)), **loop.episode_metrics(totals), "digest": word}
    return carry, found


def means(history: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Returns the mean of each metric over the iterations that measured it; NaN where none did."""
    result = {}
    for name in history[0]:
        values = np.stack([metrics[name] for metrics in history])
        measured = values[~np.isnan(values)]
        result[name] = np.mean(measured) if len(measured) else values[0]
    return result


def lowered(
    agent: Agent, env: HostEnv, phase: Phase, carry: Carry, dataset: Ring | None, key: jax.Array, envs: int
) -> Iterator[Any]:
    """Yields the programs of an epoch that collects, ready to be compiled, from the shapes of its arguments."""
    count, chunk, sizes = envs, agent.chunk, env.spec
    flag, reward = jnp.zeros((count, chunk), bool), jnp.zeros((count, chunk))
    obs, actions = jnp.zeros((count, chunk + 1, sizes.observation)), jnp.zeros((count, chunk, sizes.action))
    yield jitted_act.lower(agent, carry.agent, obs[:, 0], key)
    steps = Steps(obs, actions, reward, flag, flag, flag, flag, flag[:, 0])
    if dataset is not None and reads_dataset(phase):
        (dataset,) = jax.eval_shape(lambda agent, *data: loop.derived(agent, data), agent, dataset)
    yield jitted_learn.lower(agent, phase, carry, dataset, steps, key)
