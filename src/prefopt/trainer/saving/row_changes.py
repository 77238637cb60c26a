"""How the rows of two runs differ, in words."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

__all__ = ["row_difference"]

SHOWN = 5
"""Rows that are named."""


def row_difference(was: NDArray[np.uint64], now: NDArray[np.uint64], rows: Any) -> tuple[str, str] | None:
    """What they were and what they are; None where they are the same.

    Args:
        was: [n] a hash of each row, in order.
        now: [m] the same of the run that goes on.
        rows: its prepared rows.
    """
    if np.array_equal(was, now):
        return None
    before = f"{len(was)} rows"
    if len(was) == len(now) and np.array_equal(np.sort(was), np.sort(now)):
        return before, f"the same in another order, from {named(np.flatnonzero(was != now)[:1], rows)} on"
    gone, new = left_over(was, now), left_over(now, was)
    if len(was) == len(now) and len(changed := np.flatnonzero(was != now)) == len(new):
        return before, f"{len(new)} of them changed: {named(changed, rows)}"
    parts = [f"{len(new)} new or changed ({named(np.flatnonzero(np.isin(now, new)), rows)})"] if len(new) else []
    parts += [f"{len(gone)} gone or changed"] if len(gone) else []
    return before, f"{len(now)} rows, {', '.join(parts)}"


def left_over(of: NDArray[np.uint64], without: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Values of one that the other has not, or not so often."""
    values, counts = np.unique(of, return_counts=True)
    others = dict(zip(*np.unique(without, return_counts=True), strict=True))
    missing = counts - np.array([others.get(value, 0) for value in values])
    return np.repeat(values, np.maximum(missing, 0))


def named(places: NDArray[np.intp], rows: Any) -> str:
    """Rows by their number in the user's data, where it is known."""
    is_set = isinstance(rows, datasets.Dataset) and "row" in rows.column_names
    numbers = [rows[int(place)]["row"] if is_set else int(place) for place in places[:SHOWN]]
    return f"row{'s' if len(places) > 1 else ''} {', '.join(map(str, numbers))}{', ..' if len(places) > SHOWN else ''}"
