"""Logging of a run: terminal, metrics.jsonl, TensorBoard, optionally Weights & Biases."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxrl.runs.boards import Boards
from jaxrl.runs.jsonlines import append
from jaxrl.runs.scores import score_of_row, with_interval
from jaxrl.types import Phase


class Log:
    """Writes each epoch's row to all logs. `metrics.jsonl` is identical for identical runs."""

    def __init__(self, path: Path, wandb: str | bool = False, done: int = 0) -> None:
        """Opens the log of the run in `path` after `done` updates and steps; `wandb` is a project's name, or True."""
        self.path = path
        self.boards = Boards(path, wandb, done)
        self.bar: tqdm | None = None
        self.clock = time.perf_counter()

    def start(self, phase: Phase, done: int, chunk: int, envs: int) -> None:
        """Opens the progress bar of a phase after `done` of its epochs. It is shown only on terminals."""
        self.close_bar()
        self.phase, self.before, self.each = phase, done, int(chunk * envs if phase.collects else phase.updates)
        self.bar = tqdm(
            desc=phase.name,
            total=phase.total * self.each,
            initial=done * phase.iterations * self.each,
            unit="step" if phase.collects else "update",
            unit_scale=True,
            disable=None,
        )

    def row(self, row: dict[str, Any], stages: Mapping[str, float] | None = None) -> None:
        """Writes one epoch's metrics, and separately the seconds since the previous row, in all and by stage."""
        seconds, self.clock = time.perf_counter() - self.clock, time.perf_counter()
        append(self.path / "metrics.jsonl", row)
        stages = stages or {}
        made, spent = 0, stages.get("training", 0.0)
        if self.bar is not None:
            made, self.before = self.phase.size(self.before) * self.each, self.before + 1
        rate = made / spent if made and spent else None  # of training alone
        append(self.path / "timings.jsonl", {"epoch": row["epoch"], "seconds": seconds, "per_second": rate, **stages})
        self.boards.row(row)
        if self.bar is not None:
            self.bar.update(made)
        if score_of_row(row):
            with tqdm.external_write_mode():
                print(evaluation_line(row), flush=True)

    def close_bar(self) -> None:
        """Closes the progress bar, if there is one."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def close(self) -> None:
        """Closes everything."""
        self.close_bar()
        self.boards.close()


def evaluation_line(row: dict[str, Any]) -> str:
    """Returns a one-line summary of an evaluation."""
    other = f"  return {row['eval/return']:>8.1f}" if score_of_row(row) == "success" else ""
    return (
        f"{row['phase']:<9} epoch {row['epoch']:>4}  updates {row['updates']:>8}  steps {row['steps']:>8}  "
        f"{with_interval(row)}{other}  length {row['eval/length']:>6.1f}"
    )
