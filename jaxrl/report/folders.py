"""Reading of runs and sweep members from their folders."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxrl.errors import UserError
from jaxrl.runs import directory
from jaxrl.runs.config import to_dict
from jaxrl.runs.jsonlines import as_json, read_json
from jaxrl.runs.scores import score_of_row, scored

STATUSES = ("finished", "diverged", "dropped", "unfinished")
SIMULATORS = ("mujoco", "mujoco-mjx", "brax")


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A run, or a member of a sweep, as read from its folder."""

    path: Path
    config: dict[str, Any]
    """Every field by its dotted name, such as `agent.eta`, and `agent_name`."""
    status: str
    """finished; diverged: parameters became non-finite; dropped by successive halving; or unfinished."""
    evaluations: tuple[dict[str, Any], ...]
    """Metrics rows with an evaluation of the agent, oldest first."""
    behaviour: float | None
    """Score of the behavior policy of the data, if it was evaluated."""
    updates: int
    """Gradient steps spent."""
    steps: int
    """Environment steps spent."""
    judged: dict[str, Any] | None
    """A further evaluation, on episodes not used for selection."""
    digest: str | None
    """Digest of the dataset; None without one."""
    simulators: tuple[str, ...]
    """The simulators' versions."""
    task: str = ""
    """Environment, and the dataset if the environment occurs with several."""

    @property
    def whole(self) -> bool:
        """Whether it spent its whole budget, or diverged."""
        return self.status in ("finished", "diverged")

    def last(self, score: str) -> float | None:
        """Returns the latest finite evaluation of `success` or `return`; None without one.

        The success of a member that diverged before its first evaluation is 0.
        """
        values = [row[f"eval/{score}"] for row in self.evaluations if row.get(f"eval/{score}") is not None]
        if values:
            return values[-1]
        return 0.0 if self.status == "diverged" and score == "success" else None

    def scored(self, score: str, separate: bool) -> tuple[float | None, int]:
        """Returns the score and its number of episodes: the `separate` ones if any, else the latest evaluation.

        For a member that diverged before its first evaluation, the number is 0.
        """
        if separate and self.judged is not None:
            return self.judged.get(score), self.judged["episodes"]
        return self.last(score), self.config["schedule.eval_episodes"] if self.evaluations else 0


def members(paths: Iterable[Path]) -> tuple[list[RunRecord], list[str]]:
    """Returns the members of runs, sweeps and folders of these, without duplicates, and notes on missing members."""
    found: dict[Path, RunRecord] = {}
    notes = []
    for folder in (folder for path in paths for folder in _folders(path)):
        if (folder / "config.json").exists():
            found.setdefault(folder.resolve(), load(folder))
            continue
        digests = _digests(folder)
        begun = [path.parent for path in sorted((folder / "members").glob("*/config.json"))]
        found |= {path.resolve(): load(path, digests) for path in begun if path.resolve() not in found}
        if (missing := len(digests) - len(begun)) > 0:
            notes.append(f"{folder}: {missing} of its {len(digests)} members have not started.")
    return list(found.values()), notes


def _digests(sweep: Path) -> dict[str, str | None]:
    """Returns the digest of each member's dataset by the member's name, None without a dataset."""
    cohorts = read_json(sweep / "sweep.json", f"{sweep} is not a sweep").get("cohorts", [])
    try:
        return {f"{index:03}": cohort["dataset_digest"] for cohort in cohorts for index in cohort["members"]}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{sweep}/sweep.json is damaged: its cohorts lack members or datasets") from error


def _folders(path: Path) -> list[Path]:
    """Returns the runs and sweeps at a path: the path itself, or the folders in it."""
    if not path.is_dir():
        raise UserError(f"{path} is not a run directory: {'it is a file' if path.exists() else 'it does not exist'}")
    if _is_one(path):
        return [path]
    if found := [child for child in sorted(path.iterdir()) if _is_one(child)]:
        return found
    what = "holds neither config.json nor runs" if any(path.iterdir()) else "is empty"
    raise UserError(f"{path} is not a run directory, a sweep or a folder of these: it {what}")


def _is_one(path: Path) -> bool:
    return any((path / name).exists() for name in ("config.json", "sweep.json"))


def load(path: Path, digests: Mapping[str, str | None] | None = None) -> RunRecord:
    """Returns the record of a run, or of a sweep member, whose dataset digest is looked up by name in `digests`.

    Raises UserError if a file is missing or damaged.
    """
    rows = _rows(path / "metrics.jsonl")
    over = (path / "result.json").exists()
    result = read_json(path / "result.json", str(path)) if over else {}
    status = result.get("status", "finished" if over else "unfinished")
    if status not in STATUSES:
        raise UserError(f"{path}/result.json is damaged: status {status!r} is not one of {', '.join(STATUSES)}")
    evaluated = [row for row in rows if score_of_row(row)]
    behaviour = [scored(row)[0] for row in evaluated if row["phase"] == "behaviour"]
    manifest = _manifest(path)
    last = {**(rows[-1] if rows else {"updates": 0, "steps": 0}), **result}
    versions = manifest.get("versions", {})
    return RunRecord(
        path=path,
        config=_config(path),
        status=status,
        evaluations=tuple(row for row in evaluated if row["phase"] != "behaviour"),
        behaviour=behaviour[0] if behaviour else None,
        updates=last["updates"],
        steps=last["steps"],
        judged=as_json(result["judged"]) if result.get("judged") else None,
        digest=(digests or {}).get(path.name, manifest.get("dataset_digest")),
        simulators=tuple(f"{name} {versions.get(name)}" for name in SIMULATORS),
    )


def _manifest(path: Path) -> dict[str, Any]:
    """Returns the manifest of a run, or of the sweep that a member belongs to."""
    of_sweep = path.parent.parent / "manifest.json"
    own = path / "manifest.json"
    return read_json(of_sweep if not own.exists() and of_sweep.exists() else own, f"{path} is not a run directory")


def _config(path: Path) -> dict[str, Any]:
    try:
        values = to_dict(directory.read_config(path))
    except UserError as error:
        raise error if str(error).startswith(str(path)) else UserError(f"{path}/config.json: {error}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path}/config.json is damaged: {error}") from error
    return _flat(values)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested fields by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: _hashable(value)}
    return flat


def _hashable(value: Any) -> Any:
    return tuple(_hashable(part) for part in value) if isinstance(value, list | tuple) else value


def _rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics file, without an incomplete last line."""
    if not path.exists():
        return []
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{path} is damaged: line {number} is not JSON") from error
        if not isinstance(row, dict) or not {"epoch", "phase", "updates", "steps"} <= row.keys():
            raise UserError(f"{path} is damaged: line {number} is not a metrics row")
        rows.append(_finite(row))
    return rows


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the row without non-finite evaluation metrics."""
    return {
        name: value
        for name, value in row.items()
        if not name.startswith("eval/") or (isinstance(value, int | float) and math.isfinite(value))
    }
