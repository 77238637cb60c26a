"""A step whose loss or gradient is not a number stops before the weights change."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prefopt.types import OptimizerStep

__all__ = ["NonFiniteStepError", "describe"]

SHOWN_ROWS = 20


class NonFiniteStepError(ArithmeticError):
    """Loss or gradient of a step is NaN or infinite; the weights are those of the step before."""


def describe(step_number: int, step: OptimizerStep, losses: Sequence[Tensor], grad_norm: Tensor | float) -> str:
    """The message: which step, which rows, what to try.

    Args:
        step_number: of the optimizer step, from 1.
        step: this rank's micro-batches.
        losses: scalar loss of each micro-batch.
        grad_norm: norm of the gradient over all ranks.
    """
    bad = [b for b, loss in zip(step.micro_batches, losses, strict=True) if not torch.isfinite(loss).all()]
    rows = [row for batch in bad or step.micro_batches for row in batch.rows]
    more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
    what = "the loss is not finite" if bad else f"the gradient norm is {float(grad_norm)}, the loss is finite"
    return (
        f"Step {step_number}: {what}; rows {', '.join(map(str, rows[:SHOWN_ROWS]))}{more}. The weights were not "
        "changed by this step. Lower `learning_rate`, set `max_grad_norm`, look at these rows, or set "
        "`on_nonfinite='skip'` to leave such steps out."
    )
