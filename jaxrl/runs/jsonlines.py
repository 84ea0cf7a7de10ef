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
    """Writes JSON atomically."""
    write(path, json.dumps(value, indent=2) + "\n")


def write(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def append(path: Path, row: dict[str, Any]) -> None:
    """Appends one line of JSON and flushes it to disk; a number that is not finite is written as null."""
    with path.open("a") as file:
        file.write(json.dumps(as_json(row)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def as_json(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the row as reading it back from JSON gives it: non-finite floats are None."""
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}


def rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics file, without an incomplete last line left by a killed run."""
    if not path.exists():
        return []
    result = []
    for line in path.read_text().splitlines():
        try:
            result.append(json.loads(line))
        except ValueError:
            break
    return result
