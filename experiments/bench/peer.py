"""jaxrl's fused online loop against rejax's SAC on the same Brax environment. `python -m experiments.bench` runs it.

rejax runs in an interpreter of its own (`rejax_sac.py`). jaxrl has no SAC; ReBRAC without data and with an actor's step
in every update evaluates the same networks as often: per update the policy and the target critics at the next states,
the critics at the batch and the policy at its states with their gradients, and the critics at the policy's actions with
the gradient that leads back to the policy. What SAC has besides is densities and a temperature, what ReBRAC has besides
a distance to the batch's actions and a slow copy of the actor. The operations of matrix products are counted on both
sides. So loops are compared, not what is learned: environment, environments side by side, gradient steps after each of
their steps, batch, layers and rows of replay are equal. rejax runs without evaluation, several seeds by vmap, as it
documents, and one without.
"""

import dataclasses
import json
import os
import subprocess
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import envs
from experiments.bench.members import Program, alike, compiled
from experiments.bench.products import operations
from experiments.tables import machine
from jaxrl.agents import ReBRAC
from jaxrl.agents.parts import with_fields
from jaxrl.errors import UserError
from jaxrl.sweeps.population import Programs, stacked
from jaxrl.training import loop as train
from jaxrl.training.schedule import Schedule, phases

SAMPLES = 16  # batches that are sampled by one call of a program


@dataclasses.dataclass(frozen=True)
class Peer:
    """jaxrl's online loop against that of rejax's SAC."""

    python: Path | None = None
    """Python that has rejax and Brax; without it, nothing is compared."""
    env: str = "inverted_pendulum"
    """Brax environment."""
    backend: str = "spring"
    """Its simulator."""
    widths: tuple[int, ...] = (64, 256)
    """Widths of the two hidden layers of every network."""
    seeds: tuple[int, ...] = (1, 4)
    """Runs in one program."""
    envs: int = 64
    """Environments side by side, of each run."""
    updates: int = 16
    """Gradient steps after each step of all of them."""
    batch: int = 256
    """Transitions per gradient step."""
    replay: int = 131_072
    """Transitions kept, of each run; rejax's own default."""
    iterations: int = 8
    """Steps of all environments in one call of a program."""
    rounds: int = 5
    """How often they take turns."""
    seconds: float = 1.5
    """Seconds for which each is measured at a time, at least."""

    def check(self) -> None:
        """Raises UserError for the first value that nothing can be measured with."""
        for name in ("widths", "seeds", "envs", "updates", "batch", "iterations", "rounds"):
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,)) < 1:
                raise UserError(f"--peer.{name} {value}: must be at least 1")
        if self.replay < self.iterations * self.envs:
            raise UserError(f"--peer.replay {self.replay}: must hold at least {self.iterations * self.envs} steps")

    def settings(self) -> dict[str, Any]:
        """Returns what measurements must have in common to stand in one table."""
        names = ("env", "backend", "envs", "updates", "batch", "replay", "iterations", "rounds", "seconds")
        return {name: getattr(self, name) for name in names}


class Loop:
    """jaxrl's side of the comparison."""

    def __init__(self, study: Peer, width: int) -> None:
        """Makes as many steps without updates as one call of a program makes with them."""
        agent = with_fields(ReBRAC(), hidden=(width, width), norm="none", batch=study.batch, delay=1)
        self.env: Any = envs.make(f"brax/{study.env}?backend={study.backend}")
        self.agent = train.on_device(agent)
        self.schedule = Schedule(
            offline_updates=0,
            online_steps=study.replay,
            utd=study.updates / study.envs,
            warmup_steps=study.iterations * study.envs,
            envs=study.envs,
            replay=study.replay,
            steps_per_epoch=study.iterations * study.envs,
        )
        filling, self.phase = phases(self.schedule, agent)
        self.carry = train.jitted_begin(self.agent, self.env, self.schedule, jax.random.key(0))
        self.carry = train.jitted_epoch(self.agent, self.env, filling, self.carry, None)[0]

    def alone(self) -> Program:
        """Returns the program of one run."""
        carry = jax.tree.map(jnp.copy, self.carry)
        given: dict[str, Any] = {"agent": self.agent, "dataset": None}
        program, *costs = compiled(train.jitted_epoch, env=self.env, phase=self.phase, carry=carry, **given)
        return Program(lambda carry: program(carry=carry, **given)[0], carry, *costs)

    def together(self, seeds: int, layout: Any) -> Program:
        """Returns the program of so many runs."""
        programs, population = Programs(self.env, layout), alike(self.carry, seeds)
        given: dict[str, Any] = {"agents": programs.place(stacked([self.agent] * seeds)), "dataset": None}
        program, *costs = compiled(programs.epoch, phase=self.phase, population=population, **given)
        return Program(lambda population: program(population=population, **given)[0], population, *costs)

    def sampling(self) -> Program:
        """Returns the program that samples batches and sums them up."""

        def one(replay: Any, key: jax.Array) -> Any:
            return jax.tree.map(lambda x: x.sum(), self.agent.sample((replay,), key))

        program = jax.jit(lambda replay, keys: jax.lax.map(lambda key: one(replay, key), keys))
        assert self.carry.world is not None
        replay, keys = self.carry.world.replay, jax.random.split(jax.random.key(1), SAMPLES)
        return Program(lambda _: program(replay, keys), None, 0.0, 0)

    def update_gflop(self) -> float:
        """Returns the operations of the matrix products of one update, in thousand millions."""
        assert self.carry.world is not None
        data, key = (self.carry.world.replay,), jax.random.key(0)
        batch = jax.eval_shape(self.agent.sample, data, key)
        return operations(self.agent.update, self.carry.agent, batch, key) / 1e9


@contextmanager
def rejax(study: Peer, width: int, seeds: int) -> Generator[tuple[dict[str, Any], Callable[[str, float], float]]]:
    """Yields what rejax's side says of itself, and the measure of the seconds of a call of one of its programs."""
    script = Path(__file__).with_name("rejax_sac.py")
    settings = study.settings() | {"hidden": [width, width], "seeds": seeds, "samples": SAMPLES}
    command = [str(study.python), str(script), json.dumps(settings)]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": clean}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdin is not None and process.stdout is not None
        questions, answers = process.stdin, process.stdout

        def answer() -> dict[str, Any]:
            line = answers.readline()
            if not line:
                raise UserError(f"rejax in {study.python} stopped, see its message above")
            return json.loads(line)

        def seconds_of(program: str, seconds: float) -> float:
            print(program, seconds, file=questions, flush=True)
            done = answer()
            return done["seconds"] / done["calls"]

        yield answer(), seconds_of


def measured(study: Peer, width: int, seeds: int) -> dict[str, Any]:
    """Returns what was measured of both sides with networks of one width, for so many seeds."""
    loop = Loop(study, width)
    ours = {"alone": loop.alone(), "sampling": loop.sampling()}
    if seeds > 1:
        ours = {layout: loop.together(seeds, layout) for layout in ("vmap", "map")}
    for program in ours.values():
        program(0)
    rounds, load = [], [os.getloadavg()[0]]
    with rejax(study, width, seeds) as (about, theirs):
        for _ in range(study.rounds):
            turn = {"rejax": theirs("loop", study.seconds)}
            turn |= {name: program(study.seconds) for name, program in ours.items()}
            if "sampling" in ours:
                turn["rejax sampling"] = theirs("sampling", study.seconds)
            rounds.append(turn)
            load.append(os.getloadavg()[0])
    return {
        "width": width,
        "seeds": seeds,
        "steps": study.iterations * study.envs,
        "updates": study.iterations * study.updates,
        "seconds": {name: [turn[name] for turn in rounds] for name in rounds[0]},
        "compile_seconds": {name: program.compiling for name, program in ours.items() if name != "sampling"},
        "update_gflop": loop.update_gflop(),
        "rejax": about,
        "load_average": load,
        "manifest": machine(""),
    }
