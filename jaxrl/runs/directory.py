"""A run's folder: configuration, software and hardware, and results.

config.json       everything needed to repeat the run
manifest.json     versions, device, precision, git commit, digest of the data, command line
metrics.jsonl     one row per epoch; deterministic, so that a repetition can be compared byte by byte
timings.jsonl     seconds per epoch and rates, which vary between repetitions
result.json       the result that the run printed in its last line
checkpoints/      the latest carries; checkpoints.json, the epoch of the last
lock              held by the process that writes in the folder
tensorboard/      the metrics for TensorBoard
curves.png, rollout.gif
"""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax

from jaxrl.errors import UserError
from jaxrl.runs import jsonlines
from jaxrl.runs.config import Config, from_dict, to_dict
from jaxrl.runs.jsonlines import read_json, unwritable, write_json
from jaxrl.runs.lock import Lock, only_writer
from jaxrl.system import PACKAGES, cores, jax_setting


def default_path(name: str, env: str, seed: int) -> Path:
    """Returns a folder with name, environment, seed and start time in its name."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{name}-{plain(env)}-s{seed}-{stamp}"


def plain(env: str) -> str:
    """Returns an environment's name with only characters allowed in file names."""
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in env)


BEGUN = {"lock", "manifest.json", "manifest.json.partial", "config.json.partial"}
"""What a folder may contain if a process was killed before it was fully created."""


def check_new(path: Path) -> None:
    """Raises UserError if a new run's folder cannot be created: it exists, or its parent is not writable."""
    if path.exists() and not (path.is_dir() and {entry.name for entry in path.iterdir()} <= BEGUN):
        raise UserError(f"run directory {path} exists: continue it with --resume {path}, or name another with --out")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        tempfile.TemporaryFile(dir=above).close()
    except OSError as error:
        raise UserError(f"cannot write {path}: {above}: {error.strerror}") from error


@contextlib.contextmanager
def created(path: Path, config: Config, digest: str | None) -> Generator[Lock]:
    """A context of a new run's folder, whose only writer this process is. Raises UserError if it cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error
    with only_writer(path) as lock:
        check_new(path)  # another process may have been faster
        write_json(path / "manifest.json", manifest(digest))
        write_json(path / "config.json", to_dict(config))  # last: it makes the folder a run's
        yield lock


def manifest(digest: str | None) -> dict[str, Any]:
    """Returns what a run's results depend on besides its configuration; `digest` is that of its dataset, if any."""
    device, mesh = jax.devices()[0], jax.sharding.get_abstract_mesh()
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "device": device.device_kind,
        "devices": 1 if mesh.empty else mesh.size,  # over which the run is sharded
        "platform": device.platform,
        "machine": platform.machine(),
        "cores": cores(),  # which XLA on the CPU divides its sums among
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "xla_threads": os.environ.get("PJRT_NPROC") or os.environ.get("NPROC"),
        "matmul_precision": jax_setting("default_matmul_precision"),
        "x64": jax_setting("enable_x64"),
        "git_commit": _commit(),
        "dataset_digest": digest,
        "argv": sys.argv[1:],
    }


def read_config(path: Path) -> Config:
    """Returns the configuration of the run in a folder. Raises UserError if there is none."""
    values = read_json(path / "config.json", f"{path} is not a run directory")
    try:
        return from_dict(values)
    except KeyError as error:
        raise UserError(f"{path}/config.json is damaged: {error} is missing") from error


NUMERICAL = ("versions", "device", "devices", "machine", "cores", "xla_flags", "xla_threads", "matmul_precision", "x64")
"""What of a manifest the last bits of a run's numbers depend on."""


def warn_of_changes(path: Path) -> None:
    """Says on stderr, in one line, what differs from the manifest in a folder that changes the last bits of numbers."""
    before, now = read_json(path / "manifest.json", f"{path} is not a run directory"), manifest(None)
    numbers = [name for name in NUMERICAL if name in before and not (name == "cores" and now["platform"] != "cpu")]
    found = [f"{name} {_said(before[name], now[name])}" for name in numbers if before[name] != now[name]]
    if found:
        print(f"{path}: numbers may differ in their last bits: {', '.join(found)}", file=sys.stderr)


def _said(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        names = [name for name in now if before.get(name) != now[name]]
        before, now = (" ".join(f"{name} {which.get(name)}" for name in names) for which in (before, now))
    return (
        f"was {before if before not in ('', None) else 'not set'} and is {now if now not in ('', None) else 'not set'}"
    )


def rewind(path: Path, epoch: int) -> list[Path]:
    """Keeps the rows of a run's metrics and timings up to an epoch; returns the files to which the others were moved.

    Before the first checkpoint, where the run begins again, none are kept.
    """
    last = epoch if epoch else -1
    aside = [jsonlines.keep_until(path / name, last) for name in ("metrics.jsonl", "timings.jsonl")]
    return [file for file in aside if file is not None]


def warn_of_rows(path: Path, epoch: int, aside: list[Path]) -> None:
    """Says on stderr, in one line, where rows were moved that a run which goes on after an epoch cannot keep."""
    if aside:
        names = ", ".join(str(file.relative_to(path)) for file in aside[:2]) + (", ..." if len(aside) > 2 else "")
        print(f"{path}: going on after epoch {epoch}; damaged and later rows are now in {names}", file=sys.stderr)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Returns the git commit of the running source, with a suffix if files were changed; None outside git."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        status = ["git", "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(status, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+changes" if changed else "")
