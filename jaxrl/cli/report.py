"""The command `jaxrl report`."""

import dataclasses
from pathlib import Path
from typing import Literal

from jaxrl.cli import flags as fl
from jaxrl.errors import UserError


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """Report on runs and sweeps: learning curves, scores with intervals, comparisons, effects of hyperparameters.

        jaxrl report runs/NAME                    a run or a sweep; the report is written into its folder
        jaxrl report runs/                        all runs and sweeps in a folder
        jaxrl report runs/A runs/B --out report   compare several

    Runs that differ only in their seed form one setting. The score of a setting is the interquartile mean of the
    last evaluations over seeds and tasks, with a 95 % bootstrap interval over seeds. A diverged member counts with its
    last evaluation. Dropped and unfinished members are listed with the budget they spent, but not compared. The best
    setting is selected on eval/success and reported on separate episodes, if there are any.

    The folder contains report.html (works offline), table.md, settings.csv, members.csv and the figures; an existing
    report there is replaced.

    Runs with unequal evaluation conditions are refused. --mix lists the conditions that may differ; the report states
    them at the top:

        eval-seed   seed of the evaluation episodes          episodes   their number
        simulator   versions of MuJoCo, MJX and Brax         data       content of the dataset
        budget      updates and steps, planned or spent; unfinished and dropped members count too

        exit code 0   written
                  2   usage error, explained in one line
    """

    out: Path | None = None
    """Output folder; by default `report` in the given folder, or in the working directory if several are given."""
    score: Literal["success", "return"] = "success"
    """Metric to compare; `return` is for a single task, if the environment does not report success."""
    mix: tuple[Literal["eval-seed", "episodes", "budget", "simulator", "data"], ...] = ()
    """Conditions that may differ between runs of a task."""


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
