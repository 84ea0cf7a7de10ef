"""Runs rejax's SAC on a Brax environment, and says how long that took. `jaxrl` is not needed here, rejax and Brax are.

    python rejax_sac.py '{"env": "inverted_pendulum", "backend": "spring", "hidden": [64, 64], ...}'

The settings are those that `peer.py` hands over. The first line of the answer has versions, the seconds that compiling
the loop took, and the operations of the matrix products of one update. Then, per line on the input, "loop 2.5" or
"sampling 2.5": repeats the training loop, or nothing but the sampling of its batches, for at least so many seconds, and
answers with how often it did so and in what time.
"""

import functools
import json
import platform
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
from products import operations  # ty: ignore[import-not-found]

warnings.simplefilter("ignore")  # Brax's and flax's, about their own future

from rejax import SAC  # noqa: E402  # ty: ignore[import-not-found]


def nothing(algorithm: Any, state: Any, key: jax.Array) -> tuple:
    """Stands in for rejax's evaluation, which is no part of what is measured."""
    return ()


def build(settings: dict[str, Any]) -> SAC:
    """Returns rejax's SAC, one call of whose `train` is so many iterations without evaluation."""
    steps = settings["iterations"] * settings["envs"]
    algorithm = SAC.create(
        env=f"brax/{settings['env']}",
        env_params={"backend": settings["backend"]},
        hidden_layer_sizes=settings["hidden"],
        num_envs=settings["envs"],
        num_epochs=settings["updates"],
        batch_size=settings["batch"],
        buffer_size=settings["replay"],
        fill_buffer=settings["batch"],
        polyak=0.995,
        total_timesteps=steps,
        eval_freq=steps,
        skip_initial_evaluation=True,
    )
    return algorithm.replace(eval_callback=nothing)


class Loop:
    """The training of one seed, or of several by vmap; each call goes on where the last one ended."""

    def __init__(self, algorithm: SAC, seeds: int) -> None:
        """Compiles."""
        keys = jax.random.split(jax.random.key(0), seeds)

        def start(key: jax.Array) -> Any:
            return algorithm.init_state(key)

        def go(state: Any) -> Any:
            return algorithm.train(train_state=state)[0]

        if seeds > 1:
            start, go = jax.vmap(start), jax.vmap(go)
        self.state = jax.jit(start)(keys if seeds > 1 else keys[0])
        lowered = jax.jit(go, donate_argnums=0).lower(self.state)
        began = time.perf_counter()
        self.program = lowered.compile()
        self.compiling = time.perf_counter() - began

    def __call__(self) -> Any:
        """Returns the state after more training."""
        self.state = self.program(self.state)
        return self.state


def sampling(algorithm: SAC, buffer: Any, count: int) -> Callable[[], Any]:
    """Returns a program that samples so many batches and sums them up."""

    def one(buffer: Any, key: jax.Array) -> Any:
        return jax.tree.map(lambda x: x.sum(), buffer.sample(algorithm.batch_size, key))

    program = jax.jit(lambda buffer, keys: jax.lax.map(functools.partial(one, buffer), keys))
    return functools.partial(program, buffer, jax.random.split(jax.random.key(1), count))


def repeated(program: Callable[[], Any], seconds: float) -> dict[str, float]:
    """Returns how often a program ran, and in what time, at least so many seconds."""
    calls, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds or not calls:
        jax.block_until_ready(program())
        calls += 1
    return {"calls": calls, "seconds": time.perf_counter() - began}


def main() -> None:
    """Builds, warms up, then measures as often as it is asked to."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print is no answer
    settings = json.loads(sys.argv[1])
    algorithm = build(settings)
    loop = Loop(algorithm, settings["seeds"])
    repeated(loop, 0)
    programs: dict[str, Any] = {"loop": loop}
    if settings["seeds"] == 1:
        buffer = jax.tree.map(jnp.copy, loop.state.replay_buffer)  # the loop gives its own away
        programs["sampling"] = sampling(algorithm, buffer, settings["samples"])
        repeated(programs["sampling"], 0)
    state = jax.eval_shape(algorithm.init_state, jax.random.key(0))
    batch = jax.eval_shape(lambda state: state.replay_buffer.sample(algorithm.batch_size, state.rng), state)
    about = {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("rejax", "brax", "jax")},
        "device": jax.devices()[0].device_kind,
        "compile_seconds": loop.compiling,
        "update_gflop": operations(algorithm.update, state, batch) / 1e9,
    }
    print(json.dumps(about), file=answers, flush=True)
    for line in sys.stdin:
        name, seconds = line.split()
        print(json.dumps(repeated(programs[name], float(seconds))), file=answers, flush=True)


if __name__ == "__main__":
    main()
