"""The pictures of a run: its learning curve and an episode of its agent."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg", force=False)
import matplotlib.pyplot as plt
import numpy as np

PHASE_COLOURS = {"offline": "tab:blue", "online": "tab:orange"}


def curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Writes success over updates, with 95 % intervals, phase by phase, and the behaviour's for comparison."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    evaluated = [row for row in rows if row.get("eval/success") is not None]
    behaviour = [row for row in evaluated if row["phase"] == "behaviour"]
    if behaviour:
        axis.axhline(behaviour[0]["eval/success"], color="gray", linestyle="--", label="behaviour")
    for phase, colour in PHASE_COLOURS.items():
        part = [row for row in evaluated if row["phase"] == phase]
        if not part:
            continue
        updates = [row["updates"] for row in part]
        axis.plot(updates, [row["eval/success"] for row in part], "o-", markersize=3, color=colour, label=phase)
        low, high = ([row[f"eval/success_{end}"] for row in part] for end in ("low", "high"))
        axis.fill_between(updates, low, high, color=colour, alpha=0.2, linewidth=0)
    axis.set(xlabel="gradient steps", ylabel="success (95 % interval)", ylim=(-0.03, 1.03))
    axis.legend(loc="best", frameon=False)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def gif(env: Any, episode: np.ndarray, path: Path, size: int = 320, per_second: int = 25) -> None:
    """Writes an episode, observations [T, O], as an animation drawn by the environment."""
    frames = [env.draw(obs, size) for obs in np.asarray(episode)]
    frames += frames[-1:] * (per_second // 2)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 // per_second, loop=0)
