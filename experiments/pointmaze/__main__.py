"""What do FMQ and behaviour cloning learn offline from a real OGBench file?

    python -m experiments.pointmaze --data pointmaze-medium-navigate-v0.npz

The file was made with OGBench's own simulator; evaluation is in `pointmaze-medium`, the same point and maze in MJX,
whose single steps agree with the file to 1e-3 (tests/envs/test_maze.py). Task 1, relabelled as OGBench single-task maze
does: -1 per step, judged on the state before the step. Sizes are the quick preset's; the discount is 0.995, since the
goal is some 180 steps away. Writes results.json and table.md into this folder.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import tyro

import envs
from experiments.tables import footnote, last, machine, spread
from jaxrl.agents.parts import with_fields
from jaxrl.runs import driver
from jaxrl.runs.datasets import load_data
from jaxrl.runs.presets import preset

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Study:
    """FMQ and behaviour cloning on a point maze's data file."""

    data: str
    """The .npz file."""
    env: str = "pointmaze-medium"
    """Environment of the evaluation."""
    seeds: int = 3
    """How many seeds, from 0."""
    updates: int = 12_000
    """Gradient steps."""
    episodes: int = 50
    """Evaluation episodes."""
    out: Path = HERE
    """Folder of the results."""


def main(study: Study) -> None:
    """Runs the study and writes its results."""
    env = envs.make(study.env)
    base = dataclasses.replace(preset("quick", "fmq"), env=study.env, data=study.data)
    schedule = dataclasses.replace(
        base.schedule, offline_updates=study.updates, online_steps=0, eval_every=4, eval_episodes=study.episodes
    )
    agent = with_fields(base.agent, discount=0.995)
    base = dataclasses.replace(base, agent=agent, schedule=schedule)
    dataset = load_data(base, env)
    results: dict[str, Any] = {"manifest": machine(dataset.digest), "seeds": []}
    results["config"] = dataclasses.asdict(dataclasses.replace(base, data=Path(study.data).name))
    for seed in range(study.seeds):
        rows: dict[str, list] = {}
        for name, kind in (("bc", preset("quick", "bc").agent), ("fmq", agent)):
            run = driver.prepare(dataclasses.replace(base, agent=kind, seed=seed), env, dataset)
            carry, rows[name] = run.first(), []
            for index in range(run.timeline.epochs):
                carry, row = run.epoch(carry, index)
                rows[name] += [row] if "eval/success" in row else []
        results["seeds"].append(rows)
        (study.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps({name: [row["eval/success"] for row in part] for name, part in rows.items()}), flush=True)
    (study.out / "table.md").write_text(table(results))
    print(table(results))


def table(results: dict[str, Any]) -> str:
    """Returns the results as Markdown."""
    lines = ["| | success of each seed | mean success | mean episode length |", "|---|---|---|---|"]
    for name, label in (("bc", "behaviour cloning"), ("fmq", "FMQ offline")):
        each = " ".join(f"{value:.2f}" for value in last(results, name))
        success, length = spread(last(results, name), 2), spread(last(results, name, "length"), 0)
        lines.append(f"| {label} | {each} | {success} | {length} |")
    return "\n".join([*lines, footnote(results)]) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Study))
