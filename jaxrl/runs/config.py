"""What a run is: one typed dataclass that is the command line's flags, `--help`, and the run's `config.json`."""

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
    """A run, completely: repeating it needs this, the data file and the same versions."""

    agent: A
    env: str = "maze-medium"
    """Environment, as `jaxrl list` names them; options follow a question mark, such as push?reward=dense."""
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    execution: Execution = dataclasses.field(default_factory=Execution)
    data: str | None = None
    """Dataset file, or a folder or quoted pattern of .npz files, one per epoch; else a behaviour is recorded, if the
    run learns from a dataset."""
    behaviour: str = "medium"
    """Level of the scripted behaviour that is recorded, see `jaxrl list`."""
    data_steps: int = 200_000
    """Steps that are recorded."""
    reward_scale: float = 1.0
    """Factor of all rewards that the agent learns from, those of the dataset and of the environment."""
    reward_shift: float = 0.0
    """What is then added to them: 1 makes rewards of -1 and 0 into 0 and 1. Returns of evaluation stay as they are."""
    weighting: Weighting = dataclasses.field(default_factory=Weighting)
    order_seed: int = 0
    """Seed of the order in which the files of a dataset of several are seen."""
    seed: int = 0
    """Seed of everything but the data, their order and the evaluation episodes."""
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
        for name, low in (("data_steps", 1), ("order_seed", 0), ("seed", 0), ("checkpoint_every", 1)):
            if not low <= getattr(self, name) < 2**63:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least {low} and below 2^63")
        if has_dataset(self):  # which refuses phases that no run can have
            return
        if self.data is not None:
            raise UserError(
                f"data = {self.data!r}: this run learns from no dataset: leave it out, or set "
                "--schedule.offline-updates or --schedule.online-data both"
            )
        if self.weighting.kind != "uniform":
            raise UserError(f"weighting.kind = {self.weighting.kind!r}: this run has no dataset to weight")


def timeline_of(config: Config) -> Timeline:
    """Returns the epochs of a run. Raises UserError where there is nothing to do."""
    reward, length = (config.reward_scale, config.reward_shift), config.execution.length(config.agent.chunk)
    return Timeline(phases(config.schedule, config.agent, reward, config.data is not None, length))


def has_dataset(config: Config) -> bool:
    """Returns whether a run has a dataset: whether one of its phases learns from it."""
    return any(reads_dataset(phase) for phase in timeline_of(config).phases)


def records(config: Config) -> bool:
    """Returns whether a run's dataset is a behaviour that is recorded for it."""
    return config.data is None and has_dataset(config)


def replaced(settings: Any, path: str, value: Any) -> Any:
    """Returns a dataclass with the field at a dotted path changed."""
    name, _, rest = path.partition(".")
    return dataclasses.replace(settings, **{name: replaced(getattr(settings, name), rest, value) if rest else value})


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the configuration as JSON would hold it, the agent's name included."""
    names = {kind: name for name, kind in AGENTS.items()}
    return {"agent_name": names[type(config.agent)], **dataclasses.asdict(config)}


def from_dict(values: dict[str, Any]) -> Config:
    """Returns the configuration that `to_dict` wrote. Raises UserError for fields that do not exist."""
    values = dict(values)
    name = values.pop("agent_name", None)
    if name not in AGENTS:
        raise unknown("agent", str(name), AGENTS)
    agent = _read(AGENTS[name], values.pop("agent"))
    return _read(Config, {**values, "agent": agent})


def _read(kind: Any, value: Any) -> Any:
    """Returns a JSON value as the type that a field asks for: dataclasses from objects, tuples from lists."""
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
