"""The metric by which the best model is chosen: whether there is such a one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from transformers import TrainingArguments

__all__ = ["BestMetricError", "check_best_metric", "check_is_measured", "prefixed"]


class BestMetricError(ValueError):
    """``metric_for_best_model`` is none of the metrics that an evaluation gives."""


def check_best_metric(args: TrainingArguments, sets: Any) -> None:
    """Of several evaluation sets each has metrics of its own, so the best model needs the name of one.

    Raises:
        ValueError: ``metric_for_best_model`` is of none of them.
    """
    metric = args.metric_for_best_model
    if metric is None or not isinstance(sets, dict) or not sets:
        return
    if not prefixed(metric, "eval").startswith(tuple(f"eval_{name}_" for name in sets)):
        example = f"eval_{next(iter(sets))}_{metric.removeprefix('eval_')}"
        raise ValueError(
            f"metric_for_best_model={metric!r}: the evaluation sets are {', '.join(map(repr, sets))}, each with "
            f"metrics under its own name; set the metric of one of them, e.g. {example!r}"
        )


def check_is_measured(args: TrainingArguments, measured: Iterable[str]) -> None:
    """Hold ``metric_for_best_model`` against what an evaluation has given.

    Args:
        args: of the run.
        measured: names of the metrics, with their prefix.

    Raises:
        BestMetricError: it is none of them; with the nearest and all that there are.
    """
    metric = args.metric_for_best_model
    if metric is None or prefixed(metric, "eval") in (names := list(measured)):
        return
    nearest = get_close_matches(prefixed(metric, "eval"), names, 1)
    meant = f", did you mean {nearest[0]!r}?" if nearest else "."
    raise BestMetricError(
        f"metric_for_best_model={metric!r}: an evaluation gives no such metric{meant} Set one of those that there "
        f"are: {', '.join(names)}"
    )


def prefixed(name: str, prefix: str) -> str:
    """The name of a metric as an evaluation writes it."""
    return name if name.startswith(f"{prefix}_") else f"{prefix}_{name}"
