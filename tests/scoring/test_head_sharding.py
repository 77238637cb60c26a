"""The head under FSDP2, on two gloo ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "distributed"))
from sharded_head import main
from worlds import start_world

TOLERANCE = 1e-7
"""Gradients of up to 1 in float32: the sum of two ranks rounds as that of two backward passes does."""
FORWARDS = 4
"""Of a case: two steps sharded, and one for each rank's batch without."""


@pytest.mark.distributed
def test_gradients_are_those_without_sharding(tmp_path: Path) -> None:
    start_world(2, tmp_path, main, tmp_path).finish()
    result = json.loads((tmp_path / "result.json").read_text())
    assert {name: value for name, value in result["differences"].items() if value > TOLERANCE} == {}
    assert result["taken"] == FORWARDS * result["cases"]
