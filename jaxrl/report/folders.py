"""What folders hold: runs, members of sweeps, and what each of them did."""

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

STATUSES = ("finished", "diverged", "dropped", "unfinished")
SIMULATORS = ("mujoco", "mujoco-mjx", "brax")


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A run, or a member of a sweep, as its folder tells."""

    path: Path
    config: dict[str, Any]
    """Every field by its dotted name, `agent.eta`, and `agent_name`."""
    status: str
    """finished; diverged: parameters became non-finite; dropped by successive halving; or unfinished."""
    evaluations: tuple[dict[str, Any], ...]
    """Rows of metrics with an evaluation of the agent, oldest first."""
    behaviour: float | None
    """Success of the behaviour that the data come from, where it was evaluated."""
    updates: int
    """Gradient steps spent."""
    steps: int
    """Environment steps spent."""
    judged: dict[str, Any] | None
    """One more evaluation, on episodes that chose nothing."""
    digest: str | None
    """Digest of the dataset; None without one."""
    simulators: tuple[str, ...]
    """The simulators' versions."""
    task: str = ""
    """Environment, and the data where one environment occurs with several."""

    @property
    def whole(self) -> bool:
        """Whether it spent the budget that it was given, as far as it could."""
        return self.status in ("finished", "diverged")

    def last(self, score: str) -> float | None:
        """Returns the newest finite evaluation of `success` or `return`; None without one.

        What diverged before it was evaluated succeeded in no episode.
        """
        values = [row[f"eval/{score}"] for row in self.evaluations if row.get(f"eval/{score}") is not None]
        if values:
            return values[-1]
        return 0.0 if self.status == "diverged" and score == "success" else None

    def scored(self, score: str, separate: bool) -> tuple[float | None, int]:
        """Returns the score and of how many episodes it is: `separate` ones where there are some, else the newest.

        What diverged before it was evaluated has a score of no episodes.
        """
        if separate and self.judged is not None:
            return self.judged.get(score), self.judged["episodes"]
        return self.last(score), self.config["schedule.eval_episodes"] if self.evaluations else 0


def members(paths: Iterable[Path]) -> tuple[list[RunRecord], list[str]]:
    """Returns the members of runs, sweeps and folders of these, each once, and notes on what they lack."""
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
            notes.append(f"{folder}: {missing} of its {len(digests)} members have not begun.")
    return list(found.values()), notes


def _digests(sweep: Path) -> dict[str, str | None]:
    """Returns the digest of each member's dataset, None where it has none, by the member's name."""
    cohorts = read_json(sweep / "sweep.json", f"{sweep} is not a sweep").get("cohorts", [])
    try:
        return {f"{index:03}": cohort["dataset_digest"] for cohort in cohorts for index in cohort["members"]}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{sweep}/sweep.json is damaged: its cohorts name no members or datasets") from error


def _folders(path: Path) -> list[Path]:
    """Returns the runs and sweeps that a path means: itself, or the folders in it."""
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
    """Returns what is in the folder of a run, or of a member of a sweep that knows its dataset's digest by its name.

    Raises UserError where a file is missing or damaged.
    """
    rows = _rows(path / "metrics.jsonl")
    over = (path / "result.json").exists()
    result = read_json(path / "result.json", str(path)) if over else {}
    status = result.get("status", "finished" if over else "unfinished")
    if status not in STATUSES:
        raise UserError(f"{path}/result.json is damaged: status {status!r} is none of {', '.join(STATUSES)}")
    evaluated = [row for row in rows if row.get("eval/success") is not None]
    behaviour = [row["eval/success"] for row in evaluated if row["phase"] == "behaviour"]
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
    """Returns the rows of a metrics file; only a last line that was not finished may be missing."""
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
            raise UserError(f"{path} is damaged: line {number} is no JSON") from error
        if not isinstance(row, dict) or not {"epoch", "phase", "updates", "steps"} <= row.keys():
            raise UserError(f"{path} is damaged: line {number} is no row of metrics")
        rows.append(_finite(row))
    return rows


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the row without the evaluation's numbers that are not finite."""
    return {
        name: value
        for name, value in row.items()
        if not name.startswith("eval/") or (isinstance(value, int | float) and math.isfinite(value))
    }
