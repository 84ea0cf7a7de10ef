"""Masks and weights beside arrays with more axes; for JAX or NumPy arrays."""

from typing import Any


def beside(mask: Any, x: Any) -> Any:
    """Returns a mask or weights [...] with trailing axes added to match an array [..., O]."""
    return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
