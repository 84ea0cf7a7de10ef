"""Curves of a run for TensorBoard, and optionally for Weights & Biases.

Their axis is updates plus environment steps, which grows in every phase; `updates`, `steps` and `epoch` are curves of
their own, to be chosen as an axis.
"""

import contextlib
import importlib
import importlib.util
import math
import os
import time
import uuid
from collections.abc import Generator
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # ty: ignore[import-not-found]
from tensorboardX.summary import scalar

from jaxrl.errors import UserError
from jaxrl.runs.jsonlines import read_json, rows, unwritable, write_json


class Boards:
    """Writes rows of metrics as points of curves."""

    def __init__(self, path: Path, wandb: str | bool = False, done: int = 0, group: str | None = None) -> None:
        """Opens the curves of the run in `path` after `done` updates and steps.

        `wandb` is a project of Weights & Biases, or True for that of WANDB_PROJECT, `group` what groups runs there.
        """
        self.folder = path / "tensorboard"
        self.wandb = _wandb(path, wandb, group) if wandb else None
        self.board = _tensorboard(self.folder, done)

    def row(self, row: dict[str, Any]) -> None:
        """Writes one epoch's metrics. Raises UserError if the disk is full."""
        numbers = {k: v for k, v in row.items() if isinstance(v, float) and math.isfinite(v)}
        numbers |= {name: row[name] for name in ("epoch", "updates", "steps")}
        with _named(self.folder):
            for name, value in numbers.items():
                self.board.write_event(Event(wall_time=time.time(), step=position(row), summary=scalar(name, value)))
            self.board.flush()
        if self.wandb is not None:
            self.wandb.log(numbers, step=position(row))

    def close(self) -> None:
        """Closes the curves."""
        with _named(self.folder):
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def publish(path: Path, wandb: str | bool = False, group: str | None = None) -> None:
    """Writes the curves of a finished run from its `metrics.jsonl`, unless they are there already."""
    if (path / ("wandb.json" if wandb else "tensorboard")).exists():
        return
    with contextlib.closing(Boards(path, wandb, group=group)) as boards:
        for row in rows(path / "metrics.jsonl"):
            boards.row(row)


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
    first = done + 1 if done else 0
    with _named(folder):
        folder.mkdir(exist_ok=True)
        board = EventsWriter(str(folder / "events"), filename_suffix=f".{done}")
        board.write_event(Event(wall_time=time.time(), step=first, session_log=SessionLog(status=SessionLog.START)))
        board.flush()
    return board


@contextlib.contextmanager
def _named(path: Path) -> Generator[None]:
    """A context in which a failure to write names a file or folder."""
    try:
        yield
    except OSError as error:
        raise unwritable(path, error) from error


def _wandb(path: Path, project: str | bool, group: str | None) -> Any:
    """Returns the run's own Weights & Biases run: a new one with a random ID, or that noted in `wandb.json` before."""
    note = path / "wandb.json"
    if note.exists():
        known = read_json(note, f"{path} cannot go on with its run of Weights & Biases")
        if project is not True and project != known.get("project"):
            raise UserError(f"--wandb-project {project}: this run's is {known.get('project')!r}")
    else:
        default = os.environ.get("WANDB_PROJECT") or "jaxrl"
        known = {"id": uuid.uuid4().hex, "project": default if project is True else project}
    config = read_json(path / "config.json", f"{path} is not a run directory")
    wandb = importlib.import_module("wandb")
    about = {"name": path.resolve().name, "group": group, "config": config}
    try:
        run = wandb.init(**known, **about, dir=str(path), resume="allow")
    except Exception as error:  # without a login or a connection; its errors have no class in common
        raise UserError(f"Weights & Biases: {' '.join(str(error).split())}") from error
    write_json(note, known)
    return run
