"""Metrics in which prefopt and TRL 1.16 differ, with the value worked out from plain forward passes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from datasets import Dataset
from independent import score_rows, sums, token_mean
from parity_harness import POLICY, REFERENCE, RELATIVE, build, evaluate, run
from tiny_models import standard_rows, tiny_model, word_tokenizer

pytestmark = pytest.mark.trl


def reference(method: str) -> dict[str, Any]:
    return {"ref_model": tiny_model(**REFERENCE)} if method == "dpo" else {}


@pytest.mark.parametrize("method", ["dpo", "tpo"])
def test_evaluation_does_not_depend_on_the_batch_size(method: str) -> None:
    """Nine rows by 9, by 4 and by 2: TRL averages batch means, the last of which counts one row as much as four."""
    rows = standard_rows(9, seed=5, gold=method == "tpo")

    def logps(library: str) -> list[float]:
        sizes = ({"per_device_eval_batch_size": size} for size in (9, 4, 2))
        return [evaluate(library, method, size, rows, **reference(method))["eval_logps/chosen"] for size in sizes]

    scores = score_rows(tiny_model(**POLICY), word_tokenizer(), {key: rows[key] for key in ("prompt", "chosen")})
    expected = float(sums(scores["chosen"]).mean())
    assert logps("prefopt") == pytest.approx([expected] * 3, rel=RELATIVE)
    theirs = logps("trl")
    assert theirs[0] == pytest.approx(expected, rel=RELATIVE)
    assert theirs[1] != pytest.approx(expected, rel=10 * RELATIVE)
    assert theirs[2] != pytest.approx(theirs[1], rel=10 * RELATIVE)


def test_mean_logits_of_cpo_leave_out_prompt_and_padding() -> None:
    """``logits/chosen``: the mean over completion tokens in prefopt, over every position of the padded batch in TRL."""
    scores = score_rows(tiny_model(**POLICY), word_tokenizer(), standard_rows(), pairs=4)["chosen"]
    expected = float(torch.cat([completion.mean_logits for completion in scores]).mean())
    ours, theirs = (run(library, "cpo", {"max_steps": 1})[0]["logits/chosen"] for library in ("prefopt", "trl"))
    assert ours == pytest.approx(expected, rel=RELATIVE)
    assert theirs != pytest.approx(expected, rel=10 * RELATIVE)


@pytest.mark.parametrize("config", [{"loss_type": "simpo", "cpo_alpha": 0.0}, {"loss_type": "alphapo", "alpha": 0.25}])
def test_nll_of_cpo_is_logged_whatever_its_weight(config: dict[str, Any]) -> None:
    """SimPO without the NLL term: its value is worth watching. TRL does not compute it and logs 0."""
    chosen = score_rows(tiny_model(**POLICY), word_tokenizer(), standard_rows(), pairs=4)["chosen"]
    ours, theirs = (run(library, "cpo", {**config, "max_steps": 1})[0] for library in ("prefopt", "trl"))
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=RELATIVE)
    assert ours["nll_loss"] == pytest.approx(token_mean(chosen), rel=RELATIVE)
    assert theirs["nll_loss"] == 0.0


def test_several_evaluation_sets_keep_their_metrics_apart() -> None:
    """TRL: the loss has the set's name, every other key is overwritten by the last set."""
    sets = {name: Dataset.from_dict(standard_rows(4, seed=seed)) for seed, name in enumerate(("first", "second"))}

    def metrics(library: str) -> dict[str, float]:
        return build(library, "dpo", {}, eval_dataset=sets, **reference("dpo")).evaluate()

    ours, theirs = metrics("prefopt"), metrics("trl")
    for name, data in sets.items():
        alone = build("prefopt", "dpo", {}, eval_dataset=data, **reference("dpo")).evaluate()
        assert ours[f"eval_{name}_rewards/margins"] == pytest.approx(alone["eval_rewards/margins"], abs=1e-5)
    assert "eval_first_loss" in theirs
    assert "eval_first_rewards/margins" not in theirs
    assert ours["eval_first_rewards/margins"] != pytest.approx(ours["eval_second_rewards/margins"], abs=1e-2)


@pytest.mark.parametrize("prefix", ["test", "held_out"])
def test_a_prefix_of_ones_own_is_on_every_metric(prefix: str) -> None:
    data = Dataset.from_dict(standard_rows(4, seed=5))

    def keys(library: str) -> set[str]:
        return set(build(library, "dpo", {}, **reference("dpo")).evaluate(data, metric_key_prefix=prefix))

    assert f"{prefix}_rewards/margins" in keys("prefopt")
    assert f"{prefix}_rewards/margins" not in keys("trl")


def test_a_loss_that_is_not_a_number_stops_the_run() -> None:
    """TRL trains on: transformers shows the loss of a NaN step as 0 unless ``logging_nan_inf_filter`` is off."""

    def broken() -> dict[str, Any]:
        model = tiny_model(**POLICY)
        with torch.no_grad():
            model.model.norm.weight[0] = math.nan
        return {"model": model, **reference("dpo")}

    theirs = run("trl", "dpo", {}, **broken())
    assert [row["loss"] for row in theirs] == [0.0, 0.0, 0.0]
    trainer = build("prefopt", "dpo", {}, **broken())
    with pytest.raises(ArithmeticError, match="not finite"):
        trainer.train()


def test_num_tokens_is_trls() -> None:
    """Kept equal, so that curves of both libraries share an axis: the prompt is counted once per completion."""
    rows = standard_rows()
    tokenizer = word_tokenizer()
    expected = sum(
        len(tokenizer(prompt + completion + "</s>")["input_ids"])
        for side in ("chosen", "rejected")
        for prompt, completion in zip(rows["prompt"], rows[side], strict=True)
    )
    for library in ("trl", "prefopt"):
        assert run(library, "dpo", {}, **reference("dpo"))[-1]["num_tokens"] == expected


@pytest.mark.parametrize("method", ["dpo", "cpo", "tpo"])
def test_predictions_are_rewards_and_log_probs_of_pairs(method: str) -> None:
    """``compute_metrics``: an entry per pair and the lengths; TRL hands over padded logits, or two means (CPO)."""
    rows = standard_rows(5, seed=5, gold=method == "tpo")
    seen: list[Any] = []

    def keep(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        return {}

    data = Dataset.from_dict(rows)
    metrics = build("prefopt", method, {}, eval_dataset=data, compute_metrics=keep, **reference(method)).evaluate()
    predictions, lengths = seen[0].predictions, seen[0].label_ids
    scores = score_rows(tiny_model(**POLICY), word_tokenizer(), rows)
    assert predictions.logps_chosen == pytest.approx(sums(scores["chosen"]).numpy(), rel=RELATIVE)
    assert predictions.rewards_rejected.mean() == pytest.approx(metrics["eval_rewards/rejected"], rel=RELATIVE)
    assert list(lengths.rejected) == [len(completion.logps) for completion in scores["rejected"]]
