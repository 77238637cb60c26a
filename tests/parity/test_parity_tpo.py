"""TPO in prefopt and in TRL 1.16: three optimizer steps with the same log."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset
from parity_harness import assert_same_row, compare, evaluate
from tiny_models import conversational_rows, implicit, standard_rows

pytestmark = pytest.mark.trl

VARIANTS: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss_type": "sigmoid"},
    "hinge": {"loss_type": "hinge", "beta": 0.1},
    "ipo": {"loss_type": "ipo", "beta": 0.5},
    "tpo_l": {"loss_type": "tpo-l", "beta": 2.0, "tpo_l_gamma": 0.7},
    "no_nll": {"loss_type": "sigmoid", "tpo_alpha": 0.0, "beta": 0.1},
    "half_nll": {"loss_type": "tpo-l", "tpo_alpha": 0.5, "beta": 2.0},
    "sigmoid_smoothed": {"loss_type": "sigmoid", "label_smoothing": 0.2, "beta": 0.1},
    "tpo_l_smoothed": {"loss_type": "tpo-l", "label_smoothing": 0.2, "beta": 2.0},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss(variant: str) -> None:
    compare("tpo", VARIANTS[variant])


@pytest.mark.parametrize(("mode", "max_length"), [("keep_start", 12), ("keep_end", 14)])
def test_truncation(mode: str, max_length: int) -> None:
    compare("tpo", {"truncation_mode": mode, "max_length": max_length})


def test_new_adapter(policy_path: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    compare("tpo", {}, arguments=lambda: {"model": policy_path, "peft_config": config})


@pytest.mark.parametrize("loss_type", ["sigmoid", "tpo-l"])
def test_accumulation(loss_type: str) -> None:
    """Without the NLL, whose token mean TRL takes per micro-batch: see test_differences_normalisation.py."""
    config = {
        "loss_type": loss_type,
        "tpo_alpha": 0.0,
        "beta": 0.5,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    compare("tpo", config, without=["entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"])


@pytest.mark.parametrize("shape", ["conversational", "implicit", "conversational_implicit"])
def test_formats(shape: str) -> None:
    rows = conversational_rows(gold=True) if "conversational" in shape else standard_rows(gold=True)
    rows = implicit(rows) if "implicit" in shape else rows
    compare("tpo", {}, arguments=lambda: {"train_dataset": Dataset.from_dict(rows)})


def test_evaluation() -> None:
    data = standard_rows(4, seed=5, gold=True)
    theirs, ours = (evaluate(library, "tpo", {}, data) for library in ("trl", "prefopt"))
    assert_same_row(ours, theirs)
