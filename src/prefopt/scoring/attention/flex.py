"""FlexAttention: a block-sparse kernel that is compiled for soft caps and sinks. It has no backward on the CPU.

In a group every token is seen from its own place to the end of its *scope*: the end of the group for a token of a
prompt that others share, else the end of its segment. So ``kv <= q < end_of_scope[kv]`` is the whole mask.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.functional import pad

from prefopt.scoring.attention.options import Case, LayerOptions
from prefopt.scoring.attention.plan import Plan

__all__ = ["attend_flex", "flex_obstacle", "scopes"]

MULTIPLE = 128
"""Rows are padded to a multiple of it: the kernel's blocks, and what its compiled backward insists on."""
RECOMPILE_LIMIT = 64
"""Kinds of calls (soft cap, window, dtype, with and without gradient) before torch would fall back to a dense mask; its
default of 8 is reached by a model with two kinds of layers and its reference."""


@lru_cache
def flex_kernel() -> Callable[..., Any]:
    """Compiled for any length: with fixed lengths every batch would be compiled anew."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    return torch.compile(flex_attention, dynamic=True)


def flex_obstacle(case: Case) -> str | None:
    """Why FlexAttention cannot compute this; None where it can."""
    if case.device.type != "cuda":
        return "it has no backward pass outside CUDA devices"
    if case.dtype is None:
        return "queries, keys and values have different types"
    return "it has no dropout" if case.dropout else None


def attend_flex(query: Tensor, key: Tensor, value: Tensor, plan: Plan, options: LayerOptions) -> Tensor:
    """[1, S, heads, D] by FlexAttention."""
    block_mask = plan.once(("blocks", options.window), lambda: make_block_mask(plan, options.window))
    missing = block_mask.shape[-1] - plan.num_tokens
    query, key, value = (pad(tensor, (0, 0, 0, missing)) for tensor in (query, key, value))
    with_sinks = options.sinks is not None
    result = flex_kernel()(
        query,
        key,
        value,
        score_mod=None if options.softcap is None else soft_cap(options.softcap),
        block_mask=block_mask,
        scale=options.scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True) if with_sinks else None,
    )
    output = (result[0] if with_sinks else result)[:, :, : plan.num_tokens]
    if options.sinks is not None:
        # a sink adds exp(sink) to the softmax's denominator exp(lse)
        lse = result[1].lse[:, :, : plan.num_tokens]
        output = (output * torch.sigmoid(lse - options.sinks[:, None].float())[..., None]).to(query.dtype)
    return output.transpose(1, 2)


def soft_cap(cap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return score_mod


def make_block_mask(plan: Plan, window: int | None) -> BlockMask:
    """The mask, and which blocks of 128 x 128 scores need it, in a row padded to blocks. No S x S mask is made."""
    length = -(-plan.num_tokens // MULTIPLE) * MULTIPLE
    on_host = [pad(tensor, (0, length - plan.num_tokens)) for tensor in scopes(plan)]
    touched, whole = blocks(on_host[0], on_host[1], window)
    end_of_scope, positions = (plan.on_device(tensor) for tensor in on_host)

    def in_scope(batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv <= q) & (q < end_of_scope[kv])

    too_early = positions - (window or 0)  # a tensor, as a number would be compiled in

    def in_window(batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return in_scope(batch, head, q, kv) & (positions[kv] > too_early[q])

    return BlockMask.from_kv_blocks(
        *(plan.on_device(tensor) for tensor in (*listed(touched & ~whole), *listed(whole))),
        BLOCK_SIZE=MULTIPLE,
        mask_mod=in_scope if window is None else in_window,
        seq_lengths=(length, length),
    )


def blocks(end_of_scope: Tensor, positions: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """[blocks, blocks] which blocks of queries (lines) and keys may have visible scores, and which have no others."""
    count = len(positions) // MULTIPLE
    scope, place = end_of_scope.view(count, MULTIPLE), positions.view(count, MULTIPLE)
    first = torch.arange(count) * MULTIPLE
    last = first + MULTIPLE - 1
    touched = (first <= last[:, None]) & (first[:, None] < scope.amax(1))
    whole = (last <= first[:, None]) & (last[:, None] < scope.amin(1))
    if window is not None:
        touched &= place.amin(1)[:, None] - place.amax(1) < window
        whole &= place.amax(1)[:, None] - place.amin(1) < window
    return touched, whole


def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """[1, 1, blocks] how many blocks of keys each block of queries has; [1, 1, blocks, blocks] all, these first."""
    order = chosen.int().argsort(dim=1, descending=True, stable=True)
    return chosen.sum(1).int()[None, None], order.int()[None, None]


def scopes(plan: Plan) -> tuple[Tensor, Tensor]:
    """[S] the row index from which a token is no longer seen, and [S] its place on its path; int64, on the host."""
    end_of_scope = torch.empty(plan.num_tokens, dtype=torch.int64)
    positions = torch.empty(plan.num_tokens, dtype=torch.int64)
    for start, end, prefix_start, prefix_end in plan.segments:
        end_of_scope[start:end] = end
        end_of_scope[prefix_start:prefix_end] = end
        prefix = prefix_end - prefix_start
        positions[start:end] = torch.arange(prefix, prefix + end - start)
    return end_of_scope, positions
