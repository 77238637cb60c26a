"""A run that was interrupted and resumed is the run that was not: weights and every logged row.

Here with what has a state of its own; every method, layout and kind of data is in `reliability/test_exact_resume.py`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from short_runs import dataset, log_rows, trainer, weights

from prefopt.reference import ModelReference

EPOCHS = {"max_steps": -1, "num_train_epochs": 3, "count": 12}
"""Three steps an epoch: what the reference gave in the first is looked up in the others."""
CASES = {
    "simpo-accumulating": (
        "cpo",
        {"loss_type": "simpo", "cpo_alpha": 0.0, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    ),
    "tr-dpo": ("dpo", {"sync_ref_model": True, "ref_model_sync_steps": 2}),
    "tr-dpo-lora": ("dpo", {"lora": True, "sync_ref_model": True, "ref_model_sync_steps": 2}),
    "bco-shift": ("dpo", {"loss_type": "bco_pair", "bco_shift": True}),
    "budget": ("dpo", {"tokens_per_batch": 60, "gradient_accumulation_steps": 2}),
    "budget-stream": ("tpo", {"tokens_per_batch": 60, "stream": True}),
    "epochs": ("dpo", EPOCHS),
    "epochs-lora": ("dpo", {**EPOCHS, "lora": True}),
    "epochs-stream": ("dpo", {"count": 12, "max_steps": 8, "stream": True}),
}


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch, reference_cache: Path) -> None:
    """Log-probs of the reference are rounded by the company a pair has, more than so small a model does by itself."""
    original = ModelReference.__call__

    def rounded(self, batch):
        noise = 1e-5 * (sum(batch.rows) % 7)
        return {b: replace(stats, sum_logps=stats.sum_logps + noise) for b, stats in original(self, batch).items()}

    monkeypatch.setattr(ModelReference, "__call__", rounded)


def made(folder: Path, method: str, options: dict):
    options = dict(options)
    stream, lora = options.pop("stream", False), options.pop("lora", False)
    if lora:
        from peft import LoraConfig

        torch.manual_seed(3)
        options["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    if stream:
        options["rows"] = dataset(options.pop("count", 40)).to_iterable_dataset()
    return trainer(folder, method, save_strategy="steps", save_steps=1, logging_steps=3, **options)


@pytest.mark.parametrize("name", CASES)
def test_resuming_changes_nothing(name: str, tmp_path: Path) -> None:
    """The checkpoint lies between two log rows, so that the running sums have to survive too."""
    method, options = CASES[name]
    whole = made(tmp_path / "whole", method, options)
    whole.train()
    for step in (1, 4):
        resumed = made(tmp_path / "resumed", method, options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert torch.equal(weights(resumed.model), weights(whole.model)), step
        assert log_rows(resumed) == log_rows(whole), step


def test_the_cache_does_not_enter_a_resumed_run(tmp_path: Path, monkeypatch) -> None:
    """It may be gone, or hold what another run has computed in other batches: the checkpoint has the run's values."""
    caches = [str(tmp_path / "own"), str(tmp_path / "of_another_run")]
    monkeypatch.setenv("PREFOPT_CACHE", caches[1])
    made(tmp_path / "another", "dpo", {**EPOCHS, "per_device_train_batch_size": 5}).train()
    monkeypatch.setenv("PREFOPT_CACHE", caches[0])
    whole = made(tmp_path / "whole", "dpo", EPOCHS)
    whole.train()
    for cache in caches:
        monkeypatch.setenv("PREFOPT_CACHE", cache)
        resumed = made(tmp_path / "resumed", "dpo", EPOCHS)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
        assert torch.equal(weights(resumed.model), weights(whole.model)), cache


def test_the_checkpoint_has_what_users_look_for(tmp_path: Path) -> None:
    run = made(tmp_path, "dpo", {})
    run.train()
    files = {path.name for path in (tmp_path / "checkpoint-6").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "trainer_state.json", "README.md"} <= files
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    assert torch.equal(weights(loaded), weights(run.model))
    assert loaded.config._attn_implementation == "sdpa"


def test_a_run_can_be_trained_further_with_more_steps(tmp_path: Path) -> None:
    """``train`` may be called again on one trainer, as tools that train in chunks do."""
    run = trainer(tmp_path, max_steps=2)
    run.train()
    first = weights(run.model)
    run.args.max_steps = 4
    run.train()
    assert run.state.global_step == 4
    assert not torch.equal(first, weights(run.model))
