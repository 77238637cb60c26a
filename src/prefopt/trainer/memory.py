"""How much memory a training step needs beside the weights, and how much there is.

What autograd keeps of a forward pass depends on the model, its adapters, the attention, the head and the precision. It
is not worked out from a config but counted, for a pair at three lengths (`trials`). Every part of it is constant, or
proportional to the tokens or to their square (attention that holds its weights), so three counts give the three
coefficients, and these the bytes of the largest micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import nn

from prefopt.batching.budget import micro_batch_tokens

__all__ = ["ActivationModel", "BatchSize", "MemoryEstimate", "free_bytes", "largest_batch", "training_bytes"]

SAFE_SHARE = 0.7
"""Share of the free memory that a step may take by the estimate. The rest is for what is not estimated: gradients
between layers, what the head keeps and the logits of its tile, fragments that the allocator cannot use, and other
processes."""

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class BatchSize:
    """A micro-batch, as far as memory is concerned."""

    tokens: int
    """Positions that the model computes, padding included."""
    longest: int
    """Those of its longest pair."""


def largest_batch(sizes: Sequence[int], num_pairs: int, *, padded: bool, budget: int | None = None) -> BatchSize:
    """The largest micro-batch that pairs can make, whatever their order.

    Args:
        sizes: tokens of every pair that may come.
        num_pairs: of a micro-batch; with a budget, those of the step that it is packed from.
        padded: every pair of a micro-batch is as large as the largest.
        budget: tokens of a micro-batch; a pair above it is one of its own.
    """
    largest = sorted(sizes)[-num_pairs:]
    tokens, longest = micro_batch_tokens(largest, padded=padded), largest[-1]
    return BatchSize(tokens if budget is None else max(longest, min(tokens, budget)), longest)


@dataclass(frozen=True)
class ActivationModel:
    """Bytes that autograd keeps from the forward to the backward pass.

    Of a pair of t tokens they are ``fixed + per_token t + per_square t^2``.

    Example:
        >>> model = ActivationModel.fit([(10, 1300), (20, 2700), (40, 5800)])
        >>> [round(model.bytes(BatchSize(tokens, longest=40))) for tokens in (40, 80)]
        [5800, 11600]
    """

    fixed: float
    """Copies of weights, as autocast makes them."""
    per_token: float
    per_square: float

    @classmethod
    def fit(cls, counts: Sequence[tuple[int, int]]) -> ActivationModel:
        """The coefficients from (tokens, bytes) of one pair at several lengths; three lengths determine them.

        Fewer different lengths are taken as all per token, which is never less.
        """
        tokens, kept = (np.array(column, dtype=np.float64) for column in zip(*counts, strict=True))
        if len(set(tokens)) < 3:
            return cls(0.0, float((kept / tokens).max()), 0.0)
        square, slope, fixed = (float(x) for x in np.polyfit(tokens, kept, 2))
        if square < 0:  # experts fill up in steps: what bends down a little must not be extrapolated
            square, (slope, fixed) = 0.0, (float(x) for x in np.polyfit(tokens, kept, 1))
        return cls(max(fixed, 0.0), slope, square)

    def bytes(self, size: BatchSize) -> float:
        """Of a micro-batch; the squares of its pairs add up to at most ``longest`` times its tokens."""
        return self.fixed + self.per_token * size.tokens + self.per_square * size.longest * size.tokens


@dataclass(frozen=True)
class MemoryEstimate:
    """What a step needs beside the weights, and what there is; bytes."""

    activations: float
    training: float
    """Gradients and optimizer states that are not there yet."""
    free: float

    @property
    def fits(self) -> bool:
        """Whether the step fits without recomputing activations."""
        return self.activations + self.training <= SAFE_SHARE * self.free

    def __str__(self) -> str:
        return (
            f"{readable(self.activations)} of activations for the largest micro-batch, {readable(self.training)} of "
            f"gradients and optimizer states, {readable(self.free)} free"
        )


def readable(size: float) -> str:
    """A number of bytes in GiB, or in MiB where that is less than one.

    Example:
        >>> readable(1.25e9), readable(7e5)
        ('1.2 GiB', '0.7 MiB')
    """
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def training_bytes(parameters: Iterable[nn.Parameter], *, states: int, buckets: bool) -> int:
    """Bytes of gradients, and of ``states`` numbers per weight, that are not allocated yet.

    Args:
        parameters: of the model; those that are not trained need nothing.
        states: numbers per weight that the optimizer has yet to allocate.
        buckets: gradients are copied into buckets, by which ranks exchange them (DDP).
    """
    return sum(p.nbytes * (states + (p.grad is None) + buckets) for p in parameters if p.requires_grad)


def free_bytes(device: torch.device, num_processes: int) -> float | None:
    """What a process may still allocate on the device; None where that cannot be asked.

    Args:
        device: of the model.
        num_processes: that share the memory of this machine, on a CPU.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu":
        return min(psutil.virtual_memory().available, container_bytes(CGROUP)) / num_processes
    return None


def container_bytes(folder: Path) -> float:
    """What the container of this process may still take; infinite where it has no limit.

    Args:
        folder: of the control group. Files that it caches are given up when memory is short, and count as free.
    """
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
        cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())["inactive_file"]
    except OSError:
        return float("inf")
    return float("inf") if limit == "max" else int(limit) - int(used) + int(cached)
