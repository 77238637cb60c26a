"""`allow_changes` where the checkpoint has no state of what is new: it begins, and the rest goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import dataset, log_rows, trainer

SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 0.01}
PLATEAU: dict[str, Any] = {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "eval_loss"}
LINEAR = {"lr_scheduler_type": "linear"}


def rates(run: Any) -> list[float]:
    return [row["learning_rate"] for row in log_rows(run) if "learning_rate" in row]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [(PLATEAU, LINEAR, [0.005, 0.0025]), (LINEAR, PLATEAU, [0.01, 0.01])],
    ids=["linear", "plateau"],
)
def test_a_schedule_of_another_kind_acts(
    before: dict[str, Any], after: dict[str, Any], expected: list[float], tmp_path: Path
) -> None:
    """One that is a function of the step is as it is there; the other begins."""
    evaluated: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": dataset(4)}
    trainer(tmp_path, **before, **evaluated, **SAVED).train()
    run = trainer(tmp_path, **after, **evaluated, **SAVED, allow_changes=True)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert rates(run)[-2:] == pytest.approx(expected)


def test_a_reference_that_begins_to_move_begins_as_given(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path, **SAVED).train()
    moves = {"sync_ref_model": True, "ref_model_sync_steps": 4, "ref_model_mixup_alpha": 0.5}
    run = trainer(tmp_path, **moves, **SAVED, allow_changes=True)
    given = {name: weight.clone() for name, weight in run.model_reference.weights().items()}
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "it begins as it was given" in caplog.text
    policy = dict(run.model.named_parameters())
    for name, weight in run.model_reference.weights().items():
        assert torch.allclose(weight, (given[name] + policy[name]) / 2)


class TwoInOne(torch.optim.SGD):
    """A user's, which names the parts of its state as it likes."""

    def state_dict(self) -> dict[str, Any]:
        return {"matrices": super().state_dict(), "others": {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict["matrices"])


def test_an_optimizer_with_a_state_of_its_own_goes_on(tmp_path: Path) -> None:
    def made() -> Any:
        run = trainer(tmp_path, **SAVED)
        run.optimizer = TwoInOne(run.model.parameters(), lr=0.01, momentum=0.9)
        return run

    whole, resumed = made(), made()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for ours, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, expected)
