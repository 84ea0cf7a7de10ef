"""The host side of a run: loading data, driving epochs, recording, stopping and resuming.

Each compiled epoch is one call; evaluation, logging, checkpoints and stop requests are handled between calls.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxrl import sharding, system
from jaxrl.data.files import Dataset
from jaxrl.errors import UserError
from jaxrl.replay.ring import Ring
from jaxrl.replay.streaming import Shards, Stream
from jaxrl.rollout import host, workers
from jaxrl.rollout.executors import Execution, check_learning
from jaxrl.runs import checkpoint, directory, jsonlines, plots
from jaxrl.runs.config import Config, records, timeline_of, to_dict
from jaxrl.runs.datasets import check_same_data, digest_of, in_memory, known_digest, load_data
from jaxrl.runs.evaluation import animate, episodes_of, evaluate_behaviour, evaluation, simulators_of
from jaxrl.runs.jsonlines import as_json, write_json
from jaxrl.runs.lock import Lock, only_writer
from jaxrl.runs.logging import Log
from jaxrl.runs.progress import Clock, announced
from jaxrl.runs.scores import SCORES, interval, score_of_row, scored, written
from jaxrl.runs.signals import StopRequested, StopRequests
from jaxrl.training import host_loop, loop
from jaxrl.training.host_loop import Interrupted
from jaxrl.training.loop import Carry, abstract_carry
from jaxrl.training.schedule import Timeline, reads_dataset
from jaxrl.types import Agent, Drawable, Env, Fitting, HostEnv, Phase, score_of

DIVERGED = "diverged"  # status in result.json of a run whose agent's state became NaN or infinite


def row_of(index: int, phase: Phase, updates: Any, steps: Any, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the metrics row of the epoch with this index (from 0); all arguments are on the host."""
    row: dict[str, Any] = {"epoch": index + 1, "phase": phase.name, "updates": int(updates), "steps": int(steps)}
    return row | {name: value.item() for name, value in sorted(metrics.items())}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, ready to be driven: its agent on the device, its environment, its epochs and its data."""

    config: Config
    env: Env | HostEnv
    agent: Agent
    execution: Execution
    timeline: Timeline
    data: Ring | Stream | None  # None if no phase learns from a dataset
    simulators: host.Simulators | None = None  # for an environment that steps on the CPU
    clock: Clock = dataclasses.field(default_factory=Clock, compare=False)  # what its time is spent on

    @property
    def recorded(self) -> Env | None:
        """The environment whose scripted behavior is the dataset; None if the dataset has another source."""
        return self.env if records(self.config) and not isinstance(self.env, HostEnv) else None

    def close(self) -> None:
        """Stops the simulator processes, if any."""
        if self.simulators is not None:
            self.simulators.close()

    def first(self) -> Carry:
        """Returns the carry before the first epoch."""
        key, data = jax.random.key(self.config.seed), self.dataset(0)
        carry = loop.jitted_begin(self.agent, self.env, self.config.schedule, key, self.execution)
        if data is not None and isinstance(self.agent, Fitting):
            carry = loop.jitted_fit(self.agent, carry, data)
        return on_devices(carry)

    def restore(self, folder: Path) -> tuple[Carry, int]:
        """Returns the carry to resume from and its number of epochs: the latest checkpoint's, or the initial one.

        Raises UserError if there were checkpoints and none can be read.
        """
        loaded = checkpoint.load(folder, self.abstract)
        if loaded is None:
            checkpoint.check_none_missing(folder, "--restart begins again and moves what is there aside")
            return self.first(), 0
        return on_devices(loaded[1]), loaded[0]

    def abstract(self, done: int) -> Carry:
        """Returns the shapes of the carry after `done` epochs, without computing anything."""
        return abstract_carry(self.agent, self.env, self.config.schedule, self.timeline, done, self.execution)

    def dataset(self, index: int) -> Ring | None:
        """Returns the dataset for the epoch with this index (from 0), on every device."""
        return sharding.shared(self.data.at(index) if isinstance(self.data, Stream) else self.data)

    def epoch(self, carry: Carry, index: int) -> tuple[Carry, dict[str, Any]]:
        """Returns the carry after the epoch with this index (from 0), and its row of metrics."""
        phase, before = self.timeline.at(index)
        if before == 0:
            carry = on_devices(loop.jitted_enter(self.agent, phase, carry))
        data, which = self.dataset(index) if reads_dataset(phase) else None, f"epoch {index + 1}"
        with self.clock.stage("training", f"{phase.name}, {which} of {self.timeline.epochs}"):
            if self.simulators is not None and phase.collects:
                envs = self.config.schedule.envs
                carry, metrics = host_loop.epoch(self.simulators, self.agent, phase, carry, data, envs, self.execution)
            else:
                carry, metrics = loop.jitted_epoch(self.agent, self.env, phase, carry, data, self.execution)
            row = row_of(index, phase, *jax.device_get((carry.updates, carry.steps, metrics)))
        if self.timeline.evaluates(index, self.config.schedule.eval_every) and finite(carry):
            with self.clock.stage(
                "evaluating", f"evaluating {self.config.schedule.eval_episodes} episodes after {which}"
            ):
                episodes = episodes_of(self.config, self.agent, self.env, carry.agent, self.simulators)
                row |= evaluation(episodes, score_of(self.env))
        return carry, row


def spent(carry: Carry) -> int:
    """Returns the updates and environment steps so far."""
    return int(carry.updates) + int(carry.steps)


def finite(carry: Carry) -> bool:
    """Returns whether every number of the agent's state is finite."""
    return bool(loop.jitted_all_finite(carry.agent))


def on_devices(carry: Carry) -> Carry:
    """Returns the carry committed to its devices like a restored one; other placements would trigger a recompile."""
    return loop.placed(carry) if sharding.several() else jax.device_put(carry, jax.devices()[0])


def prepare(config: Config, env: Env | HostEnv, dataset: Dataset | Shards | None) -> Run:
    """Returns the run of a configuration. Raises UserError if no episode is as long as the agent's windows."""
    system.check_precision()
    check_learning(config.agent, config.execution)
    agent, execution, timeline = loop.on_device(config.agent), loop.on_device(config.execution), timeline_of(config)
    data, simulators = in_memory(config, env, dataset, timeline.epochs), simulators_of(config, env)
    return Run(config, env, agent, execution, timeline, data, simulators)


def start(
    config: Config, env: Env | HostEnv, path: Path, stop: StopRequests, wandb: str | bool = False
) -> dict[str, Any]:
    """Runs a new run to its end in a new folder and returns its result. Raises StopRequested on a stop request."""
    directory.check_new(path)
    dataset = load_data(config, env)
    run = prepare(config, env, dataset)
    with directory.created(path, config, digest_of(dataset)) as lock:
        return drive(run, path, stop, wandb, lock)


def resume(
    config: Config, env: Env | HostEnv, path: Path, stop: StopRequests, wandb: str | bool = False, restart: bool = False
) -> dict[str, Any]:
    """Resumes a run from its latest checkpoint, bit for bit identical to an uninterrupted run; returns its result.

    With `restart` it begins again, and what is there is moved aside.
    """
    with only_writer(path) as lock:
        directory.warn_of_changes(path)
        dataset = load_data(config, env)
        check_same_data(path, dataset, known_digest(path))
        run = prepare(config, env, dataset)
        if restart:
            checkpoint.set_aside(path / "checkpoints")
        return drive(run, path, stop, wandb, lock)


def drive(run: Run, path: Path, stop: StopRequests, wandb: str | bool, lock: Lock) -> dict[str, Any]:
    """Runs the remaining epochs and returns the run's result. Raises StopRequested on a stop request.

    If parameters become NaN or infinite, the run ends with the status "diverged", and the last finite checkpoint stays.
    """
    folder = path / "checkpoints"
    with announced("preparing the agent and its environments"):
        carry, done = run.restore(folder)
    checkpoint.keep_until(folder, done)
    directory.warn_of_rows(path, done, directory.rewind(path, done))
    with contextlib.closing(run), contextlib.closing(Log(path, wandb, spent(carry))) as log:
        if run.recorded is not None and not done:
            with run.clock.stage("evaluating", "evaluating the behaviour of the data"):
                row = evaluate_behaviour(run.config, run.recorded)
            log.row(row, run.clock.taken())
        for index in range(done, run.timeline.epochs):
            phase, before = run.timeline.at(index)
            if index == done or before == 0:
                log.start(phase, before, run.execution.length(run.agent.chunk), run.config.schedule.envs)
            steps = int(carry.steps)
            carry, row = attempt(run, carry, index, folder)
            lock.check()
            log.row(row, run.clock.taken())
            if not finite(carry):
                return diverged(run, row, path)
            check_steps(run.config.env, row, steps)
            last = index + 1 == run.timeline.epochs
            stopping = stop.requested and not last
            closes = run.simulators is not None and run.timeline.closes_phase(index)
            if stopping or last or closes or (index + 1) % run.config.checkpoint_every == 0:
                lock.check()
                checkpoint.save(folder, index + 1, carry)
            if stopping:
                raise StopRequested
    return finish(run, carry, path)


def check_steps(env: str, row: Mapping[str, Any], before: int) -> None:
    """Raises UserError if no step of an epoch that began after `before` environment steps was finite."""
    taken = row["steps"] - before
    if 0 < taken == row.get("collect/broken"):
        raise UserError(
            f"environment {env!r}: none of the {taken} steps of epoch {row['epoch']} is finite, nothing can be learned "
            f"from them; jaxrl doctor --env {env} looks for the reason"
        )


def attempt(run: Run, carry: Carry, index: int, folder: Path) -> tuple[Carry, dict[str, Any]]:
    """Returns `run.epoch(carry, index)`. Raises StopRequested, with the error on stderr, if a simulator breaks."""
    try:
        return run.epoch(carry, index)
    except Interrupted as broken:  # the epoch will be repeated, starting with what was learned so far
        if run.timeline.at(index)[1]:  # else the latest checkpoint precedes the phase and may have other shapes
            checkpoint.save(folder, index, broken.carry)
        raise stopped_by(broken.__cause__) from broken
    except workers.WorkerDied as error:  # in an evaluation: resume from the latest checkpoint
        raise stopped_by(error) from error


def stopped_by(error: BaseException | None) -> StopRequested:
    """Prints the error and returns the exception that stops a resumable run."""
    print(error, file=sys.stderr)
    return StopRequested()


def diverged(run: Run, row: dict[str, Any], path: Path) -> dict[str, Any]:
    """Returns the result of a run whose agent's state is no longer finite, after writing it and saying so on stderr."""
    known = checkpoint.epochs(path / "checkpoints")
    rest = f"the last checkpoint, of epoch {known[-1]}, is finite" if known else "there is no checkpoint before it"
    print(f"the agent's state is NaN or infinite after epoch {row['epoch']}: training ends; {rest}", file=sys.stderr)
    counts = {name: row[name] for name in ("updates", "steps")}
    result = about(run, path) | {"status": DIVERGED, "epoch": row["epoch"], **counts}
    write_json(path / "result.json", result)
    return result


def about(run: Run, path: Path) -> dict[str, Any]:
    """Returns the part of a result that says which run it is of, and its seconds."""
    return {
        "agent": to_dict(run.config)["agent_name"],
        "env": run.config.env,
        "seed": run.config.seed,
        "run": str(path),
        "seconds": round(sum(row["seconds"] for row in jsonlines.rows(path / "timings.jsonl")), 1),
    }


def finish(run: Run, carry: Carry, path: Path) -> dict[str, Any]:
    """Returns the result of a finished run, after writing it, the learning curve and an episode."""
    rows, result = jsonlines.rows(path / "metrics.jsonl"), about(run, path)
    if missing := run.timeline.epochs - sum(row["epoch"] > 0 for row in rows):
        print(f"{path}/metrics.jsonl lacks {missing} of {run.timeline.epochs} epochs", file=sys.stderr)
    for phase in ("behaviour", *(phase.name for phase in run.timeline.phases)):
        evaluated = [row for row in rows if row["phase"] == phase and score_of_row(row)]
        if evaluated:
            result[f"{phase}_{score_of_row(evaluated[-1])}"], *result[f"{phase}_interval"] = scored(evaluated[-1])
    write_json(path / "result.json", result)
    try:  # a run that is trained stays so without its pictures
        if rows:
            plots.curves(rows, path / "curves.png")
        if isinstance(run.env, HostEnv | Drawable):
            with announced("drawing an episode"):
                animate(run.config, run.agent, run.env, carry.agent, path / "rollout.gif")
    except (UserError, OSError) as error:
        print(f"no pictures of the run: {error}", file=sys.stderr)
    return result


def table(result: dict[str, Any]) -> str:
    """Returns the result's scores as a text table."""
    phases = [name.removesuffix("_interval") for name in result if name.endswith("_interval")]
    score = next(score for score in SCORES if all(f"{phase}_{score}" in result for phase in phases))
    lines = [f"{'':<12}{score:>8}   95 % interval"]
    for phase in phases:
        value, ends = result[f"{phase}_{score}"], result[f"{phase}_interval"]
        lines.append(f"{phase:<12}{written(score, value):>8}   {interval(score, ends)}")
    return "\n".join([*lines, f"pictures, metrics and checkpoints are in {result['run']}"])


# After a run


def replay(config: Config, env: Env | HostEnv, path: Path, epochs: int) -> str | None:
    """Returns None if repeating the first epochs gives the recorded metrics bit for bit, else the first difference."""
    directory.warn_of_changes(path)
    dataset = load_data(config, env)
    check_same_data(path, dataset, known_digest(path))
    run = prepare(config, env, dataset)
    first = 1 if run.recorded is None else 0  # the behaviour's row comes before the first epoch's
    recorded = {row["epoch"]: row for row in jsonlines.rows(path / "metrics.jsonl")}
    last = min(epochs, run.timeline.epochs, max(recorded, default=0))
    if last < 1:
        raise UserError(f"{path} has no epoch to repeat yet")
    if missing := sorted(set(range(first, last + 1)) - recorded.keys()):
        raise UserError(f"{path}/metrics.jsonl is damaged: it has no row of epoch {missing[0]}")
    carry = run.first()
    with contextlib.closing(run):
        for epoch in range(first, last + 1):
            was = recorded[epoch]
            if epoch == 0 and run.recorded is not None:
                row = evaluate_behaviour(config, run.recorded)
            else:
                carry, row = run.epoch(carry, epoch - 1)
            now = as_json(row)
            for name in was | now:
                if was.get(name) != now.get(name):
                    return f"epoch {epoch}, {name}: {was.get(name)} in the record, {now.get(name)} in the repetition"
    return None
