"""A run's folder: configuration, software and hardware, and results.

config.json       everything needed to repeat the run
manifest.json     versions, device, precision, git commit, digest of the data, command line
metrics.jsonl     one row per epoch; deterministic, so that a repetition can be compared byte by byte
timings.jsonl     seconds per epoch and rates, which vary between repetitions
result.json       the result that the run printed in its last line
checkpoints/      the latest carries
tensorboard/      the metrics for TensorBoard
curves.png, rollout.gif
"""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

from jaxrl.errors import UserError
from jaxrl.runs.config import Config, from_dict, to_dict
from jaxrl.runs.jsonlines import read_json, rows, write, write_json
from jaxrl.system import PACKAGES, jax_setting


def default_path(name: str, env: str, seed: int) -> Path:
    """Returns a folder with name, environment, seed and start time in its name."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{name}-{plain(env)}-s{seed}-{stamp}"


def plain(env: str) -> str:
    """Returns an environment's name with only characters allowed in file names."""
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in env)


def check_new(path: Path) -> None:
    """Raises UserError if a new run's folder cannot be created: it exists, or its parent is not writable."""
    if path.exists():
        raise UserError(f"run directory {path} exists: continue it with --resume {path}, or name another with --out")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        tempfile.TemporaryFile(dir=above).close()
    except OSError as error:
        raise UserError(f"cannot write {path}: {above}: {error.strerror}") from error


def create(path: Path, config: Config, digest: str | None) -> None:
    """Writes a new run's folder. Raises UserError if that fails."""
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    write_json(path / "manifest.json", manifest(digest))
    write_json(path / "config.json", to_dict(config))


def manifest(digest: str | None) -> dict[str, Any]:
    """Returns what a run's results depend on besides its configuration; `digest` is that of its dataset, if any."""
    device, mesh = jax.devices()[0], jax.sharding.get_abstract_mesh()
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "device": device.device_kind,
        "devices": 1 if mesh.empty else mesh.size,  # over which the run is sharded
        "platform": device.platform,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
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


def rewind(path: Path, epoch: int) -> None:
    """Removes the rows after an epoch from a run's metrics and timings."""
    for file in filter(Path.exists, (path / "metrics.jsonl", path / "timings.jsonl")):
        write(file, "".join(json.dumps(row) + "\n" for row in rows(file) if row["epoch"] <= epoch))


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
