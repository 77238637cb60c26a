"""Short trainings that are well or have one thing wrong: what the log says of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from short_runs import dataset, trainer

from prefopt import DPOConfig, DPOTrainer
from prefopt.quickstart import ASSETS, preference_set
from prefopt.trainer.evaluation import EvaluatingTrainer
from prefopt.trainer.progress import diagnosing


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Any:
    """The names of the findings in the log."""

    def names() -> list[str]:
        found = [record.args for record in caplog.records if record.name == diagnosing.__name__]
        return [str(args[1]) for args in found if isinstance(args, tuple)]

    return names


def identical(rows: Dataset) -> Dataset:
    return rows.map(lambda row, number: {"rejected": row["chosen"]} if number % 4 == 0 else {}, with_indices=True)


def swapped(rows: Dataset) -> Dataset:
    return rows.rename_columns({"chosen": "rejected", "rejected": "chosen"})


@pytest.mark.parametrize("method", ["dpo", "cpo", "tpo"])
def test_nothing_is_said_of_a_healthy_run(method: str, tmp_path: Path, said: Any) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 8, "max_steps": 24, "learning_rate": 3e-3}
    trainer(tmp_path, method, eval_dataset=dataset(20, seed=5), **options).train()
    assert said() == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"rows": identical(dataset(40))}, ["identical pairs"]), ({"max_length": 10}, ["truncation"])],
    ids=["identical pairs", "truncation"],
)
def test_what_is_wrong_with_the_data_is_said_before_the_first_step(
    options: dict[str, Any], expected: list[str], tmp_path: Path, said: Any
) -> None:
    trainer(tmp_path, max_steps=1, **options).train()
    assert said() == expected


def test_columns_that_are_exchanged_in_one_of_the_sets(tmp_path: Path, said: Any) -> None:
    """The evaluation set holds the pairs of training, the other way round."""
    options = {"eval_strategy": "steps", "eval_steps": 10, "max_steps": 30, "learning_rate": 3e-3}
    trainer(tmp_path, rows=swapped(dataset(40)), eval_dataset=dataset(40), **options).train()
    assert said() == ["chosen and rejected swapped"]


def test_a_learning_rate_of_a_tenth(tmp_path: Path, said: Any) -> None:
    options: dict[str, Any] = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    config = DPOConfig(str(tmp_path), learning_rate=0.1, max_steps=14, per_device_train_batch_size=4, **options)
    DPOTrainer(str(ASSETS), args=config, train_dataset=preference_set("train", 60)).train()
    assert said() == ["learning rate too high"]


def test_a_learning_rate_that_moves_nothing(tmp_path: Path, said: Any) -> None:
    trainer(tmp_path, max_steps=12, learning_rate=1e-9).train()
    assert said() == ["learning rate too low"]


def test_an_evaluation_without_numbers_does_not_end_a_run(tmp_path: Path, said: Any, monkeypatch) -> None:
    evaluated = EvaluatingTrainer.evaluation_loop

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = evaluated(self, *args, **kwargs)
        output.metrics.update(dict.fromkeys(output.metrics, math.nan))
        return output

    monkeypatch.setattr(EvaluatingTrainer, "evaluation_loop", broken)
    options = {"eval_strategy": "steps", "eval_steps": 8, "max_steps": 16, "learning_rate": 3e-3}
    run = trainer(tmp_path, eval_dataset=dataset(20, seed=5), **options)
    run.train()
    assert run.state.global_step == 16
    assert said() == ["not finite"]


def test_a_diagnosis_that_fails_does_not_end_a_run(tmp_path: Path, monkeypatch, caplog) -> None:
    def fails(*args: Any) -> list[Any]:
        raise OSError("no such file")

    monkeypatch.setattr(diagnosing, "diagnose", fails)
    run = trainer(tmp_path, max_steps=2)
    run.train()
    assert run.state.global_step == 2
    assert "The diagnosis was not made: OSError('no such file')" in caplog.text
