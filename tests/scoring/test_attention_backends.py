"""Which attention backend is taken, that models compute the same with each, and that a faulty one is left."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_kernels import CUDA, stand_in
from test_layouts import examples, tiny
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prefopt.batching import pad_batch, share_batch
from prefopt.scoring.attention import backends, segment_attention
from prefopt.scoring.attention.backends import BACKENDS, backend_for
from prefopt.scoring.attention.options import LayerOptions, layer_options
from prefopt.scoring.attention.plan import Plan
from prefopt.scoring.attention.segments import masks_of
from prefopt.scoring.forward import score
from prefopt.scoring.plain import plain_scores
from prefopt.types import TRIPLE

LOGP_TOLERANCE = 1e-5
"""Nats, float32, through a model; see test_layouts."""
GRADIENT_TOLERANCE = 1e-5
"""Relative norm, float32."""


@pytest.fixture(autouse=True)
def fresh_trials() -> Iterator[None]:
    """Trials are remembered for the process; these are of kernels that stand in for others."""
    for remembered in (backends.fault, backends.is_usable):
        remembered.cache_clear()
    yield
    for remembered in (backends.fault, backends.is_usable):
        remembered.cache_clear()


# -- through models ----------------------------------------------------------------------------------------------------


def use(monkeypatch: pytest.MonkeyPatch, kernel: str) -> list[set[torch.dtype]]:
    """Have this backend compute on the CPU, over plain torch; the types of each call it gets."""
    attend, calls = stand_in(monkeypatch, kernel), []

    def counting(query: Tensor, key: Tensor, value: Tensor, plan: Plan, options: LayerOptions) -> Tensor:
        calls.append({query.dtype, key.dtype, value.dtype})
        return attend(query, key, value, plan, options)

    monkeypatch.setitem(BACKENDS, kernel, replace(BACKENDS[kernel], attend=counting, obstacle=lambda case: None))
    monkeypatch.setenv("PREFOPT_ATTENTION", kernel)
    return calls


def scored(model: torch.nn.Module, *, backward: bool) -> tuple[Tensor, Tensor | None]:
    """Log-probs of a shared batch and the gradient of a weighted sum of them."""
    model.zero_grad()
    with segment_attention(model), torch.set_grad_enabled(backward):
        logps = score(model, share_batch(examples(1), TRIPLE)).tokens.logps
        if not backward:
            return logps, None
        (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return logps.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("kernel", "family"),
    [
        ("varlen", "llama"),
        ("varlen", "mistral"),
        ("varlen", "stablelm"),
        ("flash", "gemma2"),
        ("flash", "gemma3_text"),
        ("flex", "gemma2"),
        ("flex", "gpt_oss"),
        ("flex", "granite"),
    ],
)
def test_models_compute_the_same_with_every_backend(kernel: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, soft caps, sinks and scales arrive at the kernel as each layer has them."""
    model, backward = tiny(family), kernel != "flex"  # flex has no backward here, so no trial either
    expected = plain_scores(model, pad_batch(examples(1), TRIPLE)).tokens.logps
    _, expected_gradient = scored(model, backward=backward)
    calls = use(monkeypatch, kernel)
    if not backward:
        monkeypatch.setattr(backends, "fault_of", lambda attend, case: None)
    logps, gradient = scored(model, backward=backward)
    assert len(calls) >= model.config.num_hidden_layers
    assert (logps - expected).abs().max() < LOGP_TOLERANCE
    if backward:
        assert (gradient - expected_gradient).norm() / expected_gradient.norm() < GRADIENT_TOLERANCE


def test_mixed_precision_reaches_the_kernel_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3 norms its queries, which autocast leaves in float32; torch's own attention would round them too."""
    calls = use(monkeypatch, "varlen")
    with torch.autocast("cpu", torch.bfloat16):
        scored(tiny("qwen3"), backward=True)
    assert calls
    assert all(dtypes == {torch.bfloat16} for dtypes in calls)


def test_a_trial_within_a_checkpointed_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the trial saves for its backward is not what recomputation looks for."""
    model = tiny("llama").train()
    expected, expected_gradient = scored(model, backward=True)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    use(monkeypatch, "varlen")
    logps, gradient = scored(model, backward=True)
    assert (logps - expected).abs().max() < LOGP_TOLERANCE
    assert (gradient - expected_gradient).norm() / expected_gradient.norm() < GRADIENT_TOLERANCE


def test_a_reentrant_checkpoint_reads_the_segments_again() -> None:
    """Its backward gets copies of the carrier, without the plan."""
    model = tiny("llama").train()
    _, expected = scored(model, backward=True)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": True})
    model.get_input_embeddings().weight.requires_grad_()
    _, gradient = scored(model, backward=True)
    assert (gradient - expected).norm() / expected.norm() < GRADIENT_TOLERANCE


# -- the choice --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "name", "installed", "chosen"),
    [
        ({}, "sdpa", True, "varlen"),
        ({}, "flash_attention_2", True, "flash"),
        ({}, "flash_attention_2", False, "varlen"),
        ({"windowed": True}, "eager", False, "varlen"),
        ({"dtype": torch.float32}, "sdpa", True, None),
        ({"dtype": None}, "sdpa", True, None),
        ({"head_dim": 20, "value_dim": 20}, "sdpa", True, None),
        ({"head_dim": 512, "value_dim": 512}, "sdpa", True, None),
        ({"head_dim": 96}, "sdpa", True, None),
        ({"softcap": 30.0}, "eager", True, "flash"),
        ({"softcap": 30.0}, "eager", False, "flex"),
        ({"softcap": 30.0, "dtype": torch.float32}, "eager", True, "flex"),
        ({"sinks": True}, "eager", True, "flex"),
        ({"dropout": 0.1}, "sdpa", True, "flash"),
        ({"dropout": 0.1}, "sdpa", False, None),
        ({"sinks": True, "dropout": 0.1}, "eager", True, None),
        ({"unknown": ("position_bias",)}, "sdpa", True, None),
        ({"device": torch.device("cpu")}, "sdpa", True, None),
    ],
)
def test_the_backend_for_a_call(
    changes: dict, name: str, installed: bool, chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFOPT_ATTENTION", raising=False)
    monkeypatch.setattr(backends, "fault_of", lambda attend, case: None)
    if installed:
        stand_in(monkeypatch, "flash")
    assert backend_for(name, replace(CUDA, **changes)) is (None if chosen is None else BACKENDS[chosen])


def test_windows_need_a_torch_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "old varlen")
    assert backends.obstacle("varlen", CUDA) is None
    assert "window" in str(backends.obstacle("varlen", replace(CUDA, windowed=True)))


@pytest.mark.parametrize(
    ("value", "message"), [("varlen", "CUDA"), ("flash", "not installed|CUDA"), ("flex", "backward"), ("fast", "names")]
)
def test_a_backend_that_is_asked_for_and_cannot_be_stops_the_run(
    value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFOPT_ATTENTION", value)
    with pytest.raises(ValueError, match=message):
        scored(tiny("llama"), backward=False)


def test_segments_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFOPT_ATTENTION", "segments")
    assert backend_for("sdpa", CUDA) is None


def test_what_a_layer_asks_for() -> None:
    """A window as long as the longest path, which is longer than a segment, is none."""
    plan = Plan(((0, 9, 0, 0), (9, 16, 0, 8)), torch.device("cpu"))
    sinks = torch.zeros(4)
    arguments = {
        "scaling": 0.5,
        "sliding_window": 14,
        "softcap": 30.0,
        "s_aux": sinks,
        "dropout": 0.1,
        "use_cache": True,
    }
    assert layer_options(arguments, plan) == LayerOptions(0.5, 14, 30.0, sinks, 0.1)
    assert layer_options({"sliding_window": 15, "position_ids": torch.zeros(16)}, plan) == LayerOptions()
    assert layer_options({"position_bias": torch.zeros(16)}, plan).unknown == ("position_bias",)


def test_a_backend_that_fails_is_left_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """There is no such device here: the first kernel fails in its trial, and the next one is asked."""
    monkeypatch.setattr(
        backends, "fault_of", lambda attend, case: "no kernel image" if "varlen" in str(attend) else None
    )
    stand_in(monkeypatch, "flash")
    with caplog.at_level(logging.WARNING):
        assert [backend_for("sdpa", CUDA) for _ in range(3)] == [BACKENDS["flash"]] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "The attention backend varlen is not used: no kernel image"
    ]


# -- the originals -----------------------------------------------------------------------------------------------------


def test_when_an_original_needs_a_mask() -> None:
    """Without one eager and flex attention see everything; flash attention aligns at the lower right by itself."""
    wanted = {"sdpa": "unless causal", "eager": "always", "flex_attention": "always", "flash_attention_3": "never"}
    assert {name: masks_of(name) for name in wanted} == wanted


def test_flash_attention_finds_its_own_name_in_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers loads the kernel that the config names, and ours is not among them."""
    seen = []

    def original(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        seen.append((module.config._attn_implementation, mask, "position_ids" in kwargs))
        return torch.zeros_like(query).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_9", original)
    model = tiny("llama")
    model.config._attn_implementation_internal = "flash_attention_9"
    with segment_attention(model), torch.no_grad():
        score(model, share_batch(examples(1), TRIPLE))
        assert model.config._attn_implementation == "prefopt_flash_attention_9"
    assert set(seen) == {("flash_attention_9", None, False)}
