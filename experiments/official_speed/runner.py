"""The training loop of an official implementation at its leanest: sample on the host, update, nothing else.

Runs in the official code's own environment, and imports its classes and nothing of jaxrl. It answers each line of its
standard input, a number of seconds, with a line of JSON: how many loops it made, in how many seconds.

    python runner.py METHOD REPOSITORY DATA WARMUP BATCH CHUNK BACKUP WIDTHS

Before the first answer it makes WARMUP loops. Networks have the WIDTHS, but those of the PyTorch methods, which are
fixed in their code; these have neither chunks nor n-step returns.
"""

import importlib
import json
import platform
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np

Loop = Callable[[], Any]
"""Samples and updates once, and returns what to wait for."""


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


def pure(agent: Any, sample: Callable[[], dict]) -> Loop:
    """Returns the loop of an agent whose update returns another agent."""

    def loop() -> Any:
        nonlocal agent
        agent, _ = agent.update(sample())
        return agent

    return loop


def qgf(path: str, batch: int, chunk: int, backup: int, *widths: int) -> Loop:
    """Returns QGF's loop."""
    from agents.qgf import QGFAgent, get_config
    from utils.datasets import Dataset

    assert chunk == backup, "the official QGF has one horizon"
    config = get_config()
    config.batch_size, config.horizon_length, config.action_chunking = batch, chunk, chunk > 1
    config.actor_hidden_dims = config.value_network_kwargs.hidden_dims = widths
    data = Dataset.create(**transitions(path))
    one = data.sample(1)
    agent = QGFAgent.create(0, one["observations"], one["actions"], config)
    return pure(agent, lambda: data.sample_sequence(batch, sequence_length=chunk, discount=config.discount))


def dqc(path: str, batch: int, chunk: int, backup: int, *widths: int) -> Loop:
    """Returns DQC's loop; a goal is a whole observation."""
    from agents.dqc import DQCAgent, get_config
    from utils.datasets import CGCDataset, Dataset

    config = get_config()
    config.batch_size, config.policy_chunk_size, config.backup_horizon = batch, chunk, backup
    config.actor_hidden_dims = config.value_hidden_dims = widths
    config.q_agg, config.kappa_d, config.kappa_b = "min", 0.8, 0.93
    obs, actions, last = columns(path)
    fields = {"observations": obs, "actions": actions, "terminals": last.astype(np.float32)}
    data = CGCDataset(Dataset.create(**fields, valids=1 - fields["terminals"]), config)
    return pure(DQCAgent.create(0, data.sample(1), config), lambda: data.sample(batch))


def fql(path: str, batch: int, chunk: int, backup: int, *widths: int) -> Loop:
    """Returns FQL's loop."""
    from agents.fql import FQLAgent, get_config
    from utils.datasets import Dataset

    assert chunk == backup == 1, "the official FQL has neither chunks nor n-step returns"
    config = get_config()
    config.batch_size, config.actor_hidden_dims, config.value_hidden_dims = batch, widths, widths
    data = Dataset.create(**transitions(path))
    one = data.sample(1)
    return pure(FQLAgent.create(0, one["observations"], one["actions"], config), lambda: data.sample(batch))


def d4rl(path: str) -> tuple[dict[str, np.ndarray], int, int]:
    """Returns the columns that the PyTorch methods ask of D4RL, and how many entries states and actions have."""
    data = transitions(path)
    names = ("observations", "actions", "next_observations", "rewards")
    fields = {name: data[name] for name in names} | {"terminals": 1 - data["masks"]}
    return fields, data["observations"].shape[1], data["actions"].shape[1]


def td3bc(path: str, batch: int, *_: int) -> Loop:
    """Returns TD3+BC's loop."""
    from TD3_BC import TD3_BC
    from utils import ReplayBuffer

    data, states, actions = d4rl(path)
    buffer = ReplayBuffer(states, actions)
    buffer.convert_D4RL(data)
    buffer.normalize_states()
    agent = TD3_BC(states, actions, 1.0)
    return lambda: agent.train(buffer, batch)


def prdc(path: str, batch: int, *_: int) -> Loop:
    """Returns PRDC's loop; its tree is grown here."""
    from prdc import PRDC
    from utils.buffer import ReplayBuffer

    data, states, actions = d4rl(path)
    buffer = ReplayBuffer(states, actions, "cpu", "", 1, 0)
    buffer.convert_D4RL(data)
    buffer.normalize_states()
    beta = 2.0
    agent = PRDC(np.hstack([beta * buffer.state, buffer.action]), states, actions, 1.0, "cpu", beta=beta)
    return lambda: agent.train(buffer, batch)


def a2pr(path: str, batch: int, *_: int) -> Loop:
    """Returns A2PR's loop."""
    from A2PR import A2PR
    from utils.buffer import ReplayBuffer

    data, states, actions = d4rl(path)
    buffer = ReplayBuffer(states, actions, "cpu", "", 1, 0)
    buffer.D4RL_convert(data)
    buffer.normalize_states()
    agent = A2PR(states, actions, 1.0, "cpu", mask=0.5)
    return lambda: agent.train(buffer, batch)


def odice(path: str, batch: int, *_: int) -> Loop:
    """Returns O-DICE's loop; what it would log now and then goes nowhere."""
    sys.modules["wandb"] = types.SimpleNamespace(log=lambda *_, **__: None)
    from odice import ODICE
    from policy import GaussianPolicy
    from util import sample_batch, torchify
    from value_functions import TwinV

    data, states, actions = d4rl(path)
    tensors = {name: torchify(column) for name, column in data.items()}
    policy = GaussianPolicy(states, actions, hidden_dim=1024, use_tanh=False)
    rates = {"value_lr": 2e-4, "policy_lr": 2e-4, "weight_decay": 1e-4}
    agent = ODICE(TwinV(states, layer_norm=True), policy, 10**6, Lambda=0.6, eta=1.0, use_twin_v=True, **rates)
    return lambda: agent.orthogonal_true_g_update(**sample_batch(tensors, batch))


JAX = {"qgf": qgf, "dqc": dqc, "fql": fql}
TORCH = {"td3bc": td3bc, "prdc": prdc, "a2pr": a2pr, "odice": odice}


def main() -> None:
    """Builds, warms up, then measures as often as it is asked to."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever the official code prints is no answer
    method, repository, path, warmup, *sizes = sys.argv[1:]
    sys.path.insert(0, repository)
    library = importlib.import_module("jax" if method in JAX else "torch")
    np.random.seed(0)
    loop = (JAX | TORCH)[method](path, *map(int, sizes))

    def run(seconds: float, least: int = 1) -> tuple[int, float]:
        loops, result, began = 0, None, time.perf_counter()
        while time.perf_counter() - began < seconds or loops < least:
            result = loop()
            loops += 1
        if method in JAX:
            library.block_until_ready(result)
        return loops, time.perf_counter() - began

    run(0, int(warmup))
    versions = {"python": platform.python_version(), "numpy": np.__version__, library.__name__: library.__version__}
    print(json.dumps(versions), file=answers, flush=True)
    for line in sys.stdin:
        loops, seconds = run(float(line))
        print(json.dumps({"loops": loops, "seconds": seconds}), file=answers, flush=True)


if __name__ == "__main__":
    main()
