"""What attention must know of a packed row, made once a batch.

A packed batch carries its segments as the 4-D ``attention_mask`` (int64, [1, 1, K, 4]; see ``batching.packed``),
because transformers hands a 4-D mask to every layer untouched. All layers get the same tensor object, so the plan is
kept on it: what the first layer makes (masks, indices on the device), the others find. Where a copy arrives instead (a
recomputing backward with ``use_reentrant=True``), the segments are read from the tensor again: right, but one wait for
the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from prefopt.types import Segment

__all__ = ["Plan", "attach_segments", "is_segments", "plan_of", "segment_mask", "table_of"]

Made = TypeVar("Made")


class Plan:
    """The segments of a row of S tokens, on the host, and what kernels made of them.

    Args:
        table: K times ``(start, end, prefix_start, prefix_end)``. They tile the row in order. One without a prefix
            begins a group; those with one follow it directly, and their prefix is the beginning of that segment, never
            longer than the prefix of the segment before. Then the blocks ``(start, end, -1, -1)``, each in a segment.
        device: where the row is.
    """

    def __init__(self, table: Sequence[Segment], device: torch.device) -> None:
        segments = tuple((start, end, first, last) for start, end, first, last in table if first >= 0)
        check_groups(segments)
        self.segments: Sequence[Segment] = segments
        self.blocks = tuple((start, end) for start, end, prefix, _ in table if prefix < 0)
        """Tokens that see each other in both directions."""
        self.device = device
        self.num_tokens = segments[-1][1]
        self.longest = max(end - start for start, end, _, _ in segments)
        """Tokens of the longest segment."""
        self.longest_path = max(end - start + stop - first for start, end, first, stop in segments)
        """Tokens of the longest sequence, prefix and segment: no token sees more."""
        self._made: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], Made]) -> Made:
        """What ``make`` returns, made at the first call with this key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def blocks_on_path(self, segment: Segment) -> tuple[tuple[int, int], ...]:
        """The blocks of a segment, counted from the beginning of its prefix."""
        start, end, prefix_start, prefix_end = segment
        shift = prefix_end - prefix_start - start
        return tuple((first + shift, last + shift) for first, last in self.blocks if start <= first and last <= end)

    def mask(
        self, length: int, prefix: int, window: int | None, like: Tensor, blocks: tuple[tuple[int, int], ...] = ()
    ) -> Tensor:
        """`segment_mask`, made once for all layers."""
        key = ("mask", length, prefix, window, like.dtype, blocks)
        return self.once(key, lambda: segment_mask(length, prefix, window, like, blocks))

    def on_device(self, tensor: Tensor) -> Tensor:
        """A tensor of the host, copied without waiting for the device."""
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)


def check_groups(segments: Sequence[Segment]) -> None:
    """The kernels see one group after another, and would be silently wrong where a table says otherwise."""
    row_end = group_start = shareable = 0
    for start, end, prefix_start, prefix_end in segments:
        assert row_end == start < end, f"segments do not tile the row: {segments}"
        if prefix_start == prefix_end:
            group_start, shareable = start, end
        else:
            in_group = group_start == prefix_start < prefix_end <= shareable
            assert in_group, f"a prefix is not the beginning of its group: {segments}"
            shareable = prefix_end
        row_end = end


def is_segments(attention_mask: Any) -> bool:
    """Whether a mask is the carrier of segments: additive masks are floating point, boolean masks are bool."""
    return (
        isinstance(attention_mask, Tensor)
        and attention_mask.dim() == 4
        and attention_mask.dtype == torch.int64
        and attention_mask.shape[-1] == 4
    )


def attach_segments(carrier: Any, segments: Sequence[Segment]) -> None:
    """Tell a carrier its own content, with the blocks, so that nobody has to wait for the device to read it."""
    if not hasattr(carrier, "prefopt_plan"):
        carrier.prefopt_plan = Plan(segments, carrier.device)


def plan_of(carrier: Any) -> Plan:
    """The plan of a carrier."""
    if not hasattr(carrier, "prefopt_plan"):
        attach_segments(carrier, carrier[0, 0].tolist())
    return carrier.prefopt_plan


def table_of(carrier: Any) -> Sequence[Segment]:
    """The segments of a carrier, on the host."""
    return plan_of(carrier).segments


def segment_mask(
    length: int, prefix: int, window: int | None, like: Tensor, blocks: Sequence[tuple[int, int]] = ()
) -> Tensor:
    """[1, 1, length, prefix + length] additive mask; the window counts positions on the path, not row indices.

    The tokens of a block see each other in both directions, within the window.
    """
    queries = torch.arange(prefix, prefix + length, device=like.device)[:, None]
    keys = torch.arange(prefix + length, device=like.device)[None, :]
    visible = keys <= queries
    for start, end in blocks:
        visible[start - prefix : end - prefix, start:end] = True
    if window is not None:
        visible &= queries - keys < window
    mask = torch.zeros(visible.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(~visible, torch.finfo(like.dtype).min)[None, None]
