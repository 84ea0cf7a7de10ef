"""Logging of a run: terminal, metrics.jsonl, TensorBoard, optionally Weights & Biases."""

import importlib
import importlib.util
import math
import time
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # ty: ignore[import-not-found]
from tensorboardX.summary import scalar
from tqdm import tqdm

from jaxrl.errors import UserError
from jaxrl.runs.jsonlines import append
from jaxrl.runs.scores import score_of_row, with_interval
from jaxrl.types import Phase


class Log:
    """Writes each epoch's row to all logs. `metrics.jsonl` is identical for identical runs."""

    def __init__(self, path: Path, wandb: bool = False, epoch: int = 0) -> None:
        """Opens the log of the run in `path`, after `epoch` epochs."""
        self.path = path
        self.wandb = _wandb(path) if wandb else None
        self.board = _tensorboard(path / "tensorboard", epoch)
        self.bar: tqdm | None = None
        self.clock = time.perf_counter()

    def start(self, phase: Phase, done: int, chunk: int, envs: int) -> None:
        """Opens the progress bar of a phase after `done` of its epochs. It is shown only on terminals."""
        self.close_bar()
        self.unit = phase.iterations * (chunk * envs if phase.collects else phase.updates)
        self.bar = tqdm(
            desc=phase.name,
            total=phase.epochs * self.unit,
            initial=done * self.unit,
            unit="step" if phase.collects else "update",
            unit_scale=True,
            disable=None,
        )

    def row(self, row: dict[str, Any]) -> None:
        """Writes one epoch's metrics, and separately the seconds since the previous row."""
        seconds, self.clock = time.perf_counter() - self.clock, time.perf_counter()
        append(self.path / "metrics.jsonl", row)
        rate = None if self.bar is None else self.unit / seconds
        append(self.path / "timings.jsonl", {"epoch": row["epoch"], "seconds": seconds, "per_second": rate})
        numbers = {k: v for k, v in row.items() if isinstance(v, float) and math.isfinite(v)}
        for name, value in numbers.items():
            self.board.write_event(Event(wall_time=time.time(), step=row["epoch"], summary=scalar(name, value)))
        self.board.flush()
        if self.wandb is not None:
            self.wandb.log(numbers, step=row["epoch"])
        if self.bar is not None:
            self.bar.update(self.unit)
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
        self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def evaluation_line(row: dict[str, Any]) -> str:
    """Returns a one-line summary of an evaluation."""
    other = f"  return {row['eval/return']:>8.1f}" if score_of_row(row) == "success" else ""
    return (
        f"{row['phase']:<9} epoch {row['epoch']:>4}  updates {row['updates']:>8}  steps {row['steps']:>8}  "
        f"{with_interval(row)}{other}  length {row['eval/length']:>6.1f}"
    )


def check_wandb() -> None:
    """Raises UserError if Weights & Biases is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise UserError("wandb is not installed: pip install 'jaxrl[wandb]'")


def _tensorboard(folder: Path, epoch: int) -> EventsWriter:
    """Returns a TensorBoard writer; its first event discards what an interrupted run wrote after `epoch`.

    It writes in this thread, so that a full disk raises here and no events stay queued when the process is stopped.
    """
    folder.mkdir(exist_ok=True)
    board = EventsWriter(str(folder / "events"), filename_suffix=f".{epoch}")
    board.write_event(Event(wall_time=time.time(), step=epoch + 1, session_log=SessionLog(status=SessionLog.START)))
    return board


def _wandb(path: Path) -> Any:
    wandb = importlib.import_module("wandb")
    return wandb.init(project="jaxrl", name=path.name, dir=str(path), resume="allow", id=path.name)
