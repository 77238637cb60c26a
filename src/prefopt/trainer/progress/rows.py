"""Logged rows as short lines, and what of them stands below the bar of training."""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["figures", "row_line"]

SHOWN = {
    "loss": "loss",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "grad_norm": "grad norm",
    "learning_rate": "lr",
}
"""Metric -> its name in a line."""
LEFT_OUT = (
    "rewards/",
    "logps/",
    "logits/",
    "entropy",
    "num_tokens",
    "mean_token_accuracy",
    "nll_loss",
    "aux_loss",
    "runtime",
    "samples_per_second",
    "steps_per_second",
    "epoch",
    "step",
    "total_flos",
    "model_preparation_time",
)
"""Beginnings of names that stay in ``metrics.jsonl``; whatever else was logged is a metric of the user's."""


def row_line(row: Mapping[str, Any], step: int, max_steps: int) -> str | None:
    """A logged row as a line; None for the summary at the end, which the display's own line stands for.

    >>> row_line({"loss": 0.6123, "rewards/margins": 0.25, "rewards/accuracies": 0.75, "epoch": 0.5}, 5, 10)
    'step 5/10  loss 0.6123  margin 0.25  accuracy 0.75'
    """
    if "train_loss" in row:
        return None
    place = f"step {step:,}/{max_steps:,}" if max_steps else f"step {step:,}"
    prefix = evaluation_prefix(row)
    words = [place, *([f"{prefix.removesuffix('_')}:"] if prefix else []), *named(row, prefix)]
    return "  ".join(words)


def figures(row: Mapping[str, Any]) -> str:
    """Loss, margin and accuracy of a row of training."""
    return "  ".join(f"{SHOWN[name]} {number(row[name])}" for name in list(SHOWN)[:3] if name in row)


def evaluation_prefix(row: Mapping[str, Any]) -> str:
    """``eval_``, ``eval_<name>_`` or what else stands before the metrics of an evaluation; empty for training."""
    name = next((name for name in row if name.endswith("_rewards/margins")), "")
    return name.removesuffix("rewards/margins")


def named(row: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, short in SHOWN.items():
        if f"{prefix}{name}" in row:
            yield f"{short} {number(row[prefix + name])}"
    for name, value in row.items():
        own = name.removeprefix(prefix)
        if own not in SHOWN and not own.startswith(LEFT_OUT) and isinstance(value, numbers.Number):
            yield f"{own} {number(value)}"


def number(value: Any) -> str:
    """A value with four digits.

    >>> number(0.61234), number(-3e-8), number(5e-7), number(1234.56)
    ('0.6123', '-3e-08', '5e-07', '1235')
    """
    return f"{value:.4g}" if isinstance(value, numbers.Real) else str(value)
