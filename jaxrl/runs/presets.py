"""Named configurations of every agent: sizes for minutes on a CPU, and the published ones."""

import dataclasses
from typing import Any, Literal

from jaxrl.agents import (
    A2PR,
    AGENTS,
    AWAC,
    BC,
    CFPI,
    CQL,
    DQC,
    FMQ,
    FQL,
    IQL,
    ODICE,
    PRDC,
    QC,
    QGF,
    TD3,
    TD3BC,
    FamO2O,
    ReBRAC,
)
from jaxrl.agents.parts import (
    Adam,
    AdamW,
    Autoencoder,
    Critic,
    DeterministicPolicy,
    FlowMapPolicy,
    FlowPolicy,
    GaussianPolicy,
    MixturePolicy,
    Net,
    OneStepPolicy,
    QuantileCritic,
    SelfDistillation,
    SquashedGaussianPolicy,
    Value,
    Windows,
)
from jaxrl.errors import UserError, unknown
from jaxrl.networks import Norm
from jaxrl.ops.closed_form import ClosedForm
from jaxrl.runs.config import Config
from jaxrl.training.schedule import Schedule

Preset = Literal["quick", "paper"]
_SMALL = (128, 128, 128)
_WIDE = (1024, 1024, 1024, 1024)
_LR = 1e-3  # of all networks in minutes
_FLOW = FlowPolicy(Net(_SMALL))
_ONE_STEP = OneStepPolicy(Net(_SMALL))
_AFTER, _RELU, _TORCH = Net(_SMALL, norm="after"), Net(_SMALL, "relu"), Net(_SMALL, "relu", initial="torch")
_CRITIC = Critic(_AFTER)


def _qgf(hidden: tuple[int, ...]) -> dict[str, Any]:
    """Returns QGF's networks with these widths."""
    before = Net(hidden, norm="before")
    flow = FlowPolicy(Net(hidden, norm="before_but_last"), "sinusoidal", 16)
    return {"flow": flow, "critic": Critic(before, agg="min"), "value": Value(before)}


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


def _td3(norm: Norm = "none", *, normalize: bool = True) -> TD3:
    """Returns TD3 with small networks, LayerNorm in the critics where `norm` says, and high learning rates."""
    return TD3(
        DeterministicPolicy(Net(_SMALL, "relu", "none", "torch")),
        Critic(Net(_SMALL, "relu", norm, "torch"), agg="min"),
        Adam(_LR),
        Adam(_LR),
        normalize=normalize,
    )


PRESETS: dict[str, dict[str, Config]] = {
    "quick": {name: Config(agent(), schedule=_MINUTES) for name, agent in AGENTS.items()}
    | {  # minutes on two CPU cores
        "bc": Config(BC(flow=FlowPolicy(Net(_SMALL), "fourier"), adam=Adam(_LR)), schedule=_OFFLINE),
        "fmq": Config(
            FMQ(
                actor=FlowMapPolicy(Net(_SMALL)),
                distillation=SelfDistillation(warmup=500, curriculum=4_000),
                critic=_CRITIC,
                adam=AdamW(_LR),
                target_samples=4,
            ),
            schedule=_MINUTES,
        ),
        "iql": Config(
            IQL(
                windows=Windows(chunk=5, backup=5),
                actor=GaussianPolicy(Net(_SMALL)),
                critic=dataclasses.replace(_CRITIC, agg="min"),
                value=Value(_AFTER),
                adam=Adam(_LR),
            ),
            schedule=_OFFLINE,
        ),
        "qgf": Config(
            QGF(**_qgf(_SMALL), flow_adam=Adam(_LR), critic_adam=Adam(_LR), value_adam=Adam(_LR)), schedule=_OFFLINE
        ),
        "fql": Config(
            FQL(Windows(chunk=5, backup=5), flow=_FLOW, policy=_ONE_STEP, critic=_CRITIC, adam=Adam(_LR), alpha=3.0),
            schedule=_MINUTES,
        ),
        "qc": Config(
            QC(flow=_FLOW, policy=_ONE_STEP, critic=_CRITIC, adam=AdamW(_LR), num_samples=8), schedule=_MINUTES
        ),
        "dqc": Config(
            DQC(
                windows=Windows(chunk=5, backup=10),
                flow=FlowPolicy(_AFTER),
                critic=Critic(_AFTER, agg="min", head="bce"),
                value=Value(_AFTER, head="bce"),
                adam=Adam(_LR),
            ),
            schedule=_OFFLINE,
            reward_shift=1.0,
        ),
        "td3": Config(_td3(normalize=False), env="push?reward=dense", schedule=_ONLINE),
        "td3bc": Config(TD3BC(_td3()), schedule=_OFFLINE),
        "rebrac": Config(ReBRAC(_td3("after", normalize=False)), schedule=_OFFLINE),
        "prdc": Config(PRDC(_td3()), schedule=_OFFLINE),
        "a2pr": Config(
            A2PR(_td3(), Value(Net(_SMALL, "relu", "none", "torch")), Autoencoder(_SMALL), value_adam=Adam(_LR)),
            schedule=_OFFLINE,
        ),
        "cql": Config(
            CQL(
                actor=SquashedGaussianPolicy(_TORCH),
                critic=Critic(_TORCH, agg="min"),
                actor_adam=Adam(3e-4),
                critic_adam=Adam(_LR),
            ),
            schedule=_OFFLINE,
        ),
        "awac": Config(
            AWAC(
                actor=GaussianPolicy(_TORCH, std="learned"),
                critic=Critic(_TORCH, agg="min"),
                actor_adam=Adam(_LR),
                critic_adam=Adam(_LR),
                temperature=3.0,
            ),
            schedule=_OFFLINE,
        ),
        "odice": Config(
            ODICE(
                actor=GaussianPolicy(_TORCH, std="learned"),
                value=Critic(dataclasses.replace(_TORCH, norm="before"), agg="min", epsilon="1e-5"),
                actor_adam=Adam(_LR),
                value_adam=Adam(_LR),
                trade=0.4,
            ),
            schedule=_OFFLINE,
        ),
        "famo2o": Config(
            FamO2O(
                family=GaussianPolicy(_RELU, std="learned"),
                balance=GaussianPolicy(_RELU, std="learned"),
                critic=Critic(_RELU, agg="min"),
                value=Value(_RELU),
                adam=Adam(_LR),
            ),
            schedule=_MINUTES,
        ),
        "cfpi": Config(
            CFPI(
                actor=MixturePolicy(_TORCH, components=1),
                critic=QuantileCritic(_SMALL[:2]),
                actor_adam=Adam(_LR),
                critic_adam=Adam(_LR),
                operator=_DRAWN,
            ),
            schedule=_OFFLINE,
        ),
    },
    "paper": {name: Config(agent(), schedule=_LONG, data_steps=1_000_000) for name, agent in AGENTS.items()}
    | {  # the published sizes, for an accelerator
        "bc": Config(BC(), schedule=_LONG, data_steps=1_000_000),
        "fmq": Config(FMQ(), data_steps=1_000_000),
        "iql": Config(IQL(), schedule=_LONG, data_steps=1_000_000),
        "qgf": Config(
            QGF(Windows(chunk=5, backup=5, batch=1024, discount=0.999), **_qgf(_WIDE)),
            schedule=dataclasses.replace(_LONG, offline_updates=500_000),
            data_steps=1_000_000,
        ),
        "fql": Config(FQL(), data_steps=1_000_000),
        "qc": Config(QC(), data_steps=1_000_000),
        "dqc": Config(DQC(), schedule=_LONG, data_steps=1_000_000, reward_shift=1.0),
        "td3": Config(TD3(), schedule=Schedule(offline_updates=0, warmup_steps=25_000)),
        "cql": Config(CQL(), schedule=_LONG, data_steps=1_000_000),
        "awac": Config(AWAC(), schedule=_LONG, data_steps=1_000_000),
        "odice": Config(ODICE(), schedule=_LONG, data_steps=1_000_000),
        "famo2o": Config(FamO2O(), data_steps=1_000_000),
        "cfpi": Config(CFPI(), schedule=_LONG, data_steps=1_000_000),
    },
}


VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "dqc": {  # the special cases that its paper compares with, all without the chunk critic
        name: {"chunk_critic": False, "kappa_d": 0.5, "windows": {"chunk": chunk, "backup": backup}}
        for name, chunk, backup in (("qc", 5, 5), ("qc-ns", 5, 25), ("ns", 1, 25), ("os", 1, 1))
    },
    "qgf": {  # what its paper compares the gradient at the one-step denoised action with
        "jacobian": {"guide": {"gradient": "jacobian"}},
        "noisy": {"guide": {"gradient": "noisy"}},
        "bptt": {"guide": {"gradient": "bptt"}},
        "grad-step": {"guide": {"gradient": "after"}},
    },
    "qc": {"distill": {"actor": "distill"}},
    "cfpi": {  # one Gaussian, from which the critic chooses how far to go; or a mixture, one distance, both bounds
        "single": {"actor": {"components": 1}, "operator": _DRAWN},
        "mixture": {"actor": {"components": 4}, "operator": ClosedForm()},
    },
    "cql": {  # as their papers have them for tasks with sparse rewards, which go on to learn online
        "antmaze": {"conservatism": 5.0, "lagrange": True, "gap": 0.8, "max_target": True, "lowest_gap": -200.0},
        "cal-ql": {"conservatism": 5.0, "lagrange": True, "gap": 0.8, "max_target": True, "calibrated": True},
    },
}
"""Named settings of an agent's fields, and of its parts', by agent: `jaxrl train AGENT --variant NAME`."""


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
    return dataclasses.replace(config, agent=_replaced(config.agent, variants[variant]))


def _replaced(settings: Any, values: dict[str, Any]) -> Any:
    """Returns settings with other values of some fields; a dict stands for values of the fields of a part."""
    parts = {name: _replaced(getattr(settings, name), value) for name, value in values.items() if type(value) is dict}
    return dataclasses.replace(settings, **values | parts)
