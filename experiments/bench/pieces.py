"""How fast the pieces of the default run are, and what bounds them. `python -m experiments.bench` says what is written.

Each is the best of several repetitions after compilation: environment steps per second with random actions and with the
agent in the loop, offline updates per second, fused online steps per second (collection and updates in one program),
seconds to compile the online epoch without and with the compilation cache, and the ratio of an update's time to the
time of its matrix products alone.
"""

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.experimental.compilation_cache import compilation_cache

import envs
from experiments.bench.products import operations, products
from experiments.tables import machine
from jaxrl.rollout import device as ro
from jaxrl.rollout.record import Uniform
from jaxrl.runs import driver
from jaxrl.runs.datasets import load_data
from jaxrl.runs.presets import preset
from jaxrl.training import loop
from jaxrl.types import Phase

REPETITIONS = 5


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Speed of the default run's pieces."""

    agent: str = "fmq"
    """Agent."""
    preset: str = "quick"
    """Preset of its sizes."""
    env: str = "maze-medium"
    """Environment."""
    count: int = 256
    """Environments side by side, in the rollout measurements."""

    def settings(self) -> dict[str, Any]:
        """Returns what measurements must have in common to stand in one table."""
        return dataclasses.asdict(self)


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


def bare_products(program: Callable[..., Any], *args: Any) -> Callable[[], list]:
    """Returns a compiled program of nothing but the matrix products of `program`."""
    pairs, numbers = [], []
    for left, right, dimensions, times in products(jax.make_jaxpr(program)(*args).jaxpr):
        for _ in range(times):  # operands of its own for each, so that none is computed once for all
            key = jax.random.key(len(pairs))
            pairs.append((jax.random.normal(key, left.shape), jax.random.normal(key, right.shape)))
            numbers.append(dimensions)
    compiled = jax.jit(lambda pairs: [lax.dot_general(a, b, n) for (a, b), n in zip(pairs, numbers, strict=True)])
    return lambda: compiled(pairs)


def compile_seconds(run: driver.Run, phase: Phase, carry: Any) -> tuple[float, float]:
    """Returns the seconds to compile an epoch without a cache, and again from the cache that this filled."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        use_cache(folder)
        for _ in range(2):
            jax.clear_caches()
            lowered = loop.jitted_epoch.lower(run.agent, run.env, phase, carry, run.data)
            began = time.perf_counter()
            lowered.compile()
            seconds.append(time.perf_counter() - began)
        use_cache(None)
    return seconds[0], seconds[1]


def use_cache(folder: str | None) -> None:
    """Keeps compiled programs in a folder, or nowhere."""
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()  # which otherwise stays where it was first


def measured(study: Pieces) -> dict[str, Any]:
    """Returns what was measured, by name, and on what."""
    config = dataclasses.replace(preset(study.preset, study.agent), env=study.env)
    env = envs.make(config.env)
    dataset = load_data(config, env)
    run = driver.prepare(config, env, dataset)
    online, carry = run.timeline.phases[-1], run.first()
    found: dict[str, Any] = {"manifest": machine(dataset.digest), "load_average": [os.getloadavg()[0]]}
    found["steps_per_second_random"] = steps_per_second(env, ro.scripted(Uniform(env.spec.action)), study.count)
    found["steps_per_second_policy"] = steps_per_second(env, ro.policy_of(run.agent, carry.agent), study.count)

    def updates(state: Any, data: Any, key: jax.Array) -> Any:
        def update(state: Any, key: jax.Array) -> tuple[Any, None]:
            key_batch, key_step = jax.random.split(key)
            return run.agent.update(state, run.agent.sample((data,), key_batch), key_step, (data,))[0], None

        return lax.scan(update, state, jax.random.split(key, 100))[0]

    seconds = best_seconds(jax.jit(updates), carry.agent, run.data, jax.random.key(1)) / 100
    found["offline_updates_per_second"] = 1 / seconds

    def one(state: Any, data: Any, key: jax.Array) -> Any:
        return run.agent.update(state, run.agent.sample((data,), key), key, (data,))[0]

    arguments = (carry.agent, run.data, jax.random.key(1))
    bare, flops = best_seconds(bare_products(one, *arguments)), operations(one, *arguments)
    found |= {"update_over_bare_products": seconds / bare, "gflops_of_bare_products": flops / bare / 1e9}
    found["update_gflop"] = flops / 1e9
    return found | (fused(run, online, carry) if online.collects else {})


def fused(run: driver.Run, online: Phase, carry: Any) -> dict[str, float]:
    """Returns the speed of the online epoch, and the seconds to compile it."""
    carry = loop.jitted_enter(run.agent, online, carry)
    first, second = compile_seconds(run, online, carry)
    epoch = jax.jit(loop.epoch, static_argnames=("env", "phase"))  # not donated, so that it can be repeated
    seconds = best_seconds(lambda: epoch(run.agent, run.env, online, carry, run.data))
    return {
        "compile_seconds": first,
        "compile_seconds_cached": second,
        "fused_online_steps_per_second": online.iterations * run.agent.chunk * run.config.schedule.envs / seconds,
        "fused_online_updates_per_second": online.iterations * online.updates / seconds,
    }
