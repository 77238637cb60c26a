"""Two gloo ranks give the weights, the log and the metrics of one process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))
from two_ranks import CASES, EVALUATED
from worlds import results_of

WEIGHTS_TOLERANCE = 1e-6
"""Relative norm in float32 after at most five steps of SGD."""
SCRIPT = Path(__file__).with_name("two_ranks.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """World size -> case -> result; both worlds run at the same time."""
    return results_of(SCRIPT, tmp_path_factory.mktemp("ranks"))


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_training_is_that_of_one_process(name: str, results: dict[str, dict]) -> None:
    ours, alone = results["2"][name], results["1"][name]
    weights, expected = (torch.tensor(result["weights"], dtype=torch.float64) for result in (ours, alone))
    assert ((weights - expected).norm() / expected.norm()).item() < WEIGHTS_TOLERANCE
    for row, expected_row in zip(ours["log"], alone["log"], strict=True):
        assert row == pytest.approx(expected_row, rel=1e-4, abs=1e-6)


@pytest.mark.distributed
@pytest.mark.parametrize("name", EVALUATED)
def test_evaluation_is_that_of_one_process(name: str, results: dict[str, dict]) -> None:
    ours, alone = (results[world][f"evaluate-{name}"] for world in ("2", "1"))
    assert ours.pop("order") == pytest.approx(alone.pop("order"), rel=1e-5)
    assert ours == pytest.approx(alone, rel=1e-5, abs=1e-6)


ASKED = {
    "epochs": [[3, 0, 0], [3, 0, 0]],
    "second run": [[0, 0, 0], [0, 0, 0]],
    "rank 0 knows": [[0, 0, 0], [0, 0, 0]],
    "rank 1 knows": [[1, 0, 0], [1, 0, 0]],
}
"""Run -> for each rank, the micro-batches that its reference scores in each epoch. The main process's cache counts in
a pass before training."""


@pytest.mark.distributed
@pytest.mark.parametrize("name", ASKED)
def test_what_one_rank_has_scored_all_remember(name: str, results: dict[str, dict]) -> None:
    assert results["2"][name]["asked"] == ASKED[name]
    test_training_is_that_of_one_process(name, results)


DECIDED = {
    "dpo": (False, False),
    "dpo-checkpointing": (True, False),
    "room": (False, False),
    "room on one rank": (True, False),
    "experts": (False, False),
    "an unused weight": (False, True),
    "a search asked for": (False, True),
}
"""Run -> whether activations are recomputed, and whether DDP looks for weights without a gradient in every step."""


@pytest.mark.distributed
@pytest.mark.parametrize("name", DECIDED)
def test_ranks_decide_alike(name: str, results: dict[str, dict]) -> None:
    assert tuple(results["2"][name]["decided"].values()) == DECIDED[name]
