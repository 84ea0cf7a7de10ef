"""How fast are the pieces of the default run, and what bounds them?

    python -m experiments.bench [--env maze-medium] [--agent fmq] [--preset quick]

Measured in one process, each as the best of several repetitions after compilation: environment steps per second with
random actions and with the agent in the loop, offline updates per second, fused online steps per second (collection
and updates in one program), seconds to compile the online epoch without and with the compilation cache, and the ratio
of an update's time to the time of its matrix products alone. Absolute times depend on what else the machine does;
the ratio is what to compare. Writes results.json into this folder.
"""

import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import tyro
from jax import lax

import envs
from experiments.tables import machine
from jaxrl import rollout as ro
from jaxrl import session, train
from jaxrl.config import preset
from jaxrl.data.record import Uniform

REPETITIONS = 5


@dataclasses.dataclass(frozen=True)
class Bench:
    """Speed of the default run's pieces."""

    agent: str = "fmq"
    """Agent."""
    preset: str = "quick"
    """Preset of its sizes."""
    env: str = "maze-medium"
    """Environment."""
    count: int = 256
    """Environments side by side, in the rollout measurements."""
    out: Path = Path(__file__).parent / "results.json"
    """File of the results."""


def best_seconds(program: Callable[..., Any], *args: Any) -> float:
    """Returns the shortest of several timings of a compiled program, its first call left out."""
    jax.block_until_ready(program(*args))
    times = []
    for _ in range(REPETITIONS):
        began = time.perf_counter()
        jax.block_until_ready(program(*args))
        times.append(time.perf_counter() - began)
    return min(times)


def steps_per_second(env: Any, policy: ro.Policy, count: int, decisions: int = 40) -> float:
    """Returns environment steps per second of whole rollouts, resets from the bank included."""

    def rolled(key: jax.Array) -> jax.Array:
        key_start, key_bank, key_steps = jax.random.split(key, 3)
        rollout, bank = ro.start(env, policy, key_start, count), ro.resets(env, key_bank, count)

        def body(rollout: ro.Rollout, key: jax.Array) -> tuple[ro.Rollout, jax.Array]:
            rollout, _, sums = ro.advance(env, policy, rollout, bank, key)
            return rollout, sums["returns"]

        return lax.scan(body, rollout, jax.random.split(key_steps, decisions))[1]

    return count * decisions * policy.chunk / best_seconds(jax.jit(rolled), jax.random.key(0))


def products(jaxpr: Any, times: int = 1, branches: int | None = None) -> Iterator[tuple[Any, Any, Any, int]]:
    """Yields (left, right, dimension numbers, how often) of every matrix product in a program that runs `times` times.

    It goes through each of its branches as often, or `branches` times.
    """
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            left, right = (variable.aval for variable in equation.invars)
            yield left, right, equation.params["dimension_numbers"], times
        inner = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        inner = branches if equation.primitive.name == "cond" and branches is not None else inner
        for parameter in equation.params.values():
            for part in parameter if isinstance(parameter, tuple | list) else (parameter,):
                body = getattr(part, "jaxpr", part)
                if hasattr(body, "eqns"):
                    yield from products(body, inner, branches)


def bare_products(program: Callable[..., Any], *args: Any) -> tuple[Callable[[], list], float]:
    """Returns a compiled program of nothing but the matrix products of `program`, and its floating-point operations."""
    pairs, numbers, flops = [], [], 0.0
    for left, right, dimensions, times in products(jax.make_jaxpr(program)(*args).jaxpr):
        for _ in range(times):  # operands of its own for each, so that none is computed once for all
            key = jax.random.key(len(pairs))
            pairs.append((jax.random.normal(key, left.shape), jax.random.normal(key, right.shape)))
            numbers.append(dimensions)
        (contracted, _), (batched, _) = dimensions
        twice = math.prod(left.shape[i] for i in (*contracted, *batched))  # dimensions that both operands list
        flops += 2 * times * math.prod(left.shape) * math.prod(right.shape) / twice
    compiled = jax.jit(lambda pairs: [lax.dot_general(a, b, n) for (a, b), n in zip(pairs, numbers, strict=True)])
    return lambda: compiled(pairs), flops


def compile_seconds(run: session.Run, phase: train.Phase, carry: Any) -> tuple[float, float]:
    """Returns the seconds to compile an epoch without a cache, and again from the cache that this filled."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        for _ in range(2):
            jax.clear_caches()
            lowered = train.jitted_epoch.lower(run.agent, run.env, phase, carry, run.data)
            began = time.perf_counter()
            lowered.compile()
            seconds.append(time.perf_counter() - began)
        jax.config.update("jax_enable_compilation_cache", False)
    return seconds[0], seconds[1]


def main(bench: Bench) -> None:
    """Measures, prints and writes."""
    config = dataclasses.replace(preset(bench.preset, bench.agent), env=bench.env)
    env = envs.make(config.env)
    dataset = session.load_data(config, env)
    run = session.prepare(config, env, dataset)
    online = run.timeline.phases[-1]
    carry = run.first()
    measured: dict[str, Any] = {"agent": bench.agent, "env": bench.env, "preset": bench.preset}

    uniform = ro.scripted(Uniform(env.spec.action))
    measured["steps_per_second_random"] = steps_per_second(env, uniform, bench.count)
    policy = ro.policy_of(run.agent, carry.agent)
    measured["steps_per_second_policy"] = steps_per_second(env, policy, bench.count)

    def updates(state: Any, data: Any, key: jax.Array) -> Any:
        def update(state: Any, key: jax.Array) -> tuple[Any, None]:
            key_batch, key_step = jax.random.split(key)
            return run.agent.update(state, run.agent.sample((data,), key_batch), key_step)[0], None

        return lax.scan(update, state, jax.random.split(key, 100))[0]

    seconds = best_seconds(jax.jit(updates), carry.agent, run.data, jax.random.key(1)) / 100
    measured["offline_updates_per_second"] = 1 / seconds

    def one(state: Any, data: Any, key: jax.Array) -> Any:
        return run.agent.update(state, run.agent.sample((data,), key), key)[0]

    bare, flops = bare_products(one, carry.agent, run.data, jax.random.key(1))
    bare_seconds = best_seconds(bare)
    measured["update_over_bare_products"] = seconds / bare_seconds
    measured["gflops_of_bare_products"] = flops / bare_seconds / 1e9
    measured["update_gflop"] = flops / 1e9

    if online.collects:
        carry = train.jitted_enter(run.agent, online, carry)
        first, second = compile_seconds(run, online, carry)
        measured |= {"compile_seconds": first, "compile_seconds_cached": second}
        epoch = jax.jit(train.epoch, static_argnames=("env", "phase"))  # not donated, so that it can be repeated
        seconds = best_seconds(lambda: epoch(run.agent, env, online, carry, run.data))
        steps = online.iterations * run.agent.chunk * config.schedule.envs
        measured["fused_online_steps_per_second"] = steps / seconds
        measured["fused_online_updates_per_second"] = online.iterations * online.updates / seconds
    for name, value in measured.items():
        print(f"{name:<36}{value:>14.2f}" if isinstance(value, float) else f"{name:<36}{value:>14}")
    bench.out.write_text(json.dumps({"manifest": machine(dataset.digest)} | measured, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Bench))
