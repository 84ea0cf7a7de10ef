"""Preset configurations of every agent: small ones that take minutes on a CPU, and the published ones."""

import dataclasses
from typing import Any, Literal, TypeVar

from jaxrl.agents import AGENTS, AWAC, CFPI, CQL, DQC, FMQ, FQL, IQL, ODICE, QC, QGF, TD3, FamO2O
from jaxrl.agents.parts import Adam, MixturePolicy, QuantileCritic, SelfDistillation, Windows, with_fields
from jaxrl.errors import UserError, unknown
from jaxrl.ops.closed_form import ClosedForm
from jaxrl.runs.config import Config
from jaxrl.training.schedule import Schedule
from jaxrl.types import Agent

Preset = Literal["quick", "paper"]
A = TypeVar("A")
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
_LONG = Schedule(online_steps=0)


def _small(agent: A) -> A:
    """Returns an agent with small networks and high learning rates."""
    return with_fields(agent, hidden=(128, 128, 128), lr=1e-3)


def _published(agent: Agent, schedule: Schedule = _LONG, reward_shift: float = 0.0) -> Config:
    """Returns the configuration of an agent with its published sizes, by default for offline training only."""
    return Config(agent, schedule=schedule, data_steps=1_000_000, reward_shift=reward_shift)


PRESETS: dict[str, dict[str, Config]] = {
    "quick": {name: Config(_small(agent()), schedule=_OFFLINE) for name, agent in AGENTS.items()}
    | {  # minutes on two CPU cores
        "fmq": Config(
            _small(FMQ(target_samples=4, distillation=SelfDistillation(warmup=500, curriculum=4_000))),
            schedule=_MINUTES,
        ),
        "iql": Config(_small(IQL(Windows(chunk=5, backup=5))), schedule=_OFFLINE),
        "fql": Config(_small(FQL(Windows(chunk=5, backup=5), alpha=3.0)), schedule=_MINUTES),
        "qc": Config(_small(QC(num_samples=8)), schedule=_MINUTES),
        "dqc": Config(_small(DQC(Windows(chunk=5, backup=10))), schedule=_OFFLINE, reward_shift=1.0),
        "td3": Config(_small(TD3()), env="push?reward=dense", schedule=_ONLINE),
        "cql": Config(dataclasses.replace(_small(CQL()), actor_adam=Adam(3e-4)), schedule=_OFFLINE),
        "awac": Config(_small(AWAC(temperature=3.0)), schedule=_OFFLINE),
        "odice": Config(_small(ODICE(trade=0.4)), schedule=_OFFLINE),
        "famo2o": Config(_small(FamO2O()), schedule=_MINUTES),
        "cfpi": Config(
            dataclasses.replace(
                _small(CFPI(actor=MixturePolicy(components=1), operator=_DRAWN)), critic=QuantileCritic((128, 128))
            ),
            schedule=_OFFLINE,
        ),
    },
    "paper": {name: _published(agent()) for name, agent in AGENTS.items()}
    | {  # the published sizes, for an accelerator
        "fmq": _published(FMQ(), schedule=Schedule()),
        "qgf": _published(
            with_fields(QGF(), hidden=(1024, 1024, 1024, 1024), batch=1024, discount=0.999),
            schedule=dataclasses.replace(_LONG, offline_updates=500_000),
        ),
        "fql": _published(FQL(), schedule=Schedule()),
        "qc": _published(QC(), schedule=Schedule()),
        "dqc": _published(DQC(), reward_shift=1.0),
        "td3": Config(TD3(), schedule=Schedule(offline_updates=0, warmup_steps=25_000)),
        "famo2o": _published(FamO2O(), schedule=Schedule()),
    },
}

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "dqc": {  # special cases compared in the paper, all without the chunk critic
        name: {"chunk_critic": False, "kappa_d": 0.5, "windows": {"chunk": chunk, "backup": backup}}
        for name, chunk, backup in (("qc", 5, 5), ("qc-ns", 5, 25), ("ns", 1, 25), ("os", 1, 1))
    },
    "qgf": {  # the paper's alternatives to the gradient at the one-step denoised action
        "jacobian": {"guide": {"gradient": "jacobian"}},
        "noisy": {"guide": {"gradient": "noisy"}},
        "bptt": {"guide": {"gradient": "bptt"}},
        "grad-step": {"guide": {"gradient": "after"}},
    },
    "qc": {"distill": {"actor": "distill"}},
    "cfpi": {  # one Gaussian, with the step size selected by the critic; or a mixture with one step size, both bounds
        "single": {"actor": {"components": 1}, "operator": _DRAWN},
        "mixture": {"actor": {"components": 4}, "operator": ClosedForm()},
    },
    "cql": {  # the papers' settings for tasks with sparse rewards, with online fine-tuning
        "antmaze": {"conservatism": 5.0, "lagrange": True, "gap": 0.8, "max_target": True, "lowest_gap": -200.0},
        "cal-ql": {"conservatism": 5.0, "lagrange": True, "gap": 0.8, "max_target": True, "calibrated": True},
    },
}
"""Named settings of the fields of an agent and its parts, by agent: `jaxrl train AGENT --variant NAME`."""


def preset(name: str, agent: str, variant: str | None = None) -> Config:
    """Returns a preset's configuration of an agent, or of a variant of it."""
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
    return dataclasses.replace(config, agent=_replaced(config.agent, variants[variant]))


def _replaced(settings: Any, values: dict[str, Any]) -> Any:
    """Returns settings with some fields replaced; a dict holds values for the fields of a part."""
    parts = {name: _replaced(getattr(settings, name), value) for name, value in values.items() if type(value) is dict}
    return dataclasses.replace(settings, **values | parts)
