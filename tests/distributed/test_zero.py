"""Two ranks under DeepSpeed ZeRO 1, 2 and 3 give the weights, log and metrics of one process without it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))
from worlds import start_world
from zero import CASES, STAGES, main, prepare, refused

TOLERANCE = 1e-5
"""Relative norm of the weights in float32 after three steps; ZeRO sums gradients in buckets of its own."""
CHECKED = [(stage, name) for stage in STAGES for name in CASES if not refused(name, stage)]

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, dict]]:
    """Stage -> case -> result; stage 0 is one process without DeepSpeed."""
    folder = tmp_path_factory.mktemp("zero")
    prepare(folder)
    for stage in (0, *STAGES):
        start_world(2 if stage else 1, folder, main, folder, stage).finish()
    return {stage: json.loads((folder / f"results-{stage}.json").read_text()) for stage in (0, *STAGES)}


@pytest.mark.parametrize(("stage", "name"), CHECKED)
def test_training_is_that_of_one_process(stage: int, name: str, results: dict[int, dict[str, dict]]) -> None:
    ours, alone = results[stage][name], results[0][name]
    weights, expected = (torch.tensor(result["weights"], dtype=torch.float64) for result in (ours, alone))
    assert weights.shape == expected.shape
    assert (weights - expected).norm() <= TOLERANCE * expected.norm()
    for row, wanted in zip([*ours["log"], ours["metrics"]], [*alone["log"], alone["metrics"]], strict=True):
        assert row == pytest.approx(wanted, rel=1e-4, abs=1e-5)
