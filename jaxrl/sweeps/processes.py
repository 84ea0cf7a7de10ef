"""Several processes, on one machine or many, that carry out one sweep together.

Members have nothing to say to each other, so neither have the programs of different processes: `jax.distributed`
brings the processes together, they agree on what is to be done, and then each is a JAX of its own, over its own
devices. What they still need to know of each other goes through the sweep's folder, which all of them see: each writes
every few seconds that it lives. A process that is lost takes no other with it unsaved, and no collective can hang.
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

BEAT = 2.0  # seconds between two signs of life
TOGETHER = 120  # seconds that processes wait for each other at the start
VISIBLE = ("jax_cuda_visible_devices", "jax_rocm_visible_devices")  # SLURM may give each process GPUs of its own


@dataclasses.dataclass(frozen=True)
class Machine:
    """One process among several; which of the sweep's parts are its own follows from the two numbers."""

    process: int = 0
    processes: int = 1
    meeting: str = ""  # tells one start of the processes from the one before

    def share(self, parts: int) -> range:
        """Returns the parts, of so many, that are this process's own."""
        return range(self.process, parts, self.processes)


def asked_by_environment() -> bool:
    """Whether a scheduler says that this process is one of several: SLURM, MPI, Kubernetes or a slice of TPUs."""
    environ = os.environ
    return (
        (int(environ.get("SLURM_NTASKS", 1)) > 1 and {"SLURM_STEP_NODELIST", "SLURM_PROCID"} <= environ.keys())
        or int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
        or {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environ.keys()
        or "," in environ.get("TPU_WORKER_HOSTNAMES", "")
    )


def job() -> str | None:
    """Returns the name of the scheduler's job, which stays the same when it is queued again; None without one."""
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("JOB_NAME")


def rendezvous(coordinator: str | None, processes: int | None, process: int | None, asked: dict[str, Any]) -> Machine:
    """Returns this process's place among the others, once all are there and want the same.

    Without a coordinator's address the scheduler's environment tells all three. Raises UserError where a process does
    not come or is lost meanwhile, within twice `TOGETHER`, or asks for something else, naming the first field.

    JAX ends a process that waits for another in vain by a signal, so another one is sent to meet in our place.
    """
    words = [
        sys.executable,
        "-m",
        "jaxrl.sweeps.processes",
        json.dumps([coordinator, processes, process, asked, TOGETHER]),
    ]
    sent = subprocess.run(words, capture_output=True, text=True)
    if sent.returncode:
        lost = f"not all were there within {TOGETHER} s, or one was lost"
        said = lost if sent.returncode < 0 else sent.stderr.splitlines()[-1]
        raise UserError(f"processes cannot come together: {said}")
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
    """Returns the place of this process, what each process asks for, and the devices that the scheduler gave to it."""
    jax.distributed.initialize(
        coordinator, processes, process, initialization_timeout=seconds, heartbeat_timeout_seconds=seconds
    )
    from jax._src import distributed  # where alone JAX keeps, before a backend is there, who we are and what all share

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
    """Returns the first field, dotted, in which two JSON objects differ, None where they are equal."""
    a, b = flat(one), flat(other)
    return next((name for name in a | b if a.get(name, "absent") != b.get(name, "absent")), None)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Returns nested JSON objects as one, with dotted names."""
    if not isinstance(value, dict):
        return {prefix.removesuffix("."): value}
    return {name: leaf for key, part in value.items() for name, leaf in flat(part, f"{prefix}{key}.").items()}


class Watch:
    """Signs of life: this process's are written, the others' are read."""

    def __init__(self, folder: Path, machine: Machine, patience: float) -> None:
        """Begins nothing yet; `patience` is the seconds without a sign after which a process counts as lost."""
        self.folder, self.machine, self.patience = folder, machine, patience
        self.heard = {i: (time.monotonic(), "") for i in range(machine.processes) if i != machine.process}
        self.state, self.beats, self.over = "running", 0, threading.Event()

    @contextlib.contextmanager
    def kept(self) -> Generator["Watch"]:
        """A context in which signs are written; how it is left is the last of them."""
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
        """Whether another process has stopped or is lost, which is then said on stderr."""
        lost = self.lost()
        if lost:
            print(f"{lost}: saving and stopping", file=sys.stderr)
        return lost is not None

    def lost(self) -> str | None:
        """Returns which other process has stopped, or was not heard of for too long, None where there is none."""
        for i, (since, known) in self.heard.items():
            try:
                text = (self.folder / f"{i}.json").read_text()
                sign = json.loads(text)
            except (OSError, ValueError):
                text, sign = known, {}
            if sign.get("meeting") != self.machine.meeting:  # of an earlier start
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
