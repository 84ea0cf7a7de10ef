"""User-facing errors: one line with the field, its value and the allowed values."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """An invalid request by the user. The command line prints only its message and exits with code 2."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Returns the error for an unknown name, with the closest match and the known names."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"unknown {kind} {name!r}: {hint}known are {', '.join(known)}")
