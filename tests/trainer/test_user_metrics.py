"""What ``compute_metrics`` and ``predict`` get, in all three trainers, and what their metrics can decide."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from short_runs import TRAINERS, dataset, trainer
from transformers import EarlyStoppingCallback

LOGITS_TOLERANCE = 1e-5
"""Absolute; float32, padded rows against single ones."""


def kept(seen: list[Any], **metrics: float) -> Callable[..., dict[str, float]]:
    """A ``compute_metrics`` that keeps what it is given."""
    return lambda prediction, **options: seen.append(prediction) or metrics


@pytest.fixture(params=TRAINERS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@torch.no_grad()
def alone(run: Any, row: dict[str, Any], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of one prompt with one completion, and the log-probs of its tokens."""
    ids = torch.tensor([[*row["prompt_ids"], *row[f"{side}_ids"]]])
    logits = run.model(ids).logits[0]
    logps = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    return logits, logps[len(row["prompt_ids"]) - 1 :]


@pytest.mark.parametrize("layout", ["shared_prompt", "padded"])
def test_predictions_are_those_of_each_row_alone(method: str, layout: str, tmp_path: Path) -> None:
    seen: list[Any] = []
    run = trainer(
        tmp_path,
        method,
        layout=layout,
        eval_dataset=dataset(5, seed=1),
        compute_metrics=kept(seen, mine=0.25),
        per_device_eval_batch_size=2,
        include_for_metrics=["inputs", "loss"],
        beta=0.2,
    )
    metrics = run.evaluate()
    assert metrics["eval_mine"] == 0.25
    (prediction,) = seen
    predictions, lengths, rows, losses = prediction
    for side in ("chosen", "rejected"):
        expected = [alone(run, row, side)[1].sum().item() for row in run.eval_dataset]
        found = getattr(predictions, f"logps_{side}")
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        assert getattr(lengths, side).tolist() == [len(row[f"{side}_ids"]) for row in run.eval_dataset]
        rewards = getattr(predictions, f"rewards_{side}")
        np.testing.assert_allclose(rewards, 0 if method == "dpo" else 0.2 * found, rtol=1e-5, atol=1e-5)
    assert rows.tolist() == list(range(5))
    assert predictions.logits is None
    one_by_one = [run.evaluate(run.eval_dataset.select([row]))["eval_loss"] for row in range(5)]
    np.testing.assert_allclose(losses, one_by_one, rtol=1e-4)


def test_rows_are_numbered_as_the_user_has_them(tmp_path: Path) -> None:
    """A row that is skipped leaves a gap, so that each prediction can be traced to its row."""
    rows = dataset(5, seed=1).to_dict()
    rows["rejected"][2] = rows["chosen"][2]
    seen: list[Any] = []
    run = trainer(
        tmp_path, eval_dataset=Dataset.from_dict(rows), compute_metrics=kept(seen), include_for_metrics=["inputs"]
    )
    run.evaluate()
    assert seen[0].inputs.tolist() == [0, 1, 3, 4]
    assert seen[0].losses is None


def test_what_is_no_part_of_a_pair_cannot_be_included(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'labels' is none of 'inputs'"):
        trainer(tmp_path, include_for_metrics=["labels"])
    with pytest.raises(ValueError, match="aot is a function of many pairs at once"):
        trainer(tmp_path, include_for_metrics=["loss"], loss_type="aot")


def test_full_logits_on_request(method: str, tmp_path: Path) -> None:
    seen: list[Any] = []
    run = trainer(
        tmp_path,
        method,
        eval_dataset=dataset(3, seed=1),
        full_logits_for_metrics=True,
        compute_metrics=kept(seen),
        per_device_eval_batch_size=2,
    )
    run.evaluate()
    for row, logits in zip(run.eval_dataset, seen[0].predictions.logits, strict=True):
        for index, side in enumerate(("chosen", "rejected")):
            expected = alone(run, row, side)[0].numpy()
            np.testing.assert_allclose(logits[index, : len(expected)], expected, atol=LOGITS_TOLERANCE)


def test_predict_gives_logits_without_compute_metrics(method: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, method, full_logits_for_metrics=True)
    output = run.predict(dataset(3, seed=1))
    row = run.prepared_sets(dataset(3, seed=1))[2]
    expected = alone(run, row, "rejected")[0].numpy()
    np.testing.assert_allclose(output.predictions.logits[2][1, : len(expected)], expected, atol=LOGITS_TOLERANCE)
    assert output.metrics["test_loss"] == pytest.approx(run.evaluate(dataset(3, seed=1))["eval_loss"], rel=1e-5)


def test_logits_are_reduced_before_they_are_kept(method: str, tmp_path: Path) -> None:
    """A function for it needs no other option; labels are the scored tokens, one step ahead of nothing: -100 else."""

    def reduce(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return logits.argmax(-1), labels

    seen: list[Any] = []
    run = trainer(
        tmp_path,
        method,
        eval_dataset=dataset(3, seed=1),
        preprocess_logits_for_metrics=reduce,
        compute_metrics=kept(seen),
        per_device_eval_batch_size=2,
    )
    metrics = run.evaluate()
    hits: list[bool] = []
    for row, (best, labels) in zip(run.eval_dataset, seen[0].predictions.logits, strict=True):
        assert best.dtype == labels.dtype == np.int64
        scored = labels[0] != -100
        assert labels[0][scored].tolist() == row["chosen_ids"]
        hits += (best[0][np.flatnonzero(scored) - 1] == labels[0][scored]).tolist()
    assert np.mean(hits) == pytest.approx(metrics["eval_mean_token_accuracy"])
    seen.clear()
    run.args.full_logits_for_metrics = False
    run.args.user_set = (*run.args.user_set, "full_logits_for_metrics")
    run.evaluate()
    assert seen[0].predictions.logits is None, "an explicit False is obeyed"


def test_metrics_batch_by_batch(method: str, tmp_path: Path) -> None:
    calls: list[tuple[int, bool]] = []

    def compute(prediction: Any, compute_result: bool) -> dict[str, float]:
        calls.append((len(prediction.predictions.logps_chosen), compute_result))
        return {"pairs": sum(count for count, _ in calls)} if compute_result else {}

    run = trainer(
        tmp_path,
        method,
        eval_dataset=dataset(7, seed=1),
        per_device_eval_batch_size=3,
        compute_metrics=compute,
        batch_eval_metrics=True,
    )
    assert run.evaluate()["eval_pairs"] == 7
    assert calls == [(3, False), (3, False), (1, True)]


# -- the best model ------------------------------------------------------------------------------------------------


BY_STEP: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
}
METRICS = {
    "rewards/accuracies": {},
    "eval_rewards/margins": {},
    "logps/rejected": {"greater_is_better": False},
    "nll_loss": {"loss_type": ["sigmoid", "sft"]},
    "eval_b_rewards/margins": {"sets": True},
    "a_loss": {"sets": True},
    "mine": {"compute_metrics": lambda prediction: {"mine": float(prediction.predictions.logps_chosen.mean())}},
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "LoRA"])
def test_the_best_model_by_any_metric(metric: str, adapter: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {**BY_STEP, "metric_for_best_model": metric, "max_steps": 4, **METRICS[metric]}
    several = options.pop("sets", False)
    sets = {"a": dataset(5, seed=5), "b": dataset(4, seed=6)} if several else dataset(9, seed=5)
    if adapter:
        options["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    run = trainer(tmp_path, eval_dataset=sets, **options)
    run.train()
    key = f"eval_{metric.removeprefix('eval_')}"
    found = [row[key] for row in run.state.log_history if key in row]
    assert len(found) == 4
    best = max(found) if run.args.greater_is_better else min(found)
    assert run.args.greater_is_better == (not (metric.endswith("loss") or metric == "logps/rejected"))
    assert run.state.best_metric == best
    assert run.evaluate()[key] == pytest.approx(best, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", TRAINERS)
def test_training_stops_when_a_metric_gets_no_better(name: str, tmp_path: Path) -> None:
    """The learning rate is 0: the first evaluation is never beaten, and patience is 2."""
    run = trainer(
        tmp_path,
        name,
        eval_dataset=dataset(5, seed=5),
        learning_rate=0.0,
        max_steps=6,
        metric_for_best_model="rewards/accuracies",
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        **BY_STEP,
    )
    run.train()
    assert run.state.global_step == 3


def test_the_metric_of_one_of_several_sets_must_be_named(tmp_path: Path) -> None:
    sets = {"a": dataset(3), "b": dataset(3)}
    with pytest.raises(ValueError, match=r"the evaluation sets are 'a', 'b'.*'eval_a_loss'"):
        trainer(tmp_path, eval_dataset=sets, **BY_STEP)
