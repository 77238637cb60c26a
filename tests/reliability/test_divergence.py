"""A run that diverges with finite numbers says so, once; runs that learn do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from scale import LONG
from short_runs import trainer

from prefopt import CPOConfig, CPOTrainer, DPOConfig, DPOTrainer
from prefopt.trainer.guards.divergence import divergence

STEPS, CUT = 12, 96
HEALTHY, BROKEN = ((1e-5, 1e-3), (1e-1, 1.0)) if LONG else ((1e-3,), (1e-1,))
LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "ipo": {"loss_type": "ipo"},
    "simpo": {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0},
}
SHORT = ["sigmoid", "simpo"]


@pytest.fixture(scope="module")
def real_rows(shared: Path) -> Dataset:
    with open(shared / "data/ultrafeedback/train_clean.jsonl") as file:
        return Dataset.from_list([json.loads(next(file)) for _ in range(60)])


def warnings_of(folder: Path, rows: Dataset, shared: Path, name: str, rate: float, caplog: Any) -> list[str]:
    kind, config = (CPOTrainer, CPOConfig) if name == "simpo" else (DPOTrainer, DPOConfig)
    args = config(
        str(folder),
        learning_rate=rate,
        max_steps=STEPS,
        logging_steps=2,
        per_device_train_batch_size=4,
        max_length=CUT,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        gradient_checkpointing=False,
        use_cpu=True,
        **LOSSES[name],
    )
    kind(str(shared / "models/stories260K"), args=args, train_dataset=rows).train()
    return [record.message for record in caplog.records if "has diverged" in record.message]


@pytest.mark.parametrize("name", LOSSES if LONG else SHORT)
@pytest.mark.parametrize(("rate", "diverges"), [*((r, False) for r in HEALTHY), *((r, True) for r in BROKEN)], ids=str)
def test_real_runs_at_learning_rates_from_small_to_absurd(
    rate: float,
    diverges: bool,
    name: str,
    tmp_path: Path,
    shared: Path,
    real_rows: Dataset,
    caplog: pytest.LogCaptureFixture,
    figure: Callable[[str, str], None],
) -> None:
    found = warnings_of(tmp_path, real_rows, shared, name, rate, caplog)
    figure("divergence", f"{name}, learning rate {rate:g}: {found[0][:60] if found else 'no warning'}")
    assert len(found) == int(diverges)
    assert all("Lower `learning_rate`" in message for message in found)


def test_a_model_that_was_never_trained_is_no_divergence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path, learning_rate=1e-3, use_cpu=True).train()
    assert "has diverged" not in caplog.text


@pytest.mark.parametrize(
    ("now", "first", "expected"),
    [(-6.0, -3.0, False), (-6.3, -3.0, True), (-6.3, -6.2, False), (-7.3, -6.2, True), (float("nan"), -3.0, False)],
    ids=str,
)
def test_below_chance_and_fallen(now: float, first: float, expected: bool) -> None:
    assert (divergence(now, first, 512) is not None) == expected
