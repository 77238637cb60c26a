"""Attention over a packed row, segment by segment, inside transformers' own models.

A packed batch carries its segments as the 4-D ``attention_mask`` (int64, [1, 1, K, 4]; see ``batching.packed``),
because transformers hands a 4-D mask to every layer untouched. For each attention implementation one function is
registered that looks at what it is given: segments are computed one at a time *by the original implementation*;
anything else (``generate``, a padded batch) goes to the original unchanged, with the original's mask function.
So sliding windows, soft caps and sinks stay the model's own affair.

The name has to stand in the config for as long as a backward may come: a checkpointed layer looks it up again when it
recomputes. `segment_attention` sets it, and takes it back when the outermost use ends.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["is_segments", "segment_attention", "segment_mask", "table_of"]

PREFIX = "prefopt_"


@contextmanager
def segment_attention(*models: nn.Module) -> Iterator[None]:
    """Within the context the models understand segments. Contexts may be nested."""
    changed = [config for model in models for config in attention_configs(model)]
    for config in changed:
        name = config._attn_implementation or "eager"
        register(name)
        config._attn_implementation_internal = PREFIX + name
    try:
        yield
    finally:
        for config in changed:
            config._attn_implementation_internal = config._attn_implementation.removeprefix(PREFIX)


def attention_configs(model: nn.Module) -> list[Any]:
    """The distinct configs of the model's parts that do not yet name a segment implementation."""
    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    return [c for c in configs.values() if not str(c._attn_implementation).startswith(PREFIX)]


def register(name: str) -> None:
    """Make ``prefopt_<name>`` known to transformers: the segment attention over ``name``."""
    if PREFIX + name in ALL_ATTENTION_FUNCTIONS.valid_keys():
        return

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        original = original_attention(module, name)
        if not is_segments(attention_mask):
            return original(module, query, key, value, attention_mask, **kwargs)
        return attend_segments(original, module, query, key, value, attention_mask, causal_is_implied(name), **kwargs)

    ALL_ATTENTION_FUNCTIONS.register(PREFIX + name, attention)
    if name in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys():
        ALL_MASK_ATTENTION_FUNCTIONS.register(PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])


def original_attention(module: Any, name: str) -> Callable[..., Any]:
    """What transformers would call: a registered function, or the eager one of the module's own modeling file."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)  # type: ignore[arg-type]


def causal_is_implied(name: str) -> bool:
    """Whether ``name`` is causal when it is given no mask (eager is not)."""
    return name != "eager"


def is_segments(attention_mask: Any) -> bool:
    """Whether a mask is the carrier of segments: additive masks are floating point, boolean masks are bool."""
    return (
        isinstance(attention_mask, Tensor)
        and attention_mask.dim() == 4
        and attention_mask.dtype == torch.int64
        and attention_mask.shape[-1] == 4
    )


def attend_segments(
    original: Callable[..., Any],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    implied: bool,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One call of ``original`` per segment.

    Args:
        query: [1, heads, S, head_dim]; ``key`` and ``value`` [1, kv_heads, S, head_dim].
        segments: [1, 1, K, 4] ``(start, end, prefix_start, prefix_end)``; they tile the row in order, and a prefix is
            an earlier segment.
        implied: ``original`` is causal without a mask.

    Returns:
        [1, S, heads, head_dim], and no attention weights.
    """
    kwargs.pop("position_ids", None)  # flash attention would split the segment once more where positions restart
    window = kwargs.get("sliding_window")
    table = table_of(segments)
    lengths = [end - start for start, end, _, _ in table]
    # split, not slices: the backward of a slice fills a tensor as long as the row, that of a split is one cat
    pieces = list(zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True))
    piece_at = {start: piece for (start, *_), piece in zip(table, pieces, strict=True)}
    outputs = []
    for (own_query, keys, values), (_, _, prefix_start, prefix_end) in zip(pieces, table, strict=True):
        length, prefix = own_query.shape[2], prefix_end - prefix_start
        if prefix:
            _, prefix_keys, prefix_values = piece_at[prefix_start]
            keys, values = torch.cat([prefix_keys, keys], dim=2), torch.cat([prefix_values, values], dim=2)
        plain = implied and not prefix and (window is None or length <= window)
        mask = None if plain else segment_mask(length, prefix, window, query)
        output, _ = original(module, own_query, keys, values, mask, **kwargs)
        outputs.append(output)
    return torch.cat(outputs, dim=1), None


def table_of(segments: Any) -> list[list[int]]:
    """The segments on the host. All layers get the same tensor: one synchronisation a batch, not one a layer."""
    if not hasattr(segments, "prefopt_table"):
        segments.prefopt_table = segments[0, 0].tolist()
    return segments.prefopt_table


def segment_mask(length: int, prefix: int, window: int | None, like: Tensor) -> Tensor:
    """[1, 1, length, prefix + length] additive mask; the window counts positions on the path, not row indices."""
    queries = torch.arange(prefix, prefix + length, device=like.device)[:, None]
    keys = torch.arange(prefix + length, device=like.device)[None, :]
    visible = keys <= queries
    if window is not None:
        visible &= queries - keys < window
    mask = torch.zeros(visible.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(~visible, torch.finfo(like.dtype).min)[None, None]
