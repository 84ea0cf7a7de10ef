"""Named configurations of every agent: sizes for minutes on a CPU, and the published ones."""

import dataclasses
from typing import Any, Literal, TypeVar

from jaxrl.agents import AGENTS, AWAC, CFPI, CQL, DQC, FMQ, FQL, IQL, ODICE, QC, QGF, TD3, FamO2O
from jaxrl.agents.parts import Adam, MixturePolicy, QuantileCritic, SelfDistillation, with_fields
from jaxrl.errors import UserError, unknown
from jaxrl.ops.closed_form import ClosedForm
from jaxrl.ops.guidance import QGuidance
from jaxrl.runs.config import Config, replaced
from jaxrl.training.schedule import Schedule
from jaxrl.types import Agent

A = TypeVar("A", bound=Agent)
Preset = Literal["quick", "paper"]

_DRAWN = ClosedForm(bound="jensen", delta=0.2, delta_high=2.0, draws=10)

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
_OFFLINE = dataclasses.replace(_MINUTES, online_steps=0)
_ONLINE = dataclasses.replace(_MINUTES, offline_updates=0, warmup_steps=6_400)


def _quick(agent: A, schedule: Schedule = _OFFLINE, **parts: Any) -> Config[A]:
    """Returns a configuration for minutes on two CPU cores: small networks, high learning rates, but for some parts."""
    small = with_fields(agent, hidden=(128, 128, 128), lr=1e-3)
    return Config(dataclasses.replace(small, **parts), schedule=schedule)  # ty: ignore[invalid-argument-type]


def _paper(agent: A, schedule: Schedule | None = None) -> Config[A]:
    """Returns a configuration of the published sizes, for an accelerator; offline, unless a schedule is given."""
    return Config(agent, schedule=schedule or Schedule(online_steps=0), data_steps=1_000_000)


PRESETS: dict[str, dict[str, Config]] = {
    "quick": {name: _quick(agent()) for name, agent in AGENTS.items()}
    | {
        "awac": _quick(AWAC(temperature=3.0)),
        "cfpi": _quick(CFPI(actor=MixturePolicy(components=1), operator=_DRAWN), critic=QuantileCritic((128, 128))),
        "cql": _quick(CQL(), actor_adam=Adam(3e-4)),
        "dqc": dataclasses.replace(_quick(DQC(backup=10, batch_size=256, discount=0.99)), reward_shift=1.0),
        "famo2o": _quick(FamO2O(), _MINUTES),
        "fmq": _quick(FMQ(distillation=SelfDistillation(warmup=500, curriculum=4_000), target_samples=4), _MINUTES),
        "fql": _quick(FQL(chunk=5, backup=5, alpha=3.0), _MINUTES),
        "iql": _quick(IQL(chunk=5, backup=5)),
        "odice": _quick(ODICE(trade=0.4)),
        "qc": _quick(QC(num_samples=8), _MINUTES),
        "td3": dataclasses.replace(_quick(TD3(), _ONLINE), env="push?reward=dense"),
    },
    "paper": {name: _paper(agent()) for name, agent in AGENTS.items()}
    | {
        "dqc": dataclasses.replace(_paper(DQC()), reward_shift=1.0),
        "famo2o": _paper(FamO2O(), Schedule()),
        "fmq": _paper(FMQ(), Schedule()),
        "fql": _paper(FQL(), Schedule()),
        "qc": _paper(QC(), Schedule()),
        "qgf": _paper(
            with_fields(QGF(batch_size=1024, discount=0.999), hidden=(1024, 1024, 1024, 1024)),
            Schedule(offline_updates=500_000, online_steps=0),
        ),
        "td3": _paper(TD3(), Schedule(offline_updates=0, warmup_steps=25_000)),
    },
}
"""By name, then by agent. An agent that is not named here learns offline."""


VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "dqc": {  # the special cases that its paper compares with, all without the chunk critic
        "qc": {"chunk_critic": False, "kappa_d": 0.5, "chunk": 5, "backup": 5},
        "qc-ns": {"chunk_critic": False, "kappa_d": 0.5, "chunk": 5, "backup": 25},
        "ns": {"chunk_critic": False, "kappa_d": 0.5, "chunk": 1, "backup": 25},
        "os": {"chunk_critic": False, "kappa_d": 0.5, "chunk": 1, "backup": 1},
    },
    "qgf": {  # what its paper compares the gradient at the foreseen action with
        "jacobian": {"guide": QGuidance(gradient="jacobian")},
        "noisy": {"guide": QGuidance(gradient="noisy")},
        "bptt": {"guide": QGuidance(gradient="bptt")},
        "grad-step": {"guide": QGuidance(gradient="after")},
    },
    "qc": {"distill": {"actor": "distill"}},
    "cfpi": {  # one Gaussian, from which the critic chooses how far to go; or a mixture, one distance, both bounds
        "single": {"actor.components": 1, "operator": _DRAWN},
        "mixture": {"actor.components": 4, "operator": ClosedForm()},
    },
    "cql": {  # as their papers have them for tasks with sparse rewards, which go on to learn online
        "antmaze": {"conservatism": 5.0, "lagrange": True, "gap": 0.8, "max_target": True, "lowest_gap": -200.0},
        "cal-ql": {"conservatism": 5.0, "lagrange": True, "gap": 0.8, "max_target": True, "calibrated": True},
    },
}
"""Named settings of an agent's fields, its parts' too, by agent: `jaxrl train AGENT --variant NAME`."""


def preset(name: str, agent: str, variant: str | None = None) -> Config:
    """Returns the configuration that a preset holds for an agent, or for a variant of it."""
    if agent not in AGENTS:
        raise unknown("agent", agent, AGENTS)
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    config = PRESETS[name][agent]
    if variant is None:
        return config
    variants = VARIANTS.get(agent, {})
    if not variants:
        raise UserError(f"variant = {variant!r}: {agent} has no variants")
    if variant not in variants:
        raise unknown(f"variant of {agent}", variant, variants)
    for path, value in variants[variant].items():
        config = replaced(config, f"agent.{path}", value)
    return config
