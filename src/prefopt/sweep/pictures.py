"""The curves of all trials in one picture, and each varied option beside the metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefopt.report.curves import points
from prefopt.sweep.state import Status, Sweep
from prefopt.sweep.summary import Seen, trial_rows
from prefopt.terminal import harmless

__all__ = ["as_number", "curves", "is_wide", "scatter"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
"""Okabe and Ito's palette (2008), its yellow darker; for the best trials, in their order."""
OTHERS, CROSSES = "#B8BEC4", "#6E7781"
MOST_LINES, MOST_POINTS, MOST_PANELS, FEW_POINTS = 60, 300, 8, 40
"""Curves of a picture, points of a curve, options with a picture: what a page of less than 2 MB holds; and how few
points are marked."""
WIDE, NARROW = (9.0, 4.0), (5.4, 3.4)
"""Inches."""
GIVEN_UP = (Status.PRUNED, Status.FAILED)
SPANS_MAGNITUDES = 20.0
"""Greatest by least value from which an axis is logarithmic."""
MOST_LABELS, LONGEST_LABEL, LONGEST_NAME = 12, 18, 32


def curves(folder: Path, sweep: Sweep, trials: Sequence[Seen]) -> list[Any]:
    """The sweep's metric, and loss and margin of training, of all trials: a ``matplotlib.figure.Figure`` of each.

    Args:
        folder: of the sweep.
        sweep: what is compared.
        trials: best first; the first ones have colours and names.
    """
    note = "higher is better" if sweep.direction == "maximize" else "lower is better"
    figures = [draw_metric(folder, trials, sweep.metric, note, WIDE)]
    figures[0].axes[0].legend(*named(figures[0].axes[0]), fontsize="x-small", framealpha=0.7)
    figures += [draw_metric(folder, trials, metric, "training", NARROW) for metric in ("loss", "rewards/margins")]
    return figures


def draw_metric(folder: Path, trials: Sequence[Seen], metric: str, note: str, size: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    for place, item in reversed(list(enumerate(trials[:MOST_LINES]))):  # the best on top
        steps, values = thinned(*points(trial_rows(folder, item.trial.name), metric))
        colour = COLOURS[place] if place < len(COLOURS) else OTHERS
        label = short(item.trial.name, LONGEST_NAME) if place < len(COLOURS) else None
        dots = {"marker": "o", "markersize": 3} if len(steps) < FEW_POINTS else {}
        axes.plot(steps, values, color=colour, linewidth=1.6, label=label, **dots)
        if item.trial.status in GIVEN_UP and steps:
            axes.plot(steps[-1:], values[-1:], "x", color=colour, markersize=8)
    axes.set_title(f"{short(metric, LONGEST_NAME)} ({note})", fontsize="medium")
    axes.set_xlabel("optimizer step")
    axes.grid(alpha=0.3)
    return figure


def named(axes: Any) -> tuple[list[Any], list[str]]:
    """Handles and labels of a legend, the best first, as they were drawn last."""
    handles, labels = axes.get_legend_handles_labels()
    return handles[::-1], labels[::-1]


def thinned(steps: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """Evenly fewer points where there are many; the last one stays."""
    stride = math.ceil(len(steps) / MOST_POINTS)
    if stride <= 1:
        return steps, values
    places = [*range(0, len(steps) - 1, stride), len(steps) - 1]
    return [steps[place] for place in places], [values[place] for place in places]


def scatter(trials: Sequence[Seen], option: str, metric: str) -> Any:
    """An option beside the metric, a point for each trial; a cross: pruned or failed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=NARROW, layout="constrained")
    axes = figure.subplots()
    draw_option(axes, trials, option)
    axes.set_title(short(option, LONGEST_NAME), fontsize="medium")
    axes.set_ylabel(short(metric, LONGEST_NAME))
    axes.grid(alpha=0.3)
    return figure


def draw_option(axes: Any, trials: Sequence[Seen], option: str) -> None:
    measured = [item for item in trials if item.trial.last is not None]
    values = [as_number(item.trial.options.get(option)) for item in measured]
    if all(value is not None for value in values):
        numbers = [value for value in values if value is not None]
        if is_wide(numbers):
            axes.set_xscale("log")
    else:
        texts = [short(str(item.trial.options.get(option, "as the sweep")), LONGEST_LABEL) for item in measured]
        labels = sorted(set(texts))
        numbers = [float(labels.index(text)) for text in texts]
        axes.set_xticks(range(min(len(labels), MOST_LABELS)), labels[:MOST_LABELS], fontsize="x-small", rotation=20)
        axes.set_xlim(-0.5, len(labels) - 0.5)
    for item, number in zip(measured, numbers, strict=True):
        over = item.trial.status in GIVEN_UP
        axes.plot([number], [item.trial.last], "x" if over else "o", color=CROSSES if over else COLOURS[0])


def is_wide(numbers: Sequence[float]) -> bool:
    """Whether positive numbers span so much that equal ratios are to look equal."""
    return bool(numbers) and min(numbers) > 0 and max(numbers) / min(numbers) >= SPANS_MAGNITUDES


def as_number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def short(text: str, most: int) -> str:
    """A label: no mathematics, which a dollar sign would begin, and not too long."""
    text = harmless(text).replace("$", r"\$")
    return text if len(text) <= most else f"{text[: most - 1]}…"
