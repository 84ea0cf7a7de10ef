"""Validation of numbers against the range declared by their field, on the host and before anything is built."""

import dataclasses
import math
import typing
from typing import Annotated, Any, TypeAlias

import numpy as np

from jaxrl.errors import UserError
from jaxrl.types import Checks, Scalar


@dataclasses.dataclass(frozen=True)
class Range:
    """The closed interval of allowed values of a field; None means unbounded. See `check`."""

    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        """Returns the interval as text."""
        if self.high is None:
            return f"at least {self.low}"
        return f"at most {self.high}" if self.low is None else f"in [{self.low}, {self.high}]"


Count: TypeAlias = Annotated[int, Range(1)]
Natural: TypeAlias = Annotated[int, Range(0)]
Widths: TypeAlias = Annotated[tuple[int, ...], Range(1)]
"""Sizes of hidden layers; may be empty."""
Fraction: TypeAlias = Annotated[Scalar, Range(0, 1)]
NonNegative: TypeAlias = Annotated[Scalar, Range(0)]
Positive: TypeAlias = Annotated[Scalar, Range(1e-6)]


def check(settings: Any, name: str | None = None) -> None:
    """Raises UserError for the first number of a dataclass that is not finite or outside its field's `Range`.

    Infinity is allowed if it is the upper bound of a range. Nested dataclasses are checked recursively, and the
    `check` methods of classes (`types.Checks`) are called.
    """
    name = name or type(settings).__name__
    hints = typing.get_type_hints(type(settings), include_extras=True)
    for field in dataclasses.fields(settings):
        value, path = getattr(settings, field.name), f"{name}.{field.name}"
        if dataclasses.is_dataclass(value):
            check(value, path)
        else:
            _check_number(path, value, hints[field.name])
    if isinstance(settings, Checks):
        try:
            settings.check()
        except UserError as error:  # it names the class: a part does not know its own path
            raise UserError(str(error).replace(f"{type(settings).__name__}.", f"{name}.")) from None


def _check_number(path: str, value: Any, hint: Any) -> None:
    """Raises UserError if a field's value, a number or several, violates its annotation."""
    ranges = [part for part in typing.get_args(hint) if isinstance(part, Range)]
    endless = any(allowed.high == math.inf for allowed in ranges)
    if hint is Scalar or (typing.get_origin(hint) is Annotated and typing.get_args(hint)[0] is Scalar):
        if not endless and not np.isfinite(np.asarray(value)).all():
            raise UserError(f"{path} = {value}: must be finite")
    for allowed in ranges:
        low = -math.inf if allowed.low is None else allowed.low
        high = math.inf if allowed.high is None else allowed.high
        values = np.asarray(value)
        if not ((low <= values) & (values <= high)).all():
            raise UserError(f"{path} = {value}: must be {allowed}")


def check_seed(name: str, seed: int, following: int = 0) -> None:
    """Raises UserError unless a seed, and those `following` it, are distinct: JAX keeps 32 bits of a seed."""
    if not 0 <= seed < 2**32 - following:
        raise UserError(f"{name} = {seed}: must be at least 0 and below 2^32{f' - {following}' if following else ''}")


def check_at_least(settings: Any, **bounds: Scalar) -> None:
    """Raises UserError if a named field is below its bound, for bounds that depend on other fields."""
    for name, low in bounds.items():
        value = getattr(settings, name)
        if not (np.asarray(value) >= np.asarray(low)).all():
            raise UserError(f"{type(settings).__name__}.{name} = {value}: must be at least {low}")
