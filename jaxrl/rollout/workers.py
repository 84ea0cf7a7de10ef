"""Simulators in worker processes: NumPy in, NumPy out. Neither this module nor a worker imports JAX.

A worker is a fresh interpreter: fork is unsafe with JAX's threads, and `multiprocessing` would re-run the user's
script. Each worker holds several simulators and executes a whole chunk in each before it answers, so a decision costs
one message per worker, regardless of the chunk length.

A simulator has the interface of a Gymnasium environment, but Gymnasium is not required: `reset(seed=..., options=...)`
returns (observation, info), `step(action)` returns (observation, reward, terminated, truncated, info). Actions in
[-1, 1] are scaled to its `action_space`, if it has one. A task is selected by `options={"task_id": n}`;
`info["success"]`, if present, tells whether the task is solved. An observation is an array, or a dict of arrays; floats
become float32, other entries of a dict keep their dtype.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, TypeAlias, TypeVar

import numpy as np

from jaxrl import system
from jaxrl.errors import UserError
from jaxrl.rollout.spaces import bounds, discrete, scaled

Job = TypeVar("Job")
Result = TypeVar("Result")
Observation: TypeAlias = Any  # an array, or a dict of arrays

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # 1 each: one worker per core
PATIENCE = 5.0  # seconds until a worker that does not exit is killed


class WorkerDied(UserError):  # noqa: N818
    """A worker process ended: it was killed, ran out of memory, or crashed in a simulator's native code."""


class SimulatorFailed(UserError):  # noqa: N818
    """A simulator raised an exception; unless it was a UserError, the worker has printed its traceback."""


class Pool:
    """Worker processes and their simulators, created there by `builder()` at the first reset.

    A simulator is identified by its group and its slot number; slot s is in worker s modulo the number of workers.
    Processes start with the first command. Any failure stops all of them, and the next command starts new ones.
    """

    def __init__(self, builder: Callable[[], Any] | None = None, horizon: int = 0, workers: int | None = None) -> None:
        """Takes a picklable builder of simulators, and the number of steps after which an episode is truncated."""
        self.builder, self.horizon, self.workers = builder, horizon, workers or system.cores()
        self.processes: list[subprocess.Popen] = []
        self.connections: list[Connection] = []

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def start(self) -> None:
        """Starts the processes, unless they are running."""
        if self.processes:
            return
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        environment = dict.fromkeys(THREADS, "1") | os.environ | {"PYTHONPATH": path}
        for _ in range(self.workers):
            ours, theirs = Pipe()
            program = f"from jaxrl.rollout.workers import serve; serve({theirs.fileno()})"
            command = [sys.executable, "-W", "ignore", "-c", program]
            self.processes.append(subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment))
            self.connections.append(ours)
            theirs.close()
        for worker in range(self.workers):
            self._send(worker, ("build", self.builder, self.horizon))
        for worker in range(self.workers):
            self._receive(worker)

    def close(self, patience: float = PATIENCE) -> None:
        """Stops the processes, and kills those that have not exited after `patience` seconds."""
        for connection in self.connections:
            connection.close()  # makes the worker exit
        deadline = time.monotonic() + patience
        for process in self.processes:
            try:
                process.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes, self.connections = [], []

    def reset(self, group: str, slots: np.ndarray, seeds: np.ndarray, tasks: np.ndarray) -> Observation:
        """Returns the first observations [n, O] of new episodes in n slots, given seeds [n] and tasks [n] (0: any)."""
        return self._each("reset", group, slots, seeds, tasks)["obs"]

    def execute(self, group: str, slots: np.ndarray, chunks: np.ndarray, frames: int = 0) -> dict[str, Any]:
        """Returns the steps of chunks [n, H, A] executed in n slots: the fields of `ring.Steps`, as arrays.

        In addition, "success" [n]: solved now or earlier in the episode. With `frames`, also "frames": for each slot a
        list of images [height, width, 3], one every `frames` steps of the episode.
        """
        return self._each("execute", group, slots, chunks, frames=frames)

    def map(self, function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """Yields function(job) for every job, in order, each computed by the next free worker."""
        self.start()
        waiting, done, at = enumerate(jobs), {}, 0
        running: dict[int, int] = {}  # worker: index of its job
        idle = list(range(self.workers))
        while True:
            while idle and (job := next(waiting, None)) is not None:
                running[idle[-1]] = job[0]
                self._send(idle.pop(), ("call", function, job[1]))
            if not running:
                return
            for connection in wait([self.connections[worker] for worker in running]):
                worker = self.connections.index(connection)  # ty: ignore[invalid-argument-type]
                done[running.pop(worker)] = self._receive(worker)
                idle.append(worker)
            while at in done:
                yield done.pop(at)
                at += 1

    def _each(self, command: str, group: str, slots: np.ndarray, *columns: np.ndarray, **options: Any) -> dict:
        """Returns the answers for n slots, in the order of the slots."""
        self.start()
        slots = np.asarray(slots)
        mine = {w: rows for w in range(self.workers) if len(rows := np.flatnonzero(slots % self.workers == w))}
        for worker, rows in mine.items():
            self._send(worker, (command, group, slots[rows], *(column[rows] for column in columns), *options.values()))
        answers = [self._receive(worker) for worker in mine]
        order = np.argsort(np.concatenate(list(mine.values())))
        return {name: _joined([answer[name] for answer in answers], order) for name in answers[0]}

    def _send(self, worker: int, message: tuple) -> None:
        try:
            self.connections[worker].send(message)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._died(worker) from error

    def _receive(self, worker: int) -> Any:
        try:
            fine, answer = self.connections[worker].recv()
        except (EOFError, ConnectionResetError) as error:
            raise self._died(worker) from error
        if not fine:
            self.close(patience=0)
            raise SimulatorFailed(answer)
        return answer

    def _died(self, worker: int) -> WorkerDied:
        """Stops the other workers and returns the error for a worker that died."""
        process = self.processes[worker]
        with contextlib.suppress(subprocess.TimeoutExpired):  # the connection closes before the exit code is available
            process.wait(PATIENCE)
        self.close(patience=0)
        return WorkerDied(f"worker {worker} of {self.workers} (process {process.pid}) died, {_why(process.returncode)}")


def _why(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
    hint = ": the machine may be short of memory, lower schedule.envs" if name == "SIGKILL" else ""
    return f"exit code {code} ({name}){hint}"


def _joined(parts: Sequence[Any], order: np.ndarray) -> Any:
    if isinstance(parts[0], list):
        together = [item for part in parts for item in part]
        return [together[i] for i in order]
    if isinstance(parts[0], Mapping):
        return {name: _joined([part[name] for part in parts], order) for name in parts[0]}
    return np.concatenate(parts)[order]


def stacked(items: Sequence[Any]) -> Any:
    """Returns arrays, or dicts of arrays, stacked along a new first axis."""
    if isinstance(items[0], Mapping):
        return {name: np.stack([item[name] for item in items]) for name in items[0]}
    return np.stack(items)


def observed(obs: Any) -> Observation:
    """Returns a simulator's observation with floats as float32; an observation that is not a dict is always float32."""
    if not isinstance(obs, Mapping):
        return np.asarray(obs, np.float32)
    arrays = {name: np.asarray(value) for name, value in obs.items()}
    return {name: x.astype(np.float32) if np.issubdtype(x.dtype, np.floating) else x for name, x in arrays.items()}


def finite(obs: Observation) -> bool:
    """Returns whether every number of an observation is finite."""
    return all(np.isfinite(x).all() for x in (obs.values() if isinstance(obs, Mapping) else [obs]))


def check_flags(terminated: Any, truncated: Any) -> None:
    """Raises UserError if a step's flags are not true or false."""
    for name, flag in (("terminated", terminated), ("truncated", truncated)):
        if not isinstance(flag, bool | np.bool_) and not (np.ndim(flag) == 0 and flag in (0, 1)):
            raise UserError(f"the simulator's step returned {name} = {flag!r}, must be True or False")


def zeros(obs: Observation) -> Observation:
    """Returns an observation of zeros."""
    return {name: np.zeros_like(x) for name, x in obs.items()} if isinstance(obs, Mapping) else np.zeros_like(obs)


# In the worker


class Slot:
    """One simulator and its episode."""

    def __init__(self, simulator: Any, horizon: int) -> None:
        """Stores a simulator that has not been reset yet."""
        self.simulator, self.horizon, self.bounds = simulator, horizon, bounds(simulator)

    def reset(self, seed: int, task: int) -> Observation:
        """Returns the first observation of a new episode."""
        np.random.seed(seed)
        options = {"task_id": int(task)} if task else None
        obs, _ = self.simulator.reset(seed=int(seed), options=options)
        self.obs, self.steps, self.success = observed(obs), 0, False
        self.sound = finite(self.obs)
        if not self.sound:  # the episode is over at its first step, as in `device.resets`
            self.obs = zeros(self.obs)
        self.random = np.random.get_state()
        return self.obs

    def execute(self, chunk: np.ndarray, frames: int) -> dict[str, Any]:
        """Returns the steps of a chunk [H, A], which stops if the episode ends or a number is not finite.

        After a reset that was not finite, the first step is invalid and ends the episode.

        Simulators may use NumPy's global random state, so each simulator has its own copy of it.
        """
        if frames and getattr(self.simulator, "render", None) is None:
            raise UserError("the simulator has no render()")
        np.random.set_state(self.random)
        record = {name: np.zeros(len(chunk), bool) for name in ("terminated", "truncated", "valid", "taken")}
        rewards, seen, pictures, ended = np.zeros(len(chunk), np.float32), [self.obs], [], False
        for t, action in enumerate(chunk):
            if not ended:
                obs, rewards[t], terminated, truncated, info = self.simulator.step(
                    action if self.bounds is None else scaled(action, self.bounds)
                )
                obs = observed(obs)
                check_flags(terminated, truncated)
                self.steps += 1
                valid = bool(self.sound and finite(obs) and np.isfinite(rewards[t]))
                truncated = (truncated or self.steps >= self.horizon) and not terminated
                record["taken"][t], record["valid"][t] = True, valid
                record["terminated"][t], record["truncated"][t] = terminated and valid, truncated and valid
                self.obs, rewards[t] = (obs, rewards[t]) if valid else (self.obs, 0)
                self.success = self.success or (valid and bool(info.get("success", False)))
                ended = bool(terminated or truncated or not valid)
                if frames and (self.steps % frames == 0 or ended):
                    pictures.append(self.simulator.render())
            seen.append(self.obs)
        self.random = np.random.get_state()
        result = record | {"obs": stacked(seen), "rewards": rewards, "ended": ended, "success": self.success}
        return result | ({"frames": pictures} if frames else {})


class Worker:
    """The state of a worker process; each method but the first is a command."""

    def __init__(self) -> None:
        """Creates no simulators yet."""
        self.slots: dict[tuple[str, int], Slot] = {}

    def build(self, builder: Callable[[], Any], horizon: int) -> None:
        """Stores the builder of simulators and their horizon."""
        self.builder, self.horizon = builder, horizon

    def reset(self, group: str, slots: np.ndarray, seeds: np.ndarray, tasks: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the first observations of new episodes; simulators are built on first use."""
        for slot in slots:
            if (group, slot) not in self.slots:
                self.slots[group, slot] = Slot(self.builder(), self.horizon)
                if problem := discrete(self.slots[group, slot].simulator):
                    raise UserError(f"this simulator cannot be used: {problem}")
        starts = zip(slots, seeds, tasks, strict=True)
        return {"obs": stacked([self.slots[group, slot].reset(seed, task) for slot, seed, task in starts])}

    def execute(self, group: str, slots: np.ndarray, chunks: np.ndarray, frames: int) -> dict[str, Any]:
        """Returns the steps of the chunks, field by field."""
        results = [self.slots[group, slot].execute(chunk, frames) for slot, chunk in zip(slots, chunks, strict=True)]
        columns = {name: [result[name] for result in results] for name in results[0]}
        columns["actions"] = list(chunks)
        return {name: column if name == "frames" else stacked(column) for name, column in columns.items()}

    def call(self, function: Callable[[Any], Any], job: Any) -> Any:
        """Returns function(job)."""
        return function(job)


def serve(descriptor: int) -> None:
    """Answers commands until the connection closes. Signals are handled by the parent process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    connection, worker = Connection(descriptor), Worker()
    while True:
        try:
            message = connection.recv_bytes()
            try:
                command, *arguments = pickle.loads(message)
                answer = True, getattr(worker, command)(*arguments)
            except UserError as error:
                answer = False, str(error)
            except Exception as error:
                traceback.print_exc()
                answer = False, f"a simulator failed: {type(error).__name__}: {error}"
            connection.send(answer)
        except (EOFError, ConnectionError):
            return
