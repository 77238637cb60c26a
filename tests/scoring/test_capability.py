"""Which layout a model gets, and that a model which lies about itself is caught."""

from __future__ import annotations

import re

import pytest
import torch
from test_layouts import examples, tiny
from transformers import AutoConfig, AutoModelForCausalLM

from prefopt.scoring import capability
from prefopt.scoring.attention import plan
from prefopt.scoring.capability import choose_layout, why_not_packed
from prefopt.scoring.forward import install
from prefopt.scoring.transforms import LogitTransform
from prefopt.types import PAIR


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "stablelm"])
def test_attention_models_share_prompts(family: str) -> None:
    choice = choose_layout(tiny(family), "auto", examples(1)[3], PAIR)
    assert choice.layout == "shared_prompt"
    assert not choice.reasons


@pytest.mark.parametrize("wanted", ["packed", "padded"])
def test_an_explicit_layout_is_obeyed(wanted: str) -> None:
    assert choose_layout(tiny("llama"), wanted, examples(1)[3], PAIR).layout == wanted


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("lfm2", {}, "conv"),
        ("mamba2", {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8}, "no plain attention|recurrent"),
        ("bloom", {"n_head": 4, "n_layer": 2}, "registry|rows"),
        ("llama4_text", {"num_local_experts": 2, "attention_chunk_size": 16, "intermediate_size_mlp": 32}, "chunk"),
    ],
)
def test_models_that_cannot_pack_are_padded_and_say_why(family: str, options: dict, reason: str) -> None:
    base = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **{**base, "num_attention_heads": 4, "num_key_value_heads": 2, **options})
    model = AutoModelForCausalLM.from_config(config)
    install(model)
    choice = choose_layout(model, "auto", None, PAIR)
    assert choice.layout == "padded"
    assert re.search(reason, why_not_packed(model) or "")
    assert type(model).__name__ in str(choice)


def test_a_window_by_row_index_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: the later completions' windows count rows instead of places in their sequence."""
    original = plan.segment_mask
    monkeypatch.setattr(
        plan, "segment_mask", lambda length, prefix, window, *rest: original(length, prefix, window and 2, *rest)
    )
    choice = choose_layout(tiny("mistral"), "auto", examples(1)[3], PAIR)
    assert choice.layout != "shared_prompt"
    assert "differs from the plain forward" in str(choice)


def test_a_head_that_its_config_does_not_describe_is_scored_from_full_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("granite")
    monkeypatch.setattr(capability, "use_full_logits", spy := Spy(capability.use_full_logits))
    monkeypatch.setattr("prefopt.scoring.forward.logit_transform", lambda config: LogitTransform())
    choice = choose_layout(model, "auto", examples(1)[3], PAIR)
    assert choice.layout == "padded"
    assert spy.calls == 1
    assert "full logits" in str(choice)


def test_the_trial_leaves_modes_and_weights_alone() -> None:
    model = tiny("llama").train()
    model.model.layers[0].eval()
    modes = {name: part.training for name, part in model.named_modules()}
    before = [p.clone() for p in model.parameters()]
    choose_layout(model, "auto", examples(1)[3], PAIR)
    assert modes == {name: part.training for name, part in model.named_modules()}
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


class Spy:
    def __init__(self, function) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args):
        self.calls += 1
        return self.function(*args)
