"""Offline regularizers on mixed and on medium data, with and without trajectory weighting, and PRDC's limit.

    python -m experiments.offline --seeds 3

Two datasets of the default maze's own task, each of 100,000 steps: `mixed`, of which a tenth of the steps belongs to a
good scripted behaviour and the rest to random actions that never arrive, and `medium`, of the medium behaviour. Every
method trains on each, drawing transitions alike or trajectories by advantage (Hong et al., arXiv 2306.13085), and is
evaluated on the same episodes. Methods are those of the quick presets, with smaller networks and half the updates;
`changed` below says what else differs. Nothing was tuned on these scores: AWAC's temperature and O-DICE's trade-off are
the published defaults, which do not suit this maze's rewards. With those of the quick presets either method reaches 1.0
on the weighted mixed data (one seed).

PRDC's neighbour is the stored action itself when beta is large, so that it becomes TD3+BC. Both are trained from the
same parameters on the same batches, and what is reported is how far apart their actions are at the data's states.

Writes results.json after every run, and goes on from there; then table.md and figure.png.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import tyro

import envs
from experiments.tables import machine, spread
from jaxrl.agents import AGENTS
from jaxrl.agents.parts import with_fields
from jaxrl.data import files
from jaxrl.data.files import Dataset
from jaxrl.data.mixing import mix
from jaxrl.replay.weighting import Weighting
from jaxrl.rollout import device as ro
from jaxrl.rollout import record
from jaxrl.runs import driver
from jaxrl.runs.config import Config
from jaxrl.runs.datasets import load_data
from jaxrl.runs.presets import preset
from jaxrl.training import loop
from jaxrl.training.schedule import Schedule

HERE = Path(__file__).parent
ENV = "maze-medium"
LABELS = {
    "bc": "BC (flow)",
    "iql": "IQL",
    "td3bc": "TD3+BC",
    "rebrac": "ReBRAC",
    "prdc": "PRDC",
    "a2pr": "A2PR",
    "cql": "CQL",
    "awac": "AWAC",
    "odice": "O-DICE",
    "famo2o": "FamO2O",
}
WEIGHTINGS = ("uniform", "advantage")
DATASETS = ("mixed", "medium")
BETAS = (0.1, 1.0, 10.0, 100.0, 1000.0)


@dataclasses.dataclass(frozen=True)
class Study:
    """Offline regularizers on the default maze."""

    seeds: int = 3
    """How many seeds, from 0."""
    agents: tuple[str, ...] = tuple(LABELS)
    """Which methods."""
    updates: int = 6_000
    """Gradient steps of every method."""
    hidden: tuple[int, ...] = (128, 128)
    """Widths of every network."""
    steps: int = 100_000
    """Steps of each dataset."""
    episodes: int = 50
    """Evaluation episodes."""
    cache: Path = Path("datasets")
    """Folder of the datasets, which are recorded where they are not there."""
    out: Path = HERE
    """Folder of the results."""


def changed(name: str, study: Study) -> Any:
    """Returns a method's agent: that of its quick preset on single actions, with other networks."""
    fields = {
        "bc": {"chunk": 1, "backup": 1},
        "iql": {"chunk": 1, "backup": 1},
        "cql": {"samples": 4},  # actions of each kind in the conservative term, for time
        "awac": {"temperature": 1 / 3},
        "odice": {"trade": 0.6},
    }.get(name, {})
    return with_fields(preset("quick", name).agent, hidden=study.hidden, **fields)


def main(study: Study) -> None:
    """Runs what is missing of the study and writes its results."""
    for name in study.agents:
        if name not in AGENTS:
            raise SystemExit(f"--agents {name}: known are {', '.join(LABELS)}")
    env = envs.make(ENV)
    paths = datasets(study, env)
    path = study.out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {"runs": [], "limit": []}
    asked = {name: getattr(study, name) for name in ("updates", "hidden", "steps", "episodes")}
    asked = json.loads(json.dumps(asked))
    if results.setdefault("study", asked) != asked:
        raise SystemExit(f"{path} is of another study ({results['study']}): remove it, or name another --out")
    results["manifest"] = machine("")
    results["behaviour"] = {name: described(files.load(file)) for name, file in paths.items()}
    done = {(run["agent"], run["data"], run["weighting"], run["seed"]) for run in results["runs"]}
    for name in study.agents:
        for data in DATASETS:
            for kind in WEIGHTINGS:
                todo = [seed for seed in range(study.seeds) if (name, data, kind, seed) not in done]
                for row in runs(study, env, name, paths[data], kind, todo):
                    results["runs"].append({"agent": name, "data": data, "weighting": kind} | row)
                    path.write_text(json.dumps(results, indent=1) + "\n")
                    print(json.dumps(results["runs"][-1]), flush=True)
        jax.clear_caches()
    for seed in range(len(results["limit"]), study.seeds):
        results["limit"].append(limit(study, env, paths["medium"], seed))
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps(results["limit"][-1]), flush=True)
    (study.out / "table.md").write_text(table(results))
    figure(results, study.out / "figure.png")
    print(table(results))


# Data


def datasets(study: Study, env: Any) -> dict[str, Path]:
    """Returns the files of the two datasets, recorded where they are not there."""
    study.cache.mkdir(exist_ok=True)
    paths = {name: study.cache / f"offline-study-{name}-{study.steps}.npz" for name in DATASETS}
    if not paths["mixed"].exists():
        good, bad = recorded(env, "good", study.steps // 8), recorded(env, "random", study.steps)
        files.save(paths["mixed"], mix(good, bad, 0.1, study.steps))
    if not paths["medium"].exists():
        files.save(paths["medium"], recorded(env, "medium", study.steps))
    return paths


def recorded(env: Any, level: str, steps: int) -> Dataset:
    """Returns a behaviour's episodes of the task itself, which end where it is solved, with the task's rewards."""
    each, lanes = record.lanes_of(steps, env.horizon)
    policy = ro.scripted(record.behaviour_of(env, level))
    ring = record.recording(env, policy, lanes, each, 2 * each + 2, jax.random.key(0))
    return files.relabelled(record.to_dataset(ring), env.relabel)


def described(dataset: Dataset) -> dict[str, float]:
    """Returns how good a dataset's own behaviour is."""
    assert dataset.masks is not None
    returns = files.episode_returns(dataset)
    solved = ((dataset.masks == 0) & ~dataset.terminals).sum() / len(returns)
    return {"episodes": len(returns), "success": float(solved), "return": float(returns.mean())}


# Runs


def config_of(study: Study, agent: Any, data: Path, kind: Any, seed: int) -> Config:
    """Returns a run's configuration."""
    schedule = Schedule(
        offline_updates=study.updates,
        online_steps=0,
        updates_per_epoch=study.updates,
        eval_episodes=study.episodes,
    )
    return Config(agent, ENV, schedule, data=str(data), weighting=Weighting(kind), seed=seed)


def runs(study: Study, env: Any, name: str, data: Path, kind: str, seeds: list[int]) -> Any:
    """Yields the evaluation of a method's seeds, which share data and program."""
    agent, run = changed(name, study), None
    for seed in seeds:
        config = config_of(study, agent, data, kind, seed)
        if run is None:
            run = driver.prepare(config, env, load_data(config, env))
        run, began = dataclasses.replace(run, config=config), time.perf_counter()
        _, row = run.epoch(run.first(), 0)
        seconds = round(time.perf_counter() - began, 1)
        yield {"seed": seed, "success": row["eval/success"], "return": row["eval/return"], "seconds": seconds}


def limit(study: Study, env: Any, data: Path, seed: int) -> dict[str, Any]:
    """Returns how far PRDC's actions are from TD3+BC's at 1024 of the data's states, by beta, and how often its
    neighbour has the action that is stored there.
    """
    run, reference = trained(study, env, changed("td3bc", study), data, seed)
    batch = with_fields(run.agent, batch=1024).sample((run.data,), jax.random.key(1))
    expected = run.agent.td3.choose(reference, batch.obs)
    row: dict[str, Any] = {"seed": seed, "distance": [], "own": []}
    for beta in BETAS:
        run, state = trained(study, env, dataclasses.replace(changed("prdc", study), beta=beta), data, seed)
        near = run.agent.nearest_action(state, batch, (run.data,))
        row["distance"].append(float(jnp.abs(run.agent.td3.choose(state, batch.obs) - expected).mean()))
        row["own"].append(float((near == batch.actions[:, 0]).all(axis=-1).mean()))
    return row


def trained(study: Study, env: Any, agent: Any, data: Path, seed: int) -> tuple[driver.Run, Any]:
    """Returns a run and its agent's state after a sixth of the updates."""
    config = config_of(dataclasses.replace(study, updates=study.updates // 6), agent, data, "uniform", seed)
    run = driver.prepare(config, env, load_data(config, env))
    carry, _ = loop.jitted_epoch(run.agent, env, run.timeline.phases[0], run.first(), run.data)
    return run, carry.agent


# What came of it


def values(results: dict[str, Any], name: str, data: str, kind: str, metric: str = "success") -> np.ndarray:
    """Returns a metric of each seed of a method."""
    key = (name, data, kind)
    return np.array([run[metric] for run in results["runs"] if (run["agent"], run["data"], run["weighting"]) == key])


def known(results: dict[str, Any]) -> list[str]:
    """Returns the methods that were run, in order."""
    return [name for name in LABELS if any(run["agent"] == name for run in results["runs"])]


def table(results: dict[str, Any]) -> str:
    """Returns the results as Markdown."""
    heads = [f"{data}, {'weighted' if kind == 'advantage' else 'uniform'}" for data in DATASETS for kind in WEIGHTINGS]
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    seeds = len({run["seed"] for run in results["runs"]})
    for name in known(results):
        cells = []
        for data in DATASETS:
            for kind in WEIGHTINGS:
                success, earned = values(results, name, data, kind), values(results, name, data, kind, "return")
                missing = "" if len(success) == seeds else f" ({len(success)} of {seeds} seeds)"
                cells.append(f"{spread(success, 2)}; {earned.mean():.0f}{missing}" if len(success) else "not run")
        lines.append(f"| {LABELS[name]} | {' | '.join(cells)} |")
    study, manifest, behaviour = results["study"], results["manifest"], results["behaviour"]
    data = "; ".join(f"{name}: {b['success']:.2f}; {b['return']:.0f}" for name, b in behaviour.items())
    lines.append(
        f"\nSuccess, mean over {seeds} seeds with its 95 % bootstrap interval; mean return. `{ENV}`, {study['steps']} "
        f"steps of data (their own success and return: {data}), {study['updates']} updates, networks "
        f"{study['hidden']}, {study['episodes']} episodes each. {manifest['cores']} {manifest['device']} cores, "
        f"jax {manifest['versions']['jax']}."
    )
    lines += ["\n| beta | PRDC's actions from TD3+BC's, mean | neighbours that are the stored pair |", "|---|---|---|"]
    for i, beta in enumerate(BETAS):
        distance, share = (np.array([row[name][i] for row in results["limit"]]) for name in ("distance", "own"))
        lines.append(f"| {beta:g} | {distance.mean():.2g} | {share.mean():.3f} |")
    lines.append(
        f"\nAfter {study['updates'] // 6} updates on the medium data from equal parameters and batches, "
        f"{len(results['limit'])} of {seeds} seeds."
    )
    return "\n".join(lines) + "\n"


def figure(results: dict[str, Any], path: Path) -> None:
    """Writes success by method, drawn alike or weighted, on each dataset; and PRDC's way to TD3+BC."""
    picture, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained", width_ratios=(3, 3, 2))
    names = known(results)
    for axis, data in zip(axes, DATASETS, strict=False):
        for i, kind in enumerate(WEIGHTINGS):
            for j, name in enumerate(names):
                success, place = values(results, name, data, kind), j + 0.36 * (i - 0.5)
                label = {"uniform": "uniform", "advantage": "weighted by advantage"}[kind] if j == 0 else None
                axis.bar(place, success.mean() if len(success) else 0.0, 0.34, color=f"C{i}", alpha=0.6, label=label)
                axis.plot(np.full(len(success), place), success, "k.", markersize=3)
        own_success = results["behaviour"][data]["success"]
        axis.axhline(own_success, color="black", linestyle=":", label="the data's own")
        axis.set(title=f"{data} data", ylim=(0, 1.03), xticks=range(len(names)))
        axis.set_xticklabels([LABELS[name] for name in names], rotation=45, ha="right", fontsize="small")
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("success")
    axes[0].legend(frameon=False, fontsize="small")
    for row in results["limit"]:
        axes[2].loglog(BETAS, np.maximum(row["distance"], 1e-8), "o-", color="C2", alpha=0.6)
    axes[2].set(xlabel="PRDC's beta", ylabel="mean distance of actions", title="PRDC from TD3+BC")
    axes[2].grid(alpha=0.3)
    picture.savefig(path, dpi=110)
    plt.close(picture)


if __name__ == "__main__":
    main(tyro.cli(Study))
