"""How a message about a row is written: where, what, what to do."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

__all__ = ["bad_row", "described", "nearest"]


def bad_row(row: int, column: str, problem: str, fix: str) -> ValueError:
    """The error for a broken row: its number, its column, what is wrong and how to mend it."""
    return ValueError(f"row {row}, column {column!r}: {problem}. {fix}")


def described(value: Any) -> str:
    """A value as an error shows it: its type and its beginning."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def nearest(name: str, names: Sequence[str]) -> str:
    """``" Did you mean 'chosen'?"`` where one of ``names`` is like ``name``, else nothing."""
    matches = get_close_matches(name, names, n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""
