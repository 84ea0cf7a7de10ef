"""Several processes, on one machine or many, that execute one sweep together.

Members are independent, so the programs of different processes do not communicate: `jax.distributed` is used for a
rendezvous in which the processes agree on the sweep; afterwards each runs JAX on its own devices only. All further
communication uses files in the sweep's shared folder, with a heartbeat every few seconds. If a process is lost, the
others save before stopping, and no collective can hang.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax

from jaxrl.errors import UserError
from jaxrl.runs.jsonlines import write_json

BEAT = 2.0  # seconds between heartbeats
TOGETHER = 120  # seconds that processes wait for each other at the start
VISIBLE = ("jax_cuda_visible_devices", "jax_rocm_visible_devices")  # SLURM may assign separate GPUs to each process


@dataclasses.dataclass(frozen=True)
class Machine:
    """One process among several; its index and the number of processes determine its share of the sweep."""

    process: int = 0
    processes: int = 1
    meeting: str = ""  # identifies one launch of the processes

    def share(self, parts: int) -> range:
        """Returns the indices, out of `parts`, that are assigned to this process."""
        return range(self.process, parts, self.processes)


def asked_by_environment() -> bool:
    """Returns whether a scheduler started this process as one of several: SLURM, MPI, Kubernetes or a TPU slice."""
    environ = os.environ
    return (
        (int(environ.get("SLURM_NTASKS", 1)) > 1 and {"SLURM_STEP_NODELIST", "SLURM_PROCID"} <= environ.keys())
        or int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
        or {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environ.keys()
        or "," in environ.get("TPU_WORKER_HOSTNAMES", "")
    )


def job() -> str | None:
    """Returns the scheduler's job ID or name, which is kept when the job is requeued; None without one."""
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("JOB_NAME")


def rendezvous(coordinator: str | None, processes: int | None, process: int | None, asked: dict[str, Any]) -> Machine:
    """Waits for all processes to request the same sweep, and returns this process's place among them.

    Without a coordinator's address, the scheduler's environment provides all three arguments. Raises UserError if a
    process is missing or lost (within twice `TOGETHER`), or requests something else, naming the first differing field.

    JAX aborts a process on timeout, so a subprocess does the rendezvous.
    """
    words = [
        sys.executable,
        "-m",
        "jaxrl.sweeps.processes",
        json.dumps([coordinator, processes, process, asked, TOGETHER]),
    ]
    sent = subprocess.run(words, capture_output=True, text=True)
    if sent.returncode:
        lost = f"not all connected within {TOGETHER} s, or one was lost"
        said = lost if sent.returncode < 0 else sent.stderr.splitlines()[-1]
        raise UserError(f"processes cannot connect: {said}")
    met = json.loads(sent.stdout.splitlines()[-1])
    others = met["asked"]
    for i, other in enumerate(others):
        if name := difference(others[0], other):
            first, second = (flat(x).get(name, "absent") for x in (others[0], other))
            raise UserError(f"processes 0 and {i} disagree: {name} = {first} and {second}")
    for name, devices in met["visible"].items():
        jax.config.update(name, devices)
    return Machine(**met["machine"])


def exchange(
    coordinator: str | None, processes: int | None, process: int | None, asked: Any, seconds: int
) -> dict[str, Any]:
    """Returns this process's place, the requests of all processes, and the devices assigned by the scheduler."""
    jax.distributed.initialize(
        coordinator, processes, process, initialization_timeout=seconds, heartbeat_timeout_seconds=seconds
    )
    from jax._src import distributed  # the only source of process index and key-value store before backends exist

    state: Any = distributed.global_state
    client, me = state.client, state.process_id
    client.key_value_set(f"jaxrl/asked/{me}", json.dumps(asked))
    if me == 0:
        client.key_value_set("jaxrl/meeting", f"{time.time():.3f}")
    meeting = client.blocking_key_value_get("jaxrl/meeting", 1000 * seconds)
    texts = [client.blocking_key_value_get(f"jaxrl/asked/{i}", 1000 * seconds) for i in range(state.num_processes)]
    jax.distributed.shutdown()
    return {
        "machine": {"process": me, "processes": state.num_processes, "meeting": meeting},
        "asked": [json.loads(text) for text in texts],
        "visible": {name: jax.config.read(name) for name in VISIBLE},
    }


def difference(one: Any, other: Any) -> str | None:
    """Returns the first field, dotted, in which two JSON objects differ, None if they are equal."""
    a, b = flat(one), flat(other)
    return next((name for name in a | b if a.get(name, "absent") != b.get(name, "absent")), None)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Returns nested JSON objects flattened to dotted names."""
    if not isinstance(value, dict):
        return {prefix.removesuffix("."): value}
    return {name: leaf for key, part in value.items() for name, leaf in flat(part, f"{prefix}{key}.").items()}


class Watch:
    """Heartbeats: writes those of this process, reads those of the others."""

    def __init__(self, folder: Path, machine: Machine, patience: float) -> None:
        """Starts nothing yet; a process without a heartbeat for `patience` seconds counts as lost."""
        self.folder, self.machine, self.patience = folder, machine, patience
        self.heard = {i: (time.monotonic(), "") for i in range(machine.processes) if i != machine.process}
        self.state, self.beats, self.over = "running", 0, threading.Event()

    @contextlib.contextmanager
    def kept(self) -> Generator["Watch"]:
        """A context in which heartbeats are written; the last one records whether it finished or stopped."""
        if self.machine.processes == 1:
            yield self
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        thread = threading.Thread(target=self._beat, daemon=True)
        thread.start()
        last = "stopped"
        try:
            yield self
            last = "finished"
        finally:
            self.over.set()
            thread.join()
            self.state = last
            self._write()

    def _beat(self) -> None:
        while not self.over.is_set():
            self._write()
            self.over.wait(BEAT)

    def _write(self) -> None:
        self.beats += 1
        sign = {"meeting": self.machine.meeting, "state": self.state, "beats": self.beats}
        write_json(self.folder / f"{self.machine.process}.json", sign)

    def gone(self) -> bool:
        """Returns whether another process has stopped or is lost, and reports it on stderr."""
        lost = self.lost()
        if lost:
            print(f"{lost}: saving and stopping", file=sys.stderr)
        return lost is not None

    def lost(self) -> str | None:
        """Returns a message about a process that stopped or sent no heartbeat for too long, None if there is none."""
        for i, (since, known) in self.heard.items():
            try:
                text = (self.folder / f"{i}.json").read_text()
                sign = json.loads(text)
            except (OSError, ValueError):
                text, sign = known, {}
            if sign.get("meeting") != self.machine.meeting:  # of an earlier launch
                text = known
            elif sign["state"] == "stopped":
                return f"process {i} of {self.machine.processes} has stopped"
            now = time.monotonic()
            if text != known or sign.get("state") == "finished":
                self.heard[i] = (now, text)
            elif now - since > self.patience:
                return f"process {i} of {self.machine.processes} was not heard of for {self.patience:g} s"
        return None


if __name__ == "__main__":
    try:
        print(json.dumps(exchange(*json.loads(sys.argv[1]))))
    except (RuntimeError, ValueError) as error:
        sys.exit(str(error).splitlines()[0])
