"""What the log has not shown yet: metric sums since the last row, and the running token count."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from prefopt.metrics import NUM_TOKENS, MetricSums, accumulator_dtype, means

__all__ = ["LogWindow", "StepCount"]


@dataclass
class StepCount:
    """Optimizer steps, and how many of them were left out because they were not finite."""

    steps: int = 0
    skipped: int = 0

    @property
    def correction(self) -> float:
        """Turns a mean over all steps, to which those that were left out add 0, into one of the others; NaN of none."""
        if not self.skipped:
            return 1.0
        return self.steps / (self.steps - self.skipped) if self.steps > self.skipped else math.nan

    def add(self, skipped: bool) -> None:
        self.steps += 1
        self.skipped += skipped


@dataclass
class LogWindow:
    """Sums of the steps since the last log row; saved with a checkpoint, so that a resumed run logs the same rows."""

    metrics: MetricSums = field(default_factory=MetricSums)
    num_tokens: float = 0.0
    """Tokens trained on since the run began, over all ranks, as of the last row."""
    first_logp: float | None = None
    """Mean log-prob of a chosen token in the first row of the run, nats."""
    row: StepCount = field(default_factory=StepCount)
    """Since the last row."""
    run: StepCount = field(default_factory=StepCount)
    """Since the run began."""

    def add(self, metrics: MetricSums) -> None:
        """Take in a step."""
        self.metrics.merge(metrics)
        self.count(skipped=False)

    def count(self, *, skipped: bool) -> None:
        """Count a step; of one that was left out nothing else is taken in."""
        self.row.add(skipped)
        self.run.add(skipped)

    def flush(self, all_reduce: Callable[[Tensor], Tensor] | None) -> dict[str, float]:
        """The means of the window over all ranks, which starts anew; empty where nothing was added."""
        row = means(self.metrics.reduced(all_reduce))
        self.metrics, self.row = MetricSums(), StepCount()
        if row:
            self.num_tokens += row[NUM_TOKENS]
            row[NUM_TOKENS] = self.num_tokens
        return row

    def state(self, all_reduce: Callable[[Tensor], Tensor] | None) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-able; the sums are those of all ranks."""
        counts = {"row": asdict(self.row), "run": asdict(self.run), "first_logp": self.first_logp}
        return {"num_tokens": self.num_tokens, "sums": self.metrics.reduced(all_reduce), **counts}

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
        counts = (StepCount(**state[name]) for name in ("row", "run"))
        return cls(MetricSums(sums), state["num_tokens"], state["first_logp"], *counts)
