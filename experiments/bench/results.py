"""What was measured, as people read it: tables and a figure, device by device."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from experiments.bench.peer import SAMPLES

COLOURS = {"vmap": "tab:blue", "map": "tab:orange", "alone": "tab:green", "rejax": "tab:gray"}
MARKS = {"offline": "o", "online": "s", "evaluation": "^"}
LINES = {"quick": "-", "small": "--"}
TARGET = 1.05  # of a member's cost over that of a run alone, on a CPU
MIB = 2**20


def middle(values: Any) -> float:
    """Returns the median."""
    return float(np.median(values))


def between(values: Any, form: str = ".1f") -> str:
    """Returns the least and the largest of some values."""
    return f"{min(values):{form}} to {max(values):{form}}"


def rate(amount: float, seconds: Any) -> str:
    """Returns an amount per second, in the median over rounds."""
    return f"{amount / middle(seconds):,.0f}" if amount else "-"


def over(row: dict[str, Any]) -> np.ndarray:
    """Returns, round by round, the time of a member over that of a run alone."""
    return np.array(row["seconds"]) / row["members"] / np.array(row["alone_seconds"])


# Tables


def table(results: dict[str, Any]) -> str:
    """Returns everything that was measured."""
    parts = []
    for device, studies in results["machines"].items():
        for name in (name for name in TABLES if name in studies):
            title, written = TABLES[name]
            parts.append(f"## {title}: {device}\n\n{written(studies[name])}")
    return "\n".join(parts)


def markdown(head: list[str], rows: list[list[str]], words: int) -> str:
    """Returns a table, the first columns of which are words and the others numbers."""
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def where(study: dict[str, Any]) -> str:
    """Returns on what a study was measured, and what else the machine did."""
    blocks = list(study["blocks"].values())
    manifest, loads = blocks[0]["manifest"], [load for block in blocks for load in block["load_average"]]
    return (
        f"{manifest['device']}, {manifest['cores']} cores of {study['settings']['processor']}, "
        f"jax {manifest['versions']['jax']}, load average {between(loads)}."
    )


def member_rows(block: dict[str, Any]) -> Iterator[list[str]]:
    """Yields the rows of a case and kind of epoch, the run alone first."""
    name, alone = f"{block['case']}, {block['what']}", block["alone"]
    seconds = np.concatenate([row["alone_seconds"] for row in block["rows"]])
    costs = [f"{alone['compile_seconds']:.0f}", *(f"{alone[x] / MIB:,.0f}" for x in ("bytes_held", "bytes_working"))]
    yield [name, "alone", *(rate(block[x], seconds) for x in ("updates", "steps")), "1", "", "1", *costs, "-"]
    for row in block["rows"]:
        ratio, count, grown = over(row), row["members"], row["bytes_grown"]
        yield [
            name,
            f"{count}, {row['layout']}",
            *(rate(count * block[x], row["seconds"]) for x in ("updates", "steps")),
            f"**{middle(ratio):.2f}**",
            between(ratio, ".2f"),
            f"{count * middle(ratio):.1f}",
            f"{row['compile_seconds']:.0f}",
            *(f"{row[x] / MIB:,.0f}" for x in ("bytes_held", "bytes_working")),
            "-" if grown is None else f"{grown / MIB:,.0f}",
        ]


def member_table(study: dict[str, Any]) -> str:
    """Returns the table of members."""
    head = ["epoch of", "members", "updates/s", "steps/s", "member / alone", "in rounds", "all / alone"]
    head += ["compile, s", "held, MiB", "working, MiB", "grew, MiB"]
    settings, blocks = study["settings"], list(study["blocks"].values())
    return markdown(head, [row for block in blocks for row in member_rows(block)], 2) + (
        f"\n\nFMQ in `{settings['env']}` at its quick preset; small: two hidden layers of 32, batch 64. Updates and "
        "environment steps per second are those of all members together. Member / alone: the time of an epoch over "
        "members and over the time of a run alone, driven by `jitted_epoch` just before and just after in "
        f"the same process; medians of {settings['rounds']} rounds in turn, at least {settings['seconds']:g} s each. "
        f"Epochs have {settings['updates']} updates offline and {settings['iterations']} iterations online, five times "
        "as many in the small case, fewer than a run's: what an epoch costs besides them, above all copying what "
        "members hold, weighs more here. Compiling happens once and is in none of these times. Held: by the members, "
        "besides the data that they share; working: what the program needs besides, as compiled; grew: by how much the "
        "process did during the first call. "
        f"{where(study)}\n"
    )


def peer_rows(block: dict[str, Any]) -> Iterator[list[str]]:
    """Yields the rows of a number of seeds and networks of one width, one per layout here."""
    theirs = np.array(block["seconds"]["rejax"])
    for layout, compiling in block["compile_seconds"].items():
        ours, sampling, rest = np.array(block["seconds"][layout]), "-", "-"
        if "sampling" in block["seconds"]:
            batches = block["updates"] / SAMPLES
            drawing = [batches * np.array(block["seconds"][name]) for name in ("rejax sampling", "sampling")]
            sampling = " : ".join(f"{100 * middle(x / y):.0f} %" for x, y in zip(drawing, (theirs, ours), strict=True))
            rest = f"{middle((theirs - drawing[0]) / (ours - drawing[1])):.2f}"
        yield [
            f"{block['width']}x2",
            f"{block['seeds']}, {layout}",
            *(rate(block["seeds"] * block["steps"], each) for each in (theirs, ours)),
            *(rate(block["seeds"] * block["updates"], each) for each in (theirs, ours)),
            f"**{middle(theirs / ours):.2f}**",
            between(theirs / ours, ".2f"),
            f"{1000 * block['rejax']['update_gflop']:.0f} : {1000 * block['update_gflop']:.0f}",
            sampling,
            rest,
            f"{block['rejax']['compile_seconds']:.0f} : {compiling:.0f}",
        ]


def peer_table(study: dict[str, Any]) -> str:
    """Returns the table of the peer."""
    head = ["networks", "seeds", "steps/s, rejax", "steps/s, jaxrl", "updates/s, rejax", "updates/s, jaxrl", "ratio"]
    head += ["in rounds", "MFLOP per update", "sampling", "without it", "compile, s"]
    settings, blocks = study["settings"], list(study["blocks"].values())
    versions = blocks[0]["rejax"]["versions"]
    return markdown(head, [row for block in blocks for row in peer_rows(block)], 2) + (
        f"\n\nThe online loops of SAC in rejax {versions['rejax']} (jax {versions['jax']}) and of ReBRAC in jaxrl, "
        f"`brax/{settings['env']}`, backend {settings['backend']}; on both sides {settings['envs']} environments, "
        f"{settings['updates']} updates after each step of all of them, batch {settings['batch']}, a replay of "
        f"{settings['replay']:,}, no evaluation. The algorithms differ, as jaxrl has no SAC. An update evaluates, on "
        "both sides, the policy and two target critics at the next states, two critics at the batch and the policy at "
        "its states, both with gradients, and the critics at the policy's actions with the gradient to these. SAC has "
        "densities and a temperature besides, ReBRAC a distance to the batch's actions and a slow actor. Pairs are "
        "rejax : jaxrl. MFLOP: of an update's matrix products. Sampling: the time of drawing batches, alone in a "
        "program, in per cent of the loop's; without it: the ratio of what then remains. The loops differ, too: rejax "
        "draws a batch without replacement, which orders one number per row of the replay, and computes a reset of "
        "every environment in every step; jaxrl draws with replacement, and computes resets once per epoch. Several "
        "seeds are vmapped by rejax, as it documents, and here as named; rates are those of all seeds together. "
        f"Medians of {settings['rounds']} rounds in turn, of at least {settings['seconds']:g} s each. {where(study)}\n"
    )


def piece_table(study: dict[str, Any]) -> str:
    """Returns the table of pieces."""
    settings, block = study["settings"], study["blocks"]["pieces"]
    numbers = {name: value for name, value in block.items() if isinstance(value, float)}
    rows = [
        [name.replace("_", " "), f"{value:,.0f}" if value >= 100 else f"{value:.3g}"] for name, value in numbers.items()
    ]
    return markdown(["piece", "measured"], rows, 1) + (
        f"\n\n{settings['agent']} at its {settings['preset']} preset in `{settings['env']}`, {settings['count']} "
        f"environments in the rollouts: the best of several repetitions each. {where(study)}\n"
    )


TABLES = {
    "members": ("Members of a sweep", member_table),
    "peer": ("The online loop and a peer's", peer_table),
    "pieces": ("Pieces of the default run", piece_table),
}
"""Title and table of every study."""


# Figure


def figure(results: dict[str, Any], path: Path) -> None:
    """Writes a row of pictures per device: rates and costs over the number of members, and the peer's rates."""
    machines = results["machines"]
    size = (19, 4.4 * len(machines))
    picture, axes = plt.subplots(len(machines), 4, figsize=size, squeeze=False, layout="constrained")
    for row, (device, studies) in zip(axes, machines.items(), strict=True):
        blocks = studies["members"]["blocks"].values() if "members" in studies else ()
        draw_rates(row[0], [block for block in blocks if block["what"] == "offline"], "updates")
        draw_rates(row[1], [block for block in blocks if block["what"] == "online"], "steps")
        draw_costs(row[2], list(blocks))
        draw_peer(row[3], studies["peer"]["blocks"].values() if "peer" in studies else ())
        row[0].set(title=f"offline, {device}", ylabel="updates per second, all members")
        row[1].set(title="online", ylabel="environment steps per second, all members")
        row[2].set(title="time of a member over that of a run alone")
        row[3].set(title="online loop on Brax", ylabel="environment steps per second, all seeds")
    for axis in axes.flat:
        axis.set_visible(axis.has_data())  # not all was measured everywhere
    picture.savefig(path, dpi=110)
    plt.close(picture)


def draw_rates(axis: Any, blocks: list[dict[str, Any]], unit: str) -> None:
    """Draws what all members do per second, and what a run alone does."""
    for block in blocks:
        alone = np.concatenate([row["alone_seconds"] for row in block["rows"]])
        style = LINES[block["case"]]
        axis.axhline(
            block[unit] / middle(alone),
            color="black",
            linestyle=style,
            linewidth=0.8,
            label=f"{block['case']}, run alone",
        )
        for layout, rows in by_layout(block):
            values = [row["members"] * block[unit] / middle(row["seconds"]) for row in rows]
            label = f"{block['case']}, {layout}"
            axis.plot([row["members"] for row in rows], values, f"o{style}", color=COLOURS[layout], label=label)
    axis.set(yscale="log")
    over_members(axis, blocks)


def draw_costs(axis: Any, blocks: list[dict[str, Any]]) -> None:
    """Draws the time of a member over that of a run alone, with the range over rounds."""
    for block in blocks:
        for layout, rows in by_layout(block):
            ratios = np.array([over(row) for row in rows])
            centre = np.median(ratios, axis=1)
            style, colour = f"{MARKS[block['what']]}{LINES[block['case']]}", COLOURS[layout]
            counts, label = [row["members"] for row in rows], f"{block['case']} {block['what']}, {layout}"
            axis.plot(counts, centre, style, color=colour, label=label, markersize=5)
            axis.fill_between(counts, ratios.min(axis=1), ratios.max(axis=1), color=colour, alpha=0.08, linewidth=0)
    axis.axhline(TARGET, color="black", linestyle=":", linewidth=0.8)
    below = {"ncols": 2, "loc": "upper center", "bbox_to_anchor": (0.5, -0.14)}  # so many names would hide the lines
    over_members(axis, blocks, **below)


def by_layout(block: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yields the rows of each layout."""
    for layout in dict.fromkeys(row["layout"] for row in block["rows"]):
        yield layout, [row for row in block["rows"] if row["layout"] == layout]


def over_members(axis: Any, blocks: list[dict[str, Any]], **legend: Any) -> None:
    """Sets an axis that counts members, and its legend."""
    counts = sorted({row["members"] for block in blocks for row in block["rows"]})
    axis.set(xscale="log", xlabel="members of one program")
    axis.set_xticks(counts, [f"{count}" for count in counts])
    axis.xaxis.minorticks_off()
    axis.grid(alpha=0.3)
    if blocks:
        axis.legend(frameon=False, fontsize="small", **legend)


def draw_peer(axis: Any, blocks: Any) -> None:
    """Draws the environment steps per second of both sides, as bars from the least to the largest over rounds."""
    place, ticks = 0.0, {}
    for block in blocks:
        begin = place
        for name in ("rejax", *block["compile_seconds"]):
            rates = block["seeds"] * block["steps"] / np.array(block["seconds"][name])
            spread = [[middle(rates) - rates.min()], [rates.max() - middle(rates)]]
            label = "SAC, rejax" if name == "rejax" else f"ReBRAC, jaxrl, {name}"
            axis.bar(place, middle(rates), yerr=spread, color=COLOURS[name], capsize=3, label=label)
            place += 1
        plural = "s" * (block["seeds"] > 1)
        ticks[(begin + place - 1) / 2] = f"{block['width']}x2\n{block['seeds']} seed{plural}"
        place += 0.6
    axis.set_xticks(list(ticks), list(ticks.values()))
    handles, labels = axis.get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    if named:
        axis.legend(named.values(), named.keys(), frameon=False, fontsize="small")
