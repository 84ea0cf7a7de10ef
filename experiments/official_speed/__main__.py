"""How fast are QGF, DQC and FQL here, against the official implementations and against their matrix products alone?

    python -m experiments.official_speed --data cube-single-play-v0.npz --python ENVIRONMENT/bin/python \
        --qgf CLONE --dqc CLONE --fql CLONE

The official repositories are clones outside this one, run by a Python that has what they need: the same version of
JAX as here, flax, optax, distrax and ml_collections. Three things are measured in turn, round after round, on the same
cores: the official loop (sampling on the host and `agent.update`, without logs or evaluation), an offline epoch here,
and one update's matrix products without anything else, in one program. Networks, batch, chunks, horizons and data are
equal. Rewards are -1 throughout, as what they are changes no time.

Rates are medians over rounds, ratios medians of each round's. Writes results.json and table.md into this folder.
"""

import dataclasses
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from experiments.bench.__main__ import bare_products
from experiments.tables import machine
from jaxrl import train
from jaxrl.agents import DQC, FQL, QGF
from jaxrl.data import files
from jaxrl.data.files import Dataset
from jaxrl.data.ring import Ring, from_dataset
from jaxrl.train import Phase, Schedule
from jaxrl.types import Spec

HERE = Path(__file__).parent
UPDATES = 100  # per epoch here


@dataclasses.dataclass(frozen=True)
class Study:
    """Updates per second against the official loops; a method whose repository is not named is left out."""

    data: Path
    """Dataset file in OGBench's layout."""
    python: Path
    """Python that has what the official code needs."""
    qgf: Path | None = None
    """Clone of github.com/zhouzypaul/qgf."""
    dqc: Path | None = None
    """Clone of github.com/ColinQiyangLi/dqc."""
    fql: Path | None = None
    """Clone of github.com/seohongpark/fql."""
    seconds: float = 20.0
    """Seconds for which each of the three is measured, in all rounds together."""
    rounds: int = 5
    """How often they take turns."""
    sizes: tuple[str, ...] = ("256x2", "512x4")
    """Networks, as width x hidden layers."""
    batch: int = 256
    """Windows per update."""
    out: Path = HERE
    """Folder of the results."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A method at one size."""

    name: str
    agent: Any
    repository: Path


@dataclasses.dataclass(frozen=True)
class Sizes:
    """All that an offline epoch asks of an environment."""

    spec: Spec


def cases(study: Study, size: str) -> Iterator[Case]:
    """Yields the methods whose repository is there, with networks of a size such as 512x4."""
    width, layers = (int(number) for number in size.split("x"))
    same: dict[str, Any] = dict.fromkeys(("actor_hidden", "critic_hidden"), (width,) * layers)
    same["batch_size"] = study.batch
    if study.qgf is not None:
        yield Case("QGF", QGF(chunk=1, backup=1, **same), study.qgf)
        yield Case("QGF, chunks of 5", QGF(chunk=5, backup=5, **same), study.qgf)
    if study.dqc is not None:
        yield Case("DQC, 5 of 25", DQC(chunk=5, backup=25, **same), study.dqc)
    if study.fql is not None:
        yield Case("FQL", FQL(chunk=1, backup=1, **same), study.fql)


def laid(dataset: Dataset, agent: Any) -> tuple[Ring, Spec]:
    """Returns the data in device memory, for DQC with whole observations as goals, and the sizes of the task."""
    never = np.zeros(len(dataset.terminals), bool)
    observation, action = dataset.observations.shape[1], dataset.actions.shape[1]
    if isinstance(agent, DQC):
        return from_dataset(dataset, never, never, goals=dataset.observations), Spec(
            2 * observation, action, observation
        )
    return from_dataset(dataset, -np.ones(len(never), np.float32), never), Spec(observation, action)


def rate(program: Callable[[], Any], each: int, seconds: float) -> float:
    """Returns updates per second of a program that makes `each` of them, called for so many seconds."""
    calls, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds or not calls:
        jax.block_until_ready(program())
        calls += 1
    return each * calls / (time.perf_counter() - began)


def epochs(agent: Any, ring: Ring, spec: Spec) -> Callable[[], Any]:
    """Returns a function that runs the next offline epoch, as `jaxrl train` does, compiled."""
    agent, env, phase = train.on_device(agent), Sizes(spec), Phase("offline", 1, UPDATES, False, 1)
    carry = train.jitted_begin(agent, env, Schedule(online_steps=0), jax.random.key(0))

    def following() -> Any:
        nonlocal carry
        carry, metrics = train.jitted_epoch(agent, env, phase, carry, ring)
        return metrics

    jax.block_until_ready(following())
    return following


def products_of(agent: Any, ring: Ring, spec: Spec) -> tuple[Callable[[], Any], float]:
    """Returns a compiled program of one update's matrix products, and their floating-point operations."""

    def one(state: Any, data: Ring, key: jax.Array) -> Any:
        return agent.update(state, agent.sample((data,), key), key)[0]

    program, operations = bare_products(one, agent.init(jax.random.key(0), spec), ring, jax.random.key(1))
    jax.block_until_ready(program())
    return program, operations


@contextmanager
def official(study: Study, case: Case) -> Iterator[tuple[dict[str, str], Callable[[float], float]]]:
    """Yields the versions that the official code runs with, and its loops per second when measured so long."""
    agent = case.agent
    method, widths = type(agent).__name__.lower(), ",".join(map(str, agent.actor_hidden))
    command = [str(study.python), "-W", "ignore", str(HERE / "runner.py"), method, str(case.repository)]
    sizes = [study.data.absolute(), widths, agent.batch_size, agent.chunk, agent.backup]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, *map(str, sizes)], **pipes) as process:
        assert process.stdin is not None and process.stdout is not None
        question, answer = process.stdin, process.stdout
        versions = json.loads(answer.readline())

        def measured(seconds: float) -> float:
            print(seconds, file=question, flush=True)
            done = json.loads(answer.readline())
            return done["loops"] / done["seconds"]

        yield versions, measured


def compared(study: Study, case: Case, dataset: Dataset) -> dict[str, Any]:
    """Returns what was measured of a method at one size."""
    ring, spec = laid(dataset, case.agent)
    ours, (bare, operations) = epochs(case.agent, ring, spec), products_of(case.agent, ring, spec)
    seconds = study.seconds / study.rounds
    rounds, load = [], [os.getloadavg()[0]]
    with official(study, case) as (versions, theirs):
        for _ in range(study.rounds):
            turn = {"official": theirs(seconds), "jaxrl": rate(ours, UPDATES, seconds), "bare": rate(bare, 1, seconds)}
            rounds.append(turn)
            load.append(os.getloadavg()[0])
    medians = {name: float(np.median([turn[name] for turn in rounds])) for name in rounds[0]}
    return {
        "per_second": medians,
        "over_official": float(np.median([turn["jaxrl"] / turn["official"] for turn in rounds])),
        "time_over_bare": float(np.median([turn["bare"] / turn["jaxrl"] for turn in rounds])),
        "update_gflop": operations / 1e9,
        "rounds": rounds,
        "load_average": load,
        "commit": commit(case.repository),
        "official_versions": versions,
    }


def commit(repository: Path) -> str | None:
    """Returns the commit that a clone is at, or None where git does not say."""
    command = ["git", "-C", str(repository), "rev-parse", "HEAD"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else None


def processor() -> str:
    """Returns the processor's name."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def table(results: dict[str, Any]) -> str:
    """Returns the results as people read them."""
    head = ("method", "networks", "official", "jaxrl", "ratio", "products alone", "update / products", "GFLOP/s")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * 2 + "---:|" * (len(head) - 2)]
    for row in results["rows"]:
        speed, gflop = row["per_second"], row["update_gflop"]
        cells = [row["method"], row["networks"], f"{speed['official']:.1f}", f"{speed['jaxrl']:.1f}"]
        cells += [f"**{row['over_official']:.2f}**", f"{speed['bare']:.1f}", f"{row['time_over_bare']:.2f}"]
        cells.append(f"{gflop * speed['jaxrl']:.0f} of {gflop * speed['bare']:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    manifest, study = results["manifest"], results["study"]
    lines.append(
        f"\nUpdates per second, batch {study['batch']}, `{study['data']}`: medians of {study['rounds']} rounds in turn, "
        f"{study['seconds'] / study['rounds']:g} s each. {manifest['cores']} cores of {manifest['processor']}, "
        f"jax {manifest['versions']['jax']} here and {results['rows'][0]['official_versions']['jax']} there. GFLOP/s "
        "count the update's matrix products, here and alone."
    )
    return "\n".join(lines) + "\n"


def main(study: Study) -> None:
    """Runs the study and writes its results."""
    dataset = files.load(study.data)
    where = {"processor": processor(), "cores": len(os.sched_getaffinity(0)), "nice": os.nice(0)}
    settings = {"data": study.data.name, "batch": study.batch, "rounds": study.rounds, "seconds": study.seconds}
    results: dict[str, Any] = {"manifest": machine(dataset.digest) | where, "study": settings, "rows": []}
    for size in study.sizes:
        for case in cases(study, size):
            row = {"method": case.name, "networks": size} | compared(study, case, dataset)
            results["rows"].append(row)
            print(f"{case.name}, {size}: {row['over_official']:.2f} times the official loop", flush=True)
            (study.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
            jax.clear_caches()
    (study.out / "table.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Study))
