"""A report as files: tables in Markdown and CSV, figures, and a self-contained HTML page."""

import csv
import io
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from jaxrl import __version__
from jaxrl.errors import UserError
from jaxrl.report import pictures, scores
from jaxrl.report.scores import Report, written
from jaxrl.runs import jsonlines

PAGE = "report.html"
EXPLAINED = "ᵉ over the episodes of one seed (Wilson): does not cover the variation between seeds."
CAPTIONS = {  # by the prefix of a figure's name
    "curves": "Learning curves: interquartile mean over seeds of the latest evaluation, with pointwise 95 % intervals "
    "(stratified bootstrap) of the best settings. A diverged member keeps its last evaluation.",
    "scores": "Scores: interquartile mean over seeds and tasks, with 95 % intervals (stratified bootstrap; dotted: "
    "over the episodes of one seed). Hollow: the evaluation used for selection; filled: separate episodes if there are "
    "any, else the same. Ticks are members.",
    "improvement": "Probability of improvement: the probability that a run of one setting scores higher than a run of "
    "the other, with 95 % intervals. Hollow: all pairs of runs agree, no interval.",
    "profiles": "Performance profiles: the fraction of runs that score above τ, with pointwise 95 % intervals.",
    "slices": "Slices: scores over one field. Gray points are settings, crosses those with partial budgets, which are "
    "excluded; the line is the interquartile mean over all settings with the value, and over their seeds. Intervals "
    "are over seeds.",
    "map": "Scores over both fields; a dash if no member spent its whole budget.",
}

FIGURE = re.compile(rf"({'|'.join(CAPTIONS)})(-\w+)?\.png")


def rows(report: Report) -> list[dict[str, Any]]:
    """Returns the table, one row per setting, best first; missing values are None."""
    return [scores.row(setting, report) for setting in report.settings]


def member_rows(report: Report) -> list[dict[str, Any]]:
    """Returns the table of all members."""
    return [scores.member_row(member, setting) for setting in report.settings for member in setting.members]


def write(report: Report, folder: Path) -> list[Path]:
    """Writes the report and returns its files. An existing report in the folder is replaced.

    Raises:
        UserError: the folder contains something else, or cannot be written.
    """
    check_folder(folder)
    drawn = pictures.figures(report)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in filter(FIGURE.fullmatch, (entry.name for entry in folder.iterdir())):
            (folder / old).unlink()
        texts = {  # the page first: it marks the folder as a report, so that an incomplete one can be replaced
            PAGE: html(report, drawn),
            "table.md": markdown(report),
            "settings.csv": as_csv(rows(report)),
            "members.csv": as_csv(member_rows(report)),
        }
        for name, text in texts.items():
            jsonlines.write(folder / name, text)
        for name, figure in drawn.items():
            figure.savefig(folder / f"{name}.png", dpi=150, facecolor="white")
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from error
    return [folder / name for name in (*texts, *(f"{name}.png" for name in drawn))]


def check_folder(folder: Path) -> None:
    """Raises UserError if a folder contains something other than a report."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: it is a file, name a folder")
    holds = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    if holds - {f"{PAGE}.partial"} and PAGE not in holds:
        raise UserError(f"--out {folder}: the folder contains something other than a report, name another folder")


# Tables


def as_csv(table: Sequence[dict[str, Any]]) -> str:
    """Returns the rows as CSV, with the union of their columns; missing values are empty."""
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in table for name in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def markdown(report: Report) -> str:
    """Returns the report's tables and remarks in Markdown."""
    parts = [f"# {', '.join(report.tasks)}", summary(report)]
    if len(report.tasks) > 1:
        parts.append(_pipes(*_by_task(report)))
    if found := _improvement(report):
        parts.append(_pipes(*found))
    parts.append(_items(_method(report)))
    return "\n\n".join(parts) + "\n"


def summary(report: Report) -> str:
    """Returns the conclusion, the table of settings and the remarks in Markdown."""
    parts = [f"**Mixed as allowed by --mix.** {line}" for line in report.mixed]
    parts += [" ".join(scores.verdict(report)), _pipes(*_table(report)), _items(report.notes)]
    return "\n\n".join(part for part in parts if part)


def _items(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _pipes(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def _table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Returns header and body of the table of settings."""
    several = any(row["separate"] is not None for row in rows(report))
    head = ["setting", "seeds", f"{report.score}, IQM [95\u00a0%]"]
    head += ["separate episodes"] if several else []
    head += ["mean success", "mean return", "updates", "steps", "members"]
    body = []
    for setting in report.settings:
        row = scores.row(setting, report)
        found = [scores.estimate(setting.counted, report.score)]
        found += [scores.separate(setting, report.score)] if several else []
        body.append(
            [
                setting.label + (" (partial budget)" if setting.counted and setting.partial else ""),
                str(row["seeds"]),
                *(written(one, report.score) for one in found),
                _number(row["mean_success"], "{:.2f}"),
                _number(row["mean_return"], "{:.4g}"),
                *(_spent([getattr(member, name) for member in setting.counted]) for name in ("updates", "steps")),
                ", ".join(f"{row[status]} {status}" for status in scores.folders.STATUSES if row[status]),
            ]
        )
    return head, body


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _spent(values: Sequence[int]) -> str:
    """Returns the range of what members spent, as text."""
    low, high = min(values, default=0), max(values, default=0)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def _by_task(report: Report) -> tuple[list[str], list[list[str]]]:
    """Returns header and body of the table of settings and tasks."""
    estimates = [
        [scores.estimate(s.on(task), report.score, report.judged) for task in report.tasks] for s in report.settings
    ]
    body = [
        [setting.label, *(written(one, report.score) for one in line)]
        for setting, line in zip(report.settings, estimates, strict=True)
    ]
    return ["setting", *report.tasks], body


def _improvement(report: Report) -> tuple[list[str], list[list[str]]] | None:
    """Returns header and body of the table of comparisons, None without any."""
    body = []
    for one in scores.comparisons(report):
        tasks = [] if len(report.tasks) == 1 else [", ".join(one.tasks)]
        certain = f" (all {one.pairs} pairs)" if one.estimate.low is None else ""
        body.append([one.better, one.worse, written(one.estimate, "success") + certain, *tasks])
    head = ["a run of", "scores higher than one of", "with probability [95 %]"]
    return (head + ([] if len(report.tasks) == 1 else ["tasks"]), body) if body else None


def _method(report: Report) -> list[str]:
    """Returns the description of the statistical method."""
    episodes = "separate episodes" if report.judged else f"eval/{report.score}"
    members = [member for setting in report.settings for member in setting.members]
    simulators = " or ".join(dict.fromkeys(", ".join(member.simulators) for member in members))
    return [
        "IQM: interquartile mean over seeds and tasks; [95 %]: percentile interval of the stratified bootstrap over "
        f"seeds, with tasks as strata. {EXPLAINED}",
        f"Settings are ranked on eval/{report.score}; comparisons, profiles and slices use {episodes}.",
        "A setting's score is that of its members that spent their whole budget. A diverged member counts with its "
        "last evaluation, or with success 0 if it had none.",
        f"Simulators: {simulators}. Written by jaxrl {__version__}.",
    ]


# The page


def html(report: Report, drawn: dict[str, Figure]) -> str:
    """Returns the report as one self-contained page."""
    figures = {name: _figure(name, figure) for name, figure in drawn.items()}
    count = sum(len(setting.members) for setting in report.settings)
    warning = "".join(f"<p>{escape(line)}</p>" for line in report.mixed)
    found = _improvement(report)
    body = [
        f"<h1>{escape(', '.join(report.tasks))}</h1>",
        f"<p class=quiet>{_count(len(report.settings), 'setting')}, {_count(count, 'run')}</p>",
        f"<aside><strong>Mixed as allowed by --mix</strong>{warning}</aside>" if warning else "",
        f"<p class=verdict>{escape(' '.join(scores.verdict(report)))}</p>",
        _remarks(report.notes),
        figures.pop("curves"),
        "<h2>Scores</h2>",
        _html_table(*_table(report)),
        f"<p class=quiet>{EXPLAINED}</p>",
        figures.pop("scores"),
        "<h2>By task</h2>" + _html_table(*_by_task(report)) if len(report.tasks) > 1 else "",
        "<h2>Comparisons</h2>" if found else "",
        figures.pop("improvement", ""),
        f"<details><summary>as a table</summary>{_html_table(*found, words=2)}</details>" if found else "",
        figures.pop("profiles", ""),
        "<h2>Hyperparameters</h2>" if figures else "",
        *figures.values(),
        "<h2>Runs</h2>",
        f"<details><summary>{_count(count, 'run')}</summary>{_html_table(*_members(report), words=2)}</details>",
        "<h2>Method</h2>",
        _remarks(_method(report)),
    ]
    title = escape(f"Report: {', '.join(report.tasks)}")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    parts = [f'<!DOCTYPE html>\n<html lang="en"><head>{head}', f"<style>{CSS}</style></head><body>", *body]
    return "\n".join(part for part in parts if part) + "\n</body></html>\n"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _remarks(lines: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def _html_table(head: Sequence[str], body: Sequence[Sequence[str]], words: int = 1) -> str:
    """Returns a table whose first `words` columns are text and the others numbers."""
    titles = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in body)
    table = f"<thead><tr>{titles}</tr></thead><tbody>{lines}</tbody>"
    return f"<div class=wide><table class=words{words}>{table}</table></div>"


def _members(report: Report) -> tuple[list[str], list[list[str]]]:
    names = ["member", "setting", "task", "seed", "status", "updates", "steps", "success", "return", "separate_success"]
    names = [name for name in names if name != "task" or len(report.tasks) > 1]
    body = [[_shown(row[name]) for name in names] for row in member_rows(report)]
    return [name.replace("_", " ") for name in names], body


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value + 0.0:.4g}"  # avoids "-0"
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _figure(name: str, figure: Figure) -> str:
    """Returns a figure as inline SVG with text in the page's text color."""
    file = io.StringIO()
    with matplotlib.rc_context({**pictures.STYLE, "svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = file.getvalue()
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg[svg.index("<svg") :]).replace(pictures.INK, "currentColor")
    width = float(re.findall(r' width="([\d.]+)pt"', svg)[0])
    style = f'style="width: {width * 4 / 3:.0f}px" '
    svg = re.sub(r'(width|height)="[\d.]+pt" ?', "", svg, count=2).replace("<svg ", f'<svg role="img" {style}', 1)
    caption = next(text for begin, text in CAPTIONS.items() if name.startswith(begin))
    agent = name.partition("-")[2]
    caption = f"{agent}. {caption}" if agent else caption
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


CSS = """
:root { color-scheme: light dark; --back: #ffffff; --ink: #1f2329; --quiet: #656d76; --line: #d8dce1; --warn: #fff4d6; }
@media (prefers-color-scheme: dark) {
  :root { --back: #15181d; --ink: #e3e6ea; --quiet: #9aa3ad; --line: #363c45; --warn: #453a14; }
}
body { background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 62rem;
  margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
.quiet, figcaption { color: var(--quiet); font-size: .85rem; margin-top: .2rem; }
.verdict { font-size: 1.05rem; }
aside { background: var(--warn); border-left: 4px solid #d29922; padding: .6rem 1rem; margin: 1rem 0; }
aside p { margin: .2rem 0; overflow-wrap: anywhere; }
ul { padding-left: 1.2rem; font-size: .92rem; }
li { overflow-wrap: anywhere; }
figure { margin: 1.4rem 0; break-inside: avoid; }
figure svg { max-width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .7rem .22rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--quiet); font-weight: 600; white-space: normal; vertical-align: bottom; }
:is(th, td):first-child, .words2 :is(th, td):nth-child(2) { text-align: left; }
td:last-child { white-space: normal; }
tr { break-inside: avoid; }
summary { cursor: pointer; color: var(--quiet); }
@media print {
  :root { --back: #ffffff; --ink: #000000; --quiet: #444444; --line: #bbbbbb; --warn: #ffffff; }
  body { font-size: 10pt; margin: 0; max-width: none; }
  .wide { overflow: visible; }
  th, td { white-space: normal; }
}
"""
