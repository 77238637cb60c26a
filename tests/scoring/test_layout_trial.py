"""The trial of a layout catches what a kernel, a model or a batch may get wrong without an error.

Every fault is planted behind the interface that models use: the attention function that transformers looks up, or the
batch of a layout. None of them shows in the loss of a run.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES, LAYOUTS, checkpointed, groups, tiny
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prefopt.scoring import capability
from prefopt.scoring.attention import is_segments, segment_attention, table_of
from prefopt.scoring.capability import LayoutChoice, choose_layout
from prefopt.types import TRIPLE, PreferenceBatch

FIGURE = re.compile(r"differs? from the plain forward('s)? by (\d\.\de[+-]\d\d nats a token|\d+\.\d%) on a trial pair")
DTYPES = [torch.float32, torch.bfloat16]


def choice(model: nn.Module, wanted: str = "auto") -> LayoutChoice:
    return choose_layout(model, wanted, groups(1)[3], TRIPLE)


def assert_caught(model: nn.Module, wanted: str, layout: str) -> None:
    """``wanted`` is left for ``layout``, in one line with the figure."""
    made = choice(model, wanted)
    assert made.layout == layout
    assert "\n" not in str(made)
    assert wanted in made.reasons[0]
    assert FIGURE.search(made.reasons[0]), made.reasons


def plant(monkeypatch: pytest.MonkeyPatch, model: Any, faulty: Callable[..., Any]) -> None:
    """``faulty(right, module, query, key, value, segments, **kwargs)`` computes packed rows from now on."""
    with segment_attention(model):
        name = model.config._attn_implementation
    right = ALL_ATTENTION_FUNCTIONS[name]

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        if is_segments(mask):
            return faulty(right, module, query, key, value, mask, **kwargs)
        return right(module, query, key, value, mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, name, attention)


def plant_mask(monkeypatch: pytest.MonkeyPatch, model: Any, change: Callable[..., Tensor]) -> None:
    """``change(sees, module, segments, window)`` is what positions see in packed rows, instead of ``sees`` [S, S]."""

    def dense(right: Any, module: Any, query: Any, key: Any, value: Any, segments: Any, **kwargs: Any) -> Any:
        table = table_of(segments)
        sees = torch.zeros(query.shape[2], query.shape[2], dtype=torch.bool)
        for start, end, prefix_start, prefix_end in table:
            sees[start:end, prefix_start:prefix_end] = True
            sees[start:end, start:end] = causal(end - start)
        sees = change(sees, module, table, kwargs.get("sliding_window"))
        mask = torch.zeros(sees.shape, dtype=query.dtype).masked_fill(~sees, torch.finfo(query.dtype).min)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask[None, None], **kwargs)

    plant(monkeypatch, model, dense)


def causal(length: int) -> Tensor:
    return torch.ones(length, length).tril().bool()


def plant_batch(monkeypatch: pytest.MonkeyPatch, change: Callable[[PreferenceBatch], dict[str, Any]]) -> None:
    """Model inputs of shared rows are changed."""
    right = LAYOUTS["shared_prompt"]

    def faulty(*args: Any) -> PreferenceBatch:
        batch = right(*args)
        return replace(batch, model_inputs={**batch.model_inputs, **change(batch)})

    monkeypatch.setitem(capability.LAYOUTS, "shared_prompt", faulty)


def test_what_is_planted_in_these_tests_is_right_without_its_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    plant_mask(monkeypatch, model, lambda sees, *_: sees)
    assert str(choice(model)) == "batch layout: shared_prompt"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [5, 4096])
def test_a_window_by_row_index(window: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second completion is far from its prompt by index, near by path. Real windows are longer than any trial."""
    monkeypatch.setitem(FAMILIES, "mistral", {"sliding_window": window})
    model = tiny("mistral").to(dtype)

    def by_index(sees: Tensor, _: Any, __: Any, window: int) -> Tensor:
        rows = torch.arange(len(sees))
        return sees & (rows[:, None] - rows[None, :] < window)

    plant_mask(monkeypatch, model, by_index)
    assert_caught(model, "shared_prompt", "packed")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_layout_lost_on_recompute(use_reentrant: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probs are right and gradients are not: in the backward pass the layers see one long sequence."""
    model = tiny("llama").to(dtype)
    calls: Counter[Any] = Counter()

    def lost(sees: Tensor, module: Any, *_: Any) -> Tensor:
        calls[module] += 1
        return sees if calls[module] % 2 else causal(len(sees))

    plant_mask(monkeypatch, model, lost)
    checkpointed(model, use_reentrant)
    assert_caught(model, "shared_prompt", "padded")
    assert choice(model).reasons[0].startswith("the gradients")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_that_stops_short(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama").to(dtype)
    plant(monkeypatch, model, lambda right, module, q, k, v, mask, **kw: right(module, q, k.detach(), v, mask, **kw))
    made = choice(model)
    assert made.layout == "padded"
    assert made.reasons[0].startswith("the gradients of shared_prompt differ")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prompt_that_later_completions_lose(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama").to(dtype)

    def faulty(right: Any, module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        alone = torch.tensor([(start, end, start, start) for start, end, _, _ in table_of(mask)]).view(1, 1, -1, 4)
        return right(module, query, key, value, alone, **kwargs)

    plant(monkeypatch, model, faulty)
    assert_caught(model, "shared_prompt", "packed")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wanted", ["shared_prompt", "packed"])
def test_groups_that_see_each_other(wanted: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last segment of a row, far from the first, sees that too."""
    model = tiny("llama").to(dtype)

    def leaking(sees: Tensor, _: Any, table: Any, __: Any) -> Tensor:
        sees[table[-1][0] :, : table[0][1]] = True
        return sees

    plant_mask(monkeypatch, model, leaking)
    assert_caught(model, wanted, "padded")


@pytest.mark.parametrize("dtype", DTYPES)
def test_positions_that_do_not_restart(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def counted_on(batch: PreferenceBatch) -> dict[str, Any]:
        return {"position_ids": torch.arange(batch.model_inputs["input_ids"].shape[1])[None]}

    plant_batch(monkeypatch, counted_on)
    assert_caught(tiny("llama").to(dtype), "shared_prompt", "packed")


def test_what_raises_is_left_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")

    def faulty(*args: Any, **kwargs: Any) -> Any:
        raise IndexError("mask of\n  the wrong kind")

    plant(monkeypatch, model, faulty)
    made = choice(model)
    assert made.layout == "padded"
    assert made.reasons[0] == "shared_prompt fails on a trial pair: IndexError: mask of the wrong kind"


@pytest.mark.parametrize("family", ["phimoe", "qwen2_moe"])
def test_a_model_whose_layers_do_not_name_their_window(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the mask knows it, and a row of segments brings its own. No config says so."""
    experts = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "use_sliding_window": True}
    layers = {"sliding_window": 4096, "layer_types": ["sliding_attention", "full_attention"]}
    monkeypatch.setitem(FAMILIES, family, {**experts, **layers, "shared_expert_intermediate_size": 16})
    assert_caught(tiny(family), "shared_prompt", "padded")


def test_a_trial_leaves_no_trace() -> None:
    model = checkpointed_in_part(tiny("gemma3_text"))
    before = state(model)
    assert choice(model).layout == "shared_prompt"
    assert state(model) == before


def checkpointed_in_part(model: Any) -> Any:
    """A model in a state that is easily lost: part of it frozen, one gradient there, one layer in training mode."""
    checkpointed(model, use_reentrant=False)
    model.eval()
    model.model.layers[0].train()
    model.model.layers[1].requires_grad_(False)
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    return model


def state(model: Any) -> list[Any]:
    parts = [
        (name, part.training, getattr(part, "sliding_window", None), len(part._forward_hooks))
        for name, part in model.named_modules()
    ]
    weights = [
        (name, p.requires_grad, p.sum().item(), p.grad is None or p.grad.sum().item())
        for name, p in model.named_parameters()
    ]
    return [parts, weights, model.config.sliding_window, model.config._attn_implementation]
