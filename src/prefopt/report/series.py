"""Series of a run's metrics: where they began, where they are, and how sure that is."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["MIN_ROWS", "Mean", "Series", "evaluation_sets", "first_step_where", "series"]

Row = Mapping[str, Any]

MIN_ROWS = 5
"""Rows that a mean is taken of at least: a single one is the noise of its pairs."""
HEAD, TAIL = 0.1, 0.25
"""Shares of a run that count as its beginning and as its present state."""


@dataclass(frozen=True)
class Mean:
    """A mean of rows, and its standard error."""

    value: float
    error: float

    def differs(self, other: float, errors: float = 3.0) -> bool:
        """Whether it is further from ``other`` than chance explains: three standard errors are 1 in 370."""
        return abs(self.value - other) > errors * self.error


@dataclass(frozen=True)
class Series:
    """The finite values of a metric, in the order of the steps.

    Args:
        steps: optimizer steps.
        values: as many.
    """

    steps: tuple[int, ...]
    values: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.values)

    @functools.cached_property
    def head(self) -> Mean:
        """Where it began."""
        return mean(self.values[: part(len(self), HEAD)])

    @functools.cached_property
    def tail(self) -> Mean:
        """Where it is."""
        return mean(self.values[-part(len(self), TAIL) :])

    @functools.cached_property
    def second_half(self) -> Mean:
        """Over the later half of the run."""
        return mean(self.values[len(self) // 2 :])

    @functools.cached_property
    def scatter(self) -> float:
        """Standard deviation of the rows that `tail` is the mean of."""
        return deviation(self.values[-part(len(self), TAIL) :])

    @functools.cached_property
    def rise(self) -> Mean:
        """From where it began to where it is."""
        head, tail = self.head, self.tail
        return Mean(tail.value - head.value, math.hypot(head.error, tail.error))

    def map(self, other: Series, function: Any) -> Series:
        """``function`` of the two values of each step that both have."""
        theirs = dict(zip(other.steps, other.values, strict=True))
        pairs = [(step, function(value, theirs[step])) for step, value in self.items() if step in theirs]
        return Series(tuple(step for step, _ in pairs), tuple(value for _, value in pairs))

    def items(self) -> Iterator[tuple[int, float]]:
        return iter(zip(self.steps, self.values, strict=True))


def part(length: int, share: float) -> int:
    return min(length, max(MIN_ROWS, math.ceil(length * share)))


def mean(values: Sequence[float]) -> Mean:
    if not values:
        return Mean(0.0, math.inf)
    return Mean(statistics.fmean(values), deviation(values) / math.sqrt(len(values)))


def deviation(values: Sequence[float]) -> float:
    """Standard deviation; infinite of a single value."""
    if len(values) < 2:
        return math.inf
    middle = statistics.fmean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1))


def series(rows: Sequence[Row], metric: str) -> Series:
    """A metric over the steps; of a step with several values the last, and none that is not a finite number."""
    found = {row["step"]: row[metric] for row in rows if is_number(row.get(metric))}
    return Series(tuple(found), tuple(map(float, found.values())))


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def evaluation_sets(rows: Sequence[Row]) -> list[str]:
    """What stands before the metrics of each evaluation set: ``eval_``, ``eval_<name>_``."""
    end = "rewards/accuracies"
    names = dict.fromkeys(key for row in rows for key in row if key.startswith("eval_") and key.endswith(f"_{end}"))
    return [name.removesuffix(end) for name in names]


def first_step_where(values: Series, holds: Any) -> int | None:
    """The step from which the mean of `MIN_ROWS` rows fulfils ``holds`` until the end; None where it does not."""
    step = None
    for end in range(len(values), MIN_ROWS - 1, -1):
        if not holds(statistics.fmean(values.values[end - MIN_ROWS : end])):
            break
        step = values.steps[end - 1]
    return step
