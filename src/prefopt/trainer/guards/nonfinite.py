"""What is found out about a step whose loss or gradient is not a number: which rows, which weights, what to try."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from prefopt.reference.fingerprints import own_part

__all__ = [
    "Finding",
    "NonFiniteStepError",
    "all_finite",
    "describe",
    "not_finite",
    "say_what_is_not_finite",
]

logger = logging.getLogger(__name__)

SHOWN_ROWS, SHOWN_NAMES = 20, 3
SKIP = "set on_nonfinite='skip' to leave such steps out"


class NonFiniteStepError(ArithmeticError):
    """Loss, gradient or weights are NaN or infinite; the weights are those of the step before.

    Args:
        message: what happened and what to do.
        step: number of the optimizer step, from 1.
        rows: that it comes from, as far as is known.
        folder: in which the step was written down.
    """

    def __init__(self, message: str, step: int, rows: Sequence[int] = (), folder: Path | None = None) -> None:
        super().__init__(message)
        self.step, self.rows, self.folder = step, tuple(rows), folder

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.step, self.rows, self.folder)


@dataclass(frozen=True)
class Finding:
    """What one rank finds in its part of a step."""

    columns: Mapping[str, Tensor]
    """Name -> [P] of its pairs: ``loss``, ``policy/<branch>``, ``reference/<branch>``."""
    rows: tuple[int, ...]
    """[P] their rows in the user's data."""
    guilty: tuple[bool, ...]
    """[P] whether a number of the pair, or its own gradient, is not finite."""
    weights: Mapping[str, dict[str, int]]
    """Parameters that are not finite."""
    gradients: Mapping[str, dict[str, int]] = field(default_factory=dict)
    """Parameters whose gradient is not finite."""

    @property
    def guilty_rows(self) -> list[int]:
        return [row for row, is_guilty in zip(self.rows, self.guilty, strict=True) if is_guilty]

    def bad(self, name: str) -> bool:
        """Whether a column whose name begins so is not finite somewhere."""
        return any(not values.isfinite().all() for column, values in self.columns.items() if column.startswith(name))


def not_finite(tensors: Iterable[tuple[str, Tensor | None]]) -> dict[str, dict[str, int]]:
    """Name -> how many numbers are NaN and infinite, of how many; of those tensors that have one."""
    found = {}
    for name, tensor in tensors:
        part = None if tensor is None else own_part(tensor).detach()
        if part is None or not part.is_floating_point() or bool(part.isfinite().all()):
            continue
        found[name] = {"nan": int(part.isnan().sum()), "inf": int(part.isinf().sum()), "of": part.numel()}
    return found


def all_finite(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether every trained weight that lies on this rank is finite: one pass, with one number as its result."""
    parts = [own_part(p).detach() for p in parameters if p.requires_grad]
    return bool(get_total_norm([part for part in parts if part.numel()], norm_type=math.inf).isfinite())


def describe(step: int, findings: Sequence[Finding], loss_is_finite: bool, grad_norm: float, saved: Path | str) -> str:
    """The message: which step, which rows, what to try.

    Args:
        step: number of the optimizer step, from 1.
        findings: of all ranks.
        loss_is_finite: of the step, on all ranks.
        grad_norm: over all ranks.
        saved: the folder of the dump, or why there is none.
    """
    guilty = [row for finding in findings for row in finding.guilty_rows]
    rows = guilty or [row for finding in findings for row in finding.rows]
    what = f"the gradient norm is {grad_norm}, the loss is finite" if loss_is_finite else "the loss is not finite"
    scope = "" if guilty else " (all of the step: none stands out)"
    where = f"It is written down in {saved}." if isinstance(saved, Path) else saved
    return (
        f"Step {step}: {what}; rows {listed(rows, SHOWN_ROWS)}{scope}. The weights were not changed by "
        f"this step. {advice(findings, loss_is_finite)} {where}"
    )


def advice(findings: Sequence[Finding], loss_is_finite: bool) -> str:
    """The next thing to try, by what is not finite."""
    weights = list(dict.fromkeys(name for finding in findings for name in finding.weights))
    gradients = list(dict.fromkeys(name for finding in findings for name in finding.gradients))
    if weights:
        return f"The model's weights are not finite before it: {listed(weights, SHOWN_NAMES)}. Load others, or resume."
    if any(finding.bad("reference") for finding in findings) and not any(finding.bad("policy") for finding in findings):
        return "The reference's log-probs are not finite: look for NaN in its weights, or use bfloat16 or float32."
    if not loss_is_finite:
        return f"Look at these rows, lower `learning_rate`, compute in bfloat16 or float32, or {SKIP}."
    among = f" (it is that of {listed(gradients, SHOWN_NAMES)})" if gradients else ""
    return f"Lower `learning_rate`, look at these rows, compute in bfloat16 or float32, or {SKIP}{among}."


def listed(names: Sequence[Any], shown: int) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(map(str, names[:shown])) + more


def say_what_is_not_finite(metrics: Mapping[str, Any], prefix: str) -> None:
    """A warning with the metrics that are NaN or infinite; they are logged as what they are."""
    numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
    if bad := [f"{name} {value}" for name, value in numbers.items() if not math.isfinite(value)]:
        logger.warning(
            "The evaluation (%s) gives numbers that are not finite: %s. Such a model is never taken for the best. Look "
            "for NaN in its weights or the reference's, or compute in bfloat16 or float32.",
            prefix,
            ", ".join(bad),
        )
