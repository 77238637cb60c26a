"""The kernels themselves, which need a GPU: each computes the definition, and what models compute does not change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_kernels import CUDA
from test_layouts import examples, tiny
from torch import Tensor

from prefopt.batching import share_batch
from prefopt.scoring.attention import attach_segments, segment_attention
from prefopt.scoring.attention.backends import BACKENDS, fault, obstacle
from prefopt.scoring.attention.registry import attend
from prefopt.scoring.forward import score
from prefopt.types import TRIPLE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

HALF_TOLERANCE = 5e-2
"""Nats, mean over tokens: bfloat16 activations of two equal computations."""

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "head dimension 128": {"head_dim": 128, "value_dim": 128, "heads": 16, "kv_heads": 8},
    "one key head": {"kv_heads": 1},
    "six heads": {"heads": 6, "kv_heads": 3},
    "window": {"windowed": True},
    "soft cap": {"softcap": 20.0},
    "soft cap and window": {"softcap": 20.0, "windowed": True},
    "sinks": {"sinks": True},
    "sinks and window": {"sinks": True, "windowed": True},
    "scale": {"scale": 0.2},
    "float32": {"dtype": torch.float32},
    "float16": {"dtype": torch.float16},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_kernel_computes_the_definition(backend: str, kind: str) -> None:
    case = replace(CUDA, **KINDS[kind])
    if reason := obstacle(backend, case):
        pytest.skip(reason)
    assert fault(backend, case) is None


@pytest.mark.parametrize(
    ("backend", "family"),
    [("varlen", "llama"), ("varlen", "mistral"), ("flash", "gemma2"), ("flex", "gemma2"), ("flex", "gpt_oss")],
)
def test_models_compute_the_same(backend: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the model's own attention, segment by segment, log-probs and a backward pass."""
    model = tiny(family).to("cuda", torch.bfloat16)
    if backend == "flash" and (reason := obstacle(backend, CUDA)):
        pytest.skip(reason)
    expected = scored(model, "segments", monkeypatch)
    found = scored(model, backend, monkeypatch)
    for ours, right in zip(found, expected, strict=True):
        assert (ours - right).abs().mean() < HALF_TOLERANCE


def scored(model: torch.nn.Module, backend: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    monkeypatch.setenv("PREFOPT_ATTENTION", backend)
    model.zero_grad()
    with segment_attention(model):
        logps = score(model, share_batch(examples(1), TRIPLE).to("cuda")).tokens.logps
        logps.mean().backward()
    return logps.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.fixture
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_the_host_does_not_wait_for_the_device(request: pytest.FixtureRequest) -> None:
    """From a batch's segments to the gradients, once the kernel had its trial."""

    def layer(batch: Any) -> None:
        carrier = batch.model_inputs["attention_mask"]
        attach_segments(carrier, batch.segments)
        size = batch.model_inputs["input_ids"].shape[1]
        tensors = [
            torch.zeros(1, heads, size, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for heads in (4, 2, 2)
        ]
        attend(
            "sdpa", lambda *args, **kwargs: pytest.fail("not a kernel"), None, *tensors, carrier, {}
        ).sum().backward()

    first, second = (share_batch(examples(seed), TRIPLE).to("cuda") for seed in (1, 2))
    layer(first)
    request.getfixturevalue("no_waiting")
    layer(second)
