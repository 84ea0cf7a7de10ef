"""Logging of a run: terminal, metrics.jsonl, TensorBoard, optionally Weights & Biases.

The axis of TensorBoard and Weights & Biases is updates plus environment steps, which grows in every phase; `updates`,
`steps` and `epoch` are logged as curves of their own, to be chosen as an axis.
"""

import importlib
import importlib.util
import math
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # ty: ignore[import-not-found]
from tensorboardX.summary import scalar
from tqdm import tqdm

from jaxrl.errors import UserError
from jaxrl.runs.jsonlines import append, read_json, unwritable, write_json
from jaxrl.runs.scores import score_of_row, with_interval
from jaxrl.types import Phase


class Log:
    """Writes each epoch's row to all logs. `metrics.jsonl` is identical for identical runs."""

    def __init__(self, path: Path, wandb: str | bool = False, done: int = 0) -> None:
        """Opens the log of the run in `path` after `done` updates and steps; `wandb` is a project's name, or True."""
        self.path = path
        self.wandb = _wandb(path, wandb) if wandb else None
        self.board = _tensorboard(path / "tensorboard", done)
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
        numbers = {k: v for k, v in row.items() if isinstance(v, float) and math.isfinite(v)}
        numbers |= {name: row[name] for name in ("epoch", "updates", "steps")}
        try:
            for name, value in numbers.items():
                self.board.write_event(Event(wall_time=time.time(), step=position(row), summary=scalar(name, value)))
            self.board.flush()
        except OSError as error:
            raise unwritable(self.path / "tensorboard", error) from error
        if self.wandb is not None:
            self.wandb.log(numbers, step=position(row))
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


def position(row: dict[str, Any]) -> int:
    """Returns where a row is on the axis of TensorBoard and Weights & Biases: its updates and environment steps."""
    return row["updates"] + row["steps"]


def _tensorboard(folder: Path, done: int) -> EventsWriter:
    """Returns a TensorBoard writer; its first event discards what an interrupted run wrote after `done`.

    It writes in this thread, so that a full disk raises here and no events stay queued when the process is stopped.
    """
    folder.mkdir(exist_ok=True)
    board = EventsWriter(str(folder / "events"), filename_suffix=f".{done}")
    first = done + 1 if done else 0
    board.write_event(Event(wall_time=time.time(), step=first, session_log=SessionLog(status=SessionLog.START)))
    return board


def _wandb(path: Path, project: str | bool) -> Any:
    """Returns the run's own Weights & Biases run: a new one with a random ID, or that noted in `wandb.json` before."""
    note = path / "wandb.json"
    if note.exists():
        known = read_json(note, f"{path} cannot go on with its run of Weights & Biases")
    else:
        default = os.environ.get("WANDB_PROJECT") or "jaxrl"
        known = {"id": uuid.uuid4().hex, "project": default if project is True else project}
        write_json(note, known)
    config = read_json(path / "config.json", f"{path} is not a run directory")
    wandb = importlib.import_module("wandb")
    return wandb.init(**known, name=path.resolve().name, dir=str(path), resume="allow", config=config)
