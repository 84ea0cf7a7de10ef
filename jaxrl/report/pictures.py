"""The figures of a report. All text has the color INK, which the page replaces with its own."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from jaxrl import stats
from jaxrl.report.folders import RunRecord
from jaxrl.report.scores import (
    Comparison,
    Estimate,
    Report,
    Slice,
    comparisons,
    estimate,
    score_of,
    separate,
    slices,
    strata_of,
)
from jaxrl.report.settings import Setting, shortened, text
from jaxrl.runs.plots import CLOCKS, clocks

INK, GREY = "#1f2329", "#9aa0a6"
COLOURS = ("#3b82c4", "#e07b39", "#2f9e6e", "#c2559d", "#b8960c", "#7a6bd1")  # of the best settings; others are gray
LISTED = 24  # maximum number of settings in a figure with one line per setting
TICKS = 8  # maximum number of values of a field for one tick per value
CELLS = 12  # maximum number of values of a field for numbers in heat map cells
STYLE: dict[Any, Any] = {
    **{name: INK for name in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")},
    **{"font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8, "xtick.labelsize": 8, "ytick.labelsize": 8},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True},
    **{"grid.color": GREY, "grid.alpha": 0.25, "grid.linewidth": 0.6, "axes.linewidth": 0.7, "legend.frameon": False},
    **{"figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none"},
    **{"figure.constrained_layout.use": True, "svg.fonttype": "none", "svg.hashsalt": "jaxrl"},
}


def figures(report: Report) -> dict[str, Figure]:
    """Returns the figures by name, without empty ones."""
    with matplotlib.rc_context(STYLE):
        result = {"curves": curves(report), "scores": scores(report)}
        if found := comparisons(report):
            result["improvement"] = improvement(found)
        if any(_seeds(setting, report) > 1 for setting in report.ranked):
            result["profiles"] = profiles(report)
        for agent in dict.fromkeys(setting.agent for setting in report.settings):
            of_agent = [setting for setting in report.settings if setting.agent == agent]
            found = slices(report, agent)
            if any(one.estimates.count(None) < len(one.estimates) for one in found):
                result[f"slices-{agent}"] = sliced(found, report)
            if len(found) == 2 and len(of_agent) == len(found[0].values) * len(found[1].values):
                result[f"map-{agent}"] = heat_map(found, report)
        return result


def _colour(report: Report, setting: Setting) -> str:
    place = report.settings.index(setting)
    return COLOURS[place] if place < len(COLOURS) else GREY


def _plain(label: str) -> str:
    return label.replace("$", r"\$")


def _seeds(setting: Setting, report: Report) -> int:
    return min((len(runs) for runs in strata_of(setting.counted, report.score, report.judged)), default=0)


def _range(axis: Axes, report: Report, which: str) -> None:
    if report.score == "success":
        axis.set(**{f"{which}lim": (-0.03, 1.03)})


# Learning curves


def curves(report: Report) -> Figure:
    """Returns the scores over each phase's clock (updates or steps), with one row of panels per task."""
    counted = [member for setting in report.settings for member in setting.counted]
    phases = _clocks(counted)
    size = (max(7.2, 4.4 * len(phases)), 0.7 + 2.7 * len(report.tasks) + 0.1 * min(len(report.settings), 7))
    figure = Figure(figsize=size)
    panels = figure.subplots(len(report.tasks), max(len(phases), 1), squeeze=False, sharey="row")
    for row, task in zip(panels, report.tasks, strict=True):
        row[0].set_ylabel(report.score)
        for axis, phase in zip(row, phases, strict=False):
            axis.set_title(_plain(f"{task}: {phase}" if len(report.tasks) > 1 else phase), loc="left")
            axis.set_xlabel(CLOCKS[phases[phase]][0])
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            axis.locator_params(axis="x", nbins=6)
            _range(axis, report, "y")
            _panel(axis, task, phase, report)
    _legend(figure, panels.flat)
    return figure


def _legend(figure: Figure, axes: Iterable[Axes]) -> None:
    """Adds one legend below all panels, in as many columns as fit, best setting first."""
    handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    columns = int(np.clip(figure.get_figwidth() * 13 // (8 + max(map(len, handles), default=1)), 1, 4))
    lines, labels = list(handles.values())[::-1], list(handles)[::-1]
    figure.legend(lines, labels, loc="outside lower center", ncols=columns)


def _panel(axis: Axes, task: str, phase: str, report: Report) -> None:
    """Draws a task's settings in one phase; the best are on top and have intervals."""
    behaviour = [m.behaviour for s in report.settings for m in s.members if m.task == task and m.behaviour is not None]
    if behaviour and report.score == "success":
        axis.axhline(float(np.mean(behaviour)), color=GREY, linestyle=":", label="behavior of the data")
    others = len([setting for setting in report.settings if setting.counted]) - len(COLOURS)
    for setting in reversed(report.settings):
        members, colour = setting.on(task), _colour(report, setting)
        best = colour != GREY
        clock, points, low, high = curve(members, phase, report.score, intervals=best)
        if not clock:
            continue
        label = _label(setting) if best else f"{others} other settings"
        style: dict[str, Any] = {"color": colour, "linestyle": "--" if setting.partial else "-", "label": _plain(label)}
        axis.plot(clock, points, marker="" if len(clock) > 1 else "o", linewidth=1.6 if best else 0.7, **style)
        if low:
            axis.fill_between(clock, low, high, color=colour, alpha=0.15, linewidth=0)


def _label(setting: Setting) -> str:
    """Returns a setting's legend label, with its number of seeds per task."""
    seeds = sorted(Counter(member.task for member in setting.counted).values())
    number = f"{seeds[0]} seeds" if seeds[0] == seeds[-1] else f"{seeds[0]} to {seeds[-1]} seeds"
    number = "1 seed: band over episodes" if seeds[-1] == 1 else number
    return f"{setting.label} ({number}{', partial budget' if setting.partial else ''})"


def curve(
    members: Sequence[RunRecord], phase: str, score: str, intervals: bool = True
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Returns clock, interquartile mean over seeds, and interval bounds, at the evaluations that all members have.

    A diverged member keeps its last evaluation. The bounds are empty without intervals.
    """
    name = f"eval/{score}"
    rows = {m.path: {r["epoch"]: r for r in m.evaluations if r.get(name) is not None} for m in members}
    in_phase = {m.path: {e for e, r in rows[m.path].items() if r["phase"] == phase} for m in members}
    running = [in_phase[m.path] for m in members if m.status != "diverged"]
    first = max((min(own) for own in rows.values() if own), default=0)
    epochs = [
        e for e in sorted(set.intersection(*running) if running else set().union(*in_phase.values())) if e >= first
    ]
    clock, points, ends = [], [], []
    of_phase = _clocks(members).get(phase, "updates")
    for epoch in epochs:
        here = [rows[m.path][epoch] for m in members if epoch in rows[m.path]]
        clock.append(float(np.mean([row[of_phase] for row in here])))
        values = np.array([_until(rows[m.path], epoch, name) for m in members])
        points.append(float(stats.iqm(values)))
        ends.append(_ends(values, here[0], name) if intervals else (np.nan, np.nan))
    low, high = ([end[i] for end in ends] for i in (0, 1))
    return (clock, points, low, high) if np.isfinite(ends).any() else (clock, points, [], [])


def _clocks(members: Sequence[RunRecord]) -> dict[str, str]:
    """Returns the clock (x axis) of each phase by name, in the order in which the phases begin."""
    found: dict[str, str] = {}
    begins: dict[str, int] = {}
    for member in members:
        found |= clocks(member.evaluations)
        first = {row["phase"]: row["epoch"] for row in reversed(member.evaluations)}
        begins |= {phase: max(begins.get(phase, 0), epoch) for phase, epoch in first.items()}
    return {phase: found[phase] for phase in sorted(found, key=lambda phase: begins[phase])}


def _ends(values: np.ndarray, row: dict[str, Any], name: str) -> tuple[float, float]:
    """Returns the interval over seeds, or over one seed's episodes if seeds have no spread; NaN without either."""
    if values.min() < values.max():
        return stats.stratified_bootstrap(values[:, None], resamples=1_000)[1:]
    return row.get(f"{name}_low", np.nan), row.get(f"{name}_high", np.nan)


def _until(rows: dict[int, dict[str, Any]], epoch: int, name: str) -> float:
    """Returns the latest value up to an epoch, 0 before the first."""
    return next((rows[e][name] for e in sorted(rows, reverse=True) if e <= epoch), 0.0)


# Lists of settings and of pairs


def scores(report: Report) -> Figure:
    """Returns each setting's score with its interval, and its members' scores as ticks."""
    shown = [setting for setting in report.settings if setting.counted][:LISTED]
    figure = Figure(figsize=(8.2, 1.0 + 0.28 * len(shown)))
    axis = figure.subplots()
    for place, setting in enumerate(shown):
        colour = _colour(report, setting)
        values = np.concatenate(strata_of(setting.counted, report.score, False))
        axis.plot(values, np.full(len(values), place), "|", color=colour, alpha=0.5, markersize=9)
        on_eval, on_separate = estimate(setting.counted, report.score), separate(setting, report.score)
        _interval(axis, on_eval, place - (0.16 if on_separate else 0), colour, filled=on_separate is None)
        _interval(axis, on_separate, place + 0.16, colour, filled=True)
    labels = [setting.label + (" (partial budget)" if setting.partial else "") for setting in shown]
    _lines(axis, labels)
    _range(axis, report, "x")
    axis.set_xlabel(f"{report.score}, interquartile mean and 95 % interval")
    if len(shown) < len(report.settings):
        axis.set_title(f"{len(shown)} of {len(report.settings)} settings", loc="left")
    return figure


def _interval(axis: Axes, found: Estimate | None, y: float, colour: str, filled: bool) -> None:
    if found is None:
        return
    if found.low is not None and found.high is not None:
        style = "-" if found.over == "seeds" else ":"
        axis.plot([found.low, found.high], [y, y], style, color=colour, linewidth=2)
    face = colour if filled else "none"
    axis.plot(found.point, y, "o", color=colour, markersize=5, markerfacecolor=face)


def _lines(axis: Axes, labels: Sequence[str]) -> None:
    """Labels the lines of a list, the first on top."""
    axis.set_yticks(range(len(labels)), [_plain(label) for label in labels])
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.grid(visible=False, axis="y")


def improvement(found: Sequence[Comparison]) -> Figure:
    """Returns the probabilities of improvement with their intervals, and the line of no difference."""
    shown, of_best = found[:LISTED], len({one.better for one in found}) == 1
    figure = Figure(figsize=(8.2, 1.0 + (0.28 if of_best else 0.42) * len(shown)))
    axis = figure.subplots()
    axis.axvline(0.5, color=INK, linewidth=0.8)
    for place, one in enumerate(shown):
        _interval(axis, one.estimate, place, COLOURS[0], filled=one.estimate.low is not None)
    _lines(axis, [one.worse if of_best else f"{one.better}\nover {one.worse}" for one in shown])
    axis.set_xlim(-0.03, 1.03)
    axis.set_xlabel(f"probability that a run of {found[0].better} scores higher" if of_best else "probability")
    if len(shown) < len(found):
        axis.set_title(f"{len(shown)} of {len(found)} settings", loc="left")
    return figure


def profiles(report: Report) -> Figure:
    """Returns the fraction of runs that score above each threshold."""
    shown = [setting for setting in report.ranked if _seeds(setting, report) > 1]
    tables = {setting.label: strata_of(setting.counted, report.score, report.judged) for setting in shown}
    pooled = np.concatenate([runs for table in tables.values() for runs in table])
    low, high = (0.0, 1.0) if report.score == "success" else (float(pooled.min()), float(pooled.max()))
    thresholds = np.linspace(low - 1e-3 * (high - low), high, 201)
    figure = Figure(figsize=(7.2, 3.4 + 0.1 * min(len(shown), 7)))
    axis = figure.subplots()
    for setting in reversed(shown):
        share, below, above = stats.performance_profile(tables[setting.label], thresholds)
        colour = _colour(report, setting)
        best = colour != GREY
        label = setting.label if best else f"{len(shown) - len(COLOURS)} other settings"
        style: dict[str, Any] = {"linewidth": 1.6} if best else {"linewidth": 0.7, "alpha": 0.5}
        axis.step(thresholds, share, where="post", color=colour, label=_plain(label), **style)
        if best:
            axis.fill_between(thresholds, below, above, step="post", color=colour, alpha=0.15, linewidth=0)
    axis.set(xlabel=f"{report.score} τ", ylabel="fraction of runs above τ", ylim=(-0.03, 1.03))
    _legend(figure, [axis])
    return figure


# Hyperparameters


def sliced(found: Sequence[Slice], report: Report) -> Figure:
    """Returns the scores over each field: settings as points, the mean over settings with equal value as a line."""
    short = shortened([one.field for one in found])
    columns = min(len(found), 3)
    rows = math.ceil(len(found) / columns)
    figure = Figure(figsize=(max(4.6, 3.1 * columns), 0.4 + 2.5 * rows))
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axis, one in zip(panels.flat, found, strict=False):
        _slice(axis, one, report)
        axis.set_xlabel(_plain(short[one.field]))
        _range(axis, report, "y")
    for axis in panels.flat[len(found) :]:
        axis.set_visible(False)
    for row in panels:
        row[0].set_ylabel(report.score)
    return figure


def _slice(axis: Axes, one: Slice, report: Report) -> None:
    places = dict(zip(one.values, _abscissa(axis, one.values), strict=True))
    for value, settings in zip(one.values, one.settings, strict=True):
        for setting in settings:
            if (score := score_of(setting, report)) is not None:
                ranked = setting in report.ranked
                axis.plot(places[value], score, "o" if ranked else "x", color=GREY, markersize=4, alpha=0.8)
    if len(one.values) > TICKS and all(len(settings) == 1 for settings in one.settings):
        return
    known = [(places[v], e) for v, e in zip(one.values, one.estimates, strict=True) if e is not None]
    axis.margins(x=0.12)
    axis.plot([place for place, _ in known], [e.point for _, e in known], "o-", color=COLOURS[0], markersize=4)
    for place, e in known:
        if e.low is not None and e.high is not None:
            axis.plot([place, place], [e.low, e.high], color=COLOURS[0], linewidth=2, alpha=0.6)


def _abscissa(axis: Axes, values: Sequence[Any]) -> list[float]:
    """Returns x positions of values: logarithmic if they span a decade, evenly spaced if ticks would overlap."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    log = numbers and values[0] > 0 and values[-1] >= 9.99 * values[0]
    if log:
        axis.set_xscale("log")
    if numbers and len(values) > TICKS:
        return [float(value) for value in values]
    gaps = np.diff(np.log(values) if log else values) if numbers else np.zeros(1)
    even = not numbers or min(gaps, default=1.0) < 0.12 * sum(gaps)
    if even:
        axis.set_xscale("linear")
    places = [float(place) for place in (range(len(values)) if even else values)]
    axis.set_xticks(places, [_plain(text(value)) for value in values])
    axis.set_xticks([], minor=True)
    return places


def heat_map(found: Sequence[Slice], report: Report) -> Figure:
    """Returns the scores over two fields, one cell per setting."""
    rows, columns = found
    cells = {(s.values[rows.field], s.values[columns.field]): s for group in rows.settings for s in group}
    table = np.array([[_cell(cells[y, x], report) for x in columns.values] for y in rows.values])
    short = shortened([rows.field, columns.field])
    figure = Figure(figsize=(2.2 + 0.62 * len(columns.values), 1.3 + 0.42 * len(rows.values)))
    axis = figure.subplots()
    known = table[np.isfinite(table)]
    low, high = (0.0, 1.0) if report.score == "success" or not len(known) else (float(known.min()), float(known.max()))
    mesh = axis.pcolormesh(np.ma.masked_invalid(table), cmap="viridis", vmin=low, vmax=high)
    axis.set_xticks(np.arange(len(columns.values)) + 0.5, [_plain(text(value)) for value in columns.values])
    axis.set_yticks(np.arange(len(rows.values)) + 0.5, [_plain(text(value)) for value in rows.values])
    axis.set(xlabel=_plain(short[columns.field]), ylabel=_plain(short[rows.field]))
    axis.grid(visible=False)
    if max(table.shape) <= CELLS:
        for (y, x), value in np.ndenumerate(table):
            label = "–" if np.isnan(value) else f"{value:.2f}" if report.score == "success" else f"{value:.3g}"
            colour = INK if np.isnan(value) else "white" if value < 0.4 * low + 0.6 * high else "black"
            axis.text(x + 0.5, y + 0.5, label, ha="center", va="center", color=colour, fontsize=8)
    bar = figure.colorbar(mesh, label=report.score)
    bar.outline.set_visible(False)
    return figure


def _cell(setting: Setting, report: Report) -> float:
    found = score_of(setting, report) if setting in report.ranked else None
    return float("nan") if found is None else found
