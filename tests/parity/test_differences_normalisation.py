"""Denominators: a token mean is taken over the optimizer step in prefopt, over each micro-batch in TRL 1.16."""

from __future__ import annotations

from typing import Any

import pytest
from independent import score_rows, token_mean
from parity_harness import POLICY, REFERENCE, RELATIVE, run
from tiny_models import standard_rows, tiny_model, word_tokenizer

pytestmark = pytest.mark.trl

WHOLE = {"per_device_train_batch_size": 4}
SPLIT = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
NLL: dict[str, dict[str, Any]] = {
    "dpo": {"loss_type": "sft"},
    "cpo": {"loss_type": "sigmoid", "cpo_alpha": 1.0},
    "tpo": {"loss_type": "sigmoid", "tpo_alpha": 1.0},
}


def trace(library: str, method: str, split: dict[str, int]) -> list[tuple[float, float]]:
    reference = {"ref_model": tiny_model(**REFERENCE)} if method == "dpo" else {}
    return [(row["loss"], row["grad_norm"]) for row in run(library, method, {**NLL[method], **split}, **reference)]


@pytest.mark.parametrize("method", NLL)
def test_the_split_into_micro_batches_changes_nothing(method: str) -> None:
    """Completions of 2 to 12 tokens, one pair or four per micro-batch: the same loss and gradient in prefopt alone."""
    whole = trace("trl", method, WHOLE)
    for ours in (trace("prefopt", method, WHOLE), trace("prefopt", method, SPLIT)):
        for step, expected in zip(ours, whole, strict=True):
            assert step == pytest.approx(expected, rel=RELATIVE)
    assert trace("trl", method, SPLIT)[0] != pytest.approx(whole[0], rel=5 * RELATIVE)


def test_the_whole_batch_is_the_right_answer() -> None:
    """``sft`` over four pairs: minus the mean log-prob of all their chosen tokens."""
    chosen = score_rows(tiny_model(**POLICY), word_tokenizer(), standard_rows(), pairs=4)["chosen"]
    per_pair = sum(token_mean([completion]) for completion in chosen) / len(chosen)
    assert trace("prefopt", "dpo", SPLIT)[0][0] == pytest.approx(token_mean(chosen), rel=RELATIVE)
    assert trace("trl", "dpo", SPLIT)[0][0] == pytest.approx(per_pair, rel=RELATIVE)
