"""Segments one at a time: by the model's original attention, or on the CPU by torch's own.

Nothing is left out of the original's arithmetic, so soft caps, sinks and whatever else it does stay its own affair.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask, sdpa_mask

from prefopt.scoring.attention.plan import Plan

__all__ = ["Masks", "SegmentCall", "attend_segments", "masks_of", "original_call", "torch_call"]

SegmentCall: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""query [1, heads, L, D], key and value [1, kv_heads, L', D], mask -> [1, L, heads, D]."""

Masks: TypeAlias = Literal["always", "unless causal", "never"]
"""When a call needs a mask. ``unless causal``: without one it is causal from the upper left, right where L' = L.
``never``: it is causal from the lower right and takes its window as an argument (flash attention)."""

CPU_BLOCK = 256
"""Queries a call on the CPU. Its kernel computes the keys that a mask hides too, so each block is given those up to
its own end: a fifth less time at 300 to 500 tokens. Smaller blocks save arithmetic and lose it to smaller matrices."""


def masks_of(name: str) -> Masks:
    """When the original implementation ``name`` needs a mask: when transformers would make one for it. That holds for
    kernels of the Hub too, whose names say nothing."""
    mask_function = ALL_MASK_ATTENTION_FUNCTIONS.get(name)
    if mask_function in (None, flash_attention_mask):
        return "never"
    return "unless causal" if mask_function is sdpa_mask else "always"


def torch_call(scale: float | None, dropout: float) -> SegmentCall:
    """torch's attention, which on the CPU takes fewer key heads than query heads without copying the keys."""

    def call(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        ).transpose(1, 2)

    return call


def attend_segments(
    call: SegmentCall, query: Tensor, key: Tensor, value: Tensor, plan: Plan, window: int | None, masks: Masks
) -> Tensor:
    """[1, S, heads, D]: every segment over its prefix and itself.

    Args:
        call: computes queries over the keys at the end of which they stand.
        query: [1, heads, S, D]; ``key`` and ``value`` [1, kv_heads, S, D].
        window: places on the path that a token sees, itself included; None: all.
        masks: when ``call`` needs one.
    """
    lengths = [end - start for start, end, _, _ in plan.segments]
    # split, not slices: the backward of a slice fills a tensor as long as the row, that of a split is one cat
    pieces = list(zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True))
    keys_at = {start: own[1:] for (start, *_), own in zip(plan.segments, pieces, strict=True)}
    outputs: list[Tensor] = []
    for (queries, keys, values), segment in zip(pieces, plan.segments, strict=True):
        _, _, prefix_start, prefix_end = segment
        if prefix := prefix_end - prefix_start:
            root_keys, root_values = (tensor[:, :, :prefix] for tensor in keys_at[prefix_start])
            keys, values = torch.cat([root_keys, keys], dim=2), torch.cat([root_values, values], dim=2)
        outputs += attend_path(call, queries, keys, values, plan, window, masks, plan.blocks_on_path(segment))
    return torch.cat(outputs, dim=1)


def attend_path(
    call: SegmentCall,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    plan: Plan,
    window: int | None,
    masks: Masks,
    images: tuple[tuple[int, int], ...] = (),
) -> list[Tensor]:
    """The outputs of queries that stand at the end of their keys, block by block.

    Args:
        images: places on the path that see each other in both directions; then all queries are one block. Where masks
            are never made they do not, as flash attention does not let them in the model itself.
    """
    whole = masks == "never" or query.device.type != "cpu" or bool(images)
    sizes = [query.shape[2]] if whole else block_sizes(query.shape[2], CPU_BLOCK)
    end, outputs = keys.shape[2] - query.shape[2], []
    for block, size in zip(query.split(sizes, dim=2), sizes, strict=True):
        first = 0 if window is None else max(0, end - window + 1)  # what even the first query no longer sees
        end += size
        count = end - first
        plain = count == size and (window is None or size <= window) and not images
        unmasked = masks == "never" or (masks == "unless causal" and plain)
        own = tuple((start - first, end - first) for start, end in images)
        mask = None if unmasked else plan.mask(size, count - size, window, query, own)
        outputs.append(call(block, keys[:, :, first:end], values[:, :, first:end], mask))
    return outputs


def block_sizes(length: int, largest: int) -> list[int]:
    """``length`` in as few parts of nearly equal size as ``largest`` allows."""
    count = -(-length // largest)
    return [length // count + (index < length % count) for index in range(count)]


def original_call(original: Callable[..., Any], module: Any, arguments: dict[str, Any]) -> SegmentCall:
    """The model's own attention function with the arguments its layer gave."""
    # flash attention would split a segment once more where positions restart
    arguments = {name: value for name, value in arguments.items() if name != "position_ids"}
    return lambda query, key, value, mask: original(module, query, key, value, mask, **arguments)[0]
