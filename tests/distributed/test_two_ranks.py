"""Two gloo ranks give the weights, the log and the metrics of one process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))
from two_ranks import CASES, EVALUATED, main
from worlds import results_of

WEIGHTS_TOLERANCE = 1e-6
"""Relative norm in float32 after at most five steps of SGD."""
ROUNDING = 1e-6
"""Of a mean margin, float32: before the first step policy and reference agree but for the order of their sums."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """World size -> case -> result; both worlds run at the same time."""
    return results_of(main, tmp_path_factory.mktemp("ranks"))


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_training_is_that_of_one_process(name: str, results: dict[str, dict]) -> None:
    ours, alone = results["2"][name], results["1"][name]
    weights, expected = (torch.tensor(result["weights"], dtype=torch.float64) for result in (ours, alone))
    assert ((weights - expected).norm() / expected.norm()).item() < WEIGHTS_TOLERANCE
    for row, expected_row in zip(ours["log"], alone["log"], strict=True):
        if abs(expected_row.get("rewards/margins", 1.0)) < ROUNDING:  # its sign, and so the accuracy, is rounding
            row = row | {"rewards/accuracies": expected_row["rewards/accuracies"]}
        assert row == pytest.approx(expected_row, rel=1e-4, abs=1e-6)


@pytest.mark.distributed
@pytest.mark.parametrize("name", EVALUATED)
def test_evaluation_is_that_of_one_process(name: str, results: dict[str, dict]) -> None:
    ours, alone = (results[world][f"evaluate-{name}"] for world in ("2", "1"))
    assert ours.keys() == alone.keys()
    assert alone["rows"] == list(range(EVALUATED[name]["count"]))
    for key, value in alone.items():
        assert ours[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


@pytest.mark.distributed
@pytest.mark.parametrize("method", ["dpo", "cpo", "tpo"])
def test_the_metrics_of_nine_rows_are_the_same_for_batch_sizes_1_2_4_9_and_for_two_processes(
    method: str, results: dict[str, dict]
) -> None:
    found = [results[world][f"evaluate-nine-{method}-{size}"] for world in ("1", "2") for size in (1, 2, 4, 9)]
    metrics = [{name: value for name, value in result.items() if name not in ("order", "rows")} for result in found]
    assert {"eval_loss", "eval_logps/chosen", "eval_rewards/margins", "eval_entropy"} <= set(metrics[0])
    for other in metrics[1:]:
        assert other == pytest.approx(metrics[0], rel=1e-5, abs=1e-6)


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
    "images": (False, True),
    "images-checkpointing": (True, True),
}
"""Run -> whether activations are recomputed, and whether DDP looks for weights without a gradient in every step."""


@pytest.mark.distributed
@pytest.mark.parametrize("name", DECIDED)
def test_ranks_decide_alike(name: str, results: dict[str, dict]) -> None:
    assert tuple(results["2"][name]["decided"].values()) == DECIDED[name]
