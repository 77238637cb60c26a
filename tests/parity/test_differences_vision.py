"""Pairs with images in TRL and here: the same loss, for half of the encoder's work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForImageTextToText

sys.path.append(str(Path(__file__).parents[1] / "trainer"))
from short_runs import log_rows
from test_vision import rows, trainer
from vision_models import CALLED_WITH, processor_of, tiny_vision

SAME = 1e-5
"""Relative, float32."""


def count_encoded(model: Any, family: str) -> list[int]:
    """Gets the numbers in the pixels of each later call of the part that encodes images."""
    counts: list[int] = []
    encoder = getattr(model.base_model, CALLED_WITH.get(family, "visual"))
    encoder.register_forward_pre_hook(
        lambda module, args, kwargs: counts.append((args[0] if args else kwargs["pixel_values"]).numel()),
        with_kwargs=True,
    )
    return counts


@pytest.mark.trl
@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3"])
def test_an_image_is_encoded_once_for_a_pair_and_the_loss_is_trls(family: str, tmp_path: Path) -> None:
    """Plain gradient descent: Adam makes steps of gradients that are 0 but for rounding, as those of a bias of keys."""
    trl = pytest.importorskip("trl")
    made, data = processor_of(family), rows().remove_columns("reference")
    options = {"max_steps": 3, "learning_rate": 0.1, "optim": "sgd", "logging_steps": 1, "bf16": False}
    options |= {"per_device_train_batch_size": 2, "report_to": "none", "save_strategy": "no", "use_cpu": True}
    tiny_vision(family, made).save_pretrained(tmp_path / "model")  # the reference is loaded by name
    policy = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    config = trl.DPOConfig(str(tmp_path / "trl"), gradient_checkpointing=False, **options)
    theirs = trl.DPOTrainer(policy, args=config, train_dataset=data, processing_class=made)
    ours = trainer(tmp_path / "ours", family=family, rows=data, **options)
    encoded = [count_encoded(run.model, family) for run in (ours, theirs)]
    for run in (ours, theirs):
        run.train()
    assert 0 < 2 * sum(encoded[0]) == sum(encoded[1])
    for name in ("loss", "logps/chosen", "logps/rejected", "num_tokens"):
        values, expected = ([row[name] for row in log_rows(run) if "loss" in row] for run in (ours, theirs))
        assert values == pytest.approx(expected, rel=SAME), name
