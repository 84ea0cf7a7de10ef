"""How fast are members of a sweep, the online loop against a peer's, and the default run's pieces?

    python -m experiments.bench [--only members peer pieces] [--peer.python ENVIRONMENT/bin/python]

    members  a member of 1, 4, 16 and 64 in one program against a run alone: offline and online epochs of FMQ in the
             default maze, at the sizes of the default run and at small ones, in both layouts of a sweep (members.py)
    peer     the fused online loop against rejax's SAC on the same Brax environment (peer.py); its Python needs
             `pip install rejax brax 'gymnax<1'`, in a version of JAX that it allows, best the one that runs this
    pieces   how fast the default run's pieces are, and what bounds them (pieces.py)

Members and peer are measured in turn, round after round: rates are medians over rounds, ratios medians of each round's.
The time to compile stands apart and is in none of them. Writes results.json, table.md and figure.png into this folder.
What results.json holds of this device already is not measured again, so that a bench which was stopped goes on; what
was measured on other devices stays. For a GPU, run the same line there, with a JAX on either side that knows it: both
devices are then in one table and one figure.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax
import tyro

from experiments.bench import members, peer, pieces
from experiments.bench.members import Members
from experiments.bench.peer import Peer
from experiments.bench.pieces import Pieces
from experiments.bench.results import figure, table
from experiments.official_speed.__main__ import processor
from jaxrl.errors import UserError
from jaxrl.runs.jsonlines import write_json

HERE = Path(__file__).parent
Name: TypeAlias = Literal["members", "peer", "pieces"]
Block: TypeAlias = tuple[str, Callable[[], dict[str, Any]]]
"""What is measured in one go: its name in the results, and the measurement."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """Speed of sweeps, of the online loop against a peer's, and of the default run's pieces."""

    only: tuple[Name, ...] = ("members", "peer", "pieces")
    """Studies to run."""
    members: Members = dataclasses.field(default_factory=Members)
    peer: Peer = dataclasses.field(default_factory=Peer)
    pieces: Pieces = dataclasses.field(default_factory=Pieces)
    out: Path = HERE
    """Folder of the results."""

    def check(self) -> None:
        """Raises UserError for the first value that nothing can be measured with."""
        self.members.check()
        self.peer.check()

    def blocks(self, name: Name) -> Iterator[Block]:
        """Yields what a study measures."""
        if name == "members":
            for case in self.members.cases:
                for what in self.members.what:
                    yield f"{case} {what}", lambda case=case, what=what: members.measured(self.members, case, what)
        elif name == "peer" and self.peer.python is not None:
            for width in self.peer.widths:
                for seeds in self.peer.seeds:
                    yield f"{width} {seeds}", lambda width=width, seeds=seeds: peer.measured(self.peer, width, seeds)
        elif name == "pieces":
            yield "pieces", lambda: pieces.measured(self.pieces)

    def settings(self, name: Name) -> dict[str, Any]:
        """Returns what the blocks of a study must have in common, as JSON holds it."""
        study = {"members": self.members, "peer": self.peer, "pieces": self.pieces}[name]
        return json.loads(json.dumps(study.settings() | {"processor": processor()}))


def measure(results: dict[str, Any], name: Name, bench: Bench, save: Callable[[], None]) -> None:
    """Measures what is not in the results yet. Raises UserError where these were measured with other settings."""
    device, settings = jax.devices()[0].device_kind, bench.settings(name)
    for block, measured in bench.blocks(name):
        studies = results["machines"].setdefault(device, {})
        study = studies.setdefault(name, {"settings": settings, "blocks": {}})
        if study["settings"] != settings:
            raise UserError(
                f"{bench.out}: {name} were measured with {study['settings']}, not {settings}: name another --out"
            )
        if block in study["blocks"]:
            continue
        print(f"{name}: {block}", flush=True)
        study["blocks"][block] = measured()
        save()
        jax.clear_caches()


def main(bench: Bench) -> None:
    """Runs the studies and writes their results."""
    bench.check()
    pieces.use_cache(None)  # the time to compile is measured
    path = bench.out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {"machines": {}}

    def save() -> None:
        write_json(path, results)
        (bench.out / "table.md").write_text(table(results))
        figure(results, bench.out / "figure.png")

    for name in bench.only:
        measure(results, name, bench, save)
    save()
    print((bench.out / "table.md").read_text())


if __name__ == "__main__":
    main(tyro.cli(Bench))
