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
from jaxrl.training.loop import Carry
from jaxrl.types import HostEnv, Metrics, Phase, PyTree


class Interrupted(Exception):  # noqa: N818  (not a mistake)
    """A worker died amid an epoch. Holds the carry after the last iteration."""

    def __init__(self, carry: Carry) -> None:
        """Keeps the carry."""
        super().__init__()
        self.carry = carry


def act(agent: Any, state: PyTree, obs: jax.Array, key: jax.Array) -> jax.Array:
    """Returns chunks [N, H, A] for observations [N, O], as while collecting."""
    return agent.act(state, obs, key)


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


jitted_resume = jax.jit(resume, donate_argnames=("carry",))


jitted_learn = jax.jit(
    loop.learn, static_argnames=("phase",), donate_argnames=("carry",), compiler_options=loop.COMPILING
)


jitted_close = jax.jit(loop.close, donate_argnames=("carry",))


def epoch(
    simulators: Simulators, agent: Any, phase: Phase, carry: Carry, dataset: Ring | None
) -> tuple[Carry, Metrics]:
    """Returns the carry after one epoch that collects, and its metrics, as `loop.epoch` does.

    Raises Interrupted, with the carry as it was then, where a worker dies.
    """
    key, key_starts, key_iterations = jax.random.split(carry.key, 3)
    random = host.generator(key_starts)
    history: list[Any] = []
    sums: list[dict[str, Any]] = []
    try:
        if simulators.flight is None:
            carry = jitted_resume(carry)
            simulators.flight = host.reset_all(simulators, random, lanes_of(carry))
        carry = dataclasses.replace(carry, key=key)
        if dataset is not None:
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
    means: Metrics = {name: np.mean([values[name] for values in jax.device_get(history)]) for name in history[0]}
    totals = {name: jnp.asarray(np.sum([values[name] for values in sums])) for name in sums[0]}
    return carry, {**means, **loop.episode_metrics(totals), "digest": word}


def lanes_of(carry: Carry) -> int:
    """Returns how many environments a run collects in: the lanes of its replay."""
    assert carry.world is not None
    return len(carry.world.replay.head)


def lowered(agent: Any, env: HostEnv, phase: Phase, carry: Carry, dataset: Ring, key: jax.Array) -> Iterator[Any]:
    """Yields the programs of an epoch that collects, ready to be compiled, from the shapes of its arguments."""
    count, chunk, sizes = lanes_of(carry), agent.chunk, env.spec
    flag, reward = jnp.zeros((count, chunk), bool), jnp.zeros((count, chunk))
    obs, actions = jnp.zeros((count, chunk + 1, sizes.observation)), jnp.zeros((count, chunk, sizes.action))
    yield jitted_act.lower(agent, carry.agent, obs[:, 0], key)
    steps = Steps(obs, actions, reward, flag, flag, flag, flag, flag[:, 0])
    (dataset,) = jax.eval_shape(lambda agent, *data: loop.derived(agent, data), agent, dataset)
    yield jitted_learn.lower(agent, phase, carry, dataset, steps, key)
