"""What a run is: one typed dataclass that is the command line's flags, `--help`, and the run's `config.json`."""

import dataclasses
import math
import types
import typing
from typing import Any, Generic, TypeVar

from jaxrl import ranges
from jaxrl.agents import (
    AGENTS,
)
from jaxrl.errors import UserError, unknown
from jaxrl.replay.weighting import Weighting
from jaxrl.training.schedule import Schedule

A = TypeVar("A")


@dataclasses.dataclass(frozen=True)
class Config(Generic[A]):
    """A run, completely: repeating it needs this, the data file and the same versions."""

    agent: A
    env: str = "maze-medium"
    """Environment, as `jaxrl list` names them; options follow a question mark, such as push?reward=dense."""
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    data: str | None = None
    """Dataset file, or a folder or quoted pattern of .npz files, one per epoch; else a behaviour is recorded."""
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
        self.weighting.check()
        for name in ("reward_scale", "reward_shift"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"{name} = {getattr(self, name)}: must be finite")
        if self.reward_scale <= 0:
            raise UserError(f"reward_scale = {self.reward_scale}: must be above 0")
        for name, low in (("data_steps", 1), ("order_seed", 0), ("seed", 0), ("checkpoint_every", 1)):
            if not low <= getattr(self, name) < 2**63:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least {low} and below 2^63")


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
        fields = {field.name: field.type for field in dataclasses.fields(kind)}
        for name in value:
            if name not in fields:
                raise unknown(f"field of {getattr(kind, '__name__', kind)}", name, fields)
        return kind(**{name: _read(fields[name], part) for name, part in value.items()})
    return tuple(value) if isinstance(value, list) else value
