"""Adapters: cases in which TRL 1.16 fails, or trains something else."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_harness import COMMON, POLICY, build, run
from tiny_models import tiny_model

pytestmark = pytest.mark.trl


def peft_config(kind: str, **options: Any) -> Any:
    return getattr(pytest.importorskip("peft"), kind)(task_type="CAUSAL_LM", **options)


def moved_by_training(library: str, config: dict[str, Any], **arguments: Any) -> float:
    """How far the trained weights move."""
    trainer = build(library, "dpo", config, **arguments)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    return sum(
        float((p.detach() - before[name]).norm()) for name, p in trainer.model.named_parameters() if name in before
    )


def test_a_prefix_is_trained_whatever_the_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a cache, which layers that recompute cannot take: checkpointing stays off. TRL's default has it on."""
    monkeypatch.delitem(COMMON, "gradient_checkpointing")
    adapter = {"peft_config": peft_config("PrefixTuningConfig", num_virtual_tokens=4)}
    assert moved_by_training("prefopt", {}, model=tiny_model(**POLICY), **adapter) > 1e-6
    with pytest.raises(RuntimeError, match="must match the size"):
        moved_by_training("trl", {}, model=tiny_model(**POLICY), **adapter)


def test_the_folder_of_an_adapter_is_trained_further(policy_path: str, tmp_path: Path) -> None:
    """Its adapter is in force at the start and moves."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(policy_path, dtype=torch.float32)
    get_peft_model(model, peft_config("LoraConfig", r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert moved_by_training("prefopt", {}, model=str(tmp_path)) > 1e-6
    with pytest.raises(ValueError, match="Unrecognized model"):
        build("trl", "dpo", {}, model=str(tmp_path))


def test_adalora_has_its_regulariser(policy_path: str) -> None:
    """TRL's loss is that of the pairs alone, and the ranks are never allocated."""
    options = {"target_modules": ["q_proj", "v_proj"], "total_step": 100, "tinit": 10, "tfinal": 10}
    adapter = {"model": policy_path, "peft_config": peft_config("AdaLoraConfig", **options)}
    ours, theirs = (run(library, "dpo", {"max_steps": 1}, **adapter)[0]["loss"] for library in ("prefopt", "trl"))
    assert theirs == pytest.approx(math.log(2), abs=1e-4)
    assert ours > math.log(2) + 0.1
