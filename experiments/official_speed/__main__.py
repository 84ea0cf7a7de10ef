"""How fast are QGF, DQC and FQL here, against the official implementations and against their matrix products alone?

    python -m experiments.official_speed --data cube-single-play-v0.npz --python ENVIRONMENT/bin/python \
        --qgf CLONE --dqc CLONE --fql CLONE

The official repositories are clones outside this one, run by a Python that has what they need: the same version of
JAX as here, flax, optax, distrax and ml_collections. Measured in turn, round after round, on the same cores: the
official loop (sampling on the host and `agent.update`, without logs or evaluation), an offline epoch here, and parts of
one update here, each repeated in a program of its own. Networks, batch, chunks, horizons and data are equal. Rewards
are -1 throughout, as what they are changes no time.

Rates are medians over rounds, ratios medians of each round's. Writes results.json and table.md into this folder.
"""

import dataclasses
import json
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import lax

from experiments.bench.__main__ import products
from experiments.tables import machine
from jaxrl import train
from jaxrl.agents import DQC, FQL, QGF, common
from jaxrl.data import files
from jaxrl.data.files import Dataset
from jaxrl.data.ring import Ring, from_dataset
from jaxrl.errors import UserError
from jaxrl.train import Phase, Schedule
from jaxrl.types import Spec

HERE = Path(__file__).parent
UPDATES = 100  # in one call of a program
Measure: TypeAlias = Callable[[float], float]
"""Updates per second, from how many seconds to measure."""


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
    """Seconds for which each thing is measured, in all rounds together."""
    rounds: int = 5
    """How often they take turns."""
    sizes: tuple[str, ...] = ("256x2", "512x4")
    """Networks, as width x hidden layers."""
    batch: int = 256
    """Windows per update."""
    out: Path = HERE
    """Folder of the results."""

    def check(self) -> None:
        """Raises UserError for the first value that nothing can be measured with."""
        for size in self.sizes:
            if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", size):
                raise UserError(f"--sizes {size}: must be width x hidden layers, such as 512x4")
        for name in ("rounds", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        if not any((self.qgf, self.dqc, self.fql)):
            raise UserError("nothing to compare with: name a clone with --qgf, --dqc or --fql")


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
        ring = from_dataset(dataset, never, never, goals=dataset.observations)
        return ring, Spec(2 * observation, action, goal=observation)
    return from_dataset(dataset, -np.ones(len(never), np.float32), never), Spec(observation, action)


def measure(program: Callable[[], Any], updates: int) -> Measure:
    """Returns the measure of a program of so many updates, which has then been compiled."""
    jax.block_until_ready(program())

    def measured(seconds: float) -> float:
        calls, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds or not calls:
            jax.block_until_ready(program())
            calls += 1
        return updates * calls / (time.perf_counter() - began)

    return measured


def epochs(agent: Any, ring: Ring, spec: Spec) -> Callable[[], Any]:
    """Returns a function that runs the next offline epoch, as `jaxrl train` does."""
    env, phase = Sizes(spec), Phase("offline", 1, UPDATES, False, 1)
    carry = train.jitted_begin(agent, env, Schedule(online_steps=0), jax.random.key(0))

    def following() -> Any:
        nonlocal carry
        carry, metrics = train.jitted_epoch(agent, env, phase, carry, ring)
        return metrics

    return following


def sampling(agent: Any, ring: Ring, spec: Spec) -> Callable[[], Any]:
    """Returns a program of the batches and random numbers of updates, without the updates."""

    def drawn(ring: Ring, keys: jax.Array) -> Any:
        def body(_: None, key: jax.Array) -> tuple[None, Any]:
            batch = agent.sample((ring,), key)
            return None, jax.tree.map(lambda x: x.sum(), (batch, agent.draw(spec, batch, key)))

        return lax.scan(body, None, keys)[1]

    program, keys = jax.jit(drawn), jax.random.split(jax.random.key(2), UPDATES)
    return lambda: program(ring, keys)


def stepping(agent: Any, spec: Spec) -> Callable[[], Any]:
    """Returns a program of the steps of Adam and of the target, for a gradient that is given."""
    optimizer = agent.optimizer() if hasattr(agent, "optimizer") else optax.adam(agent.lr)

    def stepped(state: common.State, gradient: Any) -> Any:
        def loss(params: Any) -> tuple[jax.Array, dict]:
            return jnp.asarray(optax.tree.vdot(params, gradient)), {}

        def body(state: common.State, _: None) -> tuple[common.State, None]:
            return common.descend(state, loss, optimizer, agent.tau)[0], None

        return lax.scan(body, state, None, length=UPDATES)[0]

    state = agent.init(jax.random.key(0), spec)
    program = jax.jit(stepped)
    return lambda: program(state, state.params)


def multiplying(agent: Any, ring: Ring, spec: Spec) -> tuple[Callable[[], Any], float]:
    """Returns a program of the matrix products of updates, and how many operations one update's are.

    Each product has operands of its own, and a new entry in one of them every time, so that none can be left out.
    """

    def one(state: Any, data: Ring, key: jax.Array) -> Any:
        return agent.update(state, agent.sample((data,), key), key)[0]

    program = jax.make_jaxpr(one)(agent.init(jax.random.key(0), spec), ring, jax.random.key(1)).jaxpr
    found = [(left.shape, right.shape, how) for left, right, how, times in products(program) for _ in range(times)]
    lefts, rights = ([jax.random.normal(jax.random.key(3), pair[i]) for pair in found] for i in (0, 1))

    def multiplied(lefts: list, rights: list) -> list:
        return [lax.dot_general(a, b, how) for a, b, (_, _, how) in zip(lefts, rights, found, strict=True)]

    def repeated(lefts: list, rights: list) -> Any:
        def body(carry: tuple[list, list], entry: jax.Array) -> tuple[tuple[list, list], None]:
            fresh = [left.at[(0,) * left.ndim].set(entry) for left in carry[0]]
            return (fresh, multiplied(fresh, rights)), None

        return lax.scan(body, (lefts, multiplied(lefts, rights)), jnp.arange(UPDATES, dtype=jnp.float32))[0]

    results = jax.eval_shape(multiplied, lefts, rights)
    summed = [math.prod(left[i] for i in contracted) for left, _, ((contracted, _), _) in found]
    operations = sum(2 * result.size * terms for result, terms in zip(results, summed, strict=True))
    compiled = jax.jit(repeated)
    return lambda: compiled(lefts, rights), operations


def pieces(agent: Any, ring: Ring, spec: Spec) -> tuple[dict[str, Measure], float]:
    """Returns the measures of training here and of its parts, and the operations of one update's matrix products."""
    agent = train.on_device(agent)
    multiplications, operations = multiplying(agent, ring, spec)
    measures = {
        "jaxrl": measure(epochs(agent, ring, spec), UPDATES),
        "products": measure(multiplications, UPDATES),
        "sampling": measure(sampling(agent, ring, spec), UPDATES),
        "stepping": measure(stepping(agent, spec), UPDATES),
    }
    return measures, operations


@contextmanager
def official(study: Study, case: Case) -> Generator[tuple[dict[str, str], Measure]]:
    """Yields the versions that the official code runs with, and the measure of its loop."""
    agent = case.agent
    method, widths = type(agent).__name__.lower(), ",".join(map(str, agent.actor_hidden))
    command = [study.python, "-W", "ignore", HERE / "runner.py", method, case.repository.absolute()]
    command += [study.data.absolute(), widths, agent.batch_size, agent.chunk, agent.backup]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([str(word) for word in command], **pipes) as process:
        assert process.stdin is not None and process.stdout is not None
        questions, answers = process.stdin, process.stdout

        def answer() -> dict[str, Any]:
            line = answers.readline()
            if not line:
                raise UserError(f"the official code of {case.name} in {case.repository} stopped, see its message above")
            return json.loads(line)

        def measured(seconds: float) -> float:
            print(seconds, file=questions, flush=True)
            done = answer()
            return done["loops"] / done["seconds"]

        yield answer(), measured


def compared(study: Study, case: Case, dataset: Dataset) -> dict[str, Any]:
    """Returns what was measured of a method at one size."""
    measures, operations = pieces(case.agent, *laid(dataset, case.agent))
    rounds, load = [], [os.getloadavg()[0]]
    with official(study, case) as (versions, theirs):
        for _ in range(study.rounds):
            turn = {"official": theirs, **measures}
            rounds.append({name: one(study.seconds / study.rounds) for name, one in turn.items()})
            load.append(os.getloadavg()[0])

    def median(of: Callable[[dict[str, float]], float]) -> float:
        return float(np.median([of(turn) for turn in rounds]))

    return {
        "per_second": {name: median(lambda turn, name=name: turn[name]) for name in rounds[0]},
        "over_official": median(lambda turn: turn["jaxrl"] / turn["official"]),
        "share": {name: median(lambda turn, name=name: turn["jaxrl"] / turn[name]) for name in rounds[0]},
        "update_gflop": operations / 1e9,
        "rounds": rounds,
        "load_average": load,
        "commit": commit(case.repository),
        "official_versions": versions,
    }


def commit(repository: Path) -> str | None:
    """Returns the commit that a clone is at, or None where git does not say."""
    command = ["git", f"--git-dir={repository / '.git'}", "rev-parse", "HEAD"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else None


def processor() -> str:
    """Returns the processor's name."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def cells(row: dict[str, Any]) -> list[str]:
    """Returns a row of the table."""
    speed, share, gflop = row["per_second"], row["share"], row["update_gflop"]
    rest = 1 - share["products"] - share["stepping"] - share["sampling"]
    return [
        row["method"],
        row["networks"],
        f"{speed['official']:.1f}",
        f"{speed['jaxrl']:.1f}",
        f"**{row['over_official']:.2f}**",
        *(f"{100 * part:.0f} %" for part in (share["products"], share["stepping"], share["sampling"], rest)),
        f"{gflop * speed['jaxrl']:.0f} of {gflop * speed['products']:.0f}",
    ]


def table(results: dict[str, Any]) -> str:
    """Returns the results as people read them."""
    head = ["method", "networks", "official", "jaxrl", "ratio", "products", "Adam, target", "sampling", "rest"]
    rows = [[*head, "GFLOP/s"], ["---", "---", *["---:"] * 8], *map(cells, results["rows"])]
    manifest, study = results["manifest"], results["study"]
    loads = [load for row in results["rows"] for load in row["load_average"]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + (
        f"\n\nUpdates per second, batch {study['batch']}, `{study['data']}`: medians of {study['rounds']} rounds in "
        f"turn, {study['seconds'] / study['rounds']:g} s each. Percentages: the time of an update's parts, each alone "
        "in a program, in per cent of the update's; the rest is activations, norms, losses, copies, and how the parts "
        "disturb each other. GFLOP/s: of the update's matrix products, in the update and alone. "
        f"{manifest['cores']} cores of {manifest['processor']}, load average {min(loads):.1f} to {max(loads):.1f}, "
        f"jax {manifest['versions']['jax']} here and {results['rows'][0]['official_versions']['jax']} there.\n"
    )


def main(study: Study) -> None:
    """Runs the study and writes its results."""
    study.check()
    dataset = files.load(study.data)
    settings = {"data": study.data.name, "batch": study.batch, "rounds": study.rounds, "seconds": study.seconds}
    manifest = machine(dataset.digest) | {"processor": processor()}
    results: dict[str, Any] = {"manifest": manifest, "study": settings, "rows": []}
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
