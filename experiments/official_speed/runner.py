"""The training loop of an official implementation at its leanest: sample on the host, update, nothing else.

Runs in the official code's own environment, and imports its classes and nothing of jaxrl. It answers each line of its
standard input, a number of seconds, with a line of JSON: how many loops it made, in how many seconds.

    python runner.py METHOD REPOSITORY DATA WIDTHS BATCH CHUNK BACKUP
"""

import json
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Sampler = Callable[[], dict]


def columns(path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns observations, actions and the ends of episodes: an episode's last row is only observed."""
    with np.load(path) as file:
        return file["observations"], file["actions"], file["terminals"].astype(bool)


def transitions(path: str) -> dict[str, np.ndarray]:
    """Returns one row per step, as single-task datasets are; the task is never solved."""
    obs, actions, last = columns(path)
    at = np.flatnonzero(~last)
    ones = np.ones(len(at), np.float32)
    ends = last[at + 1].astype(np.float32)
    return {
        "observations": obs[at],
        "actions": actions[at],
        "next_observations": obs[at + 1],
        "rewards": -ones,
        "masks": ones,
        "terminals": ends,
    }


def qgf(path: str, widths: tuple[int, ...], batch: int, chunk: int, backup: int) -> tuple[Any, Sampler]:
    """Returns QGF's agent and what samples its batches."""
    from agents.qgf import QGFAgent, get_config
    from utils.datasets import Dataset

    assert chunk == backup, "the official QGF has one horizon"
    config = get_config()
    config.batch_size, config.horizon_length, config.action_chunking = batch, chunk, chunk > 1
    config.actor_hidden_dims = config.value_network_kwargs.hidden_dims = widths
    data = Dataset.create(**transitions(path))
    one = data.sample(1)
    agent = QGFAgent.create(0, one["observations"], one["actions"], config)
    return agent, lambda: data.sample_sequence(batch, sequence_length=chunk, discount=config.discount)


def dqc(path: str, widths: tuple[int, ...], batch: int, chunk: int, backup: int) -> tuple[Any, Sampler]:
    """Returns DQC's agent and what samples its batches; a goal is a whole observation."""
    from agents.dqc import DQCAgent, get_config
    from utils.datasets import CGCDataset, Dataset

    config = get_config()
    config.batch_size, config.policy_chunk_size, config.backup_horizon = batch, chunk, backup
    config.actor_hidden_dims = config.value_hidden_dims = widths
    config.q_agg, config.kappa_d, config.kappa_b = "min", 0.8, 0.93
    obs, actions, last = columns(path)
    fields = {"observations": obs, "actions": actions, "terminals": last.astype(np.float32)}
    data = CGCDataset(Dataset.create(**fields, valids=1 - fields["terminals"]), config)
    return DQCAgent.create(0, data.sample(1), config), lambda: data.sample(batch)


def fql(path: str, widths: tuple[int, ...], batch: int, chunk: int, backup: int) -> tuple[Any, Sampler]:
    """Returns FQL's agent and what samples its batches."""
    from agents.fql import FQLAgent, get_config
    from utils.datasets import Dataset

    assert chunk == backup == 1, "the official FQL has neither chunks nor n-step returns"
    config = get_config()
    config.batch_size, config.actor_hidden_dims, config.value_hidden_dims = batch, widths, widths
    data = Dataset.create(**transitions(path))
    one = data.sample(1)
    return FQLAgent.create(0, one["observations"], one["actions"], config), lambda: data.sample(batch)


def run(agent: Any, sample: Sampler, seconds: float) -> tuple[Any, int, float]:
    """Returns the agent after the loops of so many seconds, how many they were, and the seconds until all were done."""
    import jax

    loops, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds or not loops:
        agent, _ = agent.update(sample())
        loops += 1
    jax.block_until_ready(agent)
    return agent, loops, time.perf_counter() - began


def main() -> None:
    """Builds, warms up, then measures as often as it is asked to."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever the official code prints is no answer
    method, repository, path, widths, *sizes = sys.argv[1:]
    sys.path.insert(0, repository)
    import jax

    np.random.seed(0)
    build = {"qgf": qgf, "dqc": dqc, "fql": fql}[method]
    agent, sample = build(path, tuple(int(width) for width in widths.split(",")), *map(int, sizes))
    for _ in range(2):
        agent, _, _ = run(agent, sample, 0)
    versions = {"python": platform.python_version(), "numpy": np.__version__, "jax": jax.__version__}
    print(json.dumps(versions), file=answers, flush=True)
    for line in sys.stdin:
        agent, loops, seconds = run(agent, sample, float(line))
        print(json.dumps({"loops": loops, "seconds": seconds}), file=answers, flush=True)


if __name__ == "__main__":
    main()
