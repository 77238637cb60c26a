"""The numbers that a row may bring for its loss: ``weight`` and ``margin``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from prefopt.data.errors import bad_row, described

__all__ = ["PAIR_NUMBERS", "pair_numbers"]

PAIR_NUMBERS = {"weight": "weight", "margin": "target_margin"}
"""Column -> what `TokenizedExample` calls it."""

_RULES = {"weight": "a finite number of at least 0", "margin": "a finite number"}
_FIXES = {
    "weight": "Give every row one: 1 to count as usual, 0 to be left out; or drop the column",
    "margin": "Give every row one: 0 to ask for no margin; or drop the column",
}


def pair_numbers(row: Mapping[str, Any], row_number: int) -> dict[str, float]:
    """Field of `TokenizedExample` -> the row's number, for each of the two columns that the row has.

    Args:
        row: column name -> value.
        row_number: place in the user's data set, from 0; messages name it.

    Raises:
        ValueError: a value is missing (None), no number, NaN or infinite, or a weight is negative.

    >>> pair_numbers({"prompt": "a", "margin": 2}, 0)
    {'target_margin': 2.0}
    """
    found: dict[str, float] = {}
    for column, name in PAIR_NUMBERS.items():
        if column not in row:
            continue
        value = row[column]
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or (column == "weight" and value < 0):
            problem = f"expected {_RULES[column]}, got {described(value)}"
            raise bad_row(row_number, column, problem, f"{_FIXES[column]} (or rename it, if it means something else).")
        found[name] = float(value)
    return found
