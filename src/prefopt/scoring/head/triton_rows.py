"""The row functions of the head for CUDA, in Triton. `rows` has both for any device, and says what they mean.

Each reads the logits once, in blocks of a row, and computes in float32. Neither waits for the device, and neither
holds anything of the logits' size beside them. Only `rows.row_functions` imports this module, where triton is.
"""

# Kernels are Triton's language, whose types a checker of Python does not know.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from prefopt.scoring.head.rows import RowStats
from prefopt.types import Statistic

__all__ = ["logit_gradients_", "row_stats"]

MAX_BLOCK = 4096
"""Logits that a program holds at a time: two 16-byte loads of bf16 for each of its threads."""
LAUNCH = {"num_warps": 8, "enable_fp_fusion": True}
"""256 threads: with 16 logits each, no combination of statistics spills registers. Fusion is no default everywhere."""
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.0e38)
"""The maximum before any block. Not -inf, so that entries of -inf minus it are -inf, not NaN."""
NO_WEIGHT = tl.constexpr(-128.0)
"""e^-128 is 0 in float32."""


def row_stats(
    logits: Tensor, targets: Tensor, factor: float, cap: float | None, statistics: frozenset[Statistic]
) -> RowStats:
    """Statistics of ``targets`` [n] under raw ``logits`` [n, V], which it does not change."""
    num_rows, vocab_size = shape_of(logits)

    def if_wanted(name: Statistic, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return logits.new_empty(num_rows, dtype=dtype) if name in statistics else None

    stats = RowStats(
        lse=logits.new_empty(num_rows, dtype=torch.float32),
        target_logit=logits.new_empty(num_rows, dtype=torch.float32),
        entropy=if_wanted("entropy"),
        mean_logit=if_wanted("mean_logit"),
        is_top1=if_wanted("is_top1", torch.bool),
        log_sum_sq_prob=if_wanted("log_sum_sq_prob"),
    )
    if num_rows == 0:  # CUDA refuses a launch without programs
        return stats
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        row_stats_kernel[(num_rows,)](
            logits,
            logits.stride(0),
            targets.contiguous(),
            stats.lse,
            stats.target_logit,
            stats.entropy,
            stats.mean_logit,
            stats.is_top1,
            stats.log_sum_sq_prob,
            VOCAB_SIZE=vocab_size,
            FACTOR=factor,
            CAP=cap,
            BLOCK=block_of(vocab_size),
            **LAUNCH,
        )
    return stats


def logit_gradients_(
    logits: Tensor, lse: Tensor, targets: Tensor, scale: Tensor, factor: float, cap: float | None
) -> Tensor:
    """Raw ``logits`` [n, V] become, in place, the gradient of ``sum_i scale_i log p_i(target_i)``."""
    num_rows, vocab_size = shape_of(logits)
    if num_rows == 0:
        return logits
    block = block_of(vocab_size)
    with torch.cuda.device_of(logits):
        logit_gradients_kernel[(num_rows * triton.cdiv(vocab_size, block),)](
            logits,
            logits.stride(0),
            lse.contiguous(),
            targets.contiguous(),
            scale.contiguous(),  # what comes from above is often one number, expanded
            VOCAB_SIZE=vocab_size,
            FACTOR=factor,
            CAP=cap,
            BLOCK=block,
            **LAUNCH,
        )
    return logits


def shape_of(logits: Tensor) -> tuple[int, int]:
    assert logits.stride(1) == 1 or logits.shape[1] == 1, "the kernels take the logits of a row as contiguous"
    return logits.shape[0], logits.shape[1]


def block_of(vocab_size: int) -> int:
    return min(triton.next_power_of_2(vocab_size), MAX_BLOCK)


@triton.jit
def row_stats_kernel(
    logits,
    row_stride,
    targets,
    lse_out,
    target_logit_out,
    entropy_out,
    mean_logit_out,
    is_top1_out,
    log_sum_sq_prob_out,
    VOCAB_SIZE: tl.constexpr,
    FACTOR: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row. An output that is None costs nothing: the compiler drops what leads to it.

    Sums are kept per lane and relative to ``top``, the greatest logit so far; they are rescaled only when it rises,
    which after a few blocks is rare.
    """
    row = tl.program_id(0).to(tl.int64)  # the offset of a row may exceed 32 bits
    logits += row * row_stride
    lanes = tl.arange(0, BLOCK)
    top = LOWEST
    top_start = 0
    sum_exp = tl.zeros([BLOCK], tl.float32)  # of e^d, where d = z - top
    sum_exp_d = tl.zeros([BLOCK], tl.float32)  # of e^d d
    sum_exp_sq = tl.zeros([BLOCK], tl.float32)  # of e^(2 d)
    sum_z = tl.zeros([BLOCK], tl.float32)
    # Three blocks in flight: the loads then hide behind the arithmetic.
    for start in tl.range(0, VOCAB_SIZE, BLOCK, num_stages=3):
        z = transformed_logits(logits, start + lanes, VOCAB_SIZE, FACTOR, CAP)
        if mean_logit_out is not None:
            sum_z += z
        z = tl.where(start + lanes < VOCAB_SIZE, z, float("-inf"))
        block_top = tl.max(z, 0)
        if block_top > top:
            change = top - block_top
            shrink = tl.exp(change)
            sum_exp_d = shrink * (sum_exp_d + change * sum_exp)
            sum_exp_sq *= shrink * shrink
            sum_exp *= shrink
            top = block_top
            top_start = start
        d = z - top
        exp_d = tl.exp2(d * LOG2_E)
        sum_exp += exp_d
        if entropy_out is not None:
            sum_exp_d += exp_d * tl.maximum(d, NO_WEIGHT)  # 0 * -inf would be NaN
        if log_sum_sq_prob_out is not None:
            sum_exp_sq += exp_d * exp_d
    total = tl.sum(sum_exp, 0)
    log_total = tl.log(total)
    target = tl.load(targets + row)
    tl.store(lse_out + row, top + log_total)
    tl.store(target_logit_out + row, transformed_logits(logits, target, VOCAB_SIZE, FACTOR, CAP))
    if entropy_out is not None:
        tl.store(entropy_out + row, log_total - tl.sum(sum_exp_d, 0) / total)
    if mean_logit_out is not None:
        tl.store(mean_logit_out + row, tl.sum(sum_z, 0) / VOCAB_SIZE)
    if log_sum_sq_prob_out is not None:
        tl.store(log_sum_sq_prob_out + row, tl.log(tl.sum(sum_exp_sq, 0)) - 2.0 * log_total)
    if is_top1_out is not None:
        first = first_place_of(top, logits, top_start + lanes, VOCAB_SIZE, FACTOR, CAP)
        tl.store(is_top1_out + row, first == target)


@triton.jit
def first_place_of(top, logits, places, VOCAB_SIZE: tl.constexpr, FACTOR: tl.constexpr, CAP: tl.constexpr):
    """Where the maximum is reached first. Its block is read again: cheaper than an argmax in every block."""
    at_top = transformed_logits(logits, places, VOCAB_SIZE, FACTOR, CAP) == top
    return tl.min(tl.where(at_top, places, VOCAB_SIZE), 0)


@triton.jit
def logit_gradients_kernel(
    logits,
    row_stride,
    lse,
    targets,
    scale,
    VOCAB_SIZE: tl.constexpr,
    FACTOR: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per block of a row."""
    blocks_per_row = tl.cdiv(VOCAB_SIZE, BLOCK)
    row = (tl.program_id(0) // blocks_per_row).to(tl.int64)  # the offset of a row may exceed 32 bits
    logits += row * row_stride
    places = tl.program_id(0) % blocks_per_row * BLOCK + tl.arange(0, BLOCK)
    z = transformed_logits(logits, places, VOCAB_SIZE, FACTOR, CAP)
    gradient = -tl.exp2((z - tl.load(lse + row)) * LOG2_E)
    gradient = tl.where(places == tl.load(targets + row), 1.0 + gradient, gradient)
    gradient *= tl.load(scale + row) * FACTOR
    if CAP is not None:
        tanh = z * (1.0 / CAP)
        gradient *= 1.0 - tanh * tanh
    tl.store(logits + places, gradient.to(logits.dtype.element_ty), mask=places < VOCAB_SIZE)


@triton.jit
def transformed_logits(logits, places, VOCAB_SIZE: tl.constexpr, FACTOR: tl.constexpr, CAP: tl.constexpr):
    """The logits of a row at ``places`` after the model's transform, in float32; 0 beyond the vocabulary."""
    raw = tl.load(logits + places, mask=places < VOCAB_SIZE, other=0.0)
    z = raw.to(tl.float32) * FACTOR
    if CAP is not None:
        # tanh by way of an exponential that cannot overflow
        decay = tl.exp2(tl.abs(z) * (-2.0 * LOG2_E / CAP))
        size = CAP * (1.0 - decay) / (1.0 + decay)
        z = tl.where(z < 0.0, -size, size)
    return z
