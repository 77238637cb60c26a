"""Two gloo ranks that divide the model among themselves (FSDP2) give the weights, log and metrics of one process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))
from sharded import CASES, main
from worlds import results_of

TOLERANCE = 1e-6
"""Relative norm of the weights in float32 after three steps of SGD; sums are taken in another order."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """World size -> case -> result; both worlds run at the same time."""
    return results_of(main, tmp_path_factory.mktemp("sharded"))


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_sharded_training_is_that_of_one_process(name: str, results: dict[str, dict]) -> None:
    ours, alone = results["2"][name], results["1"][name]
    for model in ("weights", "reference", "moving", "average"):
        weights, expected = (torch.tensor(result[model], dtype=torch.float64) for result in (ours, alone))
        assert weights.shape == expected.shape
        assert (weights - expected).norm() <= TOLERANCE * expected.norm(), model
    for row, expected_row in zip([*ours["log"], ours["metrics"]], [*alone["log"], alone["metrics"]], strict=True):
        assert row == pytest.approx(expected_row, rel=1e-4, abs=1e-6)


@pytest.mark.distributed
def test_the_layout_is_tried_before_the_model_is_divided(results: dict[str, dict]) -> None:
    assert results["1"]["layouts"] == ["packed"]
    assert results["2"]["layouts"] == ["packed", "packed"]
