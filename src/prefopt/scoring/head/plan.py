"""How the head goes over its tokens: how many at a time, and what is kept for the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias

import torch

__all__ = ["Mode", "choose_mode", "tile_rows", "tiles", "uncached"]

Mode: TypeAlias = Literal["frozen", "cached", "recompute"]
"""What the backward pass finds, all exact. In units of one matrix product of head and tokens:

========= ===== ====================================================================================
frozen    2     d logp / d hidden [N, H], made in the forward: the head's weights need no gradient
cached    3     d logp / d logits of (some of) the tokens, made in the forward in place of the logits
recompute 4     nothing: the logits are made again
========= ===== ====================================================================================
"""

CPU_TILE_BYTES = 32 << 20
TILE_BYTES = 512 << 20
"""Logits of a tile: large enough for the full rate of matrix products, small beside what else a step holds."""
MIN_ROWS = 256
"""Tokens of a tile whatever it takes: products of fewer rows lose a fifth of their rate, and logits of this many
tokens are fewer numbers than the head has weights."""
ROWS_MULTIPLE = 128

CPU_CACHE_BYTES = 256 << 20
"""Gradients of logits that may be kept on a CPU: 4,000 tokens of 16,000 logits. Fixed, since what a system has free is
no sign of what its other processes will want."""
CUDA_SHARE, CUDA_FREE_SHARE = 0.1, 0.5
"""On CUDA: of all memory, and of what is free, whichever is less. As a rule the first decides, so that two runs keep
the same and round alike. When the head runs, the activations of the body are there already."""

is_caching = True


def choose_mode(num_tokens: int, row_bytes: int, device: torch.device, *, weights_need_grad: bool) -> tuple[Mode, int]:
    """The mode, and how many of the N tokens are cached: the rest is made again.

    Args:
        num_tokens: N.
        row_bytes: of one token's logits.
        device: of the logits.
        weights_need_grad: whether any weight of the head needs a gradient.
    """
    if not weights_need_grad:
        return "frozen", 0
    cached = min(num_tokens, cache_budget(device) // row_bytes)
    return ("cached", cached) if cached else ("recompute", 0)


def cache_budget(device: torch.device) -> int:
    """Bytes that gradients of logits may take."""
    if not is_caching or device.type not in ("cpu", "cuda"):
        return 0
    if device.type == "cpu":
        return CPU_CACHE_BYTES
    free, total = torch.cuda.mem_get_info(device)
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(min(CUDA_SHARE * total, CUDA_FREE_SHARE * (free + reusable)))


@contextmanager
def uncached() -> Iterator[None]:
    """Within it nothing is cached: to see what a step cannot do without."""
    global is_caching
    before, is_caching = is_caching, False
    try:
        yield
    finally:
        is_caching = before


def tile_rows(row_bytes: int, device: torch.device) -> int:
    """Tokens of a tile, for logits of ``row_bytes`` each."""
    rows = (CPU_TILE_BYTES if device.type == "cpu" else TILE_BYTES) // row_bytes
    return max(MIN_ROWS, rows - rows % ROWS_MULTIPLE)


def tiles(start: int, stop: int, rows: int) -> Iterator[slice]:
    """The tokens from ``start`` to ``stop``, ``rows`` at a time; one empty tile where there are no tokens at all."""
    for first in range(start, max(stop, 1), rows):
        yield slice(first, min(first + rows, stop))
