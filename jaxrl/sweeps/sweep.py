"""A sweep and its folder: the request, the assignment of members to programs, and execution.

sweep.json      the request, and the assignment of members to programs, made before the first epoch
manifest.json   versions, device, data, as for a run
members/007/    config.json, metrics.jsonl, result.json and finally a checkpoint, as for a run
cohorts/0/      members that share one program: checkpoints while they run, timings.jsonl, stage-N.json at the end
processes/      heartbeats, if several processes work on it
report/         the output of `jaxrl report`
"""

import collections
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrl import report
from jaxrl.errors import UserError
from jaxrl.runs import checkpoint, directory, jsonlines, memory
from jaxrl.runs.config import Config, from_dict, timeline_of, to_dict
from jaxrl.runs.datasets import digest_of, load_data
from jaxrl.runs.jsonlines import read_json, write_json
from jaxrl.runs.lock import only_writer
from jaxrl.runs.signals import StopRequested, StopRequests
from jaxrl.sweeps import space as members
from jaxrl.sweeps.cohort import Cohort, CohortRunner, Make
from jaxrl.sweeps.packing import MEASURED, members_that_fit, seconds_per_layout
from jaxrl.sweeps.population import Layout, keys_of, stacked
from jaxrl.sweeps.processes import Machine, Watch, difference, flat
from jaxrl.sweeps.space import Draw, Member, Settings, Space
from jaxrl.types import Env, HostEnv

BEGUN = {"processes", "lock", *(name + end for name in ("manifest.json", "sweep.json") for end in ("", ".partial"))}
"""What a folder may contain if a sweep was stopped before it was fully created."""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep in its folder."""

    path: Path
    cohorts: tuple[Cohort, ...]
    settings: Settings

    @property
    def everyone(self) -> list[Member]:
        """All members, in the requested order."""
        return sorted((member for cohort in self.cohorts for member in cohort.members), key=lambda m: m.index)

    def is_over(self, stage: int) -> bool:
        """Returns whether all cohorts have finished a stage."""
        return all(cohort.mark(stage).exists() for cohort in self.cohorts)

    def dropped_at(self, stage: int) -> set[int]:
        """Returns the indices of the members dropped at the end of a stage: those of its worst settings.

        Settings are ranked by mean success of their members, then by mean return; settings with a diverged member rank
        below all others. Ties keep the requested order.
        """
        settings = {member.index: member.setting for member in self.everyone}
        each: dict[int, list[list[float] | None]] = {}
        for cohort in self.cohorts:
            scores = read_json(cohort.mark(stage), f"{self.path} is damaged")["scores"]
            for index, score in scores.items():
                each.setdefault(settings[int(index)], []).append(score)

        def rank(setting: int) -> tuple[bool, float, float, int]:
            known = [score for score in each[setting] if score is not None]
            success, returns = np.mean(known, axis=0) if known else (0.0, 0.0)
            return len(known) < len(each[setting]), -success, -returns, setting

        kept = sorted(each, key=rank)[: max(round(len(each) * self.settings.keep), 1)]
        return {index for index, setting in settings.items() if setting in each and setting not in kept}


# The request, as JSON


def asked_for(space: Space, settings: Settings) -> dict[str, Any]:
    """Returns the complete description of a sweep, as stored in `sweep.json`."""
    drawn = {path: dataclasses.asdict(draw) for path, draw in space.drawn.items()}
    rest = {name: getattr(space, name) for name in ("grid", "paired", "draws", "draw_seed", "seeds")}
    halving = {name: getattr(settings, name) for name in ("rungs", "keep")}
    return json.loads(json.dumps({"base": to_dict(space.base), "drawn": drawn} | rest | halving))


def space_of(asked: dict[str, Any]) -> Space:
    """Returns the space written by `asked_for`."""
    values = {path: tuple(tuple(x) if isinstance(x, list) else x for x in axis) for path, axis in asked["grid"].items()}
    drawn = {path: Draw(**draw) for path, draw in asked["drawn"].items()}
    rest = {name: asked[name] for name in ("draws", "draw_seed", "seeds")}
    return Space(from_dict(asked["base"]), values, tuple(asked["paired"]), drawn, **rest)


def read(path: Path, settings: Settings) -> Sweep:
    """Returns the sweep in a folder. Raises UserError if there is none."""
    known = read_json(path / "sweep.json", f"{path} is not the folder of a sweep")
    asked, everyone = known["asked"], space_of(known["asked"]).members()
    cohorts = tuple(
        Cohort(
            number, tuple(everyone[i] for i in row["members"]), row["layout"], row["room"], row["dataset_digest"], path
        )
        for number, row in enumerate(known["cohorts"])
    )
    return Sweep(path, cohorts, dataclasses.replace(settings, rungs=tuple(asked["rungs"]), keep=asked["keep"]))


def check_same(path: Path, asked: dict[str, Any]) -> None:
    """Raises UserError if the sweep in a folder is not the requested one, naming the first difference."""
    known = read_json(path / "sweep.json", f"{path} exists and is not the folder of a sweep")["asked"]
    if name := difference(known, asked):
        was, now = (flat(x).get(name, "absent") for x in (known, asked))
        raise UserError(f"{path} belongs to another sweep: {name} is {was} there and {now} here; name another --out")


# Before the first epoch


def create(path: Path, space: Space, settings: Settings, make: Make, processes: int = 1) -> None:
    """Writes a new sweep's folder. sweep.json, which defines the sweep, is written last."""
    rows = []
    for group in members.groups(space.members()):
        config, env = group[0].config, make(group[0].config.env)
        check_env(config, env)
        memory.check(config, env)
        digest = digest_of(load_data(config, env))
        parts, layout = arranged(group, env, settings, processes)
        about = {"layout": layout, "room": max(map(len, parts)), "dataset_digest": digest}
        rows += [{"members": [m.index for m in part]} | about for part in parts]
    path.mkdir(parents=True, exist_ok=True)
    digests = sorted({row["dataset_digest"] for row in rows} - {None})
    write_json(path / "manifest.json", directory.manifest(" ".join(digests) or None))
    write_json(path / "sweep.json", {"asked": asked_for(space, settings), "cohorts": rows})


def check_env(config: Config, env: Env | HostEnv) -> None:
    """Raises UserError if a sweep cannot collect in an environment."""
    if isinstance(env, HostEnv) and any(phase.collects for phase in timeline_of(config).phases):
        raise UserError(
            f"environment {config.env!r}: for simulators on the CPU, sweeps are offline only: --schedule.online-steps 0"
        )


def arranged(
    group: list[Member], env: Env | HostEnv, settings: Settings, processes: int = 1
) -> tuple[list[list[Member]], Layout]:
    """Returns a group's cohorts and their layout. Raises UserError if the request does not fit in memory."""
    fit = members_that_fit(group[0].config, env, len(settings.local()))
    most = settings.max_members_per_program or fit
    if most > fit:
        raise UserError(f"max_members_per_program = {most}: {fit} fit in memory")
    layout = fastest(group, env, settings) if settings.layout == "auto" else settings.layout
    return members.cohorts(group, most, processes), layout


def fastest(group: list[Member], env: Env | HostEnv, settings: Settings) -> Layout:
    """Measures updates of some of the group's members in both layouts and returns the faster layout.

    For small groups the measurement does not pay off.
    """
    if len(group) < MEASURED:
        return "map" if jax.default_backend() == "cpu" and len(group) > len(settings.local()) else "vmap"
    some = group[:MEASURED]
    seconds = seconds_per_layout(
        stacked([m.config.agent for m in some]), keys_of(m.config.seed for m in some), some[0].config, env
    )
    said = ", ".join(f"{name} {1e3 * each:.2f} ms" for name, each in seconds.items())
    print(f"layout, measured on {len(some)} members, time of an update of each: {said}", file=sys.stderr)
    return min(seconds, key=lambda name: seconds[name])


# Driving


def start(space: Space, settings: Settings, path: Path, make: Make, stop: StopRequests, machine: Machine) -> Sweep:
    """Runs a sweep to its end and returns it: a new one, or the one in the folder if it is the same.

    Raises StopRequested on a stop request.
    """
    asked = asked_for(space, settings)
    if path.exists() and not (path / "sweep.json").exists() and {entry.name for entry in path.iterdir()} - BEGUN:
        raise UserError(f"{path} exists and is not the folder of a sweep: name another with --out")
    with alone(path, machine), Watch(path / "processes", machine, settings.patience).kept() as watch:
        if machine.process == 0 and not (path / "sweep.json").exists():
            create(path, space, settings, make, machine.processes)
        wait(watch, lambda: (path / "sweep.json").exists(), stop)
        check_same(path, asked)
        return drive(read(path, settings), make, stop, watch)


def resume(path: Path, settings: Settings, make: Make, stop: StopRequests, machine: Machine) -> Sweep:
    """Resumes the sweep in a folder, runs it to its end and returns it, bit for bit equal to an uninterrupted sweep."""
    sweep = read(path, settings)
    directory.warn_of_changes(path)
    with alone(path, machine), Watch(path / "processes", machine, settings.patience).kept() as watch:
        return drive(sweep, make, stop, watch)


@contextlib.contextmanager
def alone(path: Path, machine: Machine) -> Generator[None]:
    """A context in which no other process has this one's share of the sweep. Raises UserError if one has.

    A folder in which nothing was written is removed.
    """
    name = "lock" if machine.process == 0 else f"processes/{machine.process}.lock"
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    try:
        with only_writer(path, name):
            yield
    finally:
        if path.exists() and [entry.name for entry in path.iterdir()] == ["lock"]:
            (path / "lock").unlink()
            path.rmdir()


def drive(sweep: Sweep, make: Make, stop: StopRequests, watch: Watch) -> Sweep:
    """Returns the sweep once all processes have finished it. Raises StopRequested on a stop request."""
    own = [sweep.cohorts[number] for number in watch.machine.share(len(sweep.cohorts))]
    ends, gone = (*sweep.settings.rungs, 1.0), [set[int]()]
    runner: CohortRunner | None = None
    try:
        for stage in range(len(ends)):
            for cohort in own:
                if cohort.mark(stage).exists():
                    continue
                if runner is None or runner.cohort is not cohort:
                    runner = runner and runner.close()  # free its data before the next is loaded
                    runner = CohortRunner(cohort, ends, sweep.settings.checkpoint_seconds, make, sweep.settings.local())
                runner.work(stage, gone, stop, watch)
            wait(watch, lambda stage=stage: sweep.is_over(stage), stop)
            if stage + 1 < len(ends):
                gone.append(gone[stage] | sweep.dropped_at(stage))
        for cohort in own:
            checkpoint.remove_all(cohort.folder / "checkpoints")  # each member now has its own
    finally:
        if runner is not None:
            runner.close()
    return sweep


def wait(watch: Watch, ready: Callable[[], bool], stop: StopRequests) -> None:
    """Waits for a result of another process. Raises StopRequested on a stop request or if a process is lost."""
    while not ready():
        if stop.requested or watch.gone():
            raise StopRequested
        time.sleep(0.2)


# Results


def finish(sweep: Sweep) -> dict[str, Any]:
    """Writes the report; returns how many members finished, diverged and were dropped, and the best setting."""
    results = [
        read_json(sweep.path / "members" / member.name / "result.json", f"{sweep.path} is damaged")
        for member in sweep.everyone
    ]
    counts = collections.Counter(result["status"] for result in results)
    seconds = sum(row["seconds"] for cohort in sweep.cohorts for row in jsonlines.rows(cohort.folder / "timings.jsonl"))
    result: dict[str, Any] = {"sweep": str(sweep.path), "members": len(results), **counts, "seconds": round(seconds, 1)}
    if all(found["return"] is None for found in results):
        print("every member diverged before its first evaluation: there is nothing to report", file=sys.stderr)
        return result
    found = report.read([sweep.path])
    report.write(found, sweep.path / "report")
    print(report.summary(found))
    if not found.ranked:
        return result
    best = found.ranked[0]
    scores = {"chosen_by": report.estimate(best.counted, found.score), "success": report.separate(best, found.score)}
    points = {name: None if score is None else round(score.point, 4) for name, score in scores.items()}
    return result | {"best": {"values": best.values, "seeds": len(best.counted), **points}}
