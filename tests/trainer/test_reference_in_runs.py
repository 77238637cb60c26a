"""The reference in real runs: precomputed, given, moving, under PEFT."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from short_runs import dataset, log_rows, relative_difference, trainer, weights
from tiny_models import standard_rows, tiny_model, word_tokenizer

from prefopt import DPOConfig, DPOTrainer

SAME_RUN = {"rel": 1e-4, "abs": 1e-5}
"""Cached sums are float64 of the same float32 numbers, summed in batches of other sizes."""


@pytest.mark.parametrize("options", [{}, {"ld_alpha": 0.5}, {"max_length": 12, "truncation_mode": "keep_end"}], ids=str)
def test_precomputed_equals_online(options: dict, tmp_path: Path) -> None:
    online = trainer(tmp_path, eval_dataset=dataset(5, seed=9), **options)
    online.train()
    cached = trainer(
        tmp_path, precompute_ref_log_probs=True, precompute_ref_batch_size=3, eval_dataset=dataset(5, seed=9), **options
    )
    assert cached.ref_model is None
    cached.train()
    for row, expected in zip(log_rows(cached), log_rows(online), strict=True):
        assert row == pytest.approx(expected, **SAME_RUN)
    margins = [run.evaluate()["eval_rewards/margins"] for run in (cached, online)]
    assert margins[0] == pytest.approx(margins[1], rel=1e-3)


def test_a_second_run_reads_the_cache_even_with_another_learning_rate(
    tmp_path: Path, monkeypatch, reference_cache: Path
) -> None:
    from prefopt.reference.policy import ModelReference

    calls = []
    original = ModelReference.__call__
    monkeypatch.setattr(ModelReference, "__call__", lambda self, batch: calls.append(1) or original(self, batch))
    options = {"precompute_ref_log_probs": True, "model": tiny_model(seed=77)}
    trainer(tmp_path, **options).train()
    assert calls
    calls.clear()
    trainer(tmp_path, **{**options, "model": tiny_model(seed=77), "learning_rate": 1e-3}).train()
    assert not calls
    trainer(tmp_path, **{**options, "model": tiny_model(seed=77), "ld_alpha": 0.3}).train()
    assert calls


def test_a_new_set_after_training_is_scored_by_the_weights_of_the_start(tmp_path: Path) -> None:
    cached, online = (trainer(tmp_path, precompute_ref_log_probs=flag) for flag in (True, False))
    cached.train()
    online.train()
    new = dataset(6, seed=11)
    expected = online.evaluate(new)["eval_rewards/margins"]
    assert abs(expected) > 1e-3
    assert cached.evaluate(new)["eval_rewards/margins"] == pytest.approx(expected, rel=1e-3)


def test_precompute_with_a_stream(tmp_path: Path) -> None:
    streamed = trainer(tmp_path, rows=dataset().to_iterable_dataset(), precompute_ref_log_probs=True)
    streamed.train()
    online = trainer(tmp_path, rows=dataset().to_iterable_dataset())
    online.train()
    assert torch.equal(weights(streamed.model), weights(online.model))


def test_log_probs_that_come_with_the_rows_are_used_as_they_are(tmp_path: Path) -> None:
    rows = standard_rows(8)
    given = Dataset.from_dict({**rows, "ref_chosen_logps": [-50.0] * 8, "ref_rejected_logps": [-40.0] * 8})
    run = trainer(tmp_path, rows=given, max_steps=1, per_device_train_batch_size=8)
    run.train()
    row = run.state.log_history[0]
    assert row["rewards/chosen"] == pytest.approx(0.1 * (row["logps/chosen"] + 50), rel=1e-4)
    assert row["rewards/rejected"] == pytest.approx(0.1 * (row["logps/rejected"] + 40), rel=1e-4)


def test_the_first_loss_is_ln_2_also_for_a_model_changed_in_memory(tmp_path: Path) -> None:
    """A reference that is loaded again from the model's path would start with a margin."""
    path = tmp_path / "model"
    tiny_model(seed=1).save_pretrained(path)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    run = trainer(tmp_path, model=model)
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert run.state.log_history[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_a_policy_that_was_changed_after_construction_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    with torch.no_grad():
        run.model.lm_head.weight.mul_(1.5)
    with pytest.raises(ValueError, match="differ before the first step"):
        run.train()


def test_a_given_reference_is_kept_frozen(tmp_path: Path) -> None:
    reference = tiny_model(seed=5)
    before = weights(copy.deepcopy(reference))
    run = DPOTrainer(
        tiny_model(seed=1),
        reference,
        DPOConfig(str(tmp_path), max_steps=2, learning_rate=1e-2, report_to="none", save_strategy="no"),
        train_dataset=dataset(),
        processing_class=word_tokenizer(),
    )
    run.train()
    assert torch.equal(weights(run.ref_model), before)


def test_tr_dpo_moves_the_reference_by_the_formula(tmp_path: Path) -> None:
    run = trainer(tmp_path, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.3, max_steps=2)
    start = weights(run.model)
    run.train()
    expected = 0.3 * weights(run.model) + 0.7 * start
    assert relative_difference(weights(run.ref_model), expected) < 1e-6
    assert relative_difference(start, expected) > 1e-4


@pytest.mark.parametrize("layout", ["padded", "shared_prompt"])
def test_lora_leaves_the_base_alone_and_needs_no_second_model(layout: str, tmp_path: Path) -> None:
    from peft import LoraConfig

    run = trainer(tmp_path, layout=layout, peft_config=LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    assert run.ref_model is None
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora" not in name), name


def test_a_new_adapter_on_a_trained_one(tmp_path: Path) -> None:
    """The given adapter stays active and fixed, the new one is trained; the reference is what both give at step 0."""
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    model = get_peft_model(tiny_model(seed=1), LoraConfig(r=4, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    run = trainer(tmp_path, model=model, peft_config=LoraConfig(r=2, target_modules=["v_proj"]))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".preference." in name}
    prompts = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="cannot act together"):
        trainer(tmp_path, model=model, peft_config=prompts)
