"""Attention over a packed row: its segments, computed by the kernel that the device has for them."""

from prefopt.scoring.attention.plan import attach_segments, is_segments, segment_mask, table_of
from prefopt.scoring.attention.registry import segment_attention, without_segments

__all__ = ["attach_segments", "is_segments", "segment_attention", "segment_mask", "table_of", "without_segments"]
