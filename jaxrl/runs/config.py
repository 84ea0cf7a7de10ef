"""The configuration of a run: one typed dataclass that defines the flags, `--help`, and the run's `config.json`."""

import dataclasses
import math
import types
import typing
from typing import Any, Generic, TypeVar

from jaxrl import ranges
from jaxrl.agents import AGENTS
from jaxrl.errors import UserError, unknown
from jaxrl.replay.weighting import Weighting
from jaxrl.rollout.executors import Execution
from jaxrl.training.schedule import Schedule, Timeline, phases, reads_dataset
from jaxrl.types import Agent

A = TypeVar("A", bound=Agent)


@dataclasses.dataclass(frozen=True)
class Config(Generic[A]):
    """A complete run configuration: together with the data file and the same versions, it reproduces the run."""

    agent: A
    env: str = "maze-medium"
    """Environment, a name from `jaxrl list`; options follow a question mark, such as push?reward=dense."""
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    execution: Execution = dataclasses.field(default_factory=Execution)
    data: str | None = None
    """Dataset file, or a folder or quoted pattern of .npz files, one per epoch; by default a behavior is recorded, if
    the run learns from a dataset."""
    behaviour: str = "medium"
    """Level of the scripted behavior to record, see `jaxrl list`."""
    data_steps: int = 200_000
    """Number of steps to record."""
    reward_scale: float = 1.0
    """Scale of all training rewards, from the dataset and from the environment."""
    reward_shift: float = 0.0
    """Added after scaling: 1 maps rewards of -1 and 0 to 0 and 1. Evaluation returns are not changed."""
    weighting: Weighting = dataclasses.field(default_factory=Weighting)
    order_seed: int = 0
    """Seed of the order of files in a dataset of several files."""
    seed: int = 0
    """Seed of everything except the data, their order and the evaluation episodes."""
    checkpoint_every: int = 1
    """Epochs between checkpoints."""

    def check(self) -> None:
        """Raises UserError for the first value that is out of range, before anything is built."""
        ranges.check(self.agent)
        self.schedule.check()
        ranges.check(self.execution, "execution")
        self.execution.check_fits(self.agent.chunk)
        self.weighting.check()
        for name in ("reward_scale", "reward_shift"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"{name} = {getattr(self, name)}: must be finite")
        if self.reward_scale <= 0:
            raise UserError(f"reward_scale = {self.reward_scale}: must be above 0")
        ranges.check_seed("seed", self.seed)
        for name, low in (("data_steps", 1), ("order_seed", 0), ("checkpoint_every", 1)):
            if not low <= getattr(self, name) < 2**63:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least {low} and below 2^63")
        if has_dataset(self):  # this also rejects impossible phases
            return
        if self.data is not None:
            raise UserError(
                f"data = {self.data!r}: this run does not learn from a dataset: omit it, or set "
                "--schedule.offline-updates or --schedule.online-data both"
            )
        if self.weighting.kind != "uniform":
            raise UserError(f"weighting.kind = {self.weighting.kind!r}: this run has no dataset to weight")


def timeline_of(config: Config) -> Timeline:
    """Returns the epochs of a run. Raises UserError if there are none."""
    reward, length = (config.reward_scale, config.reward_shift), config.execution.length(config.agent.chunk)
    return Timeline(phases(config.schedule, config.agent, reward, config.data is not None, length))


def has_dataset(config: Config) -> bool:
    """Returns whether a run has a dataset, that is, whether one of its phases learns from one."""
    return any(reads_dataset(phase) for phase in timeline_of(config).phases)


def records(config: Config) -> bool:
    """Returns whether a run's dataset is a behavior that the run records."""
    return config.data is None and has_dataset(config)


def replaced(settings: Any, path: str, value: Any) -> Any:
    """Returns a dataclass with the field at a dotted path changed."""
    name, _, rest = path.partition(".")
    return dataclasses.replace(settings, **{name: replaced(getattr(settings, name), rest, value) if rest else value})


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the configuration as a JSON-compatible dict, including the agent's name."""
    names = {kind: name for name, kind in AGENTS.items()}
    return {"agent_name": names[type(config.agent)], **dataclasses.asdict(config)}


def from_dict(values: dict[str, Any]) -> Config:
    """Returns the configuration written by `to_dict`. Raises UserError for unknown fields."""
    values = dict(values)
    name = values.pop("agent_name", None)
    if name not in AGENTS:
        raise unknown("agent", str(name), AGENTS)
    agent = _read(AGENTS[name], values.pop("agent"))
    return _read(Config, {**values, "agent": agent})


def _read(kind: Any, value: Any) -> Any:
    """Returns a JSON value converted to a field's type: dataclasses from objects, tuples from lists."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next((part for part in typing.get_args(kind) if part is not type(None)), kind)
    if isinstance(value, dict) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        fields = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
        for name in value:
            if name not in fields:
                raise unknown(f"field of {getattr(kind, '__name__', kind)}", name, fields)
        return kind(**{name: _read(fields[name], part) for name, part in value.items()})
    return tuple(value) if isinstance(value, list) else value
