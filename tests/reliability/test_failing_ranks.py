"""One of two ranks has no memory left, or a number that is none: both do the same about it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "distributed"))
from failing_ranks import MEMORY, main
from short_runs import relative_difference
from worlds import results_of

WEIGHTS_TOLERANCE = 1e-6
"""Relative norm in float32 after three steps of SGD."""

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """World size -> case -> result."""
    return results_of(main, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", MEMORY)
def test_memory_that_runs_out_on_one_rank_changes_no_result(name: str, results: dict[str, Any]) -> None:
    ours, alone = results["2"][name], results["1"][name]
    assert ours["parts"] == [2, 2]
    assert alone["parts"] == [1]
    difference = relative_difference(torch.tensor(ours["weights"]), torch.tensor(alone["weights"]))
    assert difference < WEIGHTS_TOLERANCE
    for mine, other in zip(ours["log"], alone["log"], strict=True):
        assert mine == pytest.approx(other, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("place", "what"), [(0, "loss is not finite"), (1, "gradient norm is nan")], ids=str)
def test_poison_on_one_rank_stops_both_at_the_same_step(place: int, what: str, results: dict[str, Any]) -> None:
    first, second = (ends[place] for ends in results["2"]["poisoned"]["ends"])
    assert first["message"] == second["message"]
    assert f"Step 2: the {what}" in first["message"]
    assert first["files"] == ["rank-0.json", "rank-0.safetensors", "rank-1.json", "rank-1.safetensors"]
    assert sorted(first["rows"]) == (sorted(second["own"]) if place == 0 else [])
    assert results["1"]["poisoned"]["ends"] == [[None, None]]
