"""The score of evaluated rows of metrics, such as `eval/success`: chosen by the environment, read from the row."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from jaxrl.types import Score

SCORES: tuple[Score, ...] = get_args(Score)


def score_of_row(row: Mapping[str, Any]) -> Score | None:
    """Returns what an evaluated row is compared by: success, or return if its environment has no success.

    None for a row without an evaluation.
    """
    return next((score for score in SCORES if row.get(f"eval/{score}") is not None), None)


def score_of_rows(rows: Iterable[Mapping[str, Any]]) -> Score:
    """Returns what the evaluated rows of a run are compared by; success if there are none."""
    return next((score for row in rows if (score := score_of_row(row))), "success")


def scored(row: Mapping[str, Any]) -> tuple[float, float | None, float | None]:
    """Returns the score of an evaluated row and the ends of its 95 % interval, which are None for a single episode."""
    score = score_of_row(row)
    assert score is not None
    low, high = (row.get(f"eval/{score}_{end}") for end in ("low", "high"))
    return row[f"eval/{score}"], low, high


def written(score: Score, value: float) -> str:
    """Returns a score as text: success with two decimals, return with one."""
    return f"{value:.2f}" if score == "success" else f"{value:.1f}"


def interval(score: Score, ends: Sequence[float | None]) -> str:
    """Returns an interval as text, such as `[0.42, 0.62]`; ends that are None, for a single episode, as `?`."""
    return f"[{', '.join('?' if end is None else written(score, end) for end in ends)}]"


def with_interval(row: Mapping[str, Any]) -> str:
    """Returns the score of an evaluated row with its interval, such as `success 0.52 [0.42, 0.62]`."""
    score, (value, *ends) = score_of_row(row), scored(row)
    assert score is not None
    return f"{score} {written(score, value)} {interval(score, ends)}"
