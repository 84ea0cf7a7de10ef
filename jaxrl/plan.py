"""What a run will take in memory, before it takes it: `jaxrl train --plan`."""

import os
import resource
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrl import session, train
from jaxrl.config import Config
from jaxrl.data import files, record
from jaxrl.data.ring import Ring, empty
from jaxrl.errors import UserError
from jaxrl.types import PyTree

KNOBS = {  # what holds memory through a run, and the flags that it grows with
    "agent": "the agent's hidden sizes",
    "dataset": "data_steps, or the length of the file in data",
    "replay": "schedule.replay",
    "environments": "schedule.envs",
}


def check(config: Config, env: Any) -> None:
    """Raises UserError where what a run holds cannot fit in the memory that is there. Nothing of it is allocated."""
    require(held(config, env))


def plan(config: Config, env: Any) -> str:
    """Returns a table of the run's memory, from the compiled programs themselves; nothing of it is allocated.

    Raises UserError, before compiling, where it cannot fit.
    """
    amounts = held(config, env)
    require(amounts)
    working = max(temporary(program) for program in programs(config, env))
    total = sum(amounts.values()) + working
    lines = amounts | {"working memory of the largest program": working, "total on the device": total}
    if jax.default_backend() == "cpu":
        lines["process, compiled and at its peak"] = peak_rss() + total + amounts["dataset"]
    return "\n".join(f"{name:<40}{amount / 2**20:>10.1f} MiB" for name, amount in lines.items())


def held(config: Config, env: Any) -> dict[str, int]:
    """Returns the bytes on the device that a run holds from its first epoch to its last, by what they are for."""
    agent, timeline, carry = abstract(config, env)
    return {
        "agent": size(carry.agent),
        "dataset": size(abstract_data(config, env)),
        "replay": size(carry.world and carry.world.replay),
        "environments": size(carry.world and carry.world.rollout),
    }


def require(amounts: dict[str, int]) -> None:
    """Raises UserError where so many bytes are not there, naming what takes most of them."""
    needed, there = sum(amounts.values()), available()
    if needed > there:
        first, second = sorted(amounts, key=lambda name: amounts[name], reverse=True)[:2]
        advice = " or ".join(f"{KNOBS[name]} ({amounts[name] / 2**30:.1f} GiB)" for name in (first, second))
        raise UserError(f"this run needs {needed / 2**30:.1f} GiB, there are {there / 2**30:.1f} GiB: lower {advice}")


def available() -> int:
    """Returns the bytes that are free: of the device's own memory, or on the CPU of this machine's."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
