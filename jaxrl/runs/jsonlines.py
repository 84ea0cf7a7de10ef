"""Atomic writing of JSON files, and files with one JSON object per line."""

import json
import math
import os
from pathlib import Path
from typing import Any

from jaxrl.errors import UserError


def read_json(path: Path, otherwise: str) -> dict[str, Any]:
    """Returns the JSON object in a file, or raises UserError with the message `otherwise` and the reason."""
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{otherwise}: {path.name} is missing") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{otherwise}: {path.name} cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{otherwise}: {path.name} is not a JSON object")
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically. Raises UserError, naming the file, if that fails."""
    write(path, json.dumps(value, indent=2) + "\n")


def write(path: Path, text: str) -> None:
    """Writes a text file atomically. Raises UserError, naming the file, if that fails."""
    partial = path.with_name(path.name + ".partial")
    try:
        try:
            partial.write_text(text)
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise unwritable(path, error) from error


def append(path: Path, row: dict[str, Any]) -> None:
    """Appends one line of JSON and flushes it to disk; a number that is not finite is written as null.

    Raises UserError, naming the file, if that fails.
    """
    _append(path, json.dumps(as_json(row)) + "\n")


def _append(path: Path, text: str) -> None:
    try:
        with path.open("a") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> UserError:
    """Returns the error for a file that cannot be written: a full or read-only disk, no permission."""
    return UserError(f"cannot write {path}: {error.strerror or error}")


def as_json(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the row as reading it back from JSON gives it: non-finite floats are None."""
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}


def rows(path: Path) -> list[dict[str, Any]]:
    """Returns the intact rows of a metrics file, without damaged lines or one left incomplete by a killed run."""
    return [row for row, _ in _lines(path) if row is not None]


def keep_until(path: Path, epoch: int) -> Path | None:
    """Keeps the rows of a metrics file up to an epoch; returns the file to which all other lines were moved, if any.

    Damaged lines are among those that are moved; intact rows after them are not.
    """
    lines = _lines(path)
    kept = [line for row, line in lines if row is not None and row["epoch"] <= epoch]
    dropped = [line for row, line in lines if row is None or row["epoch"] > epoch]
    if not dropped:
        return None
    aside = path.with_name(f"{path.name}.dropped")
    _append(aside, "".join(line + "\n" for line in dropped))  # first: what is killed in between loses nothing
    write(path, "".join(line + "\n" for line in kept))
    return aside


def _lines(path: Path) -> list[tuple[dict[str, Any] | None, str]]:
    """Returns the lines of a file, each with its row, which is None where the line is damaged."""
    if not path.exists():
        return []
    lines = path.read_text(errors="backslashreplace").split("\n")
    return [(_row(line), line) for line in lines if line]


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("epoch"), int) else None
