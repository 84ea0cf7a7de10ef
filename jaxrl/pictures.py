"""The pictures of a run: its learning curve and an episode of its agent."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot, which would choose how a notebook shows its figures
from PIL import Image

PANELS = {  # phase: what it is plotted over, colour
    "offline": ("updates", "gradient steps on the dataset", "tab:blue"),
    "online": ("steps", "steps in the environment", "tab:orange"),
}


def curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Writes success with its 95 % interval, a panel for each phase, and the behaviour's for comparison."""
    evaluated = [row for row in rows if row.get("eval/success") is not None]
    shown = {name: [row for row in evaluated if row["phase"] == name] for name in ("behaviour", *PANELS)}
    phases = [name for name in PANELS if shown[name]]
    figure = Figure(figsize=(1 + 4 * len(phases), 3.6), layout="constrained")
    axes = figure.subplots(1, len(phases), sharey=True, squeeze=False)[0]
    for name, axis in zip(phases, axes, strict=True):
        if shown["behaviour"]:
            axis.axhline(shown["behaviour"][0]["eval/success"], color="gray", linestyle="--", label="behaviour")
        panel(axis, name, shown[name])
    axes[0].set_ylabel("success (95 % interval)")
    figure.savefig(path, dpi=120)


def panel(axis: Axes, phase: str, rows: list[dict[str, Any]]) -> None:
    """Draws one phase's success over its own clock."""
    clock, label, colour = PANELS[phase]
    x = [row[clock] for row in rows]
    low, high = ([row[f"eval/success_{end}"] for row in rows] for end in ("low", "high"))
    axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    axis.plot(x, [row["eval/success"] for row in rows], "o-", markersize=3, color=colour, label=phase)
    axis.set(xlabel=label, ylim=(-0.03, 1.03))
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3)
    axis.legend(loc="best", frameon=False)


def gif(env: Any, episode: np.ndarray, path: Path, size: int = 320, per_second: int = 25) -> None:
    """Writes an episode, observations [T, O], as an animation drawn by the environment."""
    animation([env.draw(obs, size) for obs in np.asarray(episode)], path, per_second)


def animation(frames: list[Image.Image], path: Path, per_second: int = 25) -> None:
    """Writes pictures as an animation, which rests for a while at its end."""
    frames = frames + frames[-1:] * (per_second // 2)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 // per_second, loop=0)
