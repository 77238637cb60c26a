"""Hybrid and recurrent models: never shared nor packed, said with the reason, trained as the definition says."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from families import tiny
from oracle import PLAIN_RUN, SAME_LOSS, expected_losses, logged_losses
from short_runs import TRAINERS, trainer

REASONS = {
    "lfm2": "layers that are no plain attention: conv",
    "mamba": "layers that are no plain attention: linear_attention",
    "mamba2": "layers that are no plain attention: linear_attention",
    "falcon_h1": "layers that are no plain attention: hybrid",
    "qwen3_next": "layers that are no plain attention: linear_attention",
    "olmo_hybrid": "layers that are no plain attention: linear_attention",
    "bamba": "layers that are no plain attention: ",
    "jamba": "layers that are no plain attention: ",
    "recurrent_gemma": "layers that are no plain attention: linear_attention",
    "rwkv": "does not take its attention function from transformers' registry",
}
"""What the log says of each."""


IN_EVERY_TRAINER = ("lfm2", "mamba2", "falcon_h1", "qwen3_next")
CASES = [(family, method) for family in REASONS for method in TRAINERS if method == "dpo" or family in IN_EVERY_TRAINER]


@pytest.mark.parametrize(("family", "method"), CASES)
def test_it_trains_as_defined(family: str, method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two steps, asked for the shared layout; the balancing loss of those with experts is part of the loss."""
    with caplog.at_level(logging.WARNING, "prefopt"):
        run = trainer(tmp_path, method, model=tiny(family), **PLAIN_RUN)
    said = [record.getMessage() for record in caplog.records if "batch layout" in record.getMessage()]
    assert [line.split(" (")[0] for line in said] == ["batch layout: padded"]
    assert REASONS[family] in said[0]
    expected = expected_losses(run, tiny(family))
    run.train()
    assert logged_losses(run) == pytest.approx(expected, rel=SAME_LOSS)
    assert abs(expected[1] - expected[0]) > 1e3 * SAME_LOSS * expected[0], "the first step did not show"


@pytest.mark.parametrize("family", ["lfm2", "mamba2", "qwen3_next"])
def test_recomputed_and_evaluated(family: str, tmp_path: Path) -> None:
    """With activation checkpointing, in evaluation, and with an adapter."""
    from peft import LoraConfig

    def run(**options: object) -> list[float]:
        made = trainer(tmp_path, model=tiny(family), **{**PLAIN_RUN, "eval_dataset": None, **options})
        made.train()
        return logged_losses(made)

    plain = run()
    assert run(gradient_checkpointing=True) == pytest.approx(plain, rel=SAME_LOSS)
    adapter = LoraConfig(r=2, target_modules=r".*layers\.\d+.*\.(in_proj|q_proj)")
    made = trainer(tmp_path, model=tiny(family), peft_config=adapter, **PLAIN_RUN)
    expected = expected_losses(made)
    made.train()
    assert logged_losses(made) == pytest.approx(expected, rel=SAME_LOSS)
