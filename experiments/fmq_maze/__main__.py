"""Does FMQ learn, and does the method do the work? The default run of `jaxrl train`, over seeds, with ablations.

    python -m experiments.fmq_maze --seeds 5

Each seed is trained offline once. From that same carry the online phase is run as published (`FMQ`), without guidance
(`eta = 0`: the online policy only distils its anchor, while the critic goes on learning) and with a fixed radius
(`beta = 0`). The last agents are evaluated twice more on the same episodes: with beam search, and with a single
sample instead of the best of 32, which shows the policy without the critic's choice at test time. Behaviour cloning on
the same data is the baseline. The `FMQ` rows are those of `jaxrl train --seed S`, epoch by epoch.

Writes results.json, table.md and figure.png into this folder.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import tyro

import envs
from experiments.tables import footnote, last, machine, spread
from jaxrl.runs import driver
from jaxrl.runs.config import Config
from jaxrl.runs.datasets import load_data
from jaxrl.runs.evaluation import episodes_of, evaluate_behaviour, evaluation
from jaxrl.runs.presets import preset
from jaxrl.training import loop

HERE = Path(__file__).parent
ONLINE = {"FMQ": {}, "eta = 0": {"eta": 0.0}, "fixed radius": {"beta": 0.0}}
ACTING = {"": {}, " + beam search": {"test_sampler": "beam_search"}, " + one sample": {"num_samples": 1}}
COLOURS = {"offline": "tab:blue", "FMQ": "tab:orange", "eta = 0": "tab:gray", "fixed radius": "tab:green"}


@dataclasses.dataclass(frozen=True)
class Study:
    """FMQ on the default maze over seeds, with ablations."""

    seeds: int = 5
    """How many seeds, from 0."""
    out: Path = HERE
    """Folder of the results."""


def main(study: Study) -> None:
    """Runs the study and writes its results."""
    base = preset("quick", "fmq")
    env = envs.make(base.env)
    dataset = load_data(base, env)
    results: dict[str, Any] = {"manifest": machine(dataset.digest), "config": dataclasses.asdict(base)}
    results["behaviour"] = evaluate_behaviour(base, env)
    results["seeds"] = []
    for seed in range(study.seeds):
        config = dataclasses.replace(base, seed=seed)
        results["seeds"].append(one_seed(driver.prepare(config, env, dataset)) | {"bc": cloned(config, env, dataset)})
        (study.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps({name: rows[-1]["eval/success"] for name, rows in results["seeds"][-1].items()}), flush=True)
    (study.out / "table.md").write_text(table(results))
    figure(results, study.out / "figure.png")
    print(table(results))


def one_seed(run: driver.Run) -> dict[str, list[dict]]:
    """Returns the evaluated rows of the offline phase, of each online variant, and of beam search on their ends."""
    carry, rows = run.first(), {"offline": []}
    offline_epochs = run.timeline.phases[0].epochs
    for index in range(offline_epochs):
        carry, row = run.epoch(carry, index)
        rows["offline"].append(row)
    rows |= {f"offline{label}": [acting(run, carry, changes)] for label, changes in ACTING.items() if label}
    for name, changes in ONLINE.items():
        agent = loop.on_device(dataclasses.replace(run.config.agent, **changes))
        variant, forked, rows[name] = dataclasses.replace(run, agent=agent), jax.tree.map(jnp.copy, carry), []
        for index in range(offline_epochs, run.timeline.epochs):
            forked, row = variant.epoch(forked, index)
            rows[name].append(row)
        rows |= {f"{name}{label}": [acting(variant, forked, changes)] for label, changes in ACTING.items() if label}
    return {name: [row for row in part if "eval/success" in row] for name, part in rows.items()}


def acting(run: driver.Run, carry: loop.Carry, changes: dict[str, Any]) -> dict[str, Any]:
    """Returns the evaluation of an agent that acts in another way, on the same episodes."""
    agent = dataclasses.replace(run.agent, **changes)
    return evaluation(episodes_of(run.config, agent, run.env, carry.agent))


def cloned(config: Config, env: Any, dataset: Any) -> list[dict]:
    """Returns the last row of behaviour cloning on the same data, for as many updates."""
    agent = preset("quick", "bc").agent
    schedule = dataclasses.replace(config.schedule, online_steps=0, eval_every=10**9)
    run = driver.prepare(dataclasses.replace(config, agent=agent, schedule=schedule), env, dataset)
    carry, row = run.first(), {}
    for index in range(run.timeline.epochs):
        carry, row = run.epoch(carry, index)
    return [row]


def table(results: dict[str, Any]) -> str:
    """Returns the results as Markdown."""
    behaviour = results["behaviour"]
    interval = f"[{behaviour['eval/success_low']:.2f}, {behaviour['eval/success_high']:.2f}]"
    lines = [
        "| | success of each seed | mean success | mean episode length |",
        "|---|---|---|---|",
        f"| scripted behaviour | | {behaviour['eval/success']:.2f} {interval} | {behaviour['eval/length']:.0f} |",
    ]
    for name in ("bc", *(f"{phase}{label}" for phase in ("offline", *ONLINE) for label in ACTING)):
        each = " ".join(f"{value:.2f}" for value in last(results, name))
        label = {"bc": "behaviour cloning"}.get(name, name if name.startswith("offline") else f"online, {name}")
        lines.append(
            f"| {label} | {each} | {spread(last(results, name), 2)} | {spread(last(results, name, 'length'), 0)} |"
        )
    lines.append(footnote(results))
    return "\n".join(lines) + "\n"


def figure(results: dict[str, Any], path: Path) -> None:
    """Writes success over gradient steps (mean over seeds, each seed thin), and how the last agents do by acting."""
    picture, (axis, bars) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=(3, 2))
    axis.axhline(results["behaviour"]["eval/success"], color="black", linestyle=":", label="scripted behaviour")
    axis.axhline(last(results, "bc").mean(), color="tab:red", linestyle="--", label="behaviour cloning")
    for name, colour in COLOURS.items():
        updates = [row["updates"] for row in results["seeds"][0][name]]
        curves = np.array([[row["eval/success"] for row in seed[name]] for seed in results["seeds"]])
        if name != "offline":  # begin where the offline phase ends
            updates = [results["seeds"][0]["offline"][-1]["updates"], *updates]
            curves = np.concatenate([last(results, "offline")[:, None], curves], axis=1)
        axis.plot(updates, curves.T, color=colour, linewidth=0.6, alpha=0.4)
        axis.plot(updates, curves.mean(axis=0), color=colour, linewidth=2, label=name)
    axis.set(xlabel="gradient steps", ylabel="success", ylim=(-0.03, 1.03), title=results["config"]["env"])
    axis.legend(frameon=False, loc="upper left", fontsize="small")
    axis.grid(alpha=0.3)
    for i, label in enumerate(ACTING):
        for j, (name, colour) in enumerate(COLOURS.items()):
            success = last(results, f"{name}{label}")
            bars.bar(i + 0.2 * (j - 1.5), success.mean(), 0.18, color=colour, alpha=0.6)
            bars.plot(np.full(len(success), i + 0.2 * (j - 1.5)), success, "k.", markersize=3)
    bars.set(xticks=range(len(ACTING)), xticklabels=["best of 32", "beam search", "one sample"], ylim=(-0.03, 1.03))
    bars.set_title("the last agents, by how they act")
    bars.grid(axis="y", alpha=0.3)
    picture.savefig(path, dpi=110)
    plt.close(picture)


if __name__ == "__main__":
    main(tyro.cli(Study))
