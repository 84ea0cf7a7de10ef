"""Evaluation and rendering of an agent's state, during and after a run."""

import contextlib
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrl import stats, system
from jaxrl.errors import UserError
from jaxrl.rollout import device as ro
from jaxrl.rollout import host, record
from jaxrl.runs import checkpoint, plots
from jaxrl.runs.config import Config, timeline_of
from jaxrl.runs.progress import announced
from jaxrl.training import loop
from jaxrl.training.loop import abstract_carry
from jaxrl.types import Agent, Drawable, Env, HostEnv, Observation, PyTree, Score, score_of


def evaluation(episodes: ro.Episodes, score: Score = "success") -> dict[str, float]:
    """Returns the metrics of evaluated episodes: their score with its interval, mean return and mean length.

    If the score is the return, there is no success; with a single episode there is no interval, and its ends are NaN.
    """
    count, returns = len(episodes.success), np.asarray(episodes.returns)
    if score == "success":
        successes = int(episodes.success.sum())
        low, high = stats.success_interval(successes, count)
        found = {"eval/success": successes / count, "eval/success_low": low, "eval/success_high": high}
        found["eval/return"] = float(returns.mean())
    else:
        low, high = stats.mean_interval(returns) if count > 1 and np.isfinite(returns).all() else (math.nan, math.nan)
        found = {"eval/return": float(returns.mean()), "eval/return_low": low, "eval/return_high": high}
    return found | {"eval/length": float(episodes.lengths.mean()), "eval/broken": float(episodes.broken.sum())}


def evaluate_behaviour(config: Config, env: Env) -> dict[str, Any]:
    """Returns the metrics row of the scripted behavior, evaluated on the same episodes as the agent."""
    policy = ro.scripted(record.behaviour_of(env, config.behaviour))
    key = jax.random.key(config.schedule.eval_seed)
    row = {"epoch": 0, "phase": "behaviour", "updates": 0, "steps": 0}
    episodes = jax.device_get(jitted_behaviour(env, policy, key, config.schedule.eval_episodes))
    return row | evaluation(episodes, score_of(env))


jitted_behaviour = jax.jit(ro.evaluate, static_argnames=("env", "policy", "episodes"))


def newest_state(config: Config, agent: Agent, env: Env | HostEnv, path: Path) -> PyTree:
    """Returns the agent's state in a run's latest checkpoint. Raises UserError if there is no matching checkpoint."""
    timeline = timeline_of(config)

    def abstract(done: int) -> dict[str, Any]:
        return {"agent": abstract_carry(agent, env, config.schedule, timeline, done).agent}

    loaded = checkpoint.load(path / "checkpoints", abstract)
    if loaded is None:
        raise UserError(f"{path} has no checkpoint that can be read")
    return loaded[1]["agent"]


def evaluate(config: Config, env: Env | HostEnv, path: Path) -> dict[str, Any]:
    """Returns the evaluation of a run's latest checkpoint, on the episodes set by the configuration."""
    agent = loop.on_device(config.agent)
    state = newest_state(config, agent, env, path)
    simulators = simulators_of(config, env)
    closing = contextlib.closing(simulators) if simulators is not None else contextlib.nullcontext()
    with closing, announced(f"evaluating {config.schedule.eval_episodes} episodes"):
        return evaluation(episodes_of(config, agent, env, state, simulators), score_of(env))


def render(config: Config, env: Env | HostEnv, path: Path, out: Path) -> None:
    """Writes an animation of a run's latest checkpoint: the first evaluation episode."""
    agent = loop.on_device(config.agent)
    with announced("drawing an episode"):
        animate(config, agent, env, newest_state(config, agent, env, path), out)


def animate(config: Config, agent: Agent, env: Env | HostEnv, state: PyTree, out: Path) -> None:
    """Writes the first evaluation episode as an animation. Raises UserError if the environment cannot be rendered."""
    if isinstance(env, HostEnv):
        execution, key = loop.on_device(config.execution), jax.random.key(config.schedule.eval_seed)
        plots.animation(host.render(env, agent, state, key, execution=execution), out)
    elif isinstance(env, Drawable):
        plots.gif(env, episode(config, agent, env, state), out)
    else:
        raise UserError(f"environment {config.env!r} cannot be drawn: it has no draw(obs, size)")


def episode(config: Config, agent: Agent, env: Env | HostEnv, state: PyTree) -> Observation:
    """Returns the observations [T + 1, O] of the first evaluation episode."""
    episodes = episodes_of(config, agent, env, state)
    return jax.tree.map(lambda x: np.asarray(x[: episodes.lengths[0] + 1]), episodes.track)


def episodes_of(
    config: Config, agent: Agent, env: Env | HostEnv, state: PyTree, simulators: host.Simulators | None = None
) -> ro.Episodes:
    """Returns the evaluation episodes of an agent's state, on the host."""
    key, count = jax.random.key(config.schedule.eval_seed), config.schedule.eval_episodes
    execution = loop.on_device(config.execution)
    if simulators is not None:
        return host.evaluate(simulators, agent, state, key, count, execution)
    return jax.device_get(loop.jitted_evaluate(agent, env, count, state, key, execution))


def simulators_of(config: Config, env: Env | HostEnv) -> host.Simulators | None:
    """Returns the simulators of an environment that steps on the CPU; they start on first use."""
    most = max(config.schedule.envs, config.schedule.eval_episodes)
    return host.Simulators(env, min(system.cores(), most)) if isinstance(env, HostEnv) else None
