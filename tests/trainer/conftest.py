"""What the tests of the trainers share."""

from __future__ import annotations

import pytest

from prefopt.trainer import precision


@pytest.fixture(autouse=True)
def quiet_precision_line() -> None:
    """The line about precision is said once a process; each test starts anew."""
    precision._say_float32.cache_clear()
