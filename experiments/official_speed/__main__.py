"""How fast are agents here, against the official implementations and against their matrix products alone?

    python -m experiments.official_speed --data cube-single-play-v0.npz --python ENVIRONMENT/bin/python \
        --qgf CLONE --dqc CLONE --fql CLONE --torch-python ENVIRONMENT/bin/python --td3bc CLONE --prdc CLONE \
        --a2pr CLONE --odice CLONE --alone

The official repositories are clones outside this one. QGF, DQC and FQL are run by a Python that has the same version
of JAX as here, flax, optax, distrax and ml_collections; TD3+BC, PRDC, A2PR and O-DICE by one that has PyTorch, with
its own choice of threads, and SciPy. Measured in turn, round after round, on the same cores: the official loop
(sampling on the host and an update, without logs or evaluation), an offline epoch here, and parts of one update here,
each repeated in a program of its own. Networks, batch, chunks, horizons and data are equal. Rewards are -1 throughout,
as what they are changes no time. PRDC, whose searches get easier as the actor comes near the data, is measured from
its 1,000th update on, also among many synthetic keys. With --alone, ReBRAC, CQL, AWAC and FamO2O are measured as well,
against their matrix products only.

Rates are medians over rounds, ratios medians of each round's. Writes results.json and table.md into this folder, and
leaves rows that are there and that it was not asked for as they are.
"""

import dataclasses
import json
import math
import os
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import lax

from experiments.bench.products import products
from experiments.neighbours.ways import trajectories
from experiments.tables import machine
from jaxrl.agents import A2PR, AWAC, CQL, DQC, FQL, ODICE, PRDC, QGF, TD3, TD3BC, FamO2O, ReBRAC, learner
from jaxrl.agents.learner import Draws, Optimizers, State
from jaxrl.agents.parts import Critic, with_fields
from jaxrl.data import files
from jaxrl.data.files import Dataset
from jaxrl.errors import UserError
from jaxrl.replay import loading
from jaxrl.replay.ring import Ring
from jaxrl.training import loop
from jaxrl.training.schedule import Schedule
from jaxrl.types import Batch, Fitting, Phase, Spec, requirements

HERE = Path(__file__).parent
UPDATES = 100  # in one call of a program
WARMUP = 1000  # updates before the first measurement, of agents that search the data
EPISODE = 1000  # steps of a synthetic episode
Measure: TypeAlias = Callable[[float], float]
"""Updates per second, from how many seconds to measure."""


@dataclasses.dataclass(frozen=True)
class Study:
    """Updates per second against the official loops; a method whose repository is not named is left out."""

    data: Path
    """Dataset file in OGBench's layout."""
    python: Path | None = None
    """Python that has what the official code of QGF, DQC and FQL needs."""
    torch_python: Path | None = None
    """Python that has PyTorch, for the others."""
    qgf: Path | None = None
    """Clone of github.com/zhouzypaul/qgf."""
    dqc: Path | None = None
    """Clone of github.com/ColinQiyangLi/dqc."""
    fql: Path | None = None
    """Clone of github.com/seohongpark/fql."""
    td3bc: Path | None = None
    """Clone of github.com/sfujim/TD3_BC."""
    prdc: Path | None = None
    """Clone of github.com/LAMDA-RL/PRDC."""
    a2pr: Path | None = None
    """Clone of github.com/ltlhuuu/A2PR."""
    odice: Path | None = None
    """Clone of github.com/maoliyuan/ODICE-Pytorch."""
    alone: bool = False
    """Whether to measure methods against their matrix products that are compared with no official loop."""
    keys: int = 1_000_000
    """Transitions of the synthetic data among which PRDC searches as well; 0 leaves that row out."""
    seconds: float = 3.0
    """Seconds of each round for which an update is measured; its parts a third of that."""
    rounds: int = 5
    """How often they take turns."""
    sizes: tuple[str, ...] = ("256x2", "512x4", "published")
    """Networks of QGF, DQC and FQL, as width x hidden layers; "published" are all others, at their papers' sizes."""
    batch: int = 256
    """Windows per update."""
    out: Path = HERE
    """Folder of the results."""

    def check(self) -> None:
        """Raises UserError for the first value that nothing can be measured with."""
        for size in self.sizes:
            if size != "published" and not re.fullmatch(r"[1-9]\d*x[1-9]\d*", size):
                raise UserError(f"--sizes {size}: must be width x hidden layers, such as 512x4, or published")
        for name, least in (("rounds", 1), ("batch", 1), ("keys", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least {least}")
        found = [case for size in self.sizes for case in cases(self, size)]
        if not found:
            raise UserError("nothing to compare with: name a clone, such as --qgf or --td3bc, and its --sizes")
        for case in found:
            if case.repository is not None and case.python is None:
                option = "--torch-python" if case.size == "published" else "--python"
                raise UserError(f"{case.name}: {option} must name the Python that runs the official code")


@dataclasses.dataclass(frozen=True)
class Case:
    """A method at one size."""

    name: str
    size: str
    agent: Any
    repository: Path | None  # None: there is no official loop
    python: Path | None
    keys: int = 0  # of synthetic data, in place of the study's


@dataclasses.dataclass(frozen=True)
class Sizes:
    """All that an offline epoch asks of an environment."""

    spec: Spec


def cases(study: Study, size: str) -> Iterator[Case]:
    """Yields the methods whose repository is there, with networks of a size such as 512x4, or as published."""
    if size == "published":
        yield from published(study)
        return
    width, layers = (int(number) for number in size.split("x"))
    for name, method, chunk, backup, repository in (
        ("QGF", QGF, 1, 1, study.qgf),
        ("QGF, chunks of 5", QGF, 5, 5, study.qgf),
        ("DQC, 5 of 25", DQC, 5, 25, study.dqc),
        ("FQL", FQL, 1, 1, study.fql),
    ):
        if repository is not None:
            sizes: dict[str, Any] = {"hidden": (width,) * layers, "batch": study.batch}
            agent = with_fields(method(), chunk=chunk, backup=backup, **sizes)
            yield Case(name, size, agent, repository, study.python)


def published(study: Study) -> Iterator[Case]:
    """Yields the methods whose official code has networks of one size and is written in PyTorch, then the others."""
    for name, method, repository, keys in (
        ("TD3+BC", TD3BC, study.td3bc, 0),
        ("PRDC", PRDC, study.prdc, 0),
        (f"PRDC, {study.keys:,} keys", PRDC, study.prdc if study.keys else None, study.keys),
        ("A2PR", A2PR, study.a2pr, 0),
        ("O-DICE", ODICE, study.odice, 0),
    ):
        if repository is not None:
            agent = with_fields(method(), batch=study.batch)
            yield Case(name, "published", agent, repository, study.torch_python, keys)
    for method in (ReBRAC, CQL, AWAC, FamO2O) if study.alone else ():
        yield Case(method.__name__, "published", with_fields(method(), batch=study.batch), None, None)


def synthesized(keys: int, folder: Path) -> Path:
    """Returns the file of smooth synthetic trajectories with so many transitions, written into a folder."""
    lengths = np.full(-(-keys // EPISODE), EPISODE)
    lengths[-1] = keys - lengths[:-1].sum()
    terminals = np.zeros(keys + len(lengths), bool)  # one more row per episode, which is only observed
    terminals[np.cumsum(lengths + 1) - 1] = True
    observations, actions = trajectories(len(terminals), length=EPISODE + 1)
    path = folder / f"{keys}.npz"
    np.savez(path, observations=observations, actions=actions, terminals=terminals)
    return path


def searches(agent: Any) -> bool:
    """Returns whether an agent looks for neighbours among all of the data."""
    return isinstance(agent, PRDC)


def laid(dataset: Dataset, agent: Any) -> tuple[Ring, Spec]:
    """Returns the data in device memory, for DQC with whole observations as goals, and the sizes of the task."""
    observation, action = dataset.observations.shape[1], dataset.actions.shape[1]
    goals = isinstance(agent, DQC)
    spec = Spec(2 * observation, action, goal=observation) if goals else Spec(observation, action)
    dataset = dataclasses.replace(dataset, rewards=-np.ones(len(dataset.terminals), np.float32), masks=None, extra={})
    return loading.to_ring(dataset, Sizes(spec), searched=searches(agent)), spec


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


@dataclasses.dataclass
class Training:
    """An offline run, as `jaxrl train` makes it; each call is its next epoch."""

    agent: Any
    ring: Ring
    spec: Spec

    def __post_init__(self) -> None:
        """Begins, and makes the updates that are not measured."""
        self.env, self.phase = Sizes(self.spec), Phase("offline", 1, UPDATES, False, 1, data="dataset")
        self.carry = loop.jitted_begin(self.agent, self.env, Schedule(online_steps=0), jax.random.key(0))
        if isinstance(self.agent, Fitting):
            self.carry = loop.jitted_fit(self.agent, self.carry, self.ring)
        for _ in range(warmup(self.agent) // UPDATES):
            self()

    def __call__(self) -> Any:
        """Returns the metrics of the next epoch."""
        self.carry, metrics = loop.jitted_epoch(self.agent, self.env, self.phase, self.carry, self.ring)
        return metrics


def warmup(agent: Any) -> int:
    """Returns the updates that are made before the first that is measured, at least those that compile."""
    return WARMUP if searches(agent) else 2


def base(agent: Any) -> Any:
    """Returns the TD3 that an agent is built on; of the others, the agent itself."""
    return agent.td3 if isinstance(agent, A2PR | PRDC | TD3BC | ReBRAC) else agent


def delay(agent: Any) -> int:
    """Returns after how many updates the actor and the targets move."""
    method = base(agent)
    return method.delay if isinstance(method, TD3) else 1


def random_numbers(agent: Any, spec: Spec, batch: Batch, key: jax.Array) -> Draws:
    """Returns the random numbers of an update, none of O-DICE's."""
    if isinstance(agent, ODICE):
        return {}
    return (agent if isinstance(agent, A2PR) else base(agent)).draw(spec, batch, key)


def sampling(agent: Any, ring: Ring, spec: Spec) -> Callable[[], Any]:
    """Returns a program of the batches and random numbers of updates, without the updates."""

    def drawn(ring: Ring, keys: jax.Array) -> Any:
        def body(_: None, key: jax.Array) -> tuple[None, Any]:
            batch = agent.sample((ring,), key)
            return None, jax.tree.map(lambda x: x.sum(), (batch, random_numbers(agent, spec, batch, key)))

        return lax.scan(body, None, keys)[1]

    program, keys = jax.jit(drawn), jax.random.split(jax.random.key(2), UPDATES)
    return lambda: program(ring, keys)


def searching(training: Training) -> Callable[[], Any]:
    """Returns a program of the searches of updates, for the actions of the actor as it is by now."""
    agent = training.agent

    def searched(state: State, ring: Ring, keys: jax.Array) -> Any:
        return lax.map(lambda key: agent.nearest(state, agent.sample((ring,), key), (ring,)), keys)

    program, keys = jax.jit(searched), jax.random.split(jax.random.key(2), UPDATES // delay(agent))
    return lambda: program(training.carry.agent, training.ring, keys)


def stepping(agent: Any, spec: Spec) -> Callable[[], Any]:
    """Returns a program of the steps of Adam and of the targets, for a gradient that is given."""
    state = agent.init(jax.random.key(0), spec)
    step = stepped_each if isinstance(state.opt, dict) else stepped_at_once

    def stepped(state: State, gradient: Any) -> Any:
        return lax.scan(lambda state, _: (step(agent, state, gradient), None), state, None, length=UPDATES)[0]

    program = jax.jit(stepped)
    return lambda: program(state, state.params)


def towards(gradient: Any) -> Callable[[Any], tuple[jax.Array, dict]]:
    """Returns the loss that has this gradient."""
    return lambda params: (jnp.asarray(optax.tree.vdot(params, gradient)), {})


def stepped_at_once(agent: Any, state: State, gradient: Any) -> State:
    """Returns the state after a step of the optimizer that all networks share, and of the target."""
    optimizer = agent.optimizer() if isinstance(agent, QGF) else agent.adam.transformation()
    return learner.descend(state, towards(gradient), optimizer, slow_critic(agent).tau, *state.target)[0]


def stepped_each(agent: Any, state: State, gradient: Any) -> State:
    """Returns the state after a step of each network's optimizer; actor and targets may have to wait for their turn."""
    optimizers = optimizers_of(agent, state)

    def stepped(state: State, name: str) -> State:
        return learner.step(state, name, towards(gradient[name]), optimizers[name])[0]

    def delayed(state: State) -> tuple[State, dict]:
        state = stepped(state, "actor") if "actor" in state.opt else state
        return learner.follow(state, slow_critic(agent).tau, *state.target), {}

    for name in [name for name in state.opt if name != "actor"]:
        state = stepped(state, name)
    return learner.counted(learner.every(delay(agent), state, delayed)[0])


def slow_critic(agent: Any) -> Critic:
    """Returns the critic that has a target, of O-DICE that of states."""
    return agent.value if isinstance(agent, ODICE) else base(agent).critic


def optimizers_of(agent: Any, state: State) -> Optimizers:
    """Returns each network's optimizer."""
    if isinstance(agent, CQL | ODICE):
        return agent.optimizers()
    if isinstance(agent, FamO2O):
        return dict.fromkeys(state.opt, agent.adam.transformation())
    adams = {"actor": base(agent).actor_adam, "critic": base(agent).critic_adam}
    if isinstance(agent, A2PR):
        adams |= {"value": agent.value_adam, "vae": agent.vae_adam}
    return {name: adam.transformation() for name, adam in adams.items()}


def multiplying(agent: Any, ring: Ring, spec: Spec) -> tuple[Callable[[], Any], float]:
    """Returns a program of the matrix products of updates but searches, and how many operations one update's are."""
    period = delay(agent)
    agent = dataclasses.replace(agent, search="tree") if searches(agent) else agent

    def one(state: Any, data: Ring, key: jax.Array) -> Any:
        return agent.update(state, agent.sample((data,), key), key, (data,))[0]

    program = jax.make_jaxpr(one)(agent.init(jax.random.key(0), spec), ring, jax.random.key(1)).jaxpr
    first, again, operations = repeating(list(products(program, 1, 0)))
    first_late, again_late, late_operations = repeating(list(products(program, 0, 1)))  # when it is the actor's turn

    def turn(carry: Any, entry: jax.Array) -> tuple[Any, None]:
        rest = lax.scan(again, carry[0], jnp.full(period, entry))[0]
        return (rest, again_late(carry[1], entry)[0]), None

    entries = jnp.arange(UPDATES // period, dtype=jnp.float32)
    compiled = jax.jit(lambda carry: lax.scan(turn, carry, entries)[0])
    return lambda: compiled((first, first_late)), operations + late_operations / period


def repeating(found: list[tuple[Any, Any, Any, int]]) -> tuple[Any, Callable[[Any, jax.Array], Any], float]:
    """Returns operands and results of matrix products, what multiplies again in a scan, and its operations.

    Each product has operands of its own, and a new entry in one of them every time, so that none can be left out.
    """
    each = [(left.shape, right.shape, how) for left, right, how, times in found for _ in range(times)]
    lefts, rights = ([jax.random.normal(jax.random.key(3), pair[i]) for pair in each] for i in (0, 1))

    def again(carry: Any, entry: jax.Array) -> tuple[Any, None]:
        fresh = [left.at[(0,) * left.ndim].set(entry) for left in carry[0]]
        results = [lax.dot_general(a, b, how) for a, b, (_, _, how) in zip(fresh, carry[1], each, strict=True)]
        return (fresh, carry[1], results), None

    first = jax.jit(again)((lefts, rights, None), jnp.ones(()))[0]
    summed = [math.prod(left[i] for i in contracted) for left, _, ((contracted, _), _) in each]
    return first, again, sum(2 * result.size * terms for result, terms in zip(first[2], summed, strict=True))


def pieces(agent: Any, ring: Ring, spec: Spec) -> tuple[dict[str, Measure], float]:
    """Returns the measures of training here and of its parts, and the operations of one update's matrix products."""
    agent = loop.on_device(agent)
    training = Training(agent, ring, spec)
    multiplications, operations = multiplying(agent, ring, spec)
    programs = {
        "jaxrl": training,
        "products": multiplications,
        "sampling": sampling(agent, ring, spec),
        "stepping": stepping(agent, spec),
    }
    if searches(agent):
        programs["search"] = searching(training)
    return {name: measure(program, UPDATES) for name, program in programs.items()}, operations


@contextmanager
def official(case: Case, data: Path) -> Generator[tuple[dict[str, str], Measure]]:
    """Yields the versions that the official code runs with, and the measure of its loop."""
    agent, needs = case.agent, requirements(case.agent)
    policy = agent.flow if isinstance(agent, QGF | DQC | FQL) else base(agent).actor
    assert case.repository is not None
    command = [case.python, "-W", "ignore", HERE / "runner.py", type(agent).__name__.lower()]
    command += [case.repository.absolute(), data.absolute(), warmup(agent), needs.batch]
    command += [agent.chunk, needs.window, *policy.net.hidden]
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


def compared(study: Study, case: Case, data: Path) -> dict[str, Any]:
    """Returns what was measured of a method at one size."""
    dataset = files.load(data)
    measures, operations = pieces(case.agent, *laid(dataset, case.agent))
    rounds, load = [], [os.getloadavg()[0]]
    with nullcontext(({}, None)) if case.repository is None else official(case, data) as (versions, theirs):
        for _ in range(study.rounds):
            seconds = dict.fromkeys(("official", "jaxrl"), study.seconds)
            turn = measures if theirs is None else {"official": theirs, **measures}
            part = study.seconds / 3
            rounds.append({name: one(seconds.get(name, part)) for name, one in turn.items()})
            load.append(os.getloadavg()[0])

    def median(of: Callable[[dict[str, float]], float]) -> float:
        return float(np.median([of(turn) for turn in rounds]))

    return {
        "method": case.name,
        "networks": case.size,
        "per_second": {name: median(lambda turn, name=name: turn[name]) for name in rounds[0]},
        "over_official": None if case.repository is None else median(lambda turn: turn["jaxrl"] / turn["official"]),
        "share": {name: median(lambda turn, name=name: turn["jaxrl"] / turn[name]) for name in rounds[0]},
        "update_gflop": operations / 1e9,
        "rounds": rounds,
        "load_average": load,
        "commit": case.repository and commit(case.repository),
        "official_versions": versions,
        "manifest": machine(dataset.digest) | {"processor": processor()},
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
    speed, gflop, loads = row["per_second"], row["update_gflop"], row["load_average"]
    parts = [row["share"].get(name) for name in ("products", "stepping", "sampling", "search")]
    parts.append(1 - sum(part or 0 for part in parts))
    versions, ratio = row["official_versions"], row["over_official"]
    ratios = [] if ratio is None else [turn["jaxrl"] / turn["official"] for turn in row["rounds"]]
    return [
        row["method"],
        row["networks"],
        "-" if ratio is None else f"{speed['official']:.1f}",
        f"{speed['jaxrl']:.1f}",
        "-" if ratio is None else f"**{ratio:.2f}**",
        "-" if ratio is None else f"{min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)}",
        *("-" if part is None else f"{100 * part:.0f} %" for part in parts),
        f"{gflop * speed['jaxrl']:.0f} of {gflop * speed['products']:.0f}",
        next((f"{name} {versions[name]}" for name in ("jax", "torch") if name in versions), "-"),
        f"{min(loads):.1f} to {max(loads):.1f}",
    ]


def table(results: dict[str, Any]) -> str:
    """Returns the results as people read them."""
    head = ["method", "networks", "official", "jaxrl", "ratio", "rounds", "products", "Adam, target", "sampling"]
    head += ["search", "rest", "GFLOP/s", "official runs", "load average"]
    rows = [head, ["---", "---", *["---:"] * 10, "---", "---:"], *map(cells, results["rows"])]
    study, manifests = results["study"], [row["manifest"] for row in results["rows"]]
    here = sorted({manifest["versions"]["jax"] for manifest in manifests})
    machines = sorted({f"{manifest['cores']} cores of {manifest['processor']}" for manifest in manifests})
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + (
        f"\n\nUpdates per second, batch {study['batch']}, `{study['data']}` but for the row that names a number of "
        f"synthetic keys: medians of rounds in turn, {study['seconds']:g} s each, "
        "of parts at least a third of that. Percentages: the time of an update's parts, each alone in a program, in "
        "per cent of the update's; the rest is activations, norms, losses, copies, and how the parts disturb each "
        "other. Products alone have operands and results of their own in memory, which an update shares, and can so "
        "take longer than it. GFLOP/s: of the update's matrix products but the search's, in the update and alone. "
        f"{', '.join(machines)}, jax {', '.join(here)} here.\n"
    )


def recorded(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the rows that are there already, which must have been measured with the same settings."""
    if not path.exists():
        return []
    results = json.loads(path.read_text())
    if results["study"] != settings:
        raise UserError(f"{path} was measured with {results['study']}, not {settings}: name another folder with --out")
    return results["rows"]


def main(study: Study) -> None:
    """Runs the study and writes its results."""
    study.check()
    settings = {"data": study.data.name, "batch": study.batch, "seconds": study.seconds}
    path = study.out / "results.json"
    rows = {(row["method"], row["networks"]): row for row in recorded(path, settings)}
    with tempfile.TemporaryDirectory() as folder:
        for case in (case for size in study.sizes for case in cases(study, size)):
            data = synthesized(case.keys, Path(folder)) if case.keys else study.data
            rows[case.name, case.size] = compared(study, case, data)
            print(" ".join(cells(rows[case.name, case.size])), flush=True)
            results = {"study": settings, "rows": list(rows.values())}
            path.write_text(json.dumps(results, indent=1) + "\n")
            (study.out / "table.md").write_text(table(results))
            jax.clear_caches()
    print((study.out / "table.md").read_text())


if __name__ == "__main__":
    main(tyro.cli(Study))
