"""What the log has not shown yet: metric sums since the last row, and the running token count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prefopt.metrics import NUM_TOKENS, MetricSums, accumulator_dtype, means

__all__ = ["LogWindow"]


@dataclass
class LogWindow:
    """Sums of the steps since the last log row; saved with a checkpoint, so that a resumed run logs the same rows."""

    metrics: MetricSums = field(default_factory=MetricSums)
    num_tokens: float = 0.0
    """Tokens trained on since the run began, over all ranks, as of the last row."""

    def add(self, metrics: MetricSums) -> None:
        self.metrics.merge(metrics)

    def flush(self, all_reduce: Callable[[Tensor], Tensor] | None) -> dict[str, float]:
        """The means of the window over all ranks, which starts anew; empty where nothing was added."""
        row = means(self.metrics.reduced(all_reduce))
        self.metrics = MetricSums()
        if row:
            self.num_tokens += row[NUM_TOKENS]
            row[NUM_TOKENS] = self.num_tokens
        return row

    def state(self, all_reduce: Callable[[Tensor], Tensor] | None) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-able; the sums are those of all ranks."""
        return {"num_tokens": self.num_tokens, "sums": self.metrics.reduced(all_reduce)}

    @classmethod
    def restored(cls, state: dict[str, Any], device: torch.device, *, keep_sums: bool) -> LogWindow:
        """The window a checkpoint kept.

        Args:
            state: of `state`.
            device: where the sums are kept.
            keep_sums: on one rank only: the saved sums are already those of all.
        """
        dtype = accumulator_dtype(device)
        sums = {
            name: (torch.tensor(total, dtype=dtype, device=device), torch.tensor(count, dtype=dtype, device=device))
            for name, (total, count) in state["sums"].items()
        }
        if not keep_sums:
            sums = {name: (torch.zeros_like(total), torch.zeros_like(count)) for name, (total, count) in sums.items()}
        return cls(MetricSums(sums), state["num_tokens"])
