"""Reinforcement learning with generative policies over action chunks, as one XLA program.

The names below are the public surface. Each is imported when it is first used, so that `import jaxrl` stays light and
worker processes of simulators do without JAX.

    from jaxrl import agents, ops           every agent (`agents.FMQ`, ...); functions of arrays: flows, losses
    from jaxrl import Batch, Spec           what an agent's `update` and `init` take
    from jaxrl import Dataset, Ring         data on the host, and data and replay on the device
    from jaxrl import rollout, training     agent and environment together; iteration, epoch and run
    from jaxrl import Config, preset        a whole run, as the command line has it
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from jaxrl import agents, ops, replay, rollout, training
    from jaxrl.data.files import Dataset
    from jaxrl.errors import UserError
    from jaxrl.replay.ring import Ring, windows
    from jaxrl.runs.config import Config
    from jaxrl.runs.presets import preset
    from jaxrl.training.schedule import Schedule
    from jaxrl.types import Batch, EnvState, Phase, Requirements, Spec, pytree

__all__ = [
    "Batch",
    "Config",
    "Dataset",
    "EnvState",
    "Phase",
    "Requirements",
    "Ring",
    "Schedule",
    "Spec",
    "UserError",
    "agents",
    "ops",
    "preset",
    "pytree",
    "replay",
    "rollout",
    "training",
    "windows",
]

_HOMES = {
    "Config": "jaxrl.runs.config",
    "Dataset": "jaxrl.data.files",
    "Ring": "jaxrl.replay.ring",
    "Schedule": "jaxrl.training.schedule",
    "UserError": "jaxrl.errors",
    "preset": "jaxrl.runs.presets",
    "windows": "jaxrl.replay.ring",
} | dict.fromkeys(("Batch", "EnvState", "Phase", "Requirements", "Spec", "pytree"), "jaxrl.types")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'jaxrl' has no attribute {name!r}; it has {', '.join(__all__)}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    return importlib.import_module(f"jaxrl.{name}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
