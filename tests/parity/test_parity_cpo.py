"""CPO, SimPO, CPO-SimPO and AlphaPO in prefopt and in TRL 1.16: three optimizer steps with the same log."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset
from parity_harness import assert_same_row, compare, evaluate
from tiny_models import implicit, standard_rows

pytestmark = pytest.mark.trl

PADDED_MEAN = ("logits/chosen", "logits/rejected")
"""TRL's CPO averages logits over prompt and padding too, and logs an NLL of 0 where its weight is 0: see
test_differences_metrics.py."""

VARIANTS: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss_type": "sigmoid"},
    "hinge": {"loss_type": "hinge"},
    "ipo": {"loss_type": "ipo"},
    "simpo": {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.5, "simpo_gamma": 1.375},
    "cpo_simpo": {"loss_type": "simpo", "cpo_alpha": 0.5, "beta": 2.5, "simpo_gamma": 0.7},
    "alphapo": {"loss_type": "alphapo", "alpha": 0.25, "beta": 2.5, "simpo_gamma": 0.1},
    "alphapo_negative": {"loss_type": "alphapo", "alpha": -0.25, "beta": 2.5, "simpo_gamma": 0.1},
    "alpha_ipo": {"loss_type": "ipo", "alpha": 0.1, "beta": 0.5},
    "no_nll": {"loss_type": "sigmoid", "cpo_alpha": 0.0},
    "sigmoid_smoothed": {"loss_type": "sigmoid", "label_smoothing": 0.2},
    "simpo_smoothed": {"loss_type": "simpo", "label_smoothing": 0.2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss(variant: str) -> None:
    config = VARIANTS[variant]
    without_nll = config.get("cpo_alpha") == 0.0 or config["loss_type"] == "alphapo"
    compare("cpo", config, without=[*PADDED_MEAN, "nll_loss"] if without_nll else PADDED_MEAN)


def test_truncation() -> None:
    """TRL's CPO cuts the end of the completion; the same rows as ``keep_start`` while the prompt fits."""
    compare("cpo", {"max_length": 12}, without=PADDED_MEAN)


def test_new_adapter(policy_path: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    compare("cpo", {}, without=PADDED_MEAN, arguments=lambda: {"model": policy_path, "peft_config": config})


@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo"])
def test_accumulation(loss_type: str) -> None:
    """Without the NLL, whose token mean TRL takes per micro-batch: see test_differences_normalisation.py."""
    config = {
        "loss_type": loss_type,
        "cpo_alpha": 0.0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    compare("cpo", config, without=[*PADDED_MEAN, "nll_loss"])


def test_implicit_prompt() -> None:
    rows = implicit(standard_rows())
    compare("cpo", {}, without=PADDED_MEAN, arguments=lambda: {"train_dataset": Dataset.from_dict(rows)})


def test_evaluation() -> None:
    data = standard_rows(4, seed=5)
    theirs, ours = (evaluate(library, "cpo", {}, data) for library in ("trl", "prefopt"))
    assert_same_row(ours, theirs, without=[f"eval_{key}" for key in PADDED_MEAN])
