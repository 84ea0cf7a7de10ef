"""Memory and time of a sweep, estimated before it starts: `jaxrl sweep --plan`."""

import dataclasses
import time
from typing import Any

import jax

from jaxrl.runs import memory as plan
from jaxrl.runs.config import timeline_of
from jaxrl.runs.datasets import with_data
from jaxrl.sweeps import space as members
from jaxrl.sweeps import sweep
from jaxrl.sweeps.cohort import Make
from jaxrl.sweeps.packing import zeros
from jaxrl.sweeps.population import Population, Programs, keys_of, programs, stacked
from jaxrl.sweeps.space import Member, Settings, Space
from jaxrl.training import loop
from jaxrl.training.schedule import reads_dataset
from jaxrl.types import Agent, Env, HostEnv, Phase

ITERATIONS = 20  # timed iterations of an epoch without collection; else 1


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Memory and time of the cohorts of a group."""

    members: int  # of the group
    cohorts: int
    room: int  # members per program
    layout: str
    bytes_held: int
    bytes_working: int
    compiling: float  # seconds
    running: float  # seconds, of all cohorts one after the other


def forecast(space: Space, settings: Settings, make: Make) -> str:
    """Returns a table of a sweep's programs with their memory and time, measured on the programs.

    Each is compiled and run for a few iterations, on a dataset of zeros.
    """
    everyone = space.members()
    rows = [group_forecast(group, settings, make) for group in members.groups(everyone)]
    lines = [
        f"{'program':<9}{'members':>8}{'each':>6}{'layout':>8}{'held':>12}{'working':>12}{'compile':>10}{'run':>10}"
    ]
    first = 0
    for row in rows:
        numbers = f"{first}" if row.cohorts == 1 else f"{first}-{first + row.cohorts - 1}"
        memory = f"{row.bytes_held / 2**20:>8.0f} MiB{row.bytes_working / 2**20:>8.0f} MiB"
        seconds = f"{duration(row.compiling):>10}{duration(row.running):>10}"
        lines.append(f"{numbers:<9}{row.members:>8}{row.room:>6}{row.layout:>8}{memory}{seconds}")
        first += row.cohorts
    total, there = sum(row.compiling + row.running for row in rows), plan.available()
    lines.append(
        f"{len(everyone)} members in {first} program{'s' * (first > 1)}, {len(rows)} compiled: about {duration(total)} "
        f"without rungs and other processes, on {len(settings.local())} of {len(jax.local_devices())} devices with "
        f"{there / 2**30:.1f} GiB free"
    )
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Returns a duration as text in s, min or h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def group_forecast(group: list[Member], settings: Settings, make: Make) -> Forecast:
    """Compiles a group's programs, runs some iterations, and returns the forecast."""
    config = group[0].config
    env = make(config.env)
    config = with_data(config, env)
    sweep.check_env(config, env)
    parts, layout = sweep.arranged(group, env, settings)
    largest = max(parts, key=len)
    lifted = programs(env, layout, tuple(settings.local()))
    amounts, began = plan.held(config, env), time.perf_counter()
    shared = sum(amounts[name] for name in amounts.keys() - {"agent", "replay", "environments"})
    working, running = measured(largest, lifted, env)
    passed = time.perf_counter() - began
    return Forecast(
        members=len(group),
        cohorts=len(parts),
        room=len(largest),
        layout=layout,
        bytes_held=shared + len(largest) * (sum(amounts.values()) - shared),
        bytes_working=working,
        compiling=passed,
        running=running * len(parts),
    )


def measured(some: list[Member], lifted: Programs, env: Env | HostEnv) -> tuple[int, float]:
    """Returns the working memory of the members' largest program in bytes, and the seconds of a run."""
    config = some[0].config
    agents = lifted.place(stacked([member.config.agent for member in some]))
    dataset, _ = plan.abstract_data(config, env)
    data = None if dataset is None else lifted.share(zeros(dataset))
    execution: dict[str, Any] = {"execution": loop.on_device(config.execution)}
    keys = lifted.place(keys_of(m.config.seed for m in some))
    population = lifted.begin(agents, schedule=config.schedule, keys=keys, **execution)
    timeline = timeline_of(config)
    evaluations = sum(timeline.evaluates(e, config.schedule.eval_every) for e in range(timeline.epochs))
    working, seconds = 0, 0.0
    for phase in timeline.phases:
        population = lifted.enter(agents, phase=phase, population=population)
        fewer = min(1 if phase.collects else ITERATIONS, phase.iterations)
        short = dataclasses.replace(phase, iterations=fewer, last=0)
        given = {"dataset": data if reads_dataset(phase) else None, **execution}
        population, needs, each = timed(lifted, agents, population, short, given)
        working, seconds = max(working, needs), seconds + each / short.iterations * phase.total
    if not isinstance(env, HostEnv):
        key = lifted.share(jax.random.key(0))
        arguments: dict[str, Any] = {"states": population.carry.agent, "key": key, **execution}
        judge = lifted.evaluate.lower(agents, episodes=config.schedule.eval_episodes, **arguments).compile()
        jax.block_until_ready(judge(agents, **arguments))
        start = time.perf_counter()
        jax.block_until_ready(judge(agents, **arguments))
        working, seconds = (
            max(working, plan.temporary(judge)),
            seconds + (evaluations + 1) * (time.perf_counter() - start),
        )
    return working, seconds


def timed(
    lifted: Programs, agents: Agent, population: Population, phase: Phase, given: dict[str, Any]
) -> tuple[Population, int, float]:
    """Returns the members after two short epochs, the working memory of one in bytes, and the seconds of the second."""
    program = lifted.epoch.lower(agents, phase=phase, population=population, **given).compile()
    population, _ = jax.block_until_ready(program(agents, population=population, **given))
    start = time.perf_counter()
    population, _ = jax.block_until_ready(program(agents, population=population, **given))
    return population, plan.temporary(program), time.perf_counter() - start
