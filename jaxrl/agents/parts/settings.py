"""Layers and optimizers of parts, and the fields of settings made of parts."""

import dataclasses
from typing import Any, TypeVar

import optax

from jaxrl.networks import Activation, Init, Norm
from jaxrl.ranges import NonNegative, Widths
from jaxrl.types import pytree

T = TypeVar("T")


@pytree
class Net:
    """Layers of a network."""

    hidden: Widths = (512, 512, 512, 512)  # widths of the hidden layers
    activation: Activation = "gelu"  # between layers
    norm: Norm = "none"  # position of LayerNorm
    initial: Init = "glorot"  # initialization of weights

    @property
    def layers(self) -> tuple[tuple[int, ...], Norm, Activation]:
        """Widths, norm and activation, in the order in which networks take them."""
        return self.hidden, self.norm, self.activation


@pytree
class Adam:
    """The Adam optimizer."""

    lr: NonNegative = 3e-4  # learning rate

    def transformation(self) -> optax.GradientTransformation:
        """Returns the optax optimizer."""
        return optax.adam(self.lr)


@pytree
class AdamW:
    """Adam with decoupled weight decay."""

    lr: NonNegative = 3e-4  # learning rate
    weight_decay: NonNegative = 0.0  # weight decay, multiplied by the learning rate

    def transformation(self) -> optax.GradientTransformation:
        """Returns the optax optimizer."""
        return optax.adamw(self.lr, weight_decay=self.weight_decay)


def with_fields(settings: T, **values: Any) -> T:
    """Returns settings in which every field with one of these names has the given value, including fields of parts.

    So `with_fields(agent, hidden=(64, 64), lr=1e-3)` changes all networks and all optimizers. Raises TypeError for an
    unknown name.
    """
    found: set[str] = set()
    changed = _replaced(settings, values, found)
    if missing := values.keys() - found:
        raise TypeError(f"no field in {type(settings).__name__} is called {', '.join(sorted(missing))}")
    return changed


def _replaced(settings: Any, values: dict[str, Any], found: set[str]) -> Any:
    """Returns settings with these values, and adds the names of replaced fields to `found`."""
    changed = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name in values:
            found.add(field.name)
            changed[field.name] = values[field.name]
        elif dataclasses.is_dataclass(value):
            changed[field.name] = _replaced(value, values, found)
    return dataclasses.replace(settings, **changed)
