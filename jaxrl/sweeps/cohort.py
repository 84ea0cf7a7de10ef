"""Execution of a cohort: the members of a sweep that share a program, run epoch by epoch, with separate records."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxrl.replay.ring import Ring
from jaxrl.replay.streaming import Stream
from jaxrl.rollout import host
from jaxrl.runs import checkpoint, directory, driver, jsonlines
from jaxrl.runs.boards import publish
from jaxrl.runs.config import to_dict
from jaxrl.runs.datasets import check_same_data, load_data, with_data
from jaxrl.runs.evaluation import evaluate_behaviour, evaluation
from jaxrl.runs.jsonlines import append, write_json
from jaxrl.runs.lock import only_writer
from jaxrl.runs.scores import score_of_row, scored, written
from jaxrl.runs.signals import StopRequested, StopRequests
from jaxrl.sweeps.population import RUNNING, Layout, Population, keys_of, programs, stacked
from jaxrl.sweeps.processes import Watch
from jaxrl.sweeps.space import Member
from jaxrl.training.schedule import reads_dataset
from jaxrl.types import Env, Fitting, HostEnv, score_of

Make = Callable[[str], Env | HostEnv]  # an environment from its name


@dataclasses.dataclass(frozen=True)
class Cohort:
    """Members that share one program, and their folders."""

    number: int
    members: tuple[Member, ...]
    layout: Layout
    room: int  # number of members that its program has room for, equal to that of other cohorts of its shape
    dataset_digest: str | None  # None if no dataset is used
    path: Path  # of the sweep

    @property
    def folder(self) -> Path:
        """The folder of its checkpoints and timings."""
        return self.path / "cohorts" / str(self.number)

    def mark(self, stage: int) -> Path:
        """Returns the file that marks a finished stage and holds the members' scores."""
        return self.folder / f"stage-{stage}.json"

    def home(self, member: Member) -> Path:
        """Returns the folder of a member."""
        return self.path / "members" / member.name


class CohortRunner:
    """A cohort's programs and data, and which members are active."""

    def __init__(self, cohort: Cohort, ends: tuple[float, ...], seconds: float, make: Make, devices: list) -> None:
        """Loads the data without compiling. Raises UserError if the data have changed.

        Stages end after the fractions `ends` of the run; checkpoints are at least `seconds` apart.
        """
        self.cohort, self.seconds, self.held = cohort, seconds, contextlib.ExitStack()
        config = cohort.members[0].config
        env = make(config.env)
        config = with_data(config, env)
        dataset = load_data(config, env)
        check_same_data(cohort.path, dataset, cohort.dataset_digest)
        self.run = driver.prepare(config, env, dataset)
        self.programs = programs(env, cohort.layout, tuple(devices))
        if not isinstance(self.run.data, Stream):
            self.run = dataclasses.replace(self.run, data=self.programs.share(self.run.data))
        self.ends = tuple(self.evaluated_from(share) for share in ends)
        self.clock = self.saved = time.perf_counter()
        cohort.folder.mkdir(parents=True, exist_ok=True)
        self.lock = self.held.enter_context(only_writer(cohort.folder))
        for member in cohort.members:
            home = cohort.home(member)
            home.mkdir(parents=True, exist_ok=True)
            (home / "metrics.jsonl").touch()
            write_json(home / "config.json", to_dict(member.config))

    def close(self) -> None:
        """Stops the simulator processes, if any, and lets other processes write in the cohort's folder."""
        self.run.close()
        self.held.close()

    def evaluated_from(self, share: float) -> int:
        """Returns the first evaluated epoch count at or after a fraction of the run."""
        timeline, every = self.run.timeline, self.run.config.schedule.eval_every
        first = max(round(share * timeline.epochs), 1)
        return next(e for e in range(first, timeline.epochs + 1) if timeline.evaluates(e - 1, every))

    def work(self, stage: int, gone: list[set[int]], stop: StopRequests, watch: Watch) -> None:
        """Runs the members to the end of a stage. On a stop request, saves and raises StopRequested.

        `gone[s]` are the indices of the members dropped before stage s, for all stages up to this one.
        """
        population, done = self.restore(stage, gone)
        end, last = self.ends[stage], stage + 1 == len(self.ends)
        with tqdm(total=end, initial=done, unit="epoch", desc=f"program {self.cohort.number}", disable=None) as bar:
            for index in range(done, end):
                if not self.running(population).any():
                    break
                population = self.epoch(population, index)
                self.lock.check()
                bar.update()
                stopping = not (last and index + 1 == end) and (watch.gone() or stop.requested)
                if stopping or index + 1 == end or time.perf_counter() - self.saved >= self.seconds:
                    self.save(index + 1, population)
                if stopping:
                    raise StopRequested
        if last and self.members:
            self.finish(population)
        scores = {
            member.index: self.score(member) if runs else None
            for member, runs in zip(self.members, self.running(population), strict=True)
            if member.index not in gone[stage]
        }
        write_json(self.cohort.mark(stage), {"scores": scores})

    # Active members

    def select(self, stage: int, gone: list[set[int]]) -> None:
        """Selects the members that the program has in a stage.

        With layout "map", dropped members cost nothing. With "vmap", the program is recompiled without them.
        """
        out = gone[stage] if self.cohort.layout == "vmap" else set()
        self.members = [member for member in self.cohort.members if member.index not in out]
        self.room = len(self.members) if out else self.cohort.room
        if self.members:
            self.agents = self.programs.place(stacked([member.config.agent for member in self.members]), self.room)

    def running(self, population: Population) -> np.ndarray:
        """Returns which members are still running, [M] bool."""
        return np.asarray(population.stopped)[: len(self.members)] == RUNNING

    def first(self) -> Population:
        """Returns the members before their first epoch."""
        keys = self.programs.place(keys_of(m.config.seed for m in self.members), self.room)
        given: dict[str, Any] = {"schedule": self.run.config.schedule, "execution": self.run.execution}
        population, data = self.programs.begin(self.agents, keys=keys, **given), self.data(0)
        if data is not None and isinstance(self.run.agent, Fitting):
            population = self.programs.fit(self.agents, population=population, dataset=data)
        return self.programs.pad(population, len(self.members))

    def abstract(self, done: int) -> Any:
        """Returns the shapes of a checkpoint of the members after `done` epochs."""
        run, count = self.run, len(self.members)
        one = driver.abstract_carry(run.agent, run.env, run.config.schedule, run.timeline, done, run.execution)
        carry = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), one)
        stopped: Any = jax.ShapeDtypeStruct((count,), np.int32)
        return Population(carry, stopped)

    def save(self, done: int, population: Population) -> None:
        """Writes a checkpoint of the members, without those that only pad the devices."""
        tree = jax.tree.map(lambda x: x[: len(self.members)], population)
        checkpoint.save(self.cohort.folder / "checkpoints", done, tree)
        self.saved = time.perf_counter()

    def restore(self, stage: int, gone: list[set[int]]) -> tuple[Population, int]:
        """Returns the members at the start of a stage, without dropped ones, and the number of completed epochs."""

        def abstract(done: int) -> Any:
            self.select(next(s for s, end in enumerate(self.ends) if done <= end), gone)
            return self.abstract(done)

        folder = self.cohort.folder / "checkpoints"
        loaded = checkpoint.load(folder, abstract)
        done = 0 if loaded is None else loaded[0]
        if loaded is None:
            checkpoint.check_none_missing(folder, "to begin again, name another folder with --out")
        checkpoint.keep_until(folder, done)
        self.rewind(done)
        if loaded is None:
            self.select(0, gone)
            return self.first(), 0
        population, before, stopped = loaded[1], self.members, np.asarray(loaded[1].stopped)
        leaving = np.array([member.index in gone[stage] for member in before]) & (stopped >= RUNNING)
        population = dataclasses.replace(population, stopped=np.where(leaving & (stopped == RUNNING), -done, stopped))
        for i in np.flatnonzero(leaving).tolist():
            self.finalize(population, i, None)
        self.select(stage, gone)
        rows = np.array([i for i, member in enumerate(before) if member in self.members], int)
        if len(rows) < len(before):
            population = jax.tree.map(lambda x: x[rows], population)
        return self.programs.pad(population, len(rows), self.room) if len(rows) else population, done

    # An epoch

    def data(self, index: int) -> Ring | None:
        """Returns the dataset for an epoch, on every device."""
        return self.programs.share(self.run.data.at(index)) if isinstance(self.run.data, Stream) else self.run.data

    def epoch(self, population: Population, index: int) -> Population:
        """Returns the members after the epoch with this index (from 0), and writes a row for each running member."""
        phase, before = self.run.timeline.at(index)
        if before == 0:
            population = self.programs.enter(self.agents, phase=phase, population=population)
        data = self.data(index) if reads_dataset(phase) else None
        given: dict[str, Any] = {"phase": phase, "dataset": data, "execution": self.run.execution}
        given["index"] = np.int32(index)
        earlier, which = np.asarray(population.carry.steps), f"epoch {index + 1} of program {self.cohort.number}"
        with self.run.clock.stage("training", f"{phase.name}, {which}"):
            population, metrics = self.programs.epoch(self.agents, population=population, **given)
            found = jax.device_get((population.carry.updates, population.carry.steps, metrics, population.stopped))
        schedule, judged = self.run.config.schedule, [{}] * len(self.members)
        if due := self.run.timeline.evaluates(index, schedule.eval_every):
            with self.run.clock.stage("evaluating", f"evaluating after {which}"):
                judged = self.judge(population, schedule.eval_seed)
        rows = []
        for i, member in enumerate(self.members):
            updates, steps, numbers, stopped = jax.tree.map(lambda x, i=i: x[i], found)
            if stopped == RUNNING:
                rows.append(driver.row_of(index, phase, updates, steps, numbers) | judged[i])
                append(self.cohort.home(member) / "metrics.jsonl", rows[-1])
                driver.check_steps(self.run.config.env, rows[-1], int(earlier[i]))
            elif stopped == index + 1:
                print(f"member {member.name} diverged in epoch {stopped}: {member.values}", file=sys.stderr)
        now = time.perf_counter()
        append(self.cohort.folder / "timings.jsonl", self.timing(index, now - self.clock))
        self.clock = now
        if due and rows:
            with tqdm.external_write_mode():
                print(self.line(rows), flush=True)
        return population

    def timing(self, index: int, seconds: float) -> dict[str, Any]:
        """Returns the row of timings of the epoch with this index (from 0): its seconds in all and by stage."""
        return {"epoch": index + 1, "seconds": seconds} | self.run.clock.taken()

    def judge(self, population: Population, seed: int) -> list[dict[str, float]]:
        """Returns each member's evaluation on the episodes of a seed."""
        count, key, states = self.run.config.schedule.eval_episodes, jax.random.key(seed), population.carry.agent
        if self.run.simulators is None:
            key = self.programs.share(key)
            given: dict[str, Any] = {"episodes": count, "execution": self.run.execution}
            found = self.programs.evaluate(self.agents, states=states, key=key, **given)
            each = [jax.tree.map(lambda x, i=i: x[i], jax.device_get(found)) for i in range(len(self.members))]
        else:
            pairs = [jax.tree.map(lambda x, i=i: x[i], (self.agents, states)) for i in range(len(self.members))]
            each = [host.evaluate(self.run.simulators, *pair, key, count, self.run.execution) for pair in pairs]
        return [evaluation(episodes, score_of(self.run.env)) for episodes in each]

    def line(self, rows: list[dict[str, Any]]) -> str:
        """Returns a one-line summary of the running members' evaluation."""
        score, values, row = score_of(self.run.env), [scored(row)[0] for row in rows], rows[0]
        low, middle, high = (written(score, value) for value in (min(values), float(np.median(values)), max(values)))
        return (
            f"program {self.cohort.number}  {row['phase']:<8} epoch {row['epoch']:>4}  updates {row['updates']:>8}  "
            f"steps {row['steps']:>8}  {len(rows)} members: {score} {low} to {high}, median {middle}"
        )

    def rewind(self, done: int) -> None:
        """Moves rows after an epoch aside; evaluates the behavior of the data if nothing is recorded yet."""
        aside = directory.rewind(self.cohort.folder, done)
        for member in self.cohort.members:
            aside += directory.rewind(self.cohort.home(member), done)
        directory.warn_of_rows(self.cohort.path, done, aside)
        if self.run.recorded is not None and not done:
            row = evaluate_behaviour(self.run.config, self.run.recorded)
            for member in self.cohort.members:
                append(self.cohort.home(member) / "metrics.jsonl", row)

    # The end

    def score(self, member: Member) -> list[float]:
        """Returns [success, return] of a member's last evaluation; success is 0 in environments without."""
        rows = jsonlines.rows(self.cohort.home(member) / "metrics.jsonl")
        last = next(row for row in reversed(rows) if score_of_row(row))
        return [last.get("eval/success", 0.0), last["eval/return"]]

    def finish(self, population: Population) -> None:
        """Writes the result and the state of every member that no rung has dropped.

        Members are evaluated on different episodes from those used for comparison and selection.
        """
        schedule = self.run.config.schedule
        judged = self.judge(population, schedule.eval_seed + 1)
        about = {"seed": schedule.eval_seed + 1, "episodes": schedule.eval_episodes}
        stopped = np.asarray(population.stopped)
        for i, row in enumerate(judged):
            if stopped[i] >= RUNNING:
                numbers = {name: row.get(f"eval/{name}") for name in ("success", "return", "length")}
                self.finalize(population, i, about | numbers if stopped[i] == RUNNING else None)

    def finalize(self, population: Population, i: int, judged: dict[str, Any] | None) -> None:
        """Writes the result of a member, and its agent's state as a checkpoint for other commands."""
        member, stopped = self.members[i], int(population.stopped[i])
        home = self.cohort.home(member)
        rows = jsonlines.rows(home / "metrics.jsonl")
        last = rows[-1] if rows else {"epoch": 0, "updates": 0, "steps": 0}
        evaluated = [row for row in rows if score_of_row(row) and row["phase"] != "behaviour"]
        result: dict[str, Any] = {
            "member": member.index,
            "program": self.cohort.number,
            "values": member.values,
            "seed": member.config.seed,
            "status": "finished" if stopped == RUNNING else "diverged" if stopped > 0 else "dropped",
            **{name: last[name] for name in ("updates", "steps")},
            "epochs": last["epoch"],
            **{name: evaluated[-1].get(f"eval/{name}") if evaluated else None for name in ("success", "return")},
            "judged": judged,
        }
        state = jax.tree.map(lambda x: x[i], population.carry.agent)
        checkpoint.save(home / "checkpoints", last["epoch"], {"agent": state})
        write_json(home / "result.json", result)
        publish(home)
