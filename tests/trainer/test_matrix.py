"""Every combination trains two steps with the losses of the definition, or is refused for a written reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from matrix import ALL, KINDS, LOSSES, WEIGHTS, Cell, losses_by_definition, refusal, table, trainer
from oracle import STEPS, logged_losses
from short_runs import TRAINERS

TOLERANCE = 2e-5
"""Relative, float32, of the second step's loss: a gradient step of a random model of this size doubles the rounding."""
PAGE = Path(__file__).resolve().parents[2] / "docs" / "combinations.md"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("cell", [cell for cell in ALL if refusal(cell) is None], ids=str)
def test_a_combination_gives_the_losses_of_the_definition(cell: Cell) -> None:
    run = trainer(cell, os.curdir)
    assert run.layout.layout == KINDS[cell.kind].computed[cell.layout]
    assert KINDS[cell.kind].reason in str(run.layout) or run.layout.layout == cell.layout
    run.train()
    losses = logged_losses(run)
    assert len(losses) == STEPS
    assert losses == pytest.approx(losses_by_definition(cell.method, cell.kind, cell.weights, cell.loss), rel=TOLERANCE)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", TRAINERS)
def test_the_second_loss_tells_the_gradient(method: str, kind: str, weights: str, loss: str) -> None:
    """Else the test above would say nothing about gradients: without the first step's update it is another number."""
    _, second = losses_by_definition(method, kind, weights, loss)
    _, without_update = losses_by_definition(method, kind, weights, loss, learning_rate=0.0)
    assert abs(second - without_update) > 10 * TOLERANCE * abs(second)


@pytest.mark.parametrize("method", ["cpo", "tpo"])
def test_there_is_nothing_to_precompute_without_a_reference(method: str) -> None:
    with pytest.raises(TypeError, match="precompute_ref_log_probs"):
        TRAINERS[method][1]("out", precompute_ref_log_probs=True)


def test_every_combination_is_in_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{table()}")
    assert table() in PAGE.read_text()
