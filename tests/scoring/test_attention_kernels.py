"""Every attention backend computes the definition, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch
from attention_kernels import KERNELS, stand_in
from attention_oracle import HEADS, dense_attention, gradients, groups, random_inputs, table_of_groups, visible
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prefopt.scoring.attention.options import LayerOptions
from prefopt.scoring.attention.plan import Plan
from prefopt.scoring.attention.segments import attend_segments, torch_call
from prefopt.scoring.attention.trial import definition

TOLERANCE = 1e-10
"""Largest difference, float64."""
FLOAT32_SINKS = 1e-5
"""The same with sinks, which are added in float32."""

CPU = torch.device("cpu")
LONG = [(200, [310, 300, 40]), (0, [3, 280]), (5, [1])]
"""Groups whose segments are computed in several blocks."""

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, Plan, LayerOptions], Tensor]
windows = st.one_of(st.none(), st.integers(1, 12))


def agree(attend: Attend, own: list, options: LayerOptions, *, kv_heads: int = 2, seed: int = 0) -> None:
    """Output and all gradients are those of the definition."""
    torch.manual_seed(seed)
    plan = Plan(table_of_groups(own), CPU)
    inputs = random_inputs(plan.num_tokens, kv_heads=kv_heads)
    leaves = inputs if options.sinks is None else [*inputs, options.sinks]
    expected = dense_attention(inputs, visible(own, options.window), options)
    found = attend(*inputs, plan, options)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < TOLERANCE
    for ours, right in zip(gradients(found, leaves), gradients(expected, leaves), strict=True):
        assert (ours - right).abs().max() < TOLERANCE


def by_torch(query: Tensor, key: Tensor, value: Tensor, plan: Plan, options: LayerOptions) -> Tensor:
    """What a plain call on the CPU is."""
    call = torch_call(options.scale, options.dropout)
    return attend_segments(call, query, key, value, plan, options.window, "unless causal")


@given(groups=groups, window=windows, seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("kernel", ["varlen", "flash"])
def test_variable_length_kernels(kernel: str, groups: list, window: int | None, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        agree(stand_in(patch, kernel), groups, LayerOptions(window=window, scale=0.3), seed=seed)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kv_heads", [1, 2, HEADS])
def test_fewer_key_heads_than_query_heads(kernel: str, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    agree(stand_in(monkeypatch, kernel), [(5, [4, 7, 2]), (0, [3])], LayerOptions(), kv_heads=kv_heads)


def test_the_soft_cap_of_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    agree(stand_in(monkeypatch, "flash"), [(5, [4, 7, 2]), (0, [3])], LayerOptions(softcap=0.5))


@given(groups=groups, window=windows, cap=st.sampled_from([None, 0.5]), with_sinks=st.booleans())
@settings(max_examples=15, deadline=None)
def test_flex(groups: list, window: int | None, cap: float | None, with_sinks: bool) -> None:
    options = LayerOptions(window=window, softcap=cap, sinks=torch.randn(HEADS) if with_sinks else None)
    plan = Plan(table_of_groups(groups), CPU)
    inputs = [tensor.detach() for tensor in random_inputs(plan.num_tokens)]
    with pytest.MonkeyPatch.context() as patch:
        found = stand_in(patch, "flex")(*inputs, plan, options)
    difference = found - dense_attention(inputs, visible(groups, window), options)
    assert difference.abs().max() < (FLOAT32_SINKS if with_sinks else TOLERANCE)


@given(groups=groups, window=windows)
@settings(max_examples=30, deadline=None)
def test_segments_by_torch(groups: list, window: int | None) -> None:
    agree(by_torch, groups, LayerOptions(window=window))


@pytest.mark.parametrize("window", [None, 1, 7, 256, 300, 600, 2000])
def test_long_segments_in_blocks(window: int | None) -> None:
    agree(by_torch, LONG, LayerOptions(window=window))


@given(groups=groups, window=windows, cap=st.sampled_from([None, 0.5]), sinks=st.booleans())
@settings(max_examples=20, deadline=None)
def test_the_definition_of_the_trial(groups: list, window: int | None, cap: float | None, sinks: bool) -> None:
    sink = torch.randn(HEADS, dtype=torch.float64, requires_grad=True) if sinks else None
    agree(definition, groups, LayerOptions(window=window, softcap=cap, sinks=sink))


def test_a_window_spares_keys_that_nobody_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    call = torch_call(None, 0.0)

    def counting(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        sizes.append((query.shape[2], key.shape[2], mask is None))
        return call(query, key, value, mask)

    plan = Plan(table_of_groups([(300, [200, 100])]), CPU)
    attend_segments(counting, *random_inputs(plan.num_tokens), plan, 50, "unless causal")
    assert sizes == [(250, 250, False), (250, 299, False), (100, 149, False)]
    sizes.clear()
    attend_segments(counting, *random_inputs(plan.num_tokens), plan, None, "unless causal")
    assert sizes == [(250, 250, True), (250, 500, False), (100, 400, False)]
