"""What a sweep varies: the values or the range of each option, and every combination of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Parameter", "Range", "choices", "corners", "fits", "grid", "is_count", "read_parameter"]


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included.

    Args:
        low: the least; whole where the numbers are.
        high: the greatest.
        log: whether equal ratios are equally likely, rather than equal differences.
        step: between neighbours; None: all numbers between, or all whole ones.
    """

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None

    @property
    def is_whole(self) -> bool:
        return all(isinstance(number, int) for number in (self.low, self.high, self.step or 1))


Parameter = Range | list[Any]
"""A range of numbers, or the values that an option may have."""


def read_parameter(name: str, value: Any) -> Parameter:
    """A parameter as it stands in the file: a list, ``{values: [...]}``, or ``{low, high, log, step}``.

    Raises:
        ValueError: it is none of these, or a range that holds no number.
    """
    if isinstance(value, Mapping) and set(value) == {"values"}:
        value = value["values"]
    if isinstance(value, list):
        if not value:
            raise ValueError(f"{name}: an empty list of values; give at least one")
        return value
    if not isinstance(value, Mapping) or not {"low", "high"} <= set(value) <= {"low", "high", "log", "step"}:
        raise ValueError(f"{name}: wants a list of values, or {{low, high}} with log or step, got {value!r}")
    numbers = {key: number(name, value[key]) for key in ("low", "high", "step") if value.get(key) is not None}
    found = Range(numbers["low"], numbers["high"], bool(value.get("log", False)), numbers.get("step"))
    if problem := range_problem(found):
        raise ValueError(f"{name}: {problem}")
    return found


def number(name: str, value: Any) -> int | float:
    """A number; ``1e-6`` without a point is text to YAML, and a number here.

    Raises:
        ValueError: it is none, or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{name}: {value!r} is no number")
    try:
        found = value if isinstance(value, int) else float(value)
    except ValueError:
        raise ValueError(f"{name}: {value!r} is no number") from None
    if not math.isfinite(found):
        raise ValueError(f"{name}: {value!r} is not finite")
    return found


def range_problem(found: Range) -> str | None:
    if found.low >= found.high:
        return f"low={found.low} must be less than high={found.high}"
    if found.log and found.low <= 0:
        return f"log wants a low above 0, got {found.low}"
    if found.step is not None and (found.log or found.step <= 0):
        return "step must be positive" if not found.log else "log and step exclude each other; leave one out"
    return None


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def choices(parameter: Parameter) -> list[Any] | None:
    """All values of a parameter, in order; None where there is no end of them."""
    if isinstance(parameter, list):
        return parameter
    if parameter.log or (parameter.step is None and not parameter.is_whole):
        return None
    step = parameter.step or 1
    count = math.floor((parameter.high - parameter.low) / step + 1e-9) + 1  # 0.1 to 0.3 by 0.1 has three
    values = [parameter.low + place * step for place in range(count)]
    return values if parameter.is_whole else [float(f"{value:.12g}") for value in values]


def grid(parameters: Mapping[str, Parameter]) -> Iterator[dict[str, Any]]:
    """Every combination; the last parameter changes fastest.

    >>> list(grid({"beta": [0.1, 0.5], "lora_r": Range(4, 8, step=4)}))[1]
    {'beta': 0.1, 'lora_r': 8}
    """
    columns = [choices(parameter) or [] for parameter in parameters.values()]
    return (dict(zip(parameters, values, strict=True)) for values in itertools.product(*columns))


def fits(parameter: Parameter, value: Any) -> bool:
    """Whether a parameter may have this value."""
    if isinstance(parameter, list):
        return value in parameter
    return isinstance(value, (int, float)) and parameter.low <= value <= parameter.high


def corners(parameters: Mapping[str, Parameter]) -> list[dict[str, Any]]:
    """A few combinations in which every listed value and both ends of every range occur.

    >>> corners({"beta": [0.1, 0.5, 0.9], "lora_r": Range(4, 16)})
    [{'beta': 0.1, 'lora_r': 4}, {'beta': 0.5, 'lora_r': 16}, {'beta': 0.9, 'lora_r': 16}]
    """
    columns = {name: one if isinstance(one, list) else [one.low, one.high] for name, one in parameters.items()}
    longest = max(map(len, columns.values()), default=0)
    return [{name: values[min(row, len(values) - 1)] for name, values in columns.items()} for row in range(longest)]
