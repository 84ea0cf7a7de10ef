"""Errors that are for people: one line that names the field, the value and what is allowed."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what was asked for. The command line prints its message alone and exits with code 2."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Returns the error for a name that does not exist, with the nearest ones that do."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"unknown {kind} {name!r}: {hint}known are {', '.join(known)}")
