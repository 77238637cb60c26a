"""What is computed of a row of logits: its statistics, and the gradient of its log-prob.

Two functions, in torch (`torch_rows`) and in Triton (`triton_rows`). Logits are raw: before the model's factor and cap.
All sums are taken in float32 (in float64 where the logits are).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from prefopt.types import Statistic

__all__ = ["RowFunctions", "RowStats", "concatenate", "row_functions"]


@dataclass(frozen=True)
class RowStats:
    """Statistics of n rows of logits after the model's transform, each [n]."""

    lse: Tensor
    """log sum_v e^(z_v), nats."""
    target_logit: Tensor
    """z of the target."""
    entropy: Tensor | None = None
    """nats."""
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None
    """Whether the target is the first of the highest logits, bool."""
    log_sum_sq_prob: Tensor | None = None
    """log sum_v p_v^2, nats."""

    @property
    def logps(self) -> Tensor:
        return self.target_logit - self.lse


@dataclass(frozen=True)
class RowFunctions:
    """The row functions of a device, as the head uses them."""

    row_stats: Callable[..., RowStats]
    logit_gradients_: Callable[..., Tensor]
    stats_and_gradients_: Callable[..., tuple[RowStats, Tensor]]
    """Both in one: for logits that are wanted for nothing but statistics and gradient."""


def concatenate(parts: list[RowStats]) -> RowStats:
    """The statistics of all rows, of which each part has some."""
    columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(RowStats)}
    return RowStats(**{name: torch.cat(values) for name, values in columns.items() if values[0] is not None})


@functools.cache
def row_functions(device_type: str) -> RowFunctions:
    """Triton's on CUDA where it is installed, else torch's."""
    if device_type == "cuda" and importlib.util.find_spec("triton") is not None:
        from prefopt.scoring.head import triton_rows

        return in_two_passes(triton_rows.row_stats, triton_rows.logit_gradients_)
    from prefopt.scoring.head import torch_rows

    overwriting = functools.partial(torch_rows.row_stats, overwrite=True)
    return RowFunctions(overwriting, torch_rows.logit_gradients_, torch_rows.stats_and_gradients_)


def in_two_passes(row_stats: Callable[..., RowStats], logit_gradients_: Callable[..., Tensor]) -> RowFunctions:
    """Row functions of a device on which the exponential costs nothing beside the pass over memory."""

    def stats_and_gradients_(
        logits: Tensor, targets: Tensor, factor: float, cap: float | None, statistics: frozenset[Statistic]
    ) -> tuple[RowStats, Tensor]:
        stats = row_stats(logits, targets, factor, cap, statistics)
        ones = torch.ones_like(stats.lse)
        logit_gradients_(logits, stats.lse, targets, ones, factor, cap)
        return stats, ones

    return RowFunctions(row_stats, logit_gradients_, stats_and_gradients_)
