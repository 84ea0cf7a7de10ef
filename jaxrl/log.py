"""Where a run's numbers go while it runs: the terminal, metrics.jsonl, TensorBoard, optionally Weights & Biases."""

import importlib
import importlib.util
import math
import time
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tqdm.auto import tqdm

from jaxrl import rundir
from jaxrl.errors import UserError
from jaxrl.train import Phase


class Log:
    """Writes each epoch's row everywhere. `metrics.jsonl` holds nothing that differs between equal runs."""

    def __init__(self, path: Path, wandb: bool = False, epoch: int = 0) -> None:
        """Opens the log of the run in `path`, after so many epochs."""
        self.path = path
        self.board = SummaryWriter(str(path / "tensorboard"), purge_step=epoch, write_to_disk=True)
        self.bar: tqdm | None = None
        self.wandb = _wandb(path) if wandb else None
        self.clock = time.perf_counter()

    def start(self, phase: Phase, done: int, chunk: int, envs: int) -> None:
        """Opens the progress bar of a phase, `done` epochs of which are behind it."""
        self.close_bar()
        self.unit = phase.iterations * (chunk * envs if phase.collects else phase.updates)
        label = "step" if phase.collects else "update"
        total = phase.epochs * self.unit
        self.bar = tqdm(total=total, initial=done * self.unit, desc=phase.name, unit=label, unit_scale=True)

    def say(self, line: str) -> None:
        """Prints a line without breaking the progress bar."""
        tqdm.write(line)

    def row(self, row: dict[str, Any], seconds: float) -> None:
        """Writes one epoch's metrics, and its time apart from them."""
        rundir.append(self.path / "metrics.jsonl", row)
        rate = self.unit / seconds if self.bar is not None else None
        rundir.append(self.path / "timings.jsonl", {"epoch": row["epoch"], "seconds": seconds, "per_second": rate})
        numbers = {k: v for k, v in row.items() if isinstance(v, float) and math.isfinite(v)}
        for name, value in numbers.items():
            self.board.add_scalar(name, value, row["epoch"])
        if self.wandb is not None:
            self.wandb.log(numbers, step=row["epoch"])
        if self.bar is not None:
            self.bar.update(self.unit)
            if "eval/success" in row:
                self.say(evaluation_line(row))
                self.bar.set_postfix(success=f"{row['eval/success']:.2f}")

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
    """Returns what an evaluation found, in one line."""
    return (
        f"{row['phase']:<9} epoch {row['epoch']:>4}  updates {row['updates']:>8}  steps {row['steps']:>8}  "
        f"success {row['eval/success']:.2f} [{row['eval/success_low']:.2f}, {row['eval/success_high']:.2f}]  "
        f"return {row['eval/return']:>8.1f}  length {row['eval/length']:>6.1f}"
    )


def _wandb(path: Path) -> Any:
    if importlib.util.find_spec("wandb") is None:
        raise UserError("wandb is not installed: pip install 'jaxrl[wandb]'")
    wandb = importlib.import_module("wandb")

    return wandb.init(project="jaxrl", name=path.name, dir=str(path), resume="allow", id=path.name)
