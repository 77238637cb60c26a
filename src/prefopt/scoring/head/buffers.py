"""Memory for logits, used again from one pass to the next.

On a CPU, memory of this size comes from the system page by page, and goes back when it is freed: touching fresh pages
costs a third of the matrix product that fills them. On other devices torch keeps freed memory itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Buffer", "release_buffers"]

SMALL_BYTES = 1 << 20
"""Below this size the allocator does not ask the system."""
MOST_KEPT = 2
"""Buffers that wait for the next pass: one of cached gradients and one of a tile."""

free: list[Tensor] = []
"""Buffers that wait, the smallest first."""


class Buffer:
    """Uninitialised memory for ``rows`` [n, V]."""

    def __init__(self, num_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> None:
        num_bytes = num_rows * vocab_size * dtype.itemsize
        self.memory = taken(num_bytes) if device.type == "cpu" and num_bytes >= SMALL_BYTES else None
        if self.memory is None:
            self.rows = torch.empty(num_rows, vocab_size, dtype=dtype, device=device)
        else:
            self.rows = self.memory[:num_bytes].view(dtype).view(num_rows, vocab_size)

    def give_back(self) -> None:
        """Let the next one have the memory.

        A buffer and all views of it share a version counter. So autograd refuses a second backward pass over rows that
        another pass has written over since.
        """
        if self.memory is not None:
            free.append(self.memory)
            free.sort(key=Tensor.numel)
            del free[:-MOST_KEPT]


def release_buffers() -> None:
    """Give the memory of all that wait back to the system."""
    free.clear()


def taken(num_bytes: int) -> Tensor:
    """The smallest buffer that suffices, else a new one, in place of the largest."""
    for index, memory in enumerate(free):
        if memory.numel() >= num_bytes:
            return free.pop(index)
    if len(free) == MOST_KEPT:
        free.pop()
    return torch.empty(num_bytes, dtype=torch.uint8)
