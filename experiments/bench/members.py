"""What a member of a sweep costs against a run alone. `python -m experiments.bench` says what is written.

Members are driven by `jaxrl.sweeps.population.Programs`, the run alone by `jaxrl.training.loop.jitted_epoch`, both
compiled before anything is timed. Measured in turn: the run alone, members in one layout, the run alone, members in
the other, and so on through all numbers of members, round after round; the ratio is to the run alone just before and
just after.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

import envs
from experiments.neighbours.ways import peak_memory
from experiments.tables import machine
from jaxrl.agents import FMQ
from jaxrl.agents.parts import with_fields
from jaxrl.errors import UserError
from jaxrl.runs import driver, memory
from jaxrl.runs.config import Config
from jaxrl.runs.datasets import load_data
from jaxrl.runs.presets import preset
from jaxrl.sweeps.population import Layout, Population, Programs, keys_of, stacked
from jaxrl.training import loop
from jaxrl.training.loop import Carry
from jaxrl.types import Phase

What: TypeAlias = Literal["offline", "online", "evaluation"]
SMALL: dict[str, Any] = {"hidden": (32, 32), "batch": 64}
CASES: dict[str, tuple[dict[str, Any], int]] = {"quick": ({}, 1), "small": (SMALL, 5)}
"""By name, in what the agent differs from the default run's, and how many times as long its epochs are here."""


@dataclasses.dataclass(frozen=True)
class Members:
    """Cost of a member of a sweep against a run alone."""

    env: str = "maze-medium"
    """Environment."""
    cases: tuple[str, ...] = tuple(CASES)
    """Sizes of the networks and of the batch: the default run's, or small ones."""
    what: tuple[What, ...] = ("offline", "online")
    """Epochs that are measured, and the evaluation."""
    counts: tuple[int, ...] = (1, 4, 16, 64)
    """Members of one program."""
    layouts: tuple[Layout, ...] = ("vmap", "map")
    """All members at once, or one after the other."""
    updates: int = 50
    """Gradient steps of an offline epoch; a run's has more, so that what an epoch costs besides weighs less there."""
    iterations: int = 2
    """Iterations of an online epoch: a chunk of actions in every environment, and the gradient steps after it."""
    rounds: int = 3
    """How often they take turns."""
    seconds: float = 1.0
    """Seconds for which each is measured at a time, at least."""

    def check(self) -> None:
        """Raises UserError for the first value that nothing can be measured with."""
        for case in self.cases:
            if case not in CASES:
                raise UserError(f"--members.cases {case}: must be among {', '.join(CASES)}")
        for name in ("counts", "updates", "iterations", "rounds"):
            if np.min(getattr(self, name)) < 1:
                raise UserError(f"--members.{name} {getattr(self, name)}: must be at least 1")

    def settings(self) -> dict[str, Any]:
        """Returns what measurements must have in common to stand in one table."""
        names = ("env", "counts", "layouts", "updates", "iterations", "rounds", "seconds")
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass
class Program:
    """A compiled program that goes on from where its last call ended."""

    step: Callable[[Any], Any]  # state -> state
    state: Any
    compiling: float  # seconds
    working: int  # bytes besides arguments and results in their place

    def __call__(self, seconds: float) -> float:
        """Returns the seconds of a call, the mean over calls for at least so many seconds."""
        calls, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds or not calls:
            self.state = jax.block_until_ready(self.step(self.state))
            calls += 1
        return (time.perf_counter() - began) / calls


def compiled(program: Any, **arguments: Any) -> Any:
    """Returns a compiled program, the seconds that this took, and the bytes that it needs besides its arguments."""
    lowered = program.lower(**arguments)
    began = time.perf_counter()
    ready = lowered.compile()
    return ready, time.perf_counter() - began, memory.temporary(ready)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One case and one kind of epoch, to be driven alone and together."""

    config: Config
    env: Any
    data: Any
    phase: Phase
    judging: bool  # whether the evaluation is measured and not the epoch

    def begin(self) -> Carry:
        """Returns the carry of a run alone."""
        agent = loop.on_device(self.config.agent)
        carry = loop.jitted_begin(agent, self.env, self.config.schedule, jax.random.key(0))
        return loop.jitted_enter(agent, self.phase, carry)

    def alone(self) -> Program:
        """Returns the program of a run alone."""
        agent, carry, key = loop.on_device(self.config.agent), self.begin(), jax.random.key(1)
        if self.judging:
            count = self.config.schedule.eval_episodes
            given: dict[str, Any] = {"agent": agent, "state": carry.agent, "key": key}
            program, *costs = compiled(loop.jitted_evaluate, env=self.env, episodes=count, **given)
            return Program(lambda _: program(**given), None, *costs)
        given = {"agent": agent, "dataset": self.data}
        program, *costs = compiled(loop.jitted_epoch, env=self.env, phase=self.phase, carry=carry, **given)
        return Program(lambda carry: program(carry=carry, **given)[0], carry, *costs)

    def together(self, count: int, layout: Layout) -> Program:
        """Returns the program of so many members."""
        programs, population = Programs(self.env, layout), alike(self.begin(), count)
        population = dataclasses.replace(
            population, carry=programs.place(population.carry), stopped=programs.place(population.stopped)
        )
        agents = programs.place(stacked([self.config.agent] * count))
        if self.judging:
            episodes, key = self.config.schedule.eval_episodes, programs.share(jax.random.key(1))
            program, *costs = compiled(
                programs.evaluate, agents=agents, episodes=episodes, states=population.carry.agent, key=key
            )
            return Program(lambda _: program(agents=agents, states=population.carry.agent, key=key), None, *costs)
        given = {"agents": agents, "dataset": programs.share(self.data)}
        program, *costs = compiled(programs.epoch, phase=self.phase, population=population, **given)
        return Program(lambda population: program(population=population, **given)[0], population, *costs)

    def work(self) -> tuple[int, int]:
        """Returns the gradient steps and the environment steps of a member in one call."""
        if self.judging:
            return 0, self.config.schedule.eval_episodes * self.env.horizon
        steps = self.phase.iterations * self.config.schedule.envs * self.config.agent.chunk
        return self.phase.iterations * self.phase.updates, steps if self.phase.collects else 0


def alike(carry: Carry, count: int) -> Population:
    """Returns members that begin alike but for their keys."""
    many = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), carry)
    return Population(dataclasses.replace(many, key=keys_of(range(count))), jnp.zeros(count, jnp.int32))


def trial(study: Members, case: str, what: What) -> Trial:
    """Returns what is to be driven, with the recorded behaviour as its data."""
    config = dataclasses.replace(preset("quick", "fmq"), env=study.env)
    assert isinstance(config.agent, FMQ)
    sizes, longer = CASES[case]
    config = dataclasses.replace(config, agent=with_fields(config.agent, **sizes))
    env = envs.make(config.env)
    run = driver.prepare(config, env, load_data(config, env))
    offline, online = run.timeline.phases
    if what == "online":
        phase = dataclasses.replace(online, iterations=longer * study.iterations)
    else:
        phase = dataclasses.replace(offline, iterations=longer * study.updates)
    return Trial(config, env, run.data, phase, what == "evaluation")


def measured(study: Members, case: str, what: What) -> dict[str, Any]:
    """Returns the rows of one case and kind of epoch, one per number of members and layout, and what they hold for."""
    one = trial(study, case, what)
    alone = one.alone()
    alone(0)
    crews = {(count, layout): one.together(count, layout) for count in study.counts for layout in study.layouts}
    growth = {name: grown(population) for name, population in crews.items()}
    turns: dict[tuple[int, Layout], list[tuple[float, float]]] = {name: [] for name in crews}
    load = [os.getloadavg()[0]]
    for _ in range(study.rounds):
        before = alone(study.seconds)
        for name, population in crews.items():
            seconds, after = population(study.seconds), alone(study.seconds)
            turns[name].append((seconds, (before + after) / 2))
            before = after
        load.append(os.getloadavg()[0])
    check_running(crews.values())
    held, (updates, steps) = memory.size(one.begin()), one.work()
    rows = [
        {
            "members": count,
            "layout": layout,
            "seconds": [seconds for seconds, _ in turns[count, layout]],
            "alone_seconds": [seconds for _, seconds in turns[count, layout]],
            "compile_seconds": population.compiling,
            "bytes_held": count * held,
            "bytes_working": population.working,
            "bytes_grown": growth[count, layout],
        }
        for (count, layout), population in crews.items()
    ]
    single = {"compile_seconds": alone.compiling, "bytes_held": held, "bytes_working": alone.working}
    about = {"case": case, "what": what, "updates": updates, "steps": steps, "alone": single, "load_average": load}
    return about | {"manifest": machine(""), "rows": rows}


def check_running(crews: Any) -> None:
    """Raises RuntimeError where a member has left, which would cost nothing."""
    for population in crews:
        if isinstance(population.state, Population) and np.asarray(population.state.stopped).any():
            raise RuntimeError("a member diverged: nothing can be said about its cost")


def grown(program: Program) -> int | None:
    """Returns the bytes by which this process grows during a program's first call, on the CPU of a Linux; else None."""
    known = jax.default_backend() == "cpu" and sys.platform == "linux"
    before = peak_memory(reset=True) if known else 0
    program(0)
    return peak_memory() - before if known else None
