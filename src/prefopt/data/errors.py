"""How a message about a row is written: where, what, what to do."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from prefopt.terminal import harmless

__all__ = ["RowError", "bad_row", "check_text", "described", "nearest"]

PROBLEM_LENGTH, VALUE_LENGTH = 1000, 60
"""Characters of a message."""


class RowError(ValueError):
    """A row is broken; the message names it, and these say the same in parts."""

    row: int
    column: str
    problem: str
    fix: str


def bad_row(row: int, column: str, problem: str, fix: str) -> RowError:
    """The error for a broken row: its number, its column, what is wrong and how to mend it."""
    problem = shortened(problem, PROBLEM_LENGTH)
    error = RowError(harmless(f"row {row}, column {column!r}: {problem}. {fix}"))
    error.row, error.column, error.problem, error.fix = row, column, problem, fix
    return error


def check_text(text: str, row: int, column: str) -> None:
    """Raises RowError where ``text`` has half a character in it, which no tokenizer takes."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        problem = f"the text has half a character ({text[error.start]!r}, at {error.start})"
        fix = "Decode the data as what they are, or leave it out: text.encode(errors='replace').decode()."
        raise bad_row(row, column, problem, fix) from None


def described(value: Any) -> str:
    """A value as an error shows it: its type and its beginning."""
    return f"{type(value).__name__} {shortened(repr(value), VALUE_LENGTH)}"


def shortened(text: str, length: int) -> str:
    """The beginning of a text."""
    return text if len(text) <= length else text[: length - 3] + "..."


def nearest(name: str, names: Sequence[str]) -> str:
    """``" Did you mean 'chosen'?"`` where one of ``names`` is like ``name``, else nothing."""
    matches = get_close_matches(name, names, n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""
