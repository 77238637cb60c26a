"""Which rows are meant: ``0,5,10-20`` or ``random:5``."""

from __future__ import annotations

import random
import re

__all__ = ["MOST_ROWS", "row_numbers"]

MOST_ROWS = 1000
"""At once."""
_STRETCH = re.compile(r"(\d{1,15})(?:-(\d{1,15}))?")
_RANDOM = re.compile(r"random:(\d{1,15})")
_SPELLING = "write numbers and stretches, as in 0,5,10-20, or random:5"


def row_numbers(text: str, count: int | None, seed: int) -> list[int]:
    """The numbers that ``text`` names, ascending, each once.

    Args:
        text: as a user writes it.
        count: rows of the set; None for a stream, of which none can be drawn.
        seed: of the draw.

    Raises:
        ValueError: the text is of another form, or names too many rows.

    >>> row_numbers("5,0,2-4", None, 0)
    [0, 2, 3, 4, 5]
    """
    if drawn := _RANDOM.fullmatch(text.strip()):
        if count is None:
            raise ValueError(f"--rows {text}: the rows of a stream cannot be drawn; name numbers, as in 0-4.")
        wanted = min(int(drawn[1]), count)
        _check_count(text, wanted)
        return sorted(random.Random(seed).sample(range(count), wanted))
    numbers: set[int] = set()
    for part in text.split(","):
        stretch = _STRETCH.fullmatch(part.strip())
        if stretch is None:
            raise ValueError(f"--rows {text}: {part.strip()!r} is no row; {_SPELLING}.")
        first, last = int(stretch[1]), int(stretch[2] or stretch[1])
        if last < first:
            raise ValueError(f"--rows {text}: {part.strip()!r} ends before it begins; {_SPELLING}.")
        _check_count(text, len(numbers) + last - first + 1)
        numbers |= {*range(first, last + 1)}
    return sorted(numbers)


def _check_count(text: str, count: int) -> None:
    if count > MOST_ROWS:
        raise ValueError(f"--rows {text}: these are more than {MOST_ROWS:,} rows; name fewer.")
