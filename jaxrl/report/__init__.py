"""Reports of runs and sweeps: what was measured, how sure it is, and what may be concluded.

    from jaxrl import report

    found = report.read(["runs/sweep", "runs/baseline"])   # a frozen dataclass, nothing is written
    report.rows(found)                                      # the table, one dict for each setting
    report.figures(found)["curves"]                         # a matplotlib figure, which a notebook shows
    report.write(found, Path("report"))                     # report.html, table.md, CSV files and pictures

A setting is a configuration but for its seed; a task is an environment with its data. Scores are of the last
evaluation. Those that are compared are of members that spent their whole budget: finished ones, and diverged ones with
their last evaluation. Members that were dropped or have not finished count only where a setting has no others, are
marked, and are compared with nobody, unless budgets may be mixed.

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
