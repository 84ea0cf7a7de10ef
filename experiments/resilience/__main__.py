"""Does a sweep that is killed again and again end as one that nothing disturbed, bit for bit?

    python -m experiments.resilience [--kills 20] [--process-kills 5]

A small sweep of FMQ, offline and then online: twelve members, of which some diverge, in two programs, halved amid the
run. It runs undisturbed. Then it is started, killed (SIGKILL) at a random time, and started again by the same command,
until it was killed often enough. One kill in four falls before what was not done yet goes on, the others after that,
the first ones spread over the epochs, the last ones over all that remains. Should it end before, another one is begun
in a new folder, until the number of kills is full. Kills while Python is still importing, before anything was touched,
are not counted. In the end every member's metrics and result, the state of its agent and the report's table of settings
are compared with the undisturbed ones, byte by byte.

The same with two processes, a program each: one of them, at random, is killed while both are at work, the other is to
save and stop by itself (exit code 75) within patience, an epoch and saving; then both are started again. A process that
was through with its part when it was killed takes nothing with it: the other comes to its end.

Compiled programs are kept in a folder that is empty at first, so that kills may hit its writing, too. Writes
results.json and table.md into this folder.
"""

import collections
import dataclasses
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

import envs
from experiments.official_speed.__main__ import processor
from experiments.tables import machine
from jaxrl.data import files
from jaxrl.runs import directory, jsonlines
from jaxrl.runs.evaluation import newest_state
from jaxrl.runs.jsonlines import read_json
from jaxrl.training import loop

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
ENV = "point?horizon=20"
SWEEP = (
    "--agent.windows.chunk=2 --agent.windows.batch=64 --agent.num-samples=4 --agent.target-samples=4 "
    "--agent.distillation.warmup=50 --agent.distillation.curriculum=500 --agent.actor.net.hidden 32 32 "
    "--agent.critic.net.hidden 32 32 --agent.adam.lr 1e-3 1e-2 1e3 "
    "--agent.eta 0.3 1.0 --seeds 2 --schedule.offline-updates=1200 --schedule.updates-per-epoch=50 "
    "--schedule.online-steps=1280 --schedule.steps-per-epoch=80 --schedule.envs=8 --schedule.utd=0.5 "
    "--schedule.eval-every=4 --schedule.eval-episodes=10 --rungs 0.5 --keep 0.5 --layout=map "
    "--max-members-per-program=6 --checkpoint-seconds=0.3"
).split()
OFFLINE, EPOCHS, RUNG, STAGES, COHORTS = 24, 40, 20, 2, 2
ENDING = 4  # kills, the last ones, that are not spread over the epochs


@dataclasses.dataclass(frozen=True)
class Study:
    """A sweep under SIGKILLs."""

    kills: int = 20
    """Kills of the sweep of one process."""
    process_kills: int = 5
    """Kills of one of two processes."""
    patience: int = 5
    """Seconds without a sign of life after which another process counts as lost."""
    seed: int = 0
    """Seed of the times."""
    out: Path = HERE
    """Folder of the results."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the sweeps run, and how long one takes from here on."""

    folder: Path
    begin: float = 0.0
    """Seconds before the first epoch, with compiled programs at hand."""
    work: float = 0.0
    """Seconds of all that follows."""
    programs: str = "programs"
    """Folder of the compiled programs."""

    @property
    def data(self) -> Path:
        """The dataset."""
        return self.folder / "data.npz"

    def launch(self, path: Path, *more: str) -> subprocess.Popen:
        """Returns a process that makes the sweep in a folder, or goes on with it."""
        environ = os.environ | {
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / self.programs),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        line = ["-m", "jaxrl.cli", "sweep", "fmq", ENV, f"--data={self.data}", *SWEEP, f"--out={path}", *more]
        with log_of(path, *more).open("a") as log:
            return subprocess.Popen([sys.executable, *line], cwd=ROOT, env=environ, stdout=log, stderr=log)

    def left(self, path: Path) -> float:
        """Returns the seconds of work that are left in a folder."""
        done = sum(len(jsonlines.rows(path / f"cohorts/{number}/timings.jsonl")) for number in range(COHORTS))
        return self.work * max(1 - done / (COHORTS * EPOCHS), 0.25)


def log_of(path: Path, *more: str) -> Path:
    """Returns the file of what a process says."""
    return path.with_name(f"{path.name}{more[-1] if more else ''}.log")


def write_data(path: Path) -> None:
    """Writes 50 episodes of 20 random steps of `point`."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (50, 21, 2)).astype(np.float32)
    position = rng.uniform(-1, 1, (50, 2)).astype(np.float32)
    observations = []
    for t in range(21):
        observations.append(position)
        position = np.clip(position + 0.1 * actions[:, t], -1, 1)
    columns = {
        "observations": np.stack(observations, axis=1).reshape(-1, 2),
        "actions": actions.reshape(-1, 2),
        "terminals": np.tile(np.arange(21) == 20, 50),
    }
    files.save(path, files.from_columns(columns))


def finished(process: subprocess.Popen, log: Path, code: int = 0) -> None:
    """Waits for the end of a process. Raises RuntimeError for another exit code than this."""
    if process.wait() != code:
        raise RuntimeError(f"exit code {process.returncode}, not {code}: {log.read_text()[-3000:]}")


# What a kill hit


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a sweep's folder is."""

    stage: int  # STAGES where only the report is left
    cohort: int
    epoch: int  # that the cohort has written about
    saved: int  # the newest epoch that it can go on from
    saving: bool
    results: int  # of all members


def progress(path: Path) -> Progress | None:
    """Returns how far the sweep in a folder is, None where there is none yet."""
    if not (path / "sweep.json").exists():
        return None
    results = len(list(path.glob("members/*/result.json")))
    for stage in range(STAGES):
        for number in range(COHORTS):
            cohort = path / "cohorts" / str(number)
            if (cohort / f"stage-{stage}.json").exists():
                continue
            rows = jsonlines.rows(cohort / "timings.jsonl")
            saves = [entry for entry in cohort.glob("checkpoints/*") if entry.is_dir()]
            whole = [int(entry.name) for entry in saves if entry.with_name(f"{entry.name}.json").exists()]
            epoch = rows[-1]["epoch"] if rows else 0
            return Progress(stage, number, epoch, max(whole, default=0), len(saves) > len(whole), results)
    return Progress(STAGES, 0, EPOCHS, EPOCHS, False, results)


def touched(path: Path, since: float) -> bool:
    """Whether anything in a folder is newer than a time."""
    return any(entry.stat().st_mtime > since for entry in (path, *path.rglob("*")) if entry.exists())


def hit(before: Progress | None, after: Progress | None) -> str:
    """Returns what a process was at when it was killed, from the folder as it found it and left it."""
    if after is None:
        return "making the folder"
    if after.stage == STAGES:
        return "report"
    if after.saving:
        return "checkpoint"
    if after.epoch == EPOCHS:
        return "finishing"
    here = before is not None and (before.stage, before.cohort) == (after.stage, after.cohort)
    if after.epoch <= max(before.saved if before is not None and here else 0, RUNG * after.stage):
        return "loading or compiling"
    return "offline epoch" if after.epoch < OFFLINE else "online epoch"


def went_on(before: Progress | None, now: Progress | None) -> bool:
    """Whether a sweep that was started again is beyond what it could go on from."""
    if before is None or now is None:
        return now is not None and (now.epoch, now.results) > (0, 0)
    if (now.stage, now.cohort) == (before.stage, before.cohort):
        return now.epoch > max(before.saved, RUNG * before.stage) and now.epoch != before.epoch
    return (now.stage, now.cohort) > (before.stage, before.cohort)


def survived(
    place: Place, path: Path, before: Progress | None, share: float, rng: random.Random, processes: list
) -> bool:
    """Returns whether all processes still run at a random moment, having waited for it.

    One in four lies before what was not done yet goes on, the others within a share of what is left from there on.
    """
    if rng.random() < 0.25 or (before is not None and before.stage == STAGES):
        time.sleep(rng.uniform(0.3, 1.1) * place.begin)  # before that, Python imports
    else:
        while running(processes) and not went_on(before, progress(path)):
            time.sleep(0.02)
        seconds = time.perf_counter() + rng.uniform(0, share * place.left(path))
        while running(processes) and time.perf_counter() < seconds:
            time.sleep(0.01)
    return running(processes)


def running(processes: list[subprocess.Popen]) -> bool:
    """Whether none has ended."""
    return all(process.poll() is None for process in processes)


# One process


def undisturbed(place: Place, path: Path) -> tuple[float, float]:
    """Returns the seconds that a sweep took before its first epoch, and from there on."""
    began, first, rows = time.perf_counter(), 0.0, path / "cohorts/0/timings.jsonl"
    process = place.launch(path)
    while process.poll() is None:
        time.sleep(0.02)
        if not first and rows.exists():
            first = time.perf_counter() - began
    finished(process, log_of(path))
    return first, time.perf_counter() - began - first


def killed(place: Place, count: int, rng: random.Random) -> tuple[list[Path], list[dict[str, Any]]]:
    """Returns the folders of sweeps, driven to their ends, and what so many kills on the way have hit."""
    paths, hits = [place.folder / "killed-0"], []
    while len(hits) < count:
        path, left = paths[-1], count - len(hits)
        before, since = progress(path), time.time()
        share = 1.0 if left <= ENDING else 1 / (left - ENDING)
        process, began = place.launch(path), time.perf_counter()
        if not survived(place, path, before, share, rng, [process]):
            finished(process, log_of(path))
            paths.append(place.folder / f"killed-{len(paths)}")  # it came to its end
            continue
        process.kill()
        process.wait()
        after, seconds = progress(path), round(time.perf_counter() - began, 1)
        if touched(path, since - 0.01) or (before is not None and before.stage == STAGES):
            row = {"sweep": len(paths) - 1, "at": hit(before, after), "seconds": seconds}
            hits.append(row | {"left": dataclasses.asdict(after) if after else None})
            print(json.dumps(hits[-1]), flush=True)
    finished(place.launch(paths[-1]), log_of(paths[-1]))
    return paths, hits


# Two processes


def port() -> int:
    """Returns a port that is free."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def both(place: Place, path: Path, patience: int) -> list[subprocess.Popen]:
    """Returns two processes that make a sweep, or go on with it, together."""
    more = [f"--coordinator=127.0.0.1:{port()}", "--processes=2", f"--patience={patience}"]
    return [place.launch(path, *more, f"--process={number}") for number in (0, 1)]


def signs(path: Path) -> list[str]:
    """Returns the meetings of which processes say that they are at work."""
    found = [read_json(sign, "") for sign in sorted(path.glob("processes/?.json"))]
    return [sign["meeting"] for sign in found if sign["state"] == "running"]


def bereaved(place: Place, count: int, patience: int, rng: random.Random) -> tuple[list[Path], list[dict[str, Any]]]:
    """Returns the folders of sweeps by two processes, driven to their ends, and how each kill of one was survived."""
    paths, hits, known = [place.folder / "pair-0"], [], set[str]()
    while len(hits) < count:
        path, victim = paths[-1], rng.randrange(2)
        before, processes = progress(path), both(place, path, patience)
        while not (len(meetings := signs(path)) == 2 and len(set(meetings)) == 1 and meetings[0] not in known):
            if any(process.poll() is not None for process in processes):
                raise RuntimeError(log_of(path, f"--process={victim}").read_text()[-3000:])
            time.sleep(0.05)
        known.add(meetings[0])
        if not survived(place, path, before, min(1.0, 2 / (count - len(hits))), rng, processes):
            for number, process in enumerate(processes):
                finished(process, log_of(path, f"--process={number}"))
            paths.append(place.folder / f"pair-{len(paths)}")
            continue
        processes[victim].kill()
        began, after = time.perf_counter(), progress(path)
        log = log_of(path, f"--process={1 - victim}")
        if processes[1 - victim].wait() == 0:
            for number, process in enumerate(both(place, path, patience)):  # the report may be missing
                finished(process, log_of(path, f"--process={number}"))
            paths.append(place.folder / f"pair-{len(paths)}")
            continue
        finished(processes[1 - victim], log, code=75)
        row = {"sweep": len(paths) - 1, "killed": victim, "seconds": round(time.perf_counter() - began, 1)}
        said = f"process {victim} of 2 was not heard of for {patience} s" in log.read_text()
        hits.append(row | {"said": said, "at": hit(before, after)})
        processes[victim].wait()
        print(json.dumps(hits[-1]), flush=True)
    for number, process in enumerate(both(place, paths[-1], patience)):
        finished(process, log_of(paths[-1], f"--process={number}"))
    return paths, hits


# What is left of them


def differences(a: Path, b: Path) -> list[str]:
    """Returns what differs between two sweeps that are over, by file."""
    found = [] if same_bytes(a, b, "report/settings.csv") else ["report/settings.csv"]
    homes = [sorted(home.name for home in (path / "members").iterdir()) for path in (a, b)]
    if homes[0] != homes[1]:
        return ["members"]
    for name in homes[0]:
        for file in (f"members/{name}/metrics.jsonl", f"members/{name}/result.json"):
            found += [] if same_bytes(a, b, file) else [file]
        one, other = (state(path / "members" / name) for path in (a, b))
        different = [leaf for leaf in one.keys() | other.keys() if one.get(leaf) != other.get(leaf)]
        found += [f"members/{name} agent {leaf}" for leaf in sorted(different)]
    return found


def same_bytes(a: Path, b: Path, file: str) -> bool:
    """Whether a file is the same in two folders."""
    return (a / file).read_bytes() == (b / file).read_bytes()


def state(member: Path) -> dict[str, tuple[Any, ...]]:
    """Returns every leaf of a member's agent, as its checkpoint has it: shape, type and bytes."""
    config = directory.read_config(member)
    leaves = newest_state(config, loop.on_device(config.agent), envs.make(config.env), member)
    return {
        jax.tree_util.keystr(name): (leaf.shape, str(leaf.dtype), np.asarray(leaf).tobytes())
        for name, leaf in jax.tree.leaves_with_path(leaves)
    }


def statuses(path: Path) -> dict[str, int]:
    """Returns how many members of a sweep finished, diverged and were dropped."""
    results = (read_json(home / "result.json", str(home)) for home in sorted((path / "members").iterdir()))
    return dict(collections.Counter(result["status"] for result in results))


# Results


def table(results: dict[str, Any]) -> str:
    """Returns the results as people read them."""
    alone, pair, about = results["one process"], results["two processes"], results["manifest"]
    lines = [["what the kill hit", "kills"], ["---", "---:"]]
    lines += [[at, str(count)] for at, count in collections.Counter(row["at"] for row in alone["kills"]).items()]
    seconds = sorted(row["seconds"] for row in pair["kills"])
    most = max(collections.Counter(row["sweep"] for row in alone["kills"]).values())
    members = ", ".join(f"{count} {status}" for status, count in results["members"].items())
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + (
        f"\n\nA sweep of {sum(results['members'].values())} members ({members}) in two programs, killed "
        f"{len(alone['kills'])} times, up to {most} times before its end: {equal(alone)}. One takes "
        f"{results['undisturbed_s'][-1]:.0f} s undisturbed; all of them with the kills, {alone['seconds']:.0f} s.\n\n"
        f"Two processes, of which one was killed {len(pair['kills'])} times: {equal(pair)}. The other stopped by "
        f"itself, saved, with exit code 75, {seconds[0]:.1f} to {seconds[-1]:.1f} s later, at a patience of "
        f"{results['study']['patience']} s; an epoch takes {results['epoch_s']:.2f} s, and "
        f"{results['begin_s']:.0f} s pass before the first.\n\n"
        f"{about['cores']} cores of {about['processor']}, load average {results['load_average']:.1f}, "
        f"jax {about['versions']['jax']}. Equal: metrics, results and agents of all members, the table of settings.\n"
    )


def equal(part: dict[str, Any]) -> str:
    """Returns in how many folders the sweep ended as the undisturbed one, in words."""
    different = sum(bool(found) for found in part["differences"])
    count = len(part["differences"])
    if not different:
        whose = "its result is" if count == 1 else f"the results of {count} such sweeps are"
        return f"{whose} the undisturbed one, bit for bit"
    return f"the results of {different} of {count} sweeps differ"


def main(study: Study) -> None:
    """Runs the study and writes its results."""
    rng = random.Random(study.seed)
    with tempfile.TemporaryDirectory() as temporary:
        place = Place(Path(temporary))
        write_data(place.data)
        whole = place.folder / "whole"
        took = [sum(undisturbed(place, whole))]
        begin, work = undisturbed(place, place.folder / "again")
        took.append(begin + work)
        rows = [row["seconds"] for path in whole.glob("cohorts/*/timings.jsonl") for row in jsonlines.rows(path)]
        results: dict[str, Any] = {
            "manifest": machine("") | {"processor": processor()},
            "study": {"kills": study.kills, "patience": study.patience, "seed": study.seed},
            "members": statuses(whole),
            "undisturbed_s": [round(seconds, 1) for seconds in took],
            "undisturbed_twice": differences(whole, place.folder / "again"),
            "begin_s": round(begin, 1),
            "epoch_s": round(float(np.median(rows)), 2),
        }
        cold = Place(place.folder, begin, work, "programs-killed")
        for name, (count, ways) in {
            "one process": (study.kills, lambda: killed(cold, study.kills, rng)),
            "two processes": (study.process_kills, lambda: bereaved(cold, study.process_kills, study.patience, rng)),
        }.items():
            began = time.perf_counter()
            paths, hits = ways()
            seconds = round(time.perf_counter() - began, 1)
            found = [differences(whole, path) for path in paths]
            results[name] = {"kills": hits, "differences": found, "seconds": seconds}
            print(json.dumps({name: len(hits), "asked": count, "differences": found, "seconds": seconds}), flush=True)
        results["load_average"] = round(os.getloadavg()[1], 1)
    (study.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (study.out / "table.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Study))
