"""The space of a sweep: values of fields, crossed, paired or drawn at random, each with several seeds.

Members that differ only in Scalars of the agent and in seeds form one group and share one program. Any other field
changes the program or the data: its values form separate groups, which run one after the other.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np

from jaxrl import ranges
from jaxrl.errors import UserError, unknown
from jaxrl.runs.config import Config, replaced

APART = {  # fields that cannot be axes, and why or what to use instead
    "seed": "use --seeds for the number of seeds, starting at --seed",
    "order_seed": "members share their data",
    "checkpoint_every": "a sweep saves at time intervals, see --checkpoint-seconds",
    "schedule.eval_every": "members are compared on equal evaluations",
    "schedule.eval_episodes": "members are compared on equal evaluations",
    "schedule.eval_seed": "members are compared on equal evaluations",
}


@dataclasses.dataclass(frozen=True)
class Draw:
    """A distribution of a Scalar: uniform or log-uniform in [low, high]."""

    kind: Literal["uniform", "log"]
    low: float
    high: float

    def check(self, path: str) -> None:
        """Raises UserError if the bounds are invalid."""
        floor = 0 if self.kind == "log" else -math.inf
        if not (floor < self.low < self.high < math.inf):
            above = "0 < LOW < HIGH" if self.kind == "log" else "LOW < HIGH"
            raise UserError(f"{path} = {self.kind}:{self.low:g}:{self.high:g}: needs {above}, both finite")

    def values(self, count: int, random: np.random.Generator) -> list[float]:
        """Returns `count` values rounded to four digits, so that printed values are exact."""
        if self.kind == "log":
            drawn = np.exp(random.uniform(math.log(self.low), math.log(self.high), count))
        else:
            drawn = random.uniform(self.low, self.high, count)
        return [float(f"{value:.4g}") for value in drawn]


@dataclasses.dataclass(frozen=True)
class Space:
    """The space of a sweep. Every combination of grid values, pairs and draws is one setting."""

    base: Config
    grid: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)  # dotted field: its values
    paired: tuple[str, ...] = ()  # fields of the grid whose values are paired, not crossed
    drawn: Mapping[str, Draw] = dataclasses.field(default_factory=dict)
    draws: int = 0  # random settings per combination of the grid, if any field is drawn
    draw_seed: int = 0
    seeds: int = 1  # number of seeds per setting, starting at the configuration's

    def check(self) -> None:
        """Raises UserError for an invalid axis, before anything is built."""
        if self.seeds < 1:
            raise UserError(f"seeds = {self.seeds}: must be at least 1")
        ranges.check_seed("seed", self.base.seed, following=self.seeds - 1)
        ranges.check_seed("draw_seed", self.draw_seed)
        if bool(self.drawn) != (self.draws > 0):
            raise UserError(
                f"draws = {self.draws}: drawn fields require --draws, at least 1, "
                "as in --agent.adam.lr log:1e-5:1e-3 --draws 16"
            )
        for path in (*self.grid, *self.drawn):
            check_axis(self.base, path)
        for path, draw in self.drawn.items():
            draw.check(path)
            if not is_scalar(self.base, path):
                raise UserError(f"{path} = {draw.kind}:...: only Scalars can be drawn, list the values of this field")
        for path, values in self.grid.items():
            if not values:
                raise UserError(f"{path}: has no values")
            if len(set(map(str, values))) < len(values):
                raise UserError(f"{path} = {' '.join(map(str, values))}: has duplicate values")
        self.check_pairs()

    def check_pairs(self) -> None:
        """Raises UserError if paired fields are not swept, or have different numbers of values."""
        for path in self.paired:
            if path not in self.grid:
                raise unknown("swept field", path, self.grid)
        counts = {path: len(self.grid[path]) for path in self.paired}
        if len(set(counts.values())) > 1:
            said = ", ".join(f"{path} has {count}" for path, count in counts.items())
            raise UserError(f"paired: paired fields need equal numbers of values: {said}")

    def settings(self) -> Iterator[dict[str, Any]]:
        """Yields the values of every setting, by field."""
        crossed = [[{path: value} for value in values] for path, values in self.grid.items() if path not in self.paired]
        if self.paired:
            rows = zip(*(self.grid[path] for path in self.paired), strict=True)
            crossed.append([dict(zip(self.paired, row, strict=True)) for row in rows])
        if self.drawn:
            random = np.random.default_rng(self.draw_seed)
            columns = [draw.values(self.draws, random) for draw in self.drawn.values()]
            crossed.append([dict(zip(self.drawn, row, strict=True)) for row in zip(*columns, strict=True)])
        for parts in itertools.product(*crossed):
            yield {path: value for part in parts for path, value in part.items()}

    def members(self) -> "tuple[Member, ...]":
        """Returns all members, ordered by setting, then seed. Raises UserError if a value is out of range."""
        self.check()
        found = []
        for setting, values in enumerate(self.settings()):
            config = self.base
            for path, value in values.items():
                config = replaced(config, path, value)
            config.check()
            for seed in range(self.base.seed, self.base.seed + self.seeds):
                found.append(Member(len(found), setting, values, dataclasses.replace(config, seed=seed)))
        return tuple(found)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a sweep is executed."""

    layout: Literal["auto", "vmap", "map"] = "auto"
    """All members of a program at once (vmap), or one after the other on each device (map); auto measures both."""
    max_members_per_program: int | None = None
    """Maximum number of members per program; by default as many as fit in memory."""
    devices: int | None = None
    """Number of devices per process to distribute members over; by default all."""
    rungs: tuple[float, ...] = ()
    """Successive halving: fractions of the run, such as 0.25 0.5, after which the worst settings are dropped."""
    keep: float = 0.5
    """Fraction of the settings kept at each rung."""
    checkpoint_seconds: float = 60.0
    """Minimum seconds between checkpoints, which are written at the end of an epoch."""
    patience: float = 60.0
    """Seconds without a heartbeat after which another process counts as lost; then all save and stop."""

    def check(self) -> None:
        """Raises UserError for the first value that is out of range."""
        if self.max_members_per_program is not None and self.max_members_per_program < 1:
            raise UserError(f"max_members_per_program = {self.max_members_per_program}: must be at least 1")
        if list(self.rungs) != sorted(set(self.rungs)) or not all(0 < rung < 1 for rung in self.rungs):
            raise UserError(f"rungs = {' '.join(map(str, self.rungs))}: must be ascending, between 0 and 1")
        if not 0 < self.keep < 1:
            raise UserError(f"keep = {self.keep}: must lie between 0 and 1")
        for name in ("checkpoint_seconds", "patience"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least 0, and finite")

    def local(self) -> list[jax.Device]:
        """Returns the devices of this process to distribute members over. Raises UserError if there are fewer."""
        here = jax.local_devices()
        if self.devices is not None and not 1 <= self.devices <= len(here):
            raise UserError(f"devices = {self.devices}: there are {len(here)}")
        return here[: self.devices]


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    index: int
    setting: int
    values: Mapping[str, Any]  # of the swept fields
    config: Config  # complete, as for a single run

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.index:03d}"


def check_axis(config: Config, path: str) -> None:
    """Raises UserError if a dotted path is not a field of the configuration, or one that cannot be swept."""
    known = dict(fields(config))
    if path not in known:
        raise unknown("field", path, known)
    if path in APART:
        raise UserError(f"{path}: cannot be swept: {APART[path]}")


def fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted path, value) of every field, including those of nested dataclasses."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def is_scalar(config: Config, path: str) -> bool:
    """Returns whether a field is a Scalar of the agent: a pytree leaf, so its value does not change the program."""
    root, _, rest = path.partition(".")
    if root != "agent":
        return False
    paths = jax.tree_util.tree_flatten_with_path(config.agent)[0]
    return rest in {jax.tree_util.keystr(name, simple=True, separator=".") for name, _ in paths}


def groups(members: Iterable[Member]) -> list[list[Member]]:
    """Returns the members grouped by program."""
    found: list[tuple[Any, list[Member]]] = []
    for member in members:
        shape = shape_of(member.config)
        for other, group in found:
            if other == shape:
                group.append(member)
                break
        else:
            found.append((shape, [member]))
    return [group for _, group in found]


def shape_of(config: Config) -> Any:
    """Returns a key that is equal for configurations that can share one program and one dataset."""
    return jax.tree.structure(config.agent), dataclasses.replace(config, agent=None, seed=0)


def cohorts(group: list[Member], most: int, lots: int = 1) -> list[list[Member]]:
    """Returns a group split evenly into the fewest parts of at most `most` members each, but at least `lots` parts.

    Raises:
        ValueError: `most` below 1.
    """
    if most < 1:
        raise ValueError(most)
    count = min(max(-(-len(group) // most), lots), len(group))
    ends = [len(group) * i // count for i in range(count + 1)]
    return [group[low:high] for low, high in itertools.pairwise(ends)]
