"""Golden replay: what the official implementations computed, computed again by jaxrl's own agents.

`replay(path)` takes one recorded file, builds the agent that the file describes with the parameters that it holds,
hands it the recorded batch and random numbers, and compares every number under `expected/` in the file. A number that
nobody computes counts as a failure. The files' own README states keys and formulas.

What is not compared: in `dataset_qc` and `dataset_qgf`, the entries of a window after its episode's end. The official
windows run on or freeze there, ours end; in all of them such entries have no weight in a loss.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden import bc, dataset, dqc, fql, iql, odice, qc, qgf, rebrac, td3, trajweight
from tests.golden.recorded import Recorded

TOLERANCE = 1e-4  # of the largest number of an array
FLOOR = 0.1  # arrays that are smaller than this are compared absolutely, at TOLERANCE * FLOOR

TEXTS = ("meta", "hparams", "arch", "scalars")

METHODS: dict[str, Callable[[Recorded], dict[str, Any]]] = {
    "bc_": bc.replay,
    "dataset_": dataset.replay,
    "dqc_": dqc.replay,
    "edp_": qgf.edp,
    "fql_": fql.replay,
    "grad_step_": qgf.replay,
    "iql_": iql.replay,
    "qc_": qc.replay,
    "qgf_": qgf.replay,
    "rebrac_": rebrac.replay,
    "a2pr_": td3.a2pr,
    "odice_": odice.replay,
    "prdc_": td3.prdc,
    "td3bc_": td3.td3bc,
    "trajweight_": trajweight.replay,
}
"""By the beginning of a file's name: what computes everything that such a file expects."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one file."""

    file: str
    quantities: int
    worst: float  # relative error
    where: str  # the quantity with that error
    missing: tuple[str, ...] = ()  # quantities that nobody computes
    known: bool = True
    reason: str = ""  # why the file could not be replayed

    @property
    def passed(self) -> bool:
        """Whether all that the file holds was computed, and is right."""
        complete = self.known and not self.missing and not self.reason
        return complete and self.quantities > 0 and self.worst <= TOLERANCE

    def __str__(self) -> str:
        if not self.known:
            return f"{self.file:<42} unknown method"
        if self.reason:
            return f"{self.file:<42} FAIL: cannot be replayed: {self.reason}"
        verdict = "pass" if self.passed else "FAIL"
        line = f"{self.file:<42} {self.quantities:>4} quantities, worst relative error {self.worst:.1e}  {verdict}"
        if self.missing:
            return f"{line}: {len(self.missing)} not computed, such as {self.missing[0]}"
        return line if self.passed else f"{line}: {self.where}"


def replay(path: Path) -> Outcome:
    """Returns the outcome of one file; of one that cannot be replayed, the reason."""
    method = next((METHODS[prefix] for prefix in METHODS if path.name.startswith(prefix)), None)
    if method is None:
        return Outcome(path.name, 0, 0.0, "", known=False)
    try:
        return _compared(path, method)
    except Exception as error:  # whatever a foreign file makes the agents raise: the other files are still to be tried
        return Outcome(path.name, 0, 0.0, "", reason=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def _compared(path: Path, method: Callable[[Recorded], dict[str, Any]]) -> Outcome:
    with path.open("rb") as stream, np.load(stream) as file:
        arrays = {name: file[name] for name in file.files}
    texts = {name: json.loads(str(arrays.pop(name, "{}"))) for name in ("meta", "hparams", "arch", "scalars")}
    recorded = Recorded(arrays | texts.pop("scalars"), **texts)
    expected = recorded.below("expected/")
    got = method(recorded)
    pairs = {name: _pair(value, expected.get(name)) for name, value in got.items()}
    errors = {name: error(*pair) for name, pair in pairs.items() if pair[1] is not None}
    where = max(errors, key=lambda name: errors[name], default="")
    missing = tuple(name for name in expected if name not in got)
    return Outcome(path.name, len(errors), errors.get(where, 0.0), where, missing)


def _pair(got: Any, expected: Any) -> tuple[Any, Any]:
    """Returns (got, expected), where a method may say itself which part of the recording it answers to."""
    return got if isinstance(got, tuple) else (got, expected)


def error(got: Any, expected: Any) -> float:
    """Returns the largest difference, in units of the largest number that is expected; infinite for another shape."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    if got.shape != expected.shape or not np.isfinite(got).all():
        return float("inf")
    return float(np.abs(got - expected).max(initial=0) / max(np.abs(expected).max(initial=0), FLOOR))
