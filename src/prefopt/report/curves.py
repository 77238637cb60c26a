"""A run's curves as one picture: what `prefopt.trainer.ending.record` has written of it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["draw", "png"]

Row = Mapping[str, Any]
Points = tuple[list[float], list[float]]
"""Steps, values."""

COLOURS = {"train": "#0072B2", "eval": "#D55E00", "second": "#009E73", "second_eval": "#CC79A7"}
"""Okabe and Ito's palette (2008), which the colour-blind can tell apart; lines and marks differ besides."""
SIZE, DOTS_PER_INCH = (13.0, 7.2), 110


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
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=DOTS_PER_INCH)
    figure.subplots_adjust(left=0.06, right=0.98, bottom=0.08, top=0.9, wspace=0.24, hspace=0.34)
    if title:
        figure.suptitle(title)
    for axes, panel in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        draw_panel(axes, panel, rows)
    return figure


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
        for place, (label, key) in enumerate(evaluations(rows, metric)):
            colour = COLOURS[f"{prefix}eval"]
            draw_line(
                axes, points(rows, key), f"{label} {name}", colour, ("--", ":", "-.")[place % 3], "osD"[place % 3]
            )
        broken = [row["step"] for row in rows if metric in row.get("not_finite", {})]
        if broken:
            axes.plot(
                broken,
                [0.02] * len(broken),
                "x",
                color="black",
                label="not finite",
                transform=axes.get_xaxis_transform(),
            )
    axes.set_title(panel.title, fontsize="medium")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(panel.unit)
    axes.grid(alpha=0.3)
    if panel.logarithmic and any(value > 0 for metric in panel.metrics for value in points(rows, metric)[1]):
        axes.set_yscale("log")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="small")
    else:
        axes.text(0.5, 0.5, "nothing logged", ha="center", va="center", transform=axes.transAxes, alpha=0.6)


def draw_line(axes: Any, line: Points, label: str, colour: str, style: str, mark: str) -> None:
    steps, values = line
    if steps:
        axes.plot(
            steps, values, linestyle=style, marker=mark or ("." if len(steps) == 1 else ""), color=colour, label=label
        )


def points(rows: Sequence[Row], metric: str) -> Points:
    """Where a metric was logged; of a step that has several values, the last."""
    found = {row["step"]: float("nan") if row[metric] is None else float(row[metric]) for row in rows if metric in row}
    steps = sorted(found)
    return steps, [found[step] for step in steps]


def evaluations(rows: Sequence[Row], metric: str) -> list[tuple[str, str]]:
    """Name of each evaluation set (``eval``, ``eval_<name>``) that has a metric, and its key in the rows."""
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith("eval_") and key.endswith(f"_{metric}"))
    return [(key.removesuffix(f"_{metric}"), key) for key in keys]
