"""The matrix products of a program, and how many operations they are. Nothing here imports anything of this project."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax


def products(jaxpr: Any, times: int = 1, branches: int | None = None) -> Iterator[tuple[Any, Any, Any, int]]:
    """Yields (left, right, dimension numbers, how often) of every matrix product in a program that runs `times` times.

    It goes through each of its branches as often, or `branches` times.
    """
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            left, right = (variable.aval for variable in equation.invars)
            yield left, right, equation.params["dimension_numbers"], times
        inner = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        inner = branches if equation.primitive.name == "cond" and branches is not None else inner
        for parameter in equation.params.values():
            for part in parameter if isinstance(parameter, tuple | list) else (parameter,):
                body = getattr(part, "jaxpr", part)
                if hasattr(body, "eqns"):
                    yield from products(body, inner, branches)


def operations(program: Callable[..., Any], *args: Any) -> float:
    """Returns the floating-point operations of a program's matrix products."""
    total = 0.0
    for left, right, dimensions, times in products(jax.make_jaxpr(program)(*args).jaxpr):
        (contracted, _), (batched, _) = dimensions
        twice = math.prod(left.shape[i] for i in (*contracted, *batched))  # dimensions that both operands list
        total += 2 * times * math.prod(left.shape) * math.prod(right.shape) / twice
    return total
