"""Reports of runs and sweeps: scores, confidence intervals and comparisons.

    from jaxrl import report

    found = report.read(["runs/sweep", "runs/baseline"])   # a frozen dataclass, nothing is written
    report.rows(found)                                      # the table, one dict per setting
    report.figures(found)["curves"]                         # a matplotlib figure, for notebooks
    report.write(found, Path("report"))                     # report.html, table.md, CSV files and figures

A setting is a configuration without its seed; a task is an environment with its data. Scores are those of the last
evaluation. Only members that spent their whole budget are compared: finished members, and diverged members with their
last evaluation. Dropped or unfinished members count only if a setting has no others; they are marked and excluded from
comparisons, unless budgets may be mixed.

Statistics are those of Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (2021):
interquartile means, stratified bootstrap over seeds with tasks as strata, probability of improvement, profiles.
"""

from jaxrl.report.folders import RunRecord
from jaxrl.report.page import html, markdown, member_rows, rows, summary, write
from jaxrl.report.pictures import figures
from jaxrl.report.scores import (
    Comparison,
    Estimate,
    Report,
    Slice,
    comparisons,
    estimate,
    read,
    separate,
    slices,
    verdict,
)
from jaxrl.report.settings import Mix, Setting

__all__ = [
    "Comparison",
    "Estimate",
    "Mix",
    "Report",
    "RunRecord",
    "Setting",
    "Slice",
    "comparisons",
    "estimate",
    "figures",
    "html",
    "markdown",
    "member_rows",
    "read",
    "rows",
    "separate",
    "slices",
    "summary",
    "verdict",
    "write",
]
