"""Scores of settings with intervals, comparisons of settings, and remarks on both."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from jaxrl import stats
from jaxrl.errors import UserError, unknown
from jaxrl.report import folders
from jaxrl.report import settings as st
from jaxrl.report.folders import RunRecord
from jaxrl.report.settings import Mix, Setting

Score = Literal["success", "return"]
FEW = 10  # number of seeds below which percentile intervals are too narrow and a remark says so
NAMED = 4  # maximum number of members listed in a remark
SURE = 9  # pairs of runs needed to call a setting that wins all of them better; 3 vs. 3 equals do so in 1 of 20 cases
ALL_PAIRS = 5  # maximum number of settings to compare pairwise; with more, the best is compared with each other one


@dataclasses.dataclass(frozen=True)
class Report:
    """Runs grouped into settings, ready to be compared."""

    settings: tuple[Setting, ...]
    """Best first: settings with scores on all tasks after whole budgets, then the others."""
    tasks: tuple[str, ...]
    score: Score
    mixed: tuple[str, ...]
    """Conditions that differ between compared runs, as allowed by `mix`: one sentence each."""
    notes: tuple[str, ...]
    """Remarks to read with the numbers."""

    @property
    def ranked(self) -> tuple[Setting, ...]:
        """The comparable settings: whole budgets, all tasks; best first."""
        return tuple(setting for setting in self.settings if _ranked(setting, self.tasks))

    @property
    def judged(self) -> bool:
        """Whether every compared finished member was evaluated on separate episodes."""
        finished = [m for setting in self.ranked for m in setting.counted if m.status == "finished"]
        return bool(finished) and all(member.judged is not None for member in finished)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A statistic with its 95 % interval, if there is one."""

    point: float
    low: float | None = None
    high: float | None = None
    over: Literal["seeds", "episodes", ""] = ""
    """What the interval is over: seeds, or one seed's episodes, without the variation between seeds."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The probability that a run of one setting scores higher than a run of another."""

    better: str
    worse: str
    tasks: tuple[str, ...]
    pairs: int
    """Number of compared pairs of runs."""
    estimate: Estimate
    """Without an interval if all pairs agree."""

    @property
    def told_apart(self) -> bool:
        """Whether the first setting is significantly better, given the variation between seeds."""
        low = self.estimate.low
        return low > 0.5 if low is not None else self.estimate.point > 0.5 and self.pairs >= SURE


def read(paths: Iterable[Path | str], mix: Sequence[Mix] = (), score: Score = "success") -> Report:
    """Returns the report of runs, sweeps and folders of these.

    Raises:
        UserError: a path is none of these, a file is damaged, there is no evaluation yet, or runs differ in conditions
            that `mix` does not list.
    """
    for kind, names, known in (("mix", mix, get_args(Mix)), ("score", [score], get_args(Score))):
        for name in names:
            if name not in known:
                raise unknown(kind, name, known)
    paths = [Path(path) for path in paths]
    found, notes = folders.members(paths)
    settings, left_out = st.grouped(st.with_tasks(found), score, "budget" in mix)
    members = [member for setting in settings for member in setting.members]
    if not any(setting.counted for setting in settings):
        raise UserError(f"{', '.join(str(path) for path in paths)}: no run directory there has an evaluation yet")
    mixed = st.check_alike(members, mix)
    if part := sum(not member.whole for setting in settings for member in setting.counted) if "budget" in mix else 0:
        mixed.append(
            f"{part} {'run that has' if part == 1 else 'runs that have'} not spent the whole budget also count."
        )
    tasks = tuple(dict.fromkeys(m.task for setting in settings for m in setting.counted))
    if score == "return" and len(tasks) > 1:
        raise UserError(f"score = 'return': returns of different tasks are not comparable, {' and '.join(tasks[:2])}")

    settings.sort(key=lambda setting: _place(setting, tasks, score))
    report = Report(tuple(settings), tasks, score, tuple(mixed), ())
    return dataclasses.replace(report, notes=(*notes, *left_out, *remarks(report, "budget" in mix)))


def _place(setting: Setting, tasks: Sequence[str], score: Score) -> tuple[bool, bool, float, int, float]:
    """Returns the sort key of settings: score, then fewer diverged members, then higher return."""
    scores, returns = (strata_of(setting.counted, name, False) for name in (score, "return"))
    diverged = sum(member.status == "diverged" for member in setting.counted)
    point, tie = (-float(stats.iqm(np.concatenate(one))) if one else np.inf for one in (scores, returns))
    return not _ranked(setting, tasks), setting.partial, point, diverged, tie


def _ranked(setting: Setting, tasks: Sequence[str]) -> bool:
    return bool(setting.counted) and not setting.partial and {member.task for member in setting.counted} == set(tasks)


# Scores of settings


def estimate(members: Sequence[RunRecord], score: Score, separate: bool = False) -> Estimate | None:
    """Returns the interquartile mean over seeds and tasks; None if no member has a score.

    The interval is a stratified bootstrap over seeds, with tasks as strata. With one seed, or no spread among seeds,
    it is the Wilson interval over the episodes of one seed (only for success; with one seed, only on a single task).
    """
    found = [(member, *member.scored(score, separate)) for member in members]
    known = [(member, value, episodes) for member, value, episodes in found if value is not None]
    if not known:
        return None
    strata = strata_of([member for member, _, _ in known], score, separate)
    point = float(stats.iqm(np.concatenate(strata)))
    if all(len(seeds) > 1 for seeds in strata):
        _, low, high = stats.stratified_bootstrap(strata)
        if high - low > 1e-9:
            return Estimate(point, low, high, "seeds")
    elif len(strata) > 1:
        return Estimate(point)
    episodes = min((episodes for _, _, episodes in known if episodes), default=0)
    if score != "success" or not episodes:
        return Estimate(point)
    return Estimate(point, *stats.success_interval(round(point * episodes), episodes), over="episodes")


def strata_of(members: Iterable[RunRecord], score: str, separate: bool) -> tuple[np.ndarray, ...]:
    """Returns the scores of each task, tasks in alphabetical order."""
    strata: dict[str, list[float]] = {}
    for member in members:
        value, _ = member.scored(score, separate)
        if value is not None:
            strata.setdefault(member.task, []).append(value)
    return tuple(np.array(strata[task]) for task in sorted(strata))


def score_of(setting: Setting, report: Report) -> float | None:
    """Returns the interquartile mean used for comparisons: on separate episodes if all members have them."""
    strata = strata_of(setting.counted, report.score, report.judged)
    return float(stats.iqm(np.concatenate(strata))) if strata else None


def separate(setting: Setting, score: Score) -> Estimate | None:
    """Returns the score on separate episodes, None unless all finished members have it.

    Diverged members have no separate evaluation: their latest evaluation counts here too.
    """
    finished = [member for member in setting.counted if member.status != "diverged"]
    if not finished or any(member.judged is None for member in finished):
        return None
    return estimate(setting.counted, score, separate=True)


def row(setting: Setting, report: Report) -> dict[str, Any]:
    """Returns a setting's row of the table; missing values are None."""
    members = setting.counted
    on_eval, on_separate = estimate(members, report.score), separate(setting, report.score)
    statuses = Counter(member.status for member in setting.members)
    seeds = Counter(member.task for member in members)
    return {
        "setting": setting.label,
        "agent": setting.agent,
        **setting.values,
        "tasks": len(seeds),
        "seeds": min(seeds.values(), default=0),
        **_columns("eval", on_eval),
        **_columns("separate", on_separate),
        **{f"mean_{name}": _mean(member.last(name) for member in members) for name in ("success", "return")},
        **{name: _mean(getattr(member, name) for member in members) for name in ("updates", "steps")},
        **{status: statuses[status] for status in folders.STATUSES},
        "whole_budget": bool(members) and not setting.partial,
    }


def _columns(name: str, found: Estimate | None) -> dict[str, Any]:
    values = dataclasses.asdict(found) if found else {"point": None, "low": None, "high": None, "over": None}
    return {name if part == "point" else f"{name}_{part}": value for part, value in values.items()}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def member_row(member: RunRecord, setting: Setting) -> dict[str, Any]:
    """Returns a member's row of the table of all members."""
    judged = member.judged or {}
    return {
        "member": str(member.path),
        "setting": setting.label,
        "task": member.task,
        "seed": member.config["seed"],
        **setting.values,
        "status": member.status,
        "counted": member in setting.counted,
        "updates": member.updates,
        "steps": member.steps,
        "success": member.last("success"),
        "return": member.last("return"),
        **{f"separate_{name}": judged.get(name) for name in ("success", "return", "episodes")},
    }


# Comparisons of settings


def comparisons(report: Report) -> tuple[Comparison, ...]:
    """Returns the probability of improvement of all pairs of settings; with more than five, of the best over each.

    A pair is compared on the tasks on which both settings have at least two seeds.
    """
    settings = [setting for setting in report.settings if setting.counted and not setting.partial]
    pairs = itertools.combinations(settings, 2)
    if len(settings) > ALL_PAIRS:
        pairs = ((settings[0], other) for other in settings[1:])
    found = (compared(better, worse, report) for better, worse in pairs)
    return tuple(one for one in found if one is not None)


def compared(better: Setting, worse: Setting, report: Report) -> Comparison | None:
    """Returns the comparison of two settings, None if no task has two seeds of both."""

    def seeds(setting: Setting, task: str) -> int:
        return sum(len(runs) for runs in strata_of(setting.on(task), report.score, report.judged))

    tasks = tuple(task for task in report.tasks if min(seeds(better, task), seeds(worse, task)) > 1)
    if not tasks:
        return None
    x, y = (
        strata_of([m for task in tasks for m in setting.on(task)], report.score, report.judged)
        for setting in (better, worse)
    )
    point, low, high = stats.probability_of_improvement(x, y)
    found = Estimate(point, low, high, "seeds") if high - low > 1e-9 else Estimate(point)
    pairs = sum(len(a) * len(b) for a, b in zip(x, y, strict=True))
    return Comparison(better.label, worse.label, tasks, pairs, found)


@dataclasses.dataclass(frozen=True)
class Slice:
    """Scores over the values of one field, marginalized over the other fields."""

    field: str
    values: tuple[Any, ...]
    """Sorted."""
    estimates: tuple[Estimate | None, ...]
    """Over all settings with the value; settings and tasks are strata."""
    settings: tuple[tuple[Setting, ...], ...]
    """The settings with each value."""


def slices(report: Report, agent: str) -> tuple[Slice, ...]:
    """Returns the slices over each field in which the settings of an agent differ."""
    settings = [setting for setting in report.settings if setting.agent == agent]
    return tuple(_slice(field, settings, report) for field in settings[0].values)


def _slice(field: str, settings: Sequence[Setting], report: Report) -> Slice:
    values = sorted({setting.values[field] for setting in settings}, key=_order)
    groups = [tuple(setting for setting in settings if setting.values[field] == value) for value in values]
    return Slice(field, tuple(values), tuple(_marginal(group, report) for group in groups), tuple(groups))


def _order(value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return (not number, value if number else 0.0, str(value))


def _marginal(settings: Iterable[Setting], report: Report) -> Estimate | None:
    """Returns the interquartile mean over ranked settings, their tasks and seeds; only seeds are resampled."""
    ranked = [setting for setting in settings if _ranked(setting, report.tasks)]
    strata = [runs for one in ranked for runs in strata_of(one.counted, report.score, report.judged)]
    if not strata:
        return None
    if all(len(runs) > 1 for runs in strata):
        point, low, high = stats.stratified_bootstrap(tuple(strata), resamples=2_000)
        if high - low > 1e-9:
            return Estimate(point, low, high, "seeds")
    return Estimate(float(stats.iqm(np.concatenate(strata))))


# Verdict and remarks


def verdict(report: Report) -> list[str]:
    """Returns sentences naming the best setting, its score for selection and its reported score."""
    if not report.ranked:
        return ["No setting has spent its whole budget on every task yet: there is no best setting."]
    best, *others = report.ranked
    chosen, reported = estimate(best.counted, report.score), separate(best, report.score)
    what = f"{report.score} {written(chosen, report.score)}"
    if not others:
        said = f"One setting, {best.label}: {what}"
        return [f"{said}." if reported is None else f"{said}; on separate episodes {written(reported, report.score)}."]
    said = f"Best of {len(report.ranked)} settings: {best.label}, chosen on eval/{report.score} ({what})."
    if reported is None:
        share = "Selection and score use the same episodes: the score of the best is likely too high."
        return [said, share, *_rivals(best, others, report)]
    honest = f"On separate episodes of the same members, not used for selection: {written(reported, report.score)}."
    return [said, honest, *_rivals(best, others, report)]


def _rivals(best: Setting, others: Sequence[Setting], report: Report) -> list[str]:
    """Returns which settings are not significantly worse than the best."""
    found = [one for other in others if (one := compared(best, other, report)) is not None]
    if not found:
        return ["Without several seeds per setting, differences between settings cannot be assessed."]
    near = [one.worse for one in found if not one.told_apart]
    by = "by the intervals of the probability of improvement"
    if not near:
        return [f"It is distinguishable from {'the other' if len(found) == 1 else 'all others'}, {by}."]
    listed = ", ".join(near[:NAMED]) + (f" and {len(near) - NAMED} more" if len(near) > NAMED else "")
    return [f"Not distinguishable from it, {by}: {listed}."]


def remarks(report: Report, pooled: bool) -> list[str]:
    """Returns remarks on the members: which are missing, how each is counted, and how reliable the numbers are."""
    members = [member for setting in report.settings for member in setting.members]
    by_status = {status: [m for m in members if m.status == status] for status in folders.STATUSES}
    rule = "counts as is" if pooled else "counts only if no member of its setting spent a whole budget"
    said = []
    if diverged := by_status["diverged"]:
        never = sum(not member.evaluations for member in diverged)
        first = f"; {never} before the first evaluation, with success 0" if never else ""
        said.append(f"Diverged: {_named(diverged)}. Each counts with its last evaluation{first}.")
    if dropped := by_status["dropped"]:
        said.append(f"Dropped early by successive halving: {_named(dropped)}. Each {rule}.")
        kept = [s.label for s in report.settings if not s.partial and any(m.status == "dropped" for m in s.members)]
        if kept and not pooled:
            said.append(f"Only some seeds were dropped, which biases the score upward: {'; '.join(kept)}.")
    if unfinished := [member for member in by_status["unfinished"] if member.evaluations]:
        said.append(f"Unfinished: {_named(unfinished)}. Each {rule}.")
    if silent := [m for m in members if not m.evaluations and m.status != "diverged"]:
        said.append(f"No evaluation yet: {_named(silent)}.")
    return said + _about_scores(report)


def _about_scores(report: Report) -> list[str]:
    said = []
    seeds = [len(setting.on(task)) for setting in report.ranked for task in report.tasks]
    if 1 < min(seeds, default=0) < FEW:
        said.append(f"Percentile bootstrap intervals over fewer than {FEW} seeds are too narrow.")
    if seeds and max(seeds) != min(seeds):
        said.append(f"Settings have {min(seeds)} to {max(seeds)} seeds per task.")
    if len(report.tasks) > 1 and (
        some := [s.label for s in report.settings if s not in report.ranked and not s.partial]
    ):
        said.append(f"Not on every task, and therefore not ranked: {'; '.join(some)}.")
    if not report.judged and any(member.judged for s in report.ranked for member in s.counted):
        said.append("Not every finished member was evaluated on separate episodes: comparisons use eval/ of all.")
    counted = [member for setting in report.settings for member in setting.counted]
    if report.score == "success" and not any(member.last("success") for member in counted):
        said.append("No episode succeeded. If the environment does not report success, use --score return.")
    return said


def _named(members: Sequence[RunRecord]) -> str:
    """Returns the first members' paths with the budget they spent, and the number of others."""
    shown = "; ".join(f"{m.path} after {m.updates:,} updates and {m.steps:,} steps" for m in members[:NAMED])
    return shown + (f"; and {len(members) - NAMED} more" if len(members) > NAMED else "")


def written(found: Estimate | None, score: str) -> str:
    """Returns an estimate as table text, 0.93 [0.90, 0.96], with a mark if the interval is over episodes."""
    if found is None:
        return "–"
    form = "{:.2f}" if score == "success" else "{:.4g}"
    if found.low is None or found.high is None:
        return form.format(found.point)
    mark = "ᵉ" if found.over == "episodes" else ""
    return f"{form.format(found.point)} [{form.format(found.low)}, {form.format(found.high)}]{mark}"
