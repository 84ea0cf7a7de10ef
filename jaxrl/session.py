"""The host's side of a run: data in, epochs driven one by one, everything recorded, stopped and resumed.

Each compiled epoch is one call; evaluation, logging, checkpoint and the question whether to stop lie between two.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrl import checkpoint, devices, host, pictures, pool, rundir, stats, train
from jaxrl import rollout as ro
from jaxrl.config import Config, to_dict
from jaxrl.data import files, record, stream, task
from jaxrl.data.files import Dataset
from jaxrl.data.ring import Ring
from jaxrl.data.stream import Shards, Stream
from jaxrl.errors import UserError
from jaxrl.log import Log
from jaxrl.signals import StopRequests
from jaxrl.train import Carry, Phase, Schedule
from jaxrl.types import Env, on_host


class StopRequested(Exception):  # noqa: N818  (not an error)
    """The run saved its carry and stopped because it was asked to."""


def load_data(config: Config, env: Any) -> Dataset | Shards:
    """Returns the run's dataset: the file that it names, or the recorded behaviour, which is kept under datasets/.

    Of a folder of files, or a pattern of their names, only the headers are read.
    """
    config = with_data(config, env)
    if config.data is not None and (shards := stream.find(config.data)) is not None:
        task.check_fits(shards.sizes, env)
        return shards
    path = data_path(config.env, config.behaviour, config.data_steps) if config.data is None else Path(config.data)
    if config.data is None and not path.exists():
        record.behaviour_of(env, config.behaviour)  # refuses a level that does not exist
        print(f"recording {config.data_steps} steps of the behaviour {config.behaviour!r} as {path}", file=sys.stderr)
        dataset = record.record(env, config.behaviour, config.data_steps, seed=0)
        path.parent.mkdir(exist_ok=True)
        files.save(path, dataset)
    dataset = files.load(path)
    task.check_fits(task.sizes_of(dataset), env)
    return dataset


def with_data(config: Config, env: Any) -> Config:
    """Returns the configuration with a dataset named: for a simulator on the CPU, one that is there already.

    Raises UserError where there is none, saying how to get one.
    """
    if config.data is not None or not on_host(env):
        return config
    name = getattr(env, "dataset", None)
    if name is None:
        raise UserError(f"environment {config.env!r} has no behaviour to record: name a dataset file with --data")
    places = [folder / f"{name}.npz" for folder in (Path("datasets"), Path.home() / ".ogbench" / "data")]
    for path in places:
        if path.exists():
            return dataclasses.replace(config, data=str(path))
    raise UserError(
        f"no dataset for {config.env}, neither {places[0]} nor {places[1]}: make one, `jaxrl collect ogbench/{name}`, "
        f"or get the official one, `python -c \"import ogbench; ogbench.download_datasets(['{name}'])\"`"
    )


def data_path(env: str, behaviour: str, steps: int, seed: int = 0) -> Path:
    """Returns where a recorded behaviour is kept."""
    return Path("datasets") / f"{rundir.plain(env)}-{behaviour}-{steps}-s{seed}.npz"


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The epochs of a run in a row."""

    phases: tuple[Phase, ...]

    @property
    def epochs(self) -> int:
        """How many there are."""
        return sum(phase.epochs for phase in self.phases)

    def at(self, epoch: int) -> tuple[Phase, int]:
        """Returns the phase of an epoch (counted from 0), and how many epochs of that phase lie before it."""
        for phase in self.phases:
            if epoch < phase.epochs:
                return phase, epoch
            epoch -= phase.epochs
        raise IndexError(epoch)

    def closes_phase(self, epoch: int) -> bool:
        """Whether an epoch is the last of its phase."""
        phase, before = self.at(epoch)
        return before + 1 == phase.epochs

    def evaluates(self, epoch: int, every: int) -> bool:
        """Whether the agent is evaluated after an epoch: after every so many, and at the end of each phase."""
        phase, _ = self.at(epoch)
        return phase.name != "warmup" and ((epoch + 1) % every == 0 or self.closes_phase(epoch))


def abstract_carry(agent: Any, env: Env, schedule: Schedule, timeline: Timeline, epochs_done: int) -> Carry:
    """Returns the shapes of the carry after some epochs, without computing anything."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    carry = train.jitted_begin.eval_shape(agent, env, schedule, key)
    phase, _ = timeline.at(max(epochs_done - 1, 0))
    return train.jitted_enter.eval_shape(agent, phase, carry)


def row_of(index: int, phase: Phase, updates: Any, steps: Any, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the row of the epoch with this index (from 0), of numbers on the host."""
    row: dict[str, Any] = {"epoch": index + 1, "phase": phase.name, "updates": int(updates), "steps": int(steps)}
    return row | {name: value.item() for name, value in sorted(metrics.items())}


def evaluation(episodes: ro.Episodes) -> dict[str, float]:
    """Returns success with its interval, mean return and length of evaluated episodes."""
    successes, count = int(episodes.success.sum()), len(episodes.success)
    low, high = stats.success_interval(successes, count)
    return {
        "eval/success": successes / count,
        "eval/success_low": low,
        "eval/success_high": high,
        "eval/return": float(episodes.returns.mean()),
        "eval/length": float(episodes.lengths.mean()),
        "eval/broken": float(episodes.broken.sum()),
    }


def evaluate_behaviour(config: Config, env: Any) -> dict[str, Any]:
    """Returns the row of the scripted behaviour, judged on the same episodes as the agent."""
    policy = ro.scripted(record.behaviour_of(env, config.behaviour))
    key = jax.random.key(config.schedule.eval_seed)
    row = {"epoch": 0, "phase": "behaviour", "updates": 0, "steps": 0}
    return row | evaluation(jax.device_get(jitted_behaviour(env, policy, key, config.schedule.eval_episodes)))


jitted_behaviour = jax.jit(ro.evaluate, static_argnames=("env", "policy", "episodes"))


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, ready to be driven: its agent on the device, its environment, its epochs and its data."""

    config: Config
    env: Any
    agent: Any
    timeline: Timeline
    data: Ring | Stream
    simulators: host.Simulators | None = None  # of an environment that steps on the CPU

    def close(self) -> None:
        """Ends the processes of the simulators, if there are any."""
        if self.simulators is not None:
            self.simulators.close()

    def first(self) -> Carry:
        """Returns the carry before the first epoch."""
        carry = train.jitted_begin(self.agent, self.env, self.config.schedule, jax.random.key(self.config.seed))
        if hasattr(self.agent, "fit"):
            data = self.data.at(0) if isinstance(self.data, Stream) else self.data
            carry = train.jitted_fit(self.agent, carry, devices.shared(data))
        return at_home(carry)

    def restore(self, folder: Path) -> tuple[Carry, int]:
        """Returns the carry to go on from and how many epochs it has seen: the newest checkpoint's, or the first."""
        loaded = checkpoint.load(folder, self.abstract)
        return (self.first(), 0) if loaded is None else (at_home(loaded[1]), loaded[0])

    def abstract(self, done: int) -> Carry:
        """Returns the shapes of the carry after `done` epochs, without computing anything."""
        return abstract_carry(self.agent, self.env, self.config.schedule, self.timeline, done)

    def epoch(self, carry: Carry, index: int) -> tuple[Carry, dict[str, Any]]:
        """Returns the carry after the epoch with this index (from 0), and its row of metrics."""
        phase, before = self.timeline.at(index)
        if before == 0:
            carry = at_home(train.jitted_enter(self.agent, phase, carry))
        data = devices.shared(self.data.at(index) if isinstance(self.data, Stream) else self.data)
        if self.simulators is not None and phase.collects:
            carry, metrics = host.epoch(self.simulators, self.agent, phase, carry, data)
        else:
            carry, metrics = train.jitted_epoch(self.agent, self.env, phase, carry, data)
        row = row_of(index, phase, *jax.device_get((carry.updates, carry.steps, metrics)))
        if self.timeline.evaluates(index, self.config.schedule.eval_every):
            row |= evaluation(episodes_of(self.config, self.agent, self.env, carry.agent, self.simulators))
        return carry, row


def at_home(carry: Carry) -> Carry:
    """Returns the carry bound to its devices, as a restored one is: lying otherwise, it would make another program."""
    return train.placed(carry) if devices.several() else jax.device_put(carry, jax.devices()[0])


def prepare(config: Config, env: Any, dataset: Dataset | Shards) -> Run:
    """Returns the run of a configuration. Raises UserError where no episode is as long as the agent's windows."""
    agent = train.on_device(config.agent)
    timeline = Timeline(train.phases(config.schedule, agent.chunk, (config.reward_scale, config.reward_shift)))
    return Run(
        config, env, agent, timeline, in_memory(config, env, dataset, timeline.epochs), simulators_of(config, env)
    )


def simulators_of(config: Config, env: Any) -> host.Simulators | None:
    """Returns the simulators of an environment that steps on the CPU; they start when they are first needed."""
    most = max(config.schedule.envs, config.schedule.eval_episodes)
    return host.Simulators(env, min(pool.cores(), most)) if on_host(env) else None


def asks_trees(config: Config) -> bool:
    """Returns whether the agent searches all of the data in KD-trees on the host: where its device is a CPU.

    Not where the data come file by file: a program is made for its trees, and each file would need its own.
    """
    return getattr(config.agent, "searches", False) and jax.default_backend() == "cpu"


def in_memory(config: Config, env: Any, dataset: Dataset | Shards, epochs: int) -> Ring | Stream:
    """Returns the dataset in device memory, or what brings it there file by file."""
    place = functools.partial(
        task.to_ring,
        env=env,
        scale=config.reward_scale,
        shift=config.reward_shift,
        probabilities=getattr(config.agent, "head", "mse") == "bce",
        weighting=config.weighting,
    )
    if isinstance(dataset, Dataset):
        check_sizes(config.agent, task.sizes_of(dataset))
        return place(dataset, searched=asks_trees(config))
    for shard in dataset.shards:
        check_sizes(config.agent, shard.sizes)
    room = (dataset.sizes.rows, dataset.sizes.episodes)
    return Stream(dataset, functools.partial(place, room=room), config.order_seed, epochs)


def check_sizes(agent: Any, sizes: task.Sizes) -> None:
    """Raises UserError where a dataset is too small for an agent."""
    task.check_window(sizes, task.window_of(agent))
    if hasattr(agent, "check_data"):
        agent.check_data(sizes.rows - sizes.episodes)


def start(config: Config, env: Any, path: Path, stop: StopRequests, wandb: bool = False) -> dict[str, Any]:
    """Returns the result of a new run, driven to its end in a new folder. Raises StopRequested where asked to stop."""
    rundir.check_new(path)
    dataset = load_data(config, env)
    run = prepare(config, env, dataset)
    rundir.create(path, config, dataset.digest)
    return drive(run, path, stop, wandb)


def resume(config: Config, env: Any, path: Path, stop: StopRequests, wandb: bool = False) -> dict[str, Any]:
    """Returns the result of a run that goes on from its newest checkpoint, bit for bit as if it had never stopped."""
    dataset = load_data(config, env)
    check_same_data(path, dataset)
    return drive(prepare(config, env, dataset), path, stop, wandb)


def check_same_data(path: Path, dataset: Dataset | Shards) -> None:
    """Raises UserError where the dataset is not the one that the run began with."""
    known = rundir.read_json(path / "manifest.json", f"{path} is not a run directory").get("dataset_digest")
    if dataset.digest != known:
        raise UserError(f"dataset {dataset.path} has changed since {path} began: its sha256 was {known}")


def drive(run: Run, path: Path, stop: StopRequests, wandb: bool) -> dict[str, Any]:
    """Returns the run's result, after the epochs still before it. Raises StopRequested where asked to stop."""
    folder = path / "checkpoints"
    carry, done = run.restore(folder)
    checkpoint.keep(folder, [epoch for epoch in checkpoint.epochs(folder) if epoch <= done])
    rundir.rewind(path, done)
    with contextlib.closing(run), contextlib.closing(Log(path, wandb, done)) as log:
        if run.config.data is None and not rundir.rows(path / "metrics.jsonl"):
            log.row(evaluate_behaviour(run.config, run.env))
        for index in range(done, run.timeline.epochs):
            phase, before = run.timeline.at(index)
            if index == done or before == 0:
                log.start(phase, before, run.agent.chunk, run.config.schedule.envs)
            try:
                carry, row = run.epoch(carry, index)
            except host.Interrupted as broken:  # amid an epoch, which will be repeated with what it has learnt so far
                if before:  # else the newest checkpoint is the one before the phase, of another shape maybe
                    checkpoint.save(folder, index, broken.carry)
                raise stopped_by(broken.__cause__) from broken
            except pool.WorkerDied as error:  # in an evaluation: the newest checkpoint is what there is to go on from
                raise stopped_by(error) from error
            log.row(row)
            last = index + 1 == run.timeline.epochs
            stopping = stop.requested and not last
            closes = run.simulators is not None and run.timeline.closes_phase(index)
            if stopping or last or closes or (index + 1) % run.config.checkpoint_every == 0:
                checkpoint.save(folder, index + 1, carry)
            if stopping:
                raise StopRequested
    return finish(run, carry, path)


def stopped_by(error: BaseException | None) -> StopRequested:
    """Returns what stops a run that can go on later, having said in one line why."""
    print(error, file=sys.stderr)
    return StopRequested()


def finish(run: Run, carry: Carry, path: Path) -> dict[str, Any]:
    """Returns the result of a finished run, having written it, the learning curve and an episode."""
    rows = rundir.rows(path / "metrics.jsonl")
    result: dict[str, Any] = {
        "agent": to_dict(run.config)["agent_name"],
        "env": run.config.env,
        "seed": run.config.seed,
        "run": str(path),
        "seconds": round(sum(row["seconds"] for row in rundir.rows(path / "timings.jsonl")), 1),
    }
    for phase in ("behaviour", "offline", "online"):
        evaluated = [row for row in rows if row["phase"] == phase and "eval/success" in row]
        if evaluated:
            result[f"{phase}_success"] = evaluated[-1]["eval/success"]
            result[f"{phase}_interval"] = [evaluated[-1]["eval/success_low"], evaluated[-1]["eval/success_high"]]
    rundir.write_json(path / "result.json", result)
    pictures.curves(rows, path / "curves.png")
    if on_host(run.env) or hasattr(run.env, "draw"):
        try:
            animate(run.config, run.agent, run.env, carry.agent, path / "rollout.gif")
        except UserError as error:
            print(f"no picture of an episode: {error}", file=sys.stderr)
    return result


def table(result: dict[str, Any]) -> str:
    """Returns the result's success rates as people read them."""
    lines = [f"{'':<12}{'success':>8}   95 % interval"]
    for phase in ("behaviour", "offline", "online"):
        if f"{phase}_success" in result:
            low, high = result[f"{phase}_interval"]
            lines.append(f"{phase:<12}{result[f'{phase}_success']:>8.2f}   [{low:.2f}, {high:.2f}]")
    return "\n".join([*lines, f"pictures, metrics and checkpoints are in {result['run']}"])


# What is done with a run afterwards


def newest_state(config: Config, agent: Any, env: Any, path: Path) -> Any:
    """Returns the agent's state in a run's newest checkpoint. Raises UserError where there is none that fits."""
    timeline = Timeline(train.phases(config.schedule, agent.chunk))

    def abstract(done: int) -> dict[str, Any]:
        return {"agent": abstract_carry(agent, env, config.schedule, timeline, done).agent}

    loaded = checkpoint.load(path / "checkpoints", abstract)
    if loaded is None:
        raise UserError(f"{path} has no checkpoint that can be read")
    return loaded[1]["agent"]


def evaluate(config: Config, env: Any, path: Path) -> dict[str, Any]:
    """Returns the evaluation of a run's newest checkpoint, on the episodes that the configuration names."""
    agent = train.on_device(config.agent)
    state = newest_state(config, agent, env, path)
    simulators = simulators_of(config, env)
    with contextlib.closing(simulators) if simulators is not None else contextlib.nullcontext():
        return evaluation(episodes_of(config, agent, env, state, simulators))


def render(config: Config, env: Any, path: Path, out: Path) -> None:
    """Writes an episode of a run's newest checkpoint, the first that the configuration's evaluation begins."""
    agent = train.on_device(config.agent)
    animate(config, agent, env, newest_state(config, agent, env, path), out)


def animate(config: Config, agent: Any, env: Any, state: Any, out: Path) -> None:
    """Writes the first evaluation episode as an animation. Raises UserError where a simulator cannot be rendered."""
    if on_host(env):
        pictures.animation(host.film(env, agent, state, jax.random.key(config.schedule.eval_seed)), out)
    else:
        pictures.gif(env, episode(config, agent, env, state), out)


def episode(config: Config, agent: Any, env: Any, state: Any) -> np.ndarray:
    """Returns the observations [T + 1, O] of the first evaluation episode."""
    episodes = episodes_of(config, agent, env, state)
    return np.asarray(episodes.track[: episodes.lengths[0] + 1])


def episodes_of(
    config: Config, agent: Any, env: Any, state: Any, simulators: host.Simulators | None = None
) -> ro.Episodes:
    """Returns the evaluation episodes of an agent's state, on the host."""
    key = jax.random.key(config.schedule.eval_seed)
    if simulators is not None:
        return host.evaluate(simulators, agent, state, key, config.schedule.eval_episodes)
    return jax.device_get(train.jitted_evaluate(agent, env, config.schedule.eval_episodes, state, key))


def replay(config: Config, env: Any, path: Path, epochs: int) -> str | None:
    """Returns None where the first epochs, repeated, give the recorded metrics bit for bit, else what differs first."""
    dataset = load_data(config, env)
    check_same_data(path, dataset)
    run = prepare(config, env, dataset)
    first = 0 if config.data is None else 1  # the behaviour's row comes before the first epoch's
    recorded = rundir.rows(path / "metrics.jsonl")[: min(epochs, run.timeline.epochs) + 1 - first]
    if len(recorded) + first < 2:
        raise UserError(f"{path} has no epoch yet that could be repeated")
    carry = run.first()
    with contextlib.closing(run):
        for epoch, was in enumerate(recorded, start=first):
            carry, row = run.epoch(carry, epoch - 1) if epoch else (carry, evaluate_behaviour(config, env))
            now = rundir.as_json(row)
            for name in was | now:
                if was.get(name) != now.get(name):
                    return f"epoch {epoch}, {name}: {was.get(name)} is recorded, {now.get(name)} is repeated"
    return None
