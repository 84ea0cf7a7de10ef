"""What do the offline methods learn from real OGBench data, at a budget that two CPU cores can bear?

    python -m experiments.ogbench --data FOLDER --seeds 3

FOLDER holds the data files that OGBench calls pointmaze-medium-navigate-v0, cube-single-play-v0 and puzzle-3x3-play-v0,
or smaller ones that `jaxrl collect` makes. Every method trains for as many updates on as many windows with networks of
the same widths, acts in chunks of five actions, and is evaluated in OGBench's own simulators on the same episodes.
puzzle-3x3 has the sparse reward, as in the experiments of Q-chunking. Settings per task are those that the methods'
papers state for it or its like; the learning rate is that of the quick presets, for the budget is one hundredth of the
papers'. Two settings were chosen by scores. QGF's guidance weight is chosen per task on episodes of their own, by the
mean over seeds, and the whole curve over the weight is reported. DQC's kappa_b on pointmaze is that of the cube, after
the 0.5 that its paper has for another maze had learned nothing there in this project's own maze.

Writes results.json after every seed of a task, and goes on from there; then table.md and figure.png.
"""

import contextlib
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import tyro

import envs
from experiments.tables import machine, spread
from jaxrl.agents import BC, DQC, FQL, IQL, QC, QGF
from jaxrl.agents.parts import with_fields
from jaxrl.rollout import host
from jaxrl.runs import driver
from jaxrl.runs.config import Config
from jaxrl.runs.datasets import load_data
from jaxrl.runs.evaluation import episodes_of, evaluation
from jaxrl.training import loop
from jaxrl.training.schedule import Schedule

HERE = Path(__file__).parent
WEIGHTS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
CHOOSING, REPORTING = 777, 12345  # seeds of the episodes that choose the weight, and of those that are reported
LABELS = {"bc": "BC", "iql": "IQL", "qgf": "QGF", "fql": "FQL", "qc": "QC", "dqc": "DQC"}


@dataclasses.dataclass(frozen=True)
class Task:
    """A task, and what depends on it."""

    env: str
    data: str
    discount: float
    alpha: float  # of FQL
    kappa_b: float  # of DQC
    kappa_d: float
    agg: Any  # of DQC


TASKS = {
    "pointmaze-medium": Task(
        "ogbench/pointmaze-medium-navigate-singletask-v0",
        "pointmaze-medium-navigate-v0",
        0.995,
        10.0,
        0.93,
        0.8,
        "mean",
    ),
    "cube-single": Task("ogbench/cube-single-play-singletask-v0", "cube-single-play-v0", 0.99, 300.0, 0.93, 0.8, "min"),
    "puzzle-3x3": Task(
        "ogbench/puzzle-3x3-play-singletask-v0?sparse=true", "puzzle-3x3-play-v0", 0.99, 1000.0, 0.9, 0.5, "mean"
    ),
}


@dataclasses.dataclass(frozen=True)
class Study:
    """Offline methods on OGBench's own data and simulators."""

    data: Path
    """Folder of the data files."""
    tasks: tuple[str, ...] = tuple(TASKS)
    """Which tasks."""
    seeds: int = 3
    """How many seeds, from 0."""
    updates: int = 10_000
    """Gradient steps of every method."""
    hidden: tuple[int, ...] = (128, 128, 128)
    """Widths of every network."""
    batch_size: int = 256
    """Windows per update."""
    lr: float = 1e-3
    """Learning rate of every network."""
    episodes: int = 30
    """Evaluation episodes, of each kind."""
    out: Path = HERE
    """Folder of the results."""


def methods(study: Study, task: Task) -> dict[str, Any]:
    """Returns the agents, by name."""
    sizes = {"hidden": study.hidden, "batch": study.batch_size, "lr": study.lr, "chunk": 5, "discount": task.discount}
    short = {
        "bc": BC(),
        "iql": IQL(),
        "qgf": QGF(),
        "fql": FQL(alpha=task.alpha),
        "qc": QC(num_samples=4),
    }
    long = with_fields(DQC(kappa_b=task.kappa_b, kappa_d=task.kappa_d), agg=task.agg, backup=25, **sizes)
    return {name: with_fields(agent, backup=5, **sizes) for name, agent in short.items()} | {"dqc": long}


def main(study: Study) -> None:
    """Runs what is missing of the study and writes its results."""
    path = study.out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {"tasks": {}}
    asked = {name: getattr(study, name) for name in ("updates", "hidden", "batch_size", "lr", "episodes")}
    asked = json.loads(json.dumps(asked))
    if results.setdefault("study", asked) != asked:
        raise SystemExit(f"{path} is of another study ({results['study']}): remove it, or name another --out")
    results["manifest"] = machine("")
    for name in study.tasks:
        task = TASKS[name]
        seeds = results["tasks"].setdefault(name, {"env": task.env, "seeds": []})["seeds"]
        for seed in range(len(seeds), study.seeds):
            seeds.append(one_seed(study, task, seed))
            path.write_text(json.dumps(results, indent=1) + "\n")
            print(name, seed, {key: row["eval/success"] for key, row in seeds[-1]["methods"].items()}, flush=True)
    (study.out / "table.md").write_text(table(results))
    figure(results, study.out / "figure.png")
    print(table(results))


def one_seed(study: Study, task: Task, seed: int) -> dict[str, Any]:
    """Returns the evaluation of every method, and of QGF at every weight, on both kinds of episodes."""
    env = envs.make(task.env)
    rows: dict[str, Any] = {}
    with contextlib.closing(host.Simulators(env)) as simulators:
        for name, agent in methods(study, task).items():
            schedule = Schedule(
                offline_updates=study.updates, online_steps=0, updates_per_epoch=1_000, eval_episodes=study.episodes
            )
            config = Config(agent, task.env, schedule, data=str(study.data / f"{task.data}.npz"), seed=seed)
            if name == "dqc":  # it learns probabilities
                config = dataclasses.replace(config, reward_shift=1.0)
            began = time.perf_counter()
            state = trained(config, env)
            seconds = time.perf_counter() - began
            rows[name] = evaluated(config, env, state, simulators, REPORTING) | {"train_seconds": round(seconds, 1)}
            if name == "qgf":
                curve = [weighed(config, env, state, simulators, weight) for weight in WEIGHTS]
    return {"seed": seed, "methods": rows, "qgf": curve}


def trained(config: Config, env: Any) -> Any:
    """Returns an agent's state after its updates."""
    dataset = load_data(config, env)
    run = driver.prepare(config, env, dataset)
    carry = run.first()
    for index in range(run.timeline.epochs):
        phase, _ = run.timeline.at(index)
        carry, _ = loop.jitted_epoch(run.agent, env, phase, carry, run.data)
    return jax.block_until_ready(carry.agent)


def evaluated(config: Config, env: Any, state: Any, simulators: host.Simulators, seed: int) -> dict[str, float]:
    """Returns the evaluation of a trained agent on the episodes of a seed."""
    config = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, eval_seed=seed))
    agent = loop.on_device(config.agent)
    return evaluation(episodes_of(config, agent, env, state, simulators))


def weighed(config: Config, env: Any, state: Any, simulators: host.Simulators, weight: float) -> dict[str, float]:
    """Returns QGF's success at a guidance weight, on the episodes that choose and on those that are reported."""
    agent = dataclasses.replace(config.agent, guide=dataclasses.replace(config.agent.guide, weight=weight))
    config = dataclasses.replace(config, agent=agent)
    choosing, reporting = (evaluated(config, env, state, simulators, seed) for seed in (CHOOSING, REPORTING))
    return {"weight": weight, "choosing": choosing["eval/success"], "reporting": reporting["eval/success"]}


def successes(task: dict[str, Any], name: str) -> np.ndarray:
    """Returns a method's success per seed; QGF's at the weight that the separate episodes chose."""
    if name != "qgf":
        return np.array([seed["methods"][name]["eval/success"] for seed in task["seeds"]])
    return curve(task, "reporting")[:, chosen(task)]


def curve(task: dict[str, Any], episodes: str) -> np.ndarray:
    """Returns QGF's success [seeds, weights] on one kind of episodes."""
    return np.array([[point[episodes] for point in seed["qgf"]] for seed in task["seeds"]])


def chosen(task: dict[str, Any]) -> int:
    """Returns which weight does best on the episodes that choose, by the mean over seeds; the smallest of equals."""
    return int(np.argmax(curve(task, "choosing").mean(axis=0)))


def table(results: dict[str, Any]) -> str:
    """Returns the results as Markdown."""
    lines = [f"| | {' | '.join(results['tasks'])} |", "|---|" + "---|" * len(results["tasks"])]
    for name, label in LABELS.items():
        cells = []
        for task in results["tasks"].values():
            success = successes(task, name)
            note = f", w = {WEIGHTS[chosen(task)]:g}" if name == "qgf" else ""
            cells.append(f"{spread(success, 2)} ({' '.join(f'{x:.2f}' for x in success)}{note})")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    study, manifest = results["study"], results["manifest"]
    seeds = max(len(task["seeds"]) for task in results["tasks"].values())
    lines.append(
        f"\nSuccess, mean over {seeds} seeds with its 95 % bootstrap interval, and each seed's. {study['updates']} "
        f"updates of {study['batch_size']} windows, networks {study['hidden']}, {study['episodes']} episodes each in "
        f"OGBench's simulators. QGF's weight w was chosen on as many other episodes. {manifest['cores']} "
        f"{manifest['device']} cores, jax {manifest['versions']['jax']}."
    )
    return "\n".join(lines) + "\n"


def figure(results: dict[str, Any], path: Path) -> None:
    """Writes the methods' success per task, and below QGF's over the guidance weight."""
    count = len(results["tasks"])
    picture, axes = plt.subplots(2, count, figsize=(3.6 * count, 6), layout="constrained", squeeze=False)
    for (bars, lines), (name, task) in zip(axes.T, results["tasks"].items(), strict=True):
        for i, method in enumerate(LABELS):
            success = successes(task, method)
            bars.bar(i, success.mean(), color=f"C{i}", alpha=0.6)
            bars.plot(np.full(len(success), i), success, "k.", markersize=4)
        bars.set(title=name, xticks=range(len(LABELS)), xticklabels=LABELS.values(), ylim=(0, 1.03))
        ticks = range(len(WEIGHTS))
        for episodes, style in (("choosing", "--"), ("reporting", "-")):
            values = curve(task, episodes)
            lines.plot(ticks, values.mean(axis=0), style, color="C2", label=f"{episodes} episodes")
            lines.plot(ticks, values.T, style, color="C2", linewidth=0.5, alpha=0.4)
        lines.axvline(chosen(task), color="black", linestyle=":", label="chosen weight")
        lines.set(xlabel="QGF's guidance weight", xticks=ticks, ylim=(0, 1.03))
        lines.set_xticklabels([f"{weight:g}" for weight in WEIGHTS], fontsize="small")
        for axis in (bars, lines):
            axis.grid(axis="y", alpha=0.3)
    axes[0, 0].set_ylabel("success")
    axes[1, 0].set_ylabel("success")
    axes[1, 0].legend(frameon=False, fontsize="small")
    picture.savefig(path, dpi=110)
    plt.close(picture)


if __name__ == "__main__":
    main(tyro.cli(Study))
