"""The command about what runs have shown: report."""

import dataclasses
from pathlib import Path
from typing import Literal

from jaxrl.cli import flags as fl
from jaxrl.errors import UserError


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """Report on runs and sweeps: learning curves, scores with intervals, comparisons, effects of hyper-parameters.

        jaxrl report runs/NAME                    a run or a sweep; the report is written into it
        jaxrl report runs/                        all runs and sweeps in a folder
        jaxrl report runs/A runs/B --out report   several, compared

    Runs that differ in nothing but their seed are one setting. Each setting has one score, the interquartile mean of
    the last evaluations over seeds and tasks, with its 95 % bootstrap interval over seeds. A member that diverged
    counts with its last evaluation. Members that were dropped or have not finished are listed with what they spent, and
    are not compared. The best setting is chosen on eval/success and reported on separate episodes, where there are any.

    The folder gets report.html, which opens offline, table.md, settings.csv, members.csv and the pictures; an earlier
    report in it is replaced.

    Runs are compared at equal terms, and else refused. --mix names the terms that may differ, which the report then
    says at its top:

        eval-seed   seed of the evaluation's episodes        episodes   their number
        simulator   versions of MuJoCo, MJX and Brax         data       content of the dataset
        budget      updates and steps, planned or spent; unfinished and dropped members count too

        exit code 0   written
                  2   a mistake, which one line names
    """

    out: Path | None = None
    """Folder to write; by default `report` in the folder that is named, or here where several are."""
    score: Literal["success", "return"] = "success"
    """What is compared; return is for one task alone, where the environment knows no success."""
    mix: tuple[Literal["eval-seed", "episodes", "budget", "simulator", "data"], ...] = ()
    """Terms in which runs of a task may differ."""


def report(args: list[str]) -> int:
    """Returns the exit code of `jaxrl report`."""
    names, flags = fl.positionals(args, len(args))
    options = fl.parse("jaxrl report RUN...", ReportOptions, ReportOptions(), flags)
    if not names:
        raise UserError("report: name run directories, for example `jaxrl report runs/NAME`")
    from jaxrl import report

    paths = [Path(name) for name in names]
    folder = options.out or (paths[0] / "report" if len(paths) == 1 else Path("report"))
    found = report.read(paths, options.mix, options.score)
    written = report.write(found, folder)
    print(report.summary(found))
    print(f"\nwritten: {written[0].parent}/{{{','.join(path.name for path in written)}}}")
    return 0
