"""Models that Unsloth has loaded: a stand-in with the interface that Unsloth documents, as Unsloth needs a GPU."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from short_runs import trainer, weights
from tiny_models import tiny_model
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from prefopt.scoring.unsloth import VARIABLE
from prefopt.trainer.unsloth import unsloth_precision

ROUNDING = 1e-4
"""Relative difference of weights after a few steps: masks are given to the attention in another form."""


class FastBody(LlamaModel):
    """Takes no mask of others: what it gets is replaced, and in training mode it is causal only by ``causal_mask``."""

    def forward(self, input_ids=None, causal_mask=None, attention_mask=None, **kwargs: Any) -> Any:  # type: ignore[override]
        rows, length = input_ids.shape
        seen = torch.ones(rows, 1, length, length, dtype=torch.bool)
        if causal_mask is not None:
            seen &= causal_mask(length)
        if not self.training and attention_mask is not None and attention_mask.ndim == 2:
            seen &= attention_mask[:, None, None].bool()
        return super().forward(input_ids=input_ids, attention_mask=seen, **kwargs)


class FastModel(LlamaForCausalLM):
    """Makes the causal mask, and returns hidden states in place of logits where the environment says so."""

    labels_seen = 0

    def forward(self, input_ids=None, causal_mask=None, labels=None, num_logits_to_keep=0, logits_to_keep=0, **kwargs):
        type(self).labels_seen += labels is not None
        assert self.config._attn_implementation == "sdpa" or not hasattr(self, "for_training")
        triangle = lambda length: torch.ones(length, length, dtype=torch.bool).tril()  # noqa: E731
        hidden: Tensor = self.model(input_ids=input_ids, causal_mask=triangle, **kwargs).last_hidden_state
        if os.environ.get(VARIABLE, "0") == "1":
            return CausalLMOutputWithPast(logits=hidden)
        return CausalLMOutputWithPast(logits=self.lm_head(hidden))


def for_training(model: Any, use_gradient_checkpointing: Any = True) -> Any:
    model.calls.append(("training", use_gradient_checkpointing))
    return model.train()


def for_inference(model: Any) -> Any:
    model.calls.append(("inference", None))
    return model.eval()


def fast(*, marked: bool = True, checkpointing: Any = False, **notes: Any) -> Any:
    """The model of `short_runs.trainer` as if Unsloth had loaded it; not ``marked``: as if something else had."""
    model: Any = tiny_model(seed=1)
    model.__class__, model.model.__class__ = FastModel, FastBody
    if marked:
        mark(model, checkpointing)
    for name, value in notes.items():
        setattr(model, name, value)
    return model


def mark(model: Any, checkpointing: Any) -> None:
    model.for_training = functools.partial(for_training, model)
    model.for_inference = functools.partial(for_inference, model)
    model._unsloth_gradient_checkpointing = checkpointing
    model.config.unsloth_version = "2026.10.9"
    model.calls = []


def fast_peft(**options: Any) -> Any:
    """With an adapter whose forward names all arguments, the defaults too."""
    from peft import get_peft_model

    model: Any = get_peft_model(fast(**options), lora())

    def forward(self, input_ids=None, causal_mask=None, labels=None, num_logits_to_keep=0, logits_to_keep=0, **kwargs):
        given = {"num_logits_to_keep": num_logits_to_keep, "logits_to_keep": logits_to_keep, "labels": labels}
        return self.base_model(input_ids=input_ids, causal_mask=causal_mask, **given, **kwargs)

    model.forward = MethodType(forward, model)
    mark(model, False)
    return model


def lora() -> Any:
    from peft import LoraConfig

    torch.manual_seed(3)
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers write to the variable, as Unsloth's own do."""
    monkeypatch.setenv(VARIABLE, "0")


@pytest.mark.parametrize("method", ["dpo", "cpo", "tpo"])
def test_a_run_is_that_of_the_plain_model(method: str, tmp_path: Path) -> None:
    plain = trainer(tmp_path / "plain", method, max_steps=3)
    plain.train()
    FastModel.labels_seen = 0
    run = trainer(tmp_path / "fast", method, max_steps=3, model=fast())
    run.train()
    assert (weights(run.model) - weights(plain.model)).norm() < ROUNDING * weights(plain.model).norm()
    assert FastModel.labels_seen == 0
    assert os.environ[VARIABLE] == "0"
    assert run.evaluate(run.train_dataset)["eval_loss"] == pytest.approx(
        plain.evaluate(plain.train_dataset)["eval_loss"], rel=ROUNDING
    )


def test_an_adapter_with_the_reference_off(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "plain", max_steps=3, peft_config=lora())
    from peft import get_peft_model

    plain = trainer(tmp_path / "plain", max_steps=3, model=get_peft_model(tiny_model(seed=1), lora()))
    plain.train()
    run = trainer(tmp_path / "fast", max_steps=3, model=fast_peft())
    assert run.ref_model is None
    run.train()
    assert (weights(run.model) - weights(plain.model)).norm() < ROUNDING * weights(plain.model).norm()


def test_rows_are_padded_and_it_is_said_why(tmp_path: Path) -> None:
    assert "batch layout: padded (Unsloth puts a causal mask of its own" in str(trainer(tmp_path, model=fast()).layout)


def test_a_forward_that_ignores_masks_is_found_by_the_trial(tmp_path: Path) -> None:
    """Of a model that nothing marks: all that can be known is what it computes."""
    model = fast(marked=False)
    model.model.forward = functools.partial(
        FastBody.forward, model.model, causal_mask=lambda n: torch.ones(n, n).tril().bool()
    )
    layout = trainer(tmp_path, model=model).layout
    assert layout.layout == "padded"
    assert len(layout.reasons) == 2
    assert all("differs from the plain forward" in reason for reason in layout.reasons)


@pytest.mark.parametrize("checkpointing", [False, True, "unsloth"])
def test_modes_and_checkpointing_are_the_models(checkpointing: Any, tmp_path: Path, monkeypatch, caplog) -> None:
    model = fast(checkpointing=checkpointing).eval()
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable", "gradient_checkpointing_disable"):
        monkeypatch.setattr(
            model, name, lambda *args, **kwargs: pytest.fail("checkpointing was touched"), raising=False
        )
    run = trainer(tmp_path, max_steps=1, model=model, gradient_checkpointing=True)
    assert model.calls == []
    run.train()
    assert model.calls == [("training", checkpointing), ("inference", None)]
    assert not model.training
    assert ("gradient_checkpointing=True has no effect" in caplog.text) == (not checkpointing)


def test_a_model_in_training_mode_stays_in_it(tmp_path: Path) -> None:
    model = fast().train()
    trainer(tmp_path, max_steps=1, model=model).train()
    assert [name for name, _ in model.calls] == ["training"]


def test_the_length_is_the_models(tmp_path: Path) -> None:
    run = trainer(tmp_path, model=fast(max_seq_length=12))
    assert run.prepare_options.max_length == 12
    assert (
        max(len(p) + len(c) for p, c in zip(*(run.train_dataset[n] for n in ("prompt_ids", "chosen_ids")), strict=True))
        <= 12
    )


def test_the_tag(tmp_path: Path) -> None:
    assert trainer(tmp_path, model=fast()).model.model_tags == ["prefopt", "dpo", "unsloth"]
    assert trainer(tmp_path).model.model_tags == ["prefopt", "dpo"]


# -- precision ---------------------------------------------------------------------------------------------------------


def in_type(model: Any, dtype: torch.dtype) -> Any:
    """The model as if it had been loaded in this type."""
    model.config.dtype = dtype
    return model.to(dtype)


FORCED, FULL, USER = "_unsloth_forced_float32", "_unsloth_full_finetuning", "_unsloth_user_float32"


@pytest.mark.parametrize(
    ("dtype", "has_bf16", "notes", "environment", "expected"),
    [
        ("bfloat16", True, {}, {}, "bf16"),
        ("float16", True, {}, {}, "fp16"),
        ("float16", False, {}, {}, "fp16"),
        ("float32", True, {}, {}, "bf16"),
        ("float32", False, {}, {}, "fp16"),
        ("float32", False, {USER: True}, {}, "no"),
        ("bfloat16", True, {FORCED: True}, {}, "no"),
        ("bfloat16", True, {FORCED: True, FULL: True}, {}, "bf16"),
        ("float16", False, {FORCED: True, FULL: True}, {}, "no"),
        ("bfloat16", True, {}, {"UNSLOTH_FORCE_FLOAT32": "1"}, "no"),
        ("bfloat16", True, {FORCED: False}, {"UNSLOTH_FORCE_FLOAT32": "1"}, "bf16"),
        ("bfloat16", True, {}, {"UNSLOTH_MIXED_PRECISION": "bfloat16"}, "no"),
    ],
)
def test_precision(dtype, has_bf16, notes, environment, expected, monkeypatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    model = in_type(fast(**notes), getattr(torch, dtype))
    assert unsloth_precision(model, has_bf16=has_bf16) == expected


def test_a_type_that_the_weights_have_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"bf16=True: Unsloth loaded the model in torch\.float16"):
        trainer(tmp_path, model=in_type(fast(), torch.float16), bf16=True)


@pytest.mark.parametrize("given", [{}, {"bf16": True}])
def test_float32_where_unsloth_forces_it(given: dict[str, Any], tmp_path: Path) -> None:
    run = trainer(tmp_path, model=fast(_unsloth_forced_float32=True), **given)
    assert not run.args.bf16
    assert not run.args.fp16
    assert run.accelerator.mixed_precision == "no"
