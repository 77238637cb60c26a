"""How much of a long test is run: a sample with every change, all of it with ``make reliability``."""

from __future__ import annotations

import os
from typing import TypeVar

Amount = TypeVar("Amount")

LONG = os.environ.get("RELIABILITY") == "long"


def scaled(sample: Amount, whole: Amount) -> Amount:
    """``sample`` in the suite, ``whole`` in the long run."""
    return whole if LONG else sample
