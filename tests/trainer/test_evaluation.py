"""Evaluation counts every row once, whatever the batch size, and keeps several sets apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from short_runs import dataset, trainer
from tiny_models import tiny_model

MEAN_TOLERANCE = 1e-5
"""Relative; float32 log-probs whose sums are taken in another order."""


def metrics(run) -> dict[str, float]:
    return {k: v for k, v in run.evaluate().items() if "runtime" not in k and "per_second" not in k}


@pytest.mark.parametrize(
    ("method", "options"),
    [("dpo", {}), ("cpo", {}), ("tpo", {}), ("dpo", {"loss_type": ["aot", "aot_unpaired"], "use_weighting": True})],
    ids=str,
)
def test_nine_rows_have_one_mean(method: str, options: dict, tmp_path: Path) -> None:
    given = {"ref_model": tiny_model(seed=4)} if method == "dpo" else {}
    found = [
        metrics(
            trainer(
                tmp_path, method, eval_dataset=dataset(9, seed=5), per_device_eval_batch_size=size, **given, **options
            )
        )
        for size in (1, 2, 4, 9)
    ]
    assert {"eval_loss", "eval_logps/chosen", "eval_rewards/accuracies", "eval_entropy"} <= set(found[0])
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=MEAN_TOLERANCE, abs=1e-6)


def test_sets_by_name_have_their_own_metrics(tmp_path: Path) -> None:
    sets = {"a": dataset(5, seed=1), "b": dataset(7, seed=2)}
    run = trainer(tmp_path, eval_dataset=sets, eval_strategy="steps", eval_steps=2, max_steps=2)
    run.train()
    together = run.evaluate()
    alone = trainer(tmp_path, eval_dataset=sets["a"], model=run.model, max_steps=2).evaluate()
    assert together["eval_a_logps/chosen"] == pytest.approx(alone["eval_logps/chosen"], rel=MEAN_TOLERANCE)
    assert together["eval_a_logps/chosen"] != pytest.approx(together["eval_b_logps/chosen"], rel=1e-3)
    assert "eval_logps/chosen" not in together


def test_raw_rows_and_another_prefix(tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_dataset=dataset(5, seed=1))
    expected = run.evaluate()
    raw = run.evaluate(dataset(5, seed=1), metric_key_prefix="test")
    assert raw["test_loss"] == pytest.approx(expected["eval_loss"])
    assert not any(key.startswith("eval_") for key in raw)
    predicted = run.predict(dataset(5, seed=1))
    assert predicted.metrics["test_loss"] == pytest.approx(expected["eval_loss"])
    assert predicted.predictions.logps_chosen.shape == (5,)
    assert np.mean(predicted.predictions.logps_chosen) == pytest.approx(expected["eval_logps/chosen"], rel=1e-5)


def test_streams_can_be_evaluated(tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_dataset=dataset(5, seed=1))
    streamed = run.evaluate(dataset(5, seed=1).to_iterable_dataset())
    assert streamed["eval_loss"] == pytest.approx(run.evaluate()["eval_loss"])


def test_compute_metrics_gets_pairs_in_the_order_of_the_set(tmp_path: Path) -> None:
    seen = []

    def compute(prediction):
        seen.append(prediction)
        return {
            "margin": float((prediction.predictions.rewards_chosen - prediction.predictions.rewards_rejected).mean())
        }

    run = trainer(
        tmp_path, "cpo", eval_dataset=dataset(7, seed=1), compute_metrics=compute, per_device_eval_batch_size=3
    )
    result = run.evaluate()
    assert result["eval_margin"] == pytest.approx(result["eval_rewards/margins"], rel=1e-4)
    lengths = [len(row["chosen_ids"]) for row in run.eval_dataset]
    assert seen[0].label_ids.chosen.tolist() == lengths
    assert seen[0].predictions.logits is None


def test_batch_eval_metrics_and_full_logits(tmp_path: Path) -> None:
    calls = []

    def compute(prediction, compute_result):
        calls.append((len(prediction.predictions.logps_chosen), compute_result))
        return {"batches": len(calls)}

    options = {"eval_dataset": dataset(7, seed=1), "per_device_eval_batch_size": 3, "compute_metrics": compute}
    run = trainer(tmp_path, batch_eval_metrics=True, **options)
    assert run.evaluate()["eval_batches"] == 3
    assert calls == [(3, False), (3, False), (1, True)]


def test_full_logits_are_those_of_the_model(tmp_path: Path) -> None:
    import torch

    seen = []
    run = trainer(
        tmp_path,
        eval_dataset=dataset(3, seed=1),
        full_logits_for_metrics=True,
        compute_metrics=lambda prediction: seen.append(prediction) or {},
        per_device_eval_batch_size=2,
    )
    run.evaluate()
    row = run.eval_dataset[2]
    ids = torch.tensor([[*row["prompt_ids"], *row["rejected_ids"]]])
    with torch.no_grad():
        expected = run.model(ids).logits[0].numpy()
    np.testing.assert_allclose(seen[0].predictions.logits[2][1, : ids.shape[1]], expected, atol=1e-5)


def test_best_model_by_any_metric_and_early_stopping(tmp_path: Path) -> None:
    from transformers import EarlyStoppingCallback

    run = trainer(
        tmp_path,
        eval_dataset=dataset(9, seed=5),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_rewards/margins",
        greater_is_better=False,
        learning_rate=1e-3,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    run.train()
    margins = [row["eval_rewards/margins"] for row in run.state.log_history if "eval_rewards/margins" in row]
    assert run.state.best_metric == min(margins)
    assert run.evaluate()["eval_rewards/margins"] == pytest.approx(min(margins), abs=1e-5)


def test_an_evaluation_set_is_required_to_evaluate(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs an `eval_dataset`"):
        trainer(tmp_path).evaluate()
