"""The row functions of the head in torch, for any device; `rows` says what they are.

They go over the logits in blocks of rows that stay in the cache of a processor from the first pass to the last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prefopt.scoring.head.rows import RowStats
from prefopt.types import Statistic

__all__ = ["logit_gradients_", "row_stats", "stats_and_gradients_"]

CPU_BLOCK_BYTES = 1 << 19
"""Of a buffer for a block, per thread: logits, buffers and a temporary fit into 2 MiB of level 2 cache."""
BLOCK_BYTES = 1 << 28
"""The same on other devices, where a call costs more than a pass."""
NO_WEIGHT = -800.0
"""e^-800 is 0 in float32 and float64; times -inf it would be NaN."""


def row_stats(
    logits: Tensor,
    targets: Tensor,
    factor: float,
    cap: float | None,
    statistics: frozenset[Statistic],
    overwrite: bool = False,
) -> RowStats:
    """Statistics of ``targets`` [n] under raw ``logits`` [n, V].

    Args:
        logits: before factor and cap.
        targets: token ids.
        factor: of the model's transform.
        cap: of the model's transform; None where there is none.
        statistics: what is wanted beyond ``lse`` and ``target_logit``.
        overwrite: whether the logits may be used as working memory.
    """
    sums = Sums(logits, statistics)
    for block in blocks(logits, targets, in_place=overwrite and is_exact(logits, cap)):
        sums.take(block, transformed(block.logits, factor, cap, block.centred))
    return sums.stats()


def stats_and_gradients_(
    logits: Tensor, targets: Tensor, factor: float, cap: float | None, statistics: frozenset[Statistic]
) -> tuple[RowStats, Tensor]:
    """Statistics, a scale for each row, and in place of the logits what times the scale is d log p(target) / d logits.

    One exponential serves statistics and gradient: with ``e_v = e^(z_v - max z)`` and ``s = sum_v e_v`` the gradient is
    ``-(e_v - s [v = target]) / s``. Its scale commutes with the matrix products to come, and is cheaper on their
    results. The target's entry is made here, in float32: 1 - p keeps its precision in half-precision logits.
    """
    sums, in_place = Sums(logits, statistics), is_exact(logits, cap)
    for block in blocks(logits, targets, in_place):
        sums.take(block, transformed(block.logits, factor, cap, block.centred))
        total = sums.total[block.rows]
        block.exps.scatter_add_(-1, block.targets, -total)
        if not in_place:  # divided here: float16 does not hold a sum over the vocabulary
            times_slope_(block.exps, block.centred.add_(sums.top[block.rows]), cap)
            torch.div(block.exps, total, out=block.logits)
    scale = -factor / sums.total if in_place else torch.full_like(sums.total, -factor)
    return sums.stats(), scale[:, 0]


def logit_gradients_(
    logits: Tensor, lse: Tensor, targets: Tensor, scale: Tensor, factor: float, cap: float | None
) -> Tensor:
    """Raw ``logits`` [n, V] become, in place, the gradient of ``sum_i scale_i log p_i(target_i)``.

    Args:
        logits: before factor and cap.
        lse: [n] as `row_stats` gives it.
        targets: [n] token ids.
        scale: [n] the gradient with respect to each log-prob.
        factor: of the model's transform.
        cap: of the model's transform; None where there is none.
    """
    lse, scale = lse[:, None], scale[:, None] * -factor
    for block in blocks(logits, targets, in_place=is_exact(logits, cap)):
        z = transformed(block.logits, factor, cap, block.centred)
        torch.exp(torch.sub(z, lse[block.rows], out=block.centred), out=block.exps)
        block.exps.scatter_add_(-1, block.targets, block.exps.new_full(block.targets.shape, -1.0))
        if block.exps is not block.logits:
            times_slope_(block.exps, block.centred.add_(lse[block.rows]), cap)
        torch.mul(block.exps, scale[block.rows], out=block.logits)
    return logits


@dataclass(frozen=True)
class Block:
    """Some rows of the logits, and memory to work in."""

    rows: slice
    logits: Tensor
    """[k, V] raw."""
    targets: Tensor
    """[k, 1]"""
    centred: Tensor
    """[k, V] for logits relative to something; at least float32."""
    exps: Tensor
    """[k, V] for their exponentials; the logits themselves where these may be written over."""


def blocks(logits: Tensor, targets: Tensor, in_place: bool) -> Iterator[Block]:
    """The rows, in blocks that use the same memory one after another; an empty one where there are no rows."""
    num_rows, vocab_size = logits.shape
    dtype = working_dtype(logits)
    block_bytes = CPU_BLOCK_BYTES * torch.get_num_threads() if logits.device.type == "cpu" else BLOCK_BYTES
    size = max(1, min(num_rows, block_bytes // (vocab_size * dtype.itemsize)))
    centred = logits.new_empty(size, vocab_size, dtype=dtype)
    exps = None if in_place else torch.empty_like(centred)
    for start in range(0, max(1, num_rows), size):
        rows = slice(start, min(start + size, num_rows))
        block, count = logits[rows], rows.stop - start
        yield Block(rows, block, targets[rows, None], centred[:count], block if exps is None else exps[:count])


class Sums:
    """What blocks of rows add up to: columns [n, 1] that each block fills in its rows of."""

    def __init__(self, logits: Tensor, statistics: frozenset[Statistic]) -> None:
        self.top = logits.new_empty(len(logits), 1, dtype=working_dtype(logits))
        self.total, self.target = torch.empty_like(self.top), torch.empty_like(self.top)
        self.dot = torch.empty_like(self.top) if "entropy" in statistics else None
        self.mean = torch.empty_like(self.top) if "mean_logit" in statistics else None
        self.squares = torch.empty_like(self.top) if "log_sum_sq_prob" in statistics else None
        self.is_top1 = torch.empty_like(self.top, dtype=torch.bool) if "is_top1" in statistics else None

    def take(self, block: Block, z: Tensor) -> None:
        """Fill in the rows of a block from its transformed logits; leaves z - max z and e^(z - max z) in the block."""
        rows, centred, exps = block.rows, block.centred, block.exps
        top = torch.amax(z, -1, keepdim=True, out=self.top[rows])
        torch.exp(torch.sub(z, top, out=centred), out=exps)
        torch.sum(exps, -1, keepdim=True, out=self.total[rows])
        target = torch.gather(centred, -1, block.targets, out=self.target[rows])
        if self.mean is not None:
            torch.mean(centred, -1, keepdim=True, out=self.mean[rows])
        if self.squares is not None:
            torch.linalg.vecdot(exps, exps, out=self.squares[rows, 0])
        if self.is_top1 is not None:
            self.is_top1[rows] = is_first_maximum(centred, block.targets, target)
        if self.dot is not None:
            torch.linalg.vecdot(centred.clamp_(min=NO_WEIGHT), exps, out=self.dot[rows, 0])

    def stats(self) -> RowStats:
        top, total, target = self.top[:, 0], self.total[:, 0], self.target[:, 0]
        log_total = total.log()
        return RowStats(
            lse=top + log_total,
            target_logit=top + target,
            entropy=None if self.dot is None else log_total - self.dot[:, 0] / total,
            mean_logit=None if self.mean is None else top + self.mean[:, 0],
            is_top1=None if self.is_top1 is None else self.is_top1[:, 0],
            log_sum_sq_prob=None if self.squares is None else self.squares[:, 0].log() - 2 * log_total,
        )


def is_first_maximum(centred: Tensor, targets: Tensor, target: Tensor) -> Tensor:
    """[k, 1] whether the target is where argmax would be."""
    if centred.device.type != "cpu":
        return centred.argmax(-1, keepdim=True) == targets
    is_top1 = target == 0  # an argmax, dear on a CPU, is made only of rows whose target has the maximum
    candidates = is_top1[:, 0].nonzero()[:, 0]
    if len(candidates):
        is_top1[candidates] = centred[candidates].max(-1, keepdim=True).indices == targets[candidates]
    return is_top1


def transformed(logits: Tensor, factor: float, cap: float | None, out: Tensor) -> Tensor:
    """Logits after the model's transform, in the dtype of ``out``: the logits themselves where that changes nothing."""
    if logits.dtype != out.dtype:
        logits = out.copy_(logits)  # first: what follows would round to half precision
    if cap is not None:
        return torch.mul(logits, factor / cap, out=out).tanh_().mul_(cap)
    return logits if factor == 1.0 else torch.mul(logits, factor, out=out)


def times_slope_(gradients: Tensor, z: Tensor, cap: float | None) -> None:
    """Gradients with respect to ``z = cap tanh(y / cap)`` become those with respect to y; z is overwritten."""
    if cap is not None:
        gradients.addcmul_(gradients, z.div_(cap).square_(), value=-1)


def working_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def is_exact(logits: Tensor, cap: float | None) -> bool:
    """Whether what replaces the logits can be computed in their own memory."""
    return cap is None and logits.dtype == working_dtype(logits)
