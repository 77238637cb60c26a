"""A run's curves as one picture: what `prefopt.trainer.ending.record` has written of it."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from prefopt.terminal import harmless

__all__ = [
    "PANELS",
    "Panel",
    "draw",
    "draw_line",
    "evaluations",
    "finish",
    "new_figure",
    "png",
    "points",
    "separate",
]

Row = Mapping[str, Any]
Points = tuple[list[float], list[float]]
"""Steps, values."""

COLOURS = {"train": "#0072B2", "eval": "#D55E00", "second": "#009E73", "second_eval": "#CC79A7"}
"""Okabe and Ito's palette (2008), which the colour-blind can tell apart; lines and marks differ besides."""
SIZE, DOTS_PER_INCH = (13.0, 7.2), 110
SIZE_OF_ONE = (4.6, 3.3)
MOST_POINTS = 400
"""Of a line, as many as its panel has columns of dots: a longer run is thinned, its spikes are kept."""
MOST_MARKS = 40
LONGEST_LABEL = 40
SIGN_OF_A_SET = "_rewards/margins"
MOST_SETS = 5
"""Evaluation sets that are drawn."""


@dataclass(frozen=True)
class Panel:
    """A picture among those of a run.

    Args:
        title: what it shows.
        unit: of its values.
        metrics: name in the rows -> name in the legend, one or two.
        logarithmic: whether its values span orders of magnitude.
    """

    title: str
    unit: str
    metrics: Mapping[str, str]
    logarithmic: bool = False


PANELS = (
    Panel("loss", "loss", {"loss": ""}),
    Panel("reward margin, chosen minus rejected", "reward", {"rewards/margins": ""}),
    Panel("reward accuracy", "share of pairs", {"rewards/accuracies": ""}),
    Panel("log-probs of the completions", "nats", {"logps/chosen": "chosen", "logps/rejected": "rejected"}),
    Panel("learning rate", "per step", {"learning_rate": ""}),
    Panel("gradient norm", "before clipping", {"grad_norm": ""}, logarithmic=True),
)


def draw(rows: Sequence[Row], title: str = "") -> Any:
    """The curves of a run as a ``matplotlib.figure.Figure``, without matplotlib's global state.

    Args:
        rows: of ``metrics.jsonl``; a value that is null is a gap, and one that was not finite is marked on the axis.
        title: above all panels.
    """
    figure = new_figure(SIZE)
    figure.subplots_adjust(left=0.06, right=0.98, bottom=0.08, top=0.9, wspace=0.24, hspace=0.34)
    if title:
        figure.suptitle(title)
    for axes, panel in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        draw_panel(axes, panel, rows)
    return figure


def separate(rows: Sequence[Row]) -> list[tuple[str, Any]]:
    """Title and figure of each panel by itself, for pages whose width is not known."""
    found = []
    for panel in PANELS:
        figure = new_figure(SIZE_OF_ONE)
        draw_panel(figure.add_subplot(), panel, rows)
        figure.subplots_adjust(left=0.2, right=0.97, bottom=0.15, top=0.91)
        found.append((panel.title, figure))
    return found


def new_figure(size: tuple[float, float]) -> Any:
    """An empty figure of this width and height in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, dpi=DOTS_PER_INCH)


def png(figure: Any) -> bytes:
    """A figure as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def draw_panel(axes: Any, panel: Panel, rows: Sequence[Row]) -> None:
    """Training as lines, evaluation as lines with marks, of each evaluation set."""
    for number, (metric, name) in enumerate(panel.metrics.items()):
        prefix = "second_" if number else ""
        draw_line(axes, points(rows, metric), f"train {name}", COLOURS["second" if number else "train"], "-", "")
        for place, (label, key) in enumerate(evaluations(rows, metric)[:MOST_SETS]):
            colour = COLOURS[f"{prefix}eval"]
            draw_line(
                axes, points(rows, key), f"{label} {name}", colour, ("--", ":", "-.")[place % 3], "osD"[place % 3]
            )
        broken = [row["step"] for row in rows if metric in (row.get("not_finite") or {})]
        if broken := broken[:: -(-len(broken) // MOST_MARKS) or 1]:
            axes.plot(
                broken,
                [0.02] * len(broken),
                "x",
                color="black",
                label="not finite",
                transform=axes.get_xaxis_transform(),
            )
    finish(axes, panel)


def finish(axes: Any, panel: Panel) -> None:
    """Title, units and legend, around the lines that were drawn."""
    axes.set_title(panel.title, fontsize="medium", parse_math=False)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(panel.unit)
    axes.grid(alpha=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    lines = [line for line in axes.get_lines() if line.get_transform() == axes.transData]
    if panel.logarithmic and any(value > 0 for line in lines for value in line.get_ydata()):
        axes.set_yscale("log")
    if axes.get_legend_handles_labels()[1]:
        for text in axes.legend(fontsize="small").get_texts():
            text.set_parse_math(False)  # the name of a set is no formula
    else:
        axes.text(0.5, 0.5, "nothing logged", ha="center", va="center", transform=axes.transAxes, alpha=0.6)


def draw_line(axes: Any, line: Points, label: str, colour: str, style: str, mark: str) -> None:
    """Draw a line, with marks where its points are few, or is one."""
    steps, values = line
    if steps:
        marked = (mark or ("." if len(steps) == 1 else "")) if len(steps) <= MOST_MARKS else ""
        name = harmless(label)[:LONGEST_LABEL]
        axes.plot(steps, values, linestyle=style, marker=marked, markersize=4, color=colour, label=name)


def points(rows: Sequence[Row], metric: str) -> Points:
    """Where a metric was logged, thinned; of a step that has several values, the last."""
    found = {row["step"]: number(row[metric]) for row in rows if metric in row}
    steps = sorted(found)
    return thinned(steps, [found[step] for step in steps])


def number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def thinned(steps: list[float], values: list[float]) -> Points:
    """At most `MOST_POINTS` points: of each stretch the lowest and the highest value, and a gap where all is one.

    >>> thinned([1, 2, 3], [0.1, 0.2, 0.3])
    ([1, 2, 3], [0.1, 0.2, 0.3])
    """
    if len(steps) <= MOST_POINTS:
        return steps, values
    size = -(-2 * len(steps) // MOST_POINTS)
    kept: list[int] = []
    for start in range(0, len(steps), size):
        stretch = range(start, min(start + size, len(steps)))
        finite = [place for place in stretch if math.isfinite(values[place])]
        ends = {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)} if finite else {start}
        kept += sorted(ends)
    return [steps[place] for place in kept], [values[place] for place in kept]


def evaluations(rows: Sequence[Row], metric: str) -> list[tuple[str, str]]:
    """Name of each evaluation set (``eval``, ``eval_<name>``) that has a metric, and its key in the rows.

    A set is known by its margins: ``eval_nll_loss`` is a metric of ``eval``, or the loss of a set called ``nll``.
    """
    names = dict.fromkeys(chain.from_iterable(rows))
    signs = [name for name in names if name.startswith("eval_") and name.endswith(SIGN_OF_A_SET)]
    labels = [name.removesuffix(SIGN_OF_A_SET) for name in signs]
    return [(label, key) for label in labels if (key := f"{label}_{metric}") in names]
