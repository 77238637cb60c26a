"""How much of a reliability test is run: a sample with every change, all of it with ``make reliability``."""

from __future__ import annotations

import os

LONG = os.environ.get("RELIABILITY") == "long"


def scaled(sample: int, whole: int) -> int:
    """``sample`` in the suite, ``whole`` in the long run."""
    return whole if LONG else sample
