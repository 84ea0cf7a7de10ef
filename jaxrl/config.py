"""What a run is: one typed dataclass that is the command line's flags, `--help`, and the run's `config.json`."""

import dataclasses
import types
import typing
from typing import Any, Generic, Literal, TypeVar

from jaxrl.agents import AGENTS, BC, FMQ
from jaxrl.errors import UserError, unknown
from jaxrl.train import Schedule

A = TypeVar("A")


@dataclasses.dataclass(frozen=True)
class Config(Generic[A]):
    """A run, completely: repeating it needs this, the data file and the same versions."""

    agent: A
    env: str = "maze-medium"
    """Environment, as `jaxrl list` names them; options follow a question mark, such as push?reward=dense."""
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    data: str | None = None
    """Dataset file (.npz). Without one, the environment's scripted behaviour is recorded."""
    behaviour: str = "medium"
    """Level of the scripted behaviour that is recorded, see `jaxrl list`."""
    data_steps: int = 200_000
    """Steps that are recorded."""
    seed: int = 0
    """Seed of everything but the data and the evaluation episodes."""
    checkpoint_every: int = 1
    """Epochs between checkpoints."""

    def check(self) -> None:
        """Raises UserError for the first value that is out of range, before anything is built."""
        self.agent.check()  # ty: ignore[missing-attribute]
        self.schedule.check()
        for name, low in (("data_steps", 1), ("seed", 0), ("checkpoint_every", 1)):
            if not low <= getattr(self, name) < 2**63:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least {low} and below 2^63")


Preset = Literal["quick", "paper"]

_SMALL = (128, 128, 128)
_MINUTES = Schedule(
    offline_updates=12_000,
    online_steps=64_000,
    utd=0.05,
    warmup_steps=0,
    replay=200_000,
    updates_per_epoch=1_000,
    steps_per_epoch=6_400,
    eval_every=2,
)

PRESETS: dict[str, dict[str, Config]] = {
    "quick": {  # minutes on two CPU cores
        "bc": Config(BC(hidden=_SMALL, lr=1e-3), schedule=dataclasses.replace(_MINUTES, online_steps=0)),
        "fmq": Config(
            FMQ(actor_hidden=_SMALL, critic_hidden=_SMALL, lr=1e-3, target_samples=4, warmup=500, curriculum=4_000),
            schedule=_MINUTES,
        ),
    },
    "paper": {  # the published sizes, for an accelerator
        "bc": Config(BC(), schedule=Schedule(online_steps=0), data_steps=1_000_000),
        "fmq": Config(FMQ(), data_steps=1_000_000),
    },
}


def preset(name: str, agent: str) -> Config:
    """Returns the configuration that a preset holds for an agent."""
    if agent not in AGENTS:
        raise unknown("agent", agent, AGENTS)
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name][agent]


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
