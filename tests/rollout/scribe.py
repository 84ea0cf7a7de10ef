"""An agent whose actions tell which decision of an episode predicted them, and as which entry of its chunk."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.rollout.executors import Execution
from jaxrl.types import count_of, pytree

CHUNK = 6


@pytree
class Scribe:
    """Entry i of the k-th decision of an episode is code(k, i), from k = 0 on; its memory is k, its extra too."""

    chunk: int = CHUNK

    def start(self, state, obs, key):
        return jnp.zeros(count_of(obs), jnp.int32)

    def decide(self, state, memory, obs, key, *, greedy=False):
        return memory + 1, code(memory[:, None], jnp.arange(self.chunk)[None])[..., None], {"decision": memory}


def code(decision, entry):
    return decision / 50 + entry / 1000


def expected(execution: Execution, step: int) -> float:
    """Returns the action of a step of an episode, counted from 0, by the definition of each kind."""
    length = execution.length(CHUNK)
    k, i = divmod(step, length)
    if execution.kind == "real_time" and k and i < execution.delay:
        return code(k - 1, i + length)
    if execution.kind == "ensemble":
        known = [j for j in range(k + 1) if step - j * length < CHUNK]
        weights = np.exp([-float(execution.decay) * (step - j * length) for j in known])
        return float(np.average([code(j, step - j * length) for j in known], weights=weights))
    return code(k, i)


EXECUTIONS = (
    Execution(),
    Execution("receding", 1),
    Execution("receding", 4),
    Execution("ensemble", 1, decay=-0.3),
    Execution("ensemble", 2, decay=0.0),
    Execution("ensemble", 4, decay=0.3),
    Execution("real_time", 3, delay=1),
    Execution("real_time", 3, delay=3),
    Execution("real_time", 4, delay=2),
)
NEUTRAL = (
    Execution("receding"),
    Execution("receding", CHUNK),
    Execution("ensemble", CHUNK, decay=3.0),
    Execution("ensemble", decay=-3.0),
    Execution("real_time", CHUNK),
    Execution("adaptive", CHUNK, threshold=float("inf")),
    Execution("adaptive", threshold=0.0),
)


@pytree
class Noisy:
    """An agent with a memory, whose chunks are random and whose extras are many."""

    chunk: int = CHUNK

    def start(self, state, obs, key):
        return jax.random.uniform(key, (count_of(obs), 2))

    def decide(self, state, memory, obs, key, *, greedy=False):
        noise = jax.random.uniform(key, (count_of(obs), self.chunk, 1), minval=-1)
        return memory * 0.9 + 0.1, 0.5 * noise + 0.5 * memory[:, :1, None], {"memory": memory, "noise": noise}


def name(execution: Execution) -> str:
    return f"{execution.kind}-{execution.execute}-{execution.delay}-{execution.decay}-{execution.threshold}"
