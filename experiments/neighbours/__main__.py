"""How fast are exact nearest pairs of a whole dataset found inside a program, and in how much memory?

    python -m experiments.neighbours [--data cube-single-play-v0.npz puzzle-3x3-play-v0.npz ...]

For a batch of states of the dataset, each with an action, the nearest of all pairs (2 s, a) are searched, s normalized:
near the data, where the action is the stored one plus noise of standard deviation .05 per entry, and off them, where it
is .5, as early in training. The data are files, and smooth synthetic trajectories of 17 + 6 entries. The ways:

    blocks       `jaxrl.replay.neighbours`, the distances to one block of keys after the other
    tree         the same through a callback into a KD-tree on the host
    approximate  the same by `jax.lax.approx_min_k`
    scipy        `scipy.spatial.cKDTree` called directly, without JAX and without a program around it
    candidates   each state's 64 nearest states are known beforehand (`ways.known_of`), and only these are compared
                 where that is exact; otherwise the whole batch is searched as by "auto"

Each is measured in a process of its own, four batches at a time, in programs by a scan; a way that takes more than
10 ms per batch and thousand synthetic rows is not tried again. Memory is a process's peak above data and compiled
program, including the building of trees, and what is known of all rows. Writes results.json, table.md and figure.png
into this folder, and keeps in them what was measured on other devices.
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import tyro

from experiments.neighbours.ways import KNOWN, NOISE, WAYS, measured
from experiments.official_speed.__main__ import processor
from experiments.tables import machine
from jaxrl.errors import UserError

HERE = Path(__file__).parent
COLOURS = dict(zip(WAYS, ("tab:blue", "tab:orange", "tab:gray", "black", "tab:green"), strict=True))


@dataclasses.dataclass(frozen=True)
class Study:
    """Queries per second and memory of the ways to search for nearest pairs."""

    data: tuple[Path, ...] = ()
    """Dataset files, besides the synthetic trajectories."""
    rows: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    """Rows of the synthetic trajectories."""
    ways: tuple[str, ...] = WAYS
    """Ways to search."""
    batch: int = 256
    """Queries per search."""
    seconds: float = 1.0
    """Seconds for which each is measured, at least."""
    out: Path = HERE
    """Folder of the results."""

    def check(self) -> None:
        """Raises UserError for the first value that nothing can be measured with."""
        for way in self.ways:
            if way not in WAYS:
                raise UserError(f"--ways {way}: must be among {', '.join(WAYS)}")
        for rows in (*self.rows, self.batch):
            if rows < KNOWN:
                raise UserError(f"--rows and --batch: {rows} is too few, they must be at least {KNOWN}")


def per_second(row: dict[str, Any], distance: str, batch: int) -> float:
    """Returns the queries per second of a row."""
    return 1000 * batch / row[distance]["batch_ms"]


def cells(device: str, row: dict[str, Any], batch: int) -> list[str]:
    """Returns a row of the table."""
    sure = [f"{100 * row[distance].get('answered', np.nan):.0f} %".replace("nan %", "") for distance in NOISE]
    return [
        device,
        row["data"],
        f"{row['rows']:,}",
        f"{row['entries']}",
        row["way"],
        *(f"{row[distance]['batch_ms']:.2f}" for distance in NOISE),
        *(f"{per_second(row, distance, batch):,.0f}" for distance in NOISE),
        f"{row['memory_mib']:.0f}",
        *sure,
    ]


def table(results: dict[str, Any]) -> str:
    """Returns the results as people read them."""
    head = ["device", "data", "rows", "entries", "way", "near, ms", "off, ms", "near, queries/s", "off, queries/s"]
    lines = [
        [*head, "memory, MiB", "answered near", "answered off"],
        ["---", "---", *["---:"] * 2, "---", *["---:"] * 7],
    ]
    notes = []
    for device, found in results["machines"].items():
        lines += [cells(device, row, found["study"]["batch"]) for row in found["rows"]]
        manifest, loads = found["manifest"], [row["load_average"] for row in found["rows"]]
        notes.append(
            f"{device}: {manifest['cores']} cores of {manifest['processor']}, batch {found['study']['batch']}, load "
            f"average {min(loads):.1f} to {max(loads):.1f}, jax {manifest['versions']['jax']}."
        )
        costs = [row["near"]["all_candidates_s"] for row in found["rows"] if row["way"] == "candidates"]
        if costs:
            notes.append(
                f"To find the candidates of all rows beforehand would take {min(costs):.0f} to {max(costs):.0f} s."
            )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + (
        "\n\nTime per batch, queries per second (median over calls), memory at the peak above the data's and the "
        "program's. Answered: the queries for which the known candidates are enough; one other query in its batch, and "
        f"the batch is searched fully. {' '.join(notes)}\n"
    )


def figure(results: dict[str, Any], path: Path) -> None:
    """Writes queries per second and memory over the rows of the synthetic trajectories, a line style per device."""
    picture, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    axes[1].sharey(axes[0])
    for style, (device, found) in zip(("-", "--", ":", "-."), results["machines"].items(), strict=False):
        for way, colour in COLOURS.items():
            rows = [row for row in found["rows"] if row["way"] == way and row["data"] == "synthetic"]
            for axis, distance in zip(axes, NOISE, strict=False):
                speed = [per_second(row, distance, found["study"]["batch"]) for row in rows]
                axis.plot([row["rows"] for row in rows], speed, f"o{style}", color=colour, label=f"{way}, {device}")
            memory = [row["memory_mib"] for row in rows]
            axes[2].plot([row["rows"] for row in rows], memory, f"o{style}", color=colour)
    for axis, title in zip(axes, ("near the data", "off the data", "memory at the peak"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="rows", ylabel="queries per second", title=title)
        axis.grid(alpha=0.3)
    axes[2].set_ylabel("MiB")
    axes[0].legend(frameon=False, fontsize="small")
    picture.savefig(path, dpi=110)
    plt.close(picture)


def main(study: Study) -> None:
    """Runs the study and writes its results."""
    study.check()
    path = study.out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {"machines": {}}
    settings = {"data": [file.name for file in study.data], "rows": study.rows, "batch": study.batch}
    rows: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    for source in (*study.rows, *study.data):
        slow = {row["way"] for row in rows if row["data"] == "synthetic" and row["off"]["batch_ms"] > row["rows"] / 100}
        for way in [way for way in study.ways if way not in slow]:
            with concurrent.futures.ProcessPoolExecutor(1, context) as process:
                rows.append(process.submit(measured, source, way, study.batch, study.seconds).result())
            print(json.dumps(rows[-1]), flush=True)
    manifest = machine("") | {"processor": processor()}
    results["machines"][manifest["device"]] = {"manifest": manifest, "study": settings, "rows": rows}
    path.write_text(json.dumps(results, indent=1) + "\n")
    (study.out / "table.md").write_text(table(results))
    figure(results, study.out / "figure.png")
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Study))
