"""Models that cannot share a row, or pack one, are trained padded, say so, and give the plain forward's numbers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from families import UNSHARED, groups, loss_and_gradient, objective, plain_loss, reference_of, tiny
from tiny_models import standard_rows, word_tokenizer

from prefopt import DPOConfig, DPOTrainer
from prefopt.batching import pad_batch
from prefopt.data import tokenized_example
from prefopt.scoring.capability import choose_layout
from prefopt.types import PAIR

LOSS_TOLERANCE = 1e-6
"""Relative, float32: the same model on the same rows; only the head computes fewer of them."""
GRADIENT_TOLERANCE = 1e-5
"""Relative norm, float32."""
TRAINED = {
    "mamba2": "layers that are no plain attention: linear_attention",
    "falcon_h1": "layers that are no plain attention: hybrid",
    "lfm2": "layers that are no plain attention: conv",
    "llama4_text": "layers that are no plain attention: chunked_attention",
    "falcon": "counts rows (ALiBi or chunks)",
    "bloom": "does not take its attention function from transformers' registry",
    "mpt": "does not take its attention function from transformers' registry",
    "gptj": "does not take its attention function from transformers' registry",
    "doge": "shared_prompt fails on a trial pair: RuntimeError: ",
    "qwen2_moe": "shared_prompt differs from the plain forward by ",
}
"""Some of each kind, and what is said of them."""


def dpo_trainer(folder: Path, family: str) -> tuple[Any, Any]:
    """A trainer of one SGD step of length 1, so that the weights move by their gradient; and its reference."""
    model = tiny(family)
    reference = reference_of(model)
    config = DPOConfig(
        str(folder),
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.0,
        max_steps=1,
        logging_steps=1,
        per_device_train_batch_size=4,
        train_sampling_strategy="sequential",
        router_aux_loss_coef=0.0,  # what is compared is the preference loss
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = Dataset.from_dict(standard_rows(4))
    trainer = DPOTrainer(model, reference.model, config, train_dataset=rows, processing_class=word_tokenizer())
    return trainer, reference


@pytest.mark.parametrize("family", UNSHARED)
def test_a_model_that_cannot_share_is_padded(family: str) -> None:
    choice = choose_layout(tiny(family), "auto", groups(1)[3], PAIR)
    assert choice.layout == "padded"
    assert choice.reasons
    assert "full logits" not in str(choice)
    assert "\n" not in str(choice)


@pytest.mark.parametrize("family", TRAINED)
def test_its_training_is_that_of_the_plain_forward(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "prefopt"):
        trainer, reference = dpo_trainer(tmp_path, family)
    said = [record.getMessage() for record in caplog.records if "batch layout" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("batch layout: padded (")
    assert TRAINED[family] in said[0]

    batch = pad_batch([tokenized_example(row, PAIR) for row in trainer.train_dataset], PAIR)
    model = trainer.model.train()
    loss, gradient = loss_and_gradient(plain_loss, model, reference, batch, objective("dpo"))
    model.zero_grad()
    before = flat(model)
    trainer.train()
    moved = before - flat(model)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=LOSS_TOLERANCE)
    assert loss.item() != pytest.approx(0.6931, abs=1e-3)  # the reference is another model
    assert ((moved - gradient).norm() / gradient.norm()).item() < GRADIENT_TOLERANCE


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten().double() for parameter in model.parameters()])
