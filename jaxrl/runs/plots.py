"""Figures of a run (learning curve, episode animation) and of a dataset."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot, which would change how notebooks display figures
from PIL import Image

from jaxrl.data.quality import Measures
from jaxrl.runs.scores import score_of_row, score_of_rows, scored
from jaxrl.types import Drawable

CLOCKS = {  # x axis of a phase: its label, color
    "updates": ("gradient steps", "tab:blue"),
    "steps": ("steps in the environment", "tab:orange"),
}


def clocks(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Returns the x axis of each phase, in the order of the phases: "steps" if it steps the environment, or "updates".

    `rows` are a run's metrics, or only those with an evaluation.
    """
    found, before = {}, 0
    for phase in dict.fromkeys(row["phase"] for row in rows if row["phase"] != "behaviour"):
        steps = [row["steps"] for row in rows if row["phase"] == phase]
        found[phase] = "steps" if steps[-1] > (steps[0] if len(steps) > 1 else before) else "updates"
        before = steps[-1]
    return found


def curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Writes the score with its 95 % interval, one panel per phase, and the behavior's score for comparison."""
    evaluated, score = [row for row in rows if score_of_row(row)], score_of_rows(rows)
    behaviour = [row for row in evaluated if row["phase"] == "behaviour"]
    shown = {
        phase: (clock, [row for row in evaluated if row["phase"] == phase]) for phase, clock in clocks(rows).items()
    }
    shown = {phase: (clock, own) for phase, (clock, own) in shown.items() if own}
    figure = Figure(figsize=(1 + 4 * len(shown), 3.6), layout="constrained")
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axis, (phase, (clock, own)) in zip(axes, shown.items(), strict=True):
        if behaviour:
            axis.axhline(scored(behaviour[0])[0], color="gray", linestyle="--", label="behaviour")
        panel(axis, phase, clock, own)
    axes[0].set_ylabel(f"{score} (95 % interval)")
    figure.savefig(path, dpi=120)


def panel(axis: Axes, phase: str, clock: str, rows: list[dict[str, Any]]) -> None:
    """Draws one phase's score over its clock."""
    label, color = CLOCKS[clock]
    x = [row[clock] for row in rows]
    values, low, high = np.array([scored(row) for row in rows], float).T  # ends that are None become NaN
    axis.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    axis.plot(x, values, "o-", markersize=3, color=color, label=phase)
    axis.set(xlabel=label)
    if score_of_rows(rows) == "success":
        axis.set(ylim=(-0.03, 1.03))
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3)
    axis.legend(loc="best", frameon=False)


def gif(env: Drawable, episode: np.ndarray, path: Path, size: int = 320, per_second: int = 25) -> None:
    """Writes an episode, observations [T, O], as an animation rendered by the environment."""
    animation([env.draw(obs, size) for obs in np.asarray(episode)], path, per_second)


def animation(frames: list[Image.Image], path: Path, per_second: int = 25) -> None:
    """Writes frames as an animation that pauses at its end."""
    frames = frames + frames[-1:] * (per_second // 2)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 // per_second, loop=0)


def dataset(measures: Measures, path: Path) -> None:
    """Writes four histograms: returns, lengths, nearest-neighbor distances, action variance around a state.

    Panels without data say why.
    """
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    ((returns, lengths), (nearest, actions)) = figure.subplots(2, 2)
    if measures.returns is None or not len(measures.returns):
        _blank(returns, "no rewards" if measures.returns is None else "no finished episode")
    else:
        histogram(returns, measures.returns, "tab:blue", mean=float(measures.returns.mean()))
    histogram(lengths, measures.lengths, "tab:blue")
    around = measures.neighbourhoods
    if around is None:
        _blank(nearest, "one episode")
        _blank(actions, "one episode")
    else:
        histogram(nearest, around.nearest, "tab:green", log=True, median=around.epsilon)
        histogram(
            actions, around.action_variance, "tab:green", mean=around.action_variance.mean(), all=around.action_spread
        )
    returns.set(xlabel="return of an episode", ylabel="episodes")
    lengths.set(xlabel="steps of an episode", ylabel="episodes")
    nearest.set(xlabel="distance of the nearest state of another episode", ylabel="steps drawn")
    actions.set(xlabel="variance of the actions around a state", ylabel="steps drawn")
    figure.suptitle(Path(measures.path).name)
    figure.savefig(path, dpi=120)


def histogram(axis: Axes, values: np.ndarray, colour: str, log: bool = False, **marks: float) -> None:
    """Draws a histogram of values in 40 bins, with labeled vertical lines.

    On a log axis, zeros count as the smallest nonzero value; the axis is linear if all values are equal.
    """
    low, high = float(np.min(values, where=values > 0, initial=np.inf) if log else values.min()), float(values.max())
    if low < high:
        edges = np.geomspace(low, high, 41) if log else np.linspace(low, high, 41)
        edges[0], edges[-1] = low, high  # undo rounding
        axis.set_xscale("log" if log else "linear")
    else:
        edges = high + max(abs(high) / 10, 0.5) * np.linspace(-1, 1, 42)
    axis.hist(np.clip(values, edges[0], edges[-1]), bins=edges.tolist(), color=colour, alpha=0.7)
    for (name, value), style in zip(marks.items(), ("-", "--"), strict=False):
        axis.axvline(value, color="black", linestyle=style, linewidth=1, label=f"{name} {value:.4g}")
    if axis.get_xscale() == "linear":
        axis.locator_params(axis="x", nbins=6)
    if marks:
        axis.legend(frameon=False)
    axis.grid(alpha=0.3)


def _blank(axis: Axes, reason: str) -> None:
    axis.text(0.5, 0.5, reason, ha="center", va="center", transform=axis.transAxes, color="gray")
    axis.set(xticks=[], yticks=[])
