"""The parts that agents are built from: frozen settings with `init` and pure functions of parameters.

A part has no fixed sizes: `init` takes examples, as in flax, and later calls take parameters. Observations and actions
may have any leading axes. The caller selects which part of an observation a network sees, see `types.Spec`.
"""

# ruff: noqa: F401
from jaxrl.agents.parts.critics import Critic, QuantileCritic, Value, check_heads
from jaxrl.agents.parts.data import CutWindows, Transitions, Windows
from jaxrl.agents.parts.flows import FEWEST_FEATURES, FlowMapPolicy, FlowPolicy, OneStepPolicy, SelfDistillation
from jaxrl.agents.parts.policies import (
    Autoencoder,
    DeterministicPolicy,
    GaussianPolicy,
    MixturePolicy,
    SquashedGaussianPolicy,
)
from jaxrl.agents.parts.settings import Adam, AdamW, Net, with_fields
