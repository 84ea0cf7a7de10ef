"""Whether two versions of the code train alike, bit for bit: every agent is trained a little, every metric compared.

    python -m tests.bit_for_bit record FOLDER [NAME ...]   all runs, or those named: one file of metrics each
    python -m tests.bit_for_bit compare FOLDER FOLDER      one line a run; exit code 1 where any differs

Both are recorded on one machine with the same libraries. A run or a metric that one side lacks is a difference. Only
the metric `digest` is not compared: it depends on how the tree of a run's state is laid out, not on its numbers alone.
No run sets a field of an agent, so that this file fits versions whose modules and fields have other names, too.
"""

import contextlib
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")  # each version compiles its own programs

import jax
import numpy as np

from jaxrl import cli
from jaxrl.agents import AGENTS

POINT = "point?horizon=20&tolerance=1.0"  # wide enough that agents get there by chance, and evaluations tell them apart
SHORT = (
    "--schedule.offline-updates=40 --schedule.updates-per-epoch=20 --schedule.eval-episodes=100 --schedule.envs=4 "
    "--schedule.warmup-steps=20 --schedule.online-steps=80 --schedule.steps-per-epoch=40 --schedule.utd=0.25"
).split()  # whole iterations of 4 environments, for chunks of 1 and of 5 steps
LONGER = ["--schedule.offline-updates=600", "--schedule.updates-per-epoch=200"]  # beyond the default agent's warm-up


def runs(data: Path) -> dict[str, list[str]]:
    """Returns the arguments of `jaxrl train` by the name of the run; all but the default one learn from a file."""
    flags = [f"--data={data}", *SHORT]
    goals = {f"{agent}-goals": [agent, f"{POINT}&goal_conditioned=true", *flags] for agent in ("iql", "dqc", "qgf")}
    weighted = {"td3bc-weighted": ["td3bc", POINT, *flags, "--weighting.kind=advantage"]}
    return {agent: [agent, POINT, *flags] for agent in AGENTS} | goals | weighted | {"default": [*SHORT, *LONGER]}


def write_data(path: Path) -> None:
    """Writes 20 episodes of 20 random steps of `point`."""
    random = np.random.default_rng(0)
    actions = random.uniform(-1, 1, (20, 21, 2)).astype(np.float32)
    observations = [random.uniform(-1, 1, (20, 2)).astype(np.float32)]
    for t in range(20):
        observations.append(np.clip(observations[-1] + 0.1 * actions[:, t], -1, 1))
    flat = {"observations": np.stack(observations, axis=1).reshape(-1, 2), "actions": actions.reshape(-1, 2)}
    np.savez(path, **flat, terminals=np.tile(np.arange(21) == 20, 20))


def record(folder: Path, names: list[str]) -> None:
    """Trains, and keeps the metrics of each run in the folder; stops at a run that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        write_data(data := Path(place, "data.npz"))
        for name in names or runs(data):
            assert cli.main(["train", *runs(data)[name], f"--out={name}"]) == 0, name
            (folder / f"{name}.jsonl").write_bytes(Path(name, "metrics.jsonl").read_bytes())
            jax.clear_caches()


def compared(*files: Path) -> str:
    """Returns where two files of metrics differ first, and both values, or "identical"."""
    if missing := [file for file in files if not file.exists()]:
        return f"no {missing[0]}"
    rows = ([json.loads(line, parse_float=str) for line in file.read_text().splitlines()] for file in files)
    for number, (a, b) in enumerate(itertools.zip_longest(*rows, fillvalue={}), 1):  # as text, -0.0 is not 0.0
        for metric in a | b:
            was, now = a.get(metric, "absent"), b.get(metric, "absent")
            if metric != "digest" and was != now:
                return f"row {number}, {metric}: {was} and {now}"
    return "identical"


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["record", folder, *names]:
            record(Path(folder).resolve(), names)
        case ["compare", one, other]:
            files = sorted({path.name for folder in (one, other) for path in Path(folder).glob("*.jsonl")})
            found = {file: compared(Path(one, file), Path(other, file)) for file in files}
            print(*(f"{Path(file).stem:<15} {line}" for file, line in found.items()), sep="\n")
            sys.exit(set(found.values()) != {"identical"})
        case _:
            sys.exit(__doc__)
