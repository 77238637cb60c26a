"""The pictures of a page about a data set."""

from __future__ import annotations

from typing import Any

import numpy as np

from prefopt.inspection.statistics.result import LayoutTokens, LengthBias, Statistics
from prefopt.report.curves import COLOURS

__all__ = ["bias_figure", "layouts_figure", "lengths_figure"]

WIDE, SMALL = (10.5, 3.2), (5.2, 3.0)
"""Inches."""
HATCHES = ("", "//", "..")


def lengths_figure(found: Statistics) -> Any:
    """A histogram of each part's lengths, in the finest unit that was counted, as a ``matplotlib.figure.Figure``."""
    from matplotlib.figure import Figure

    unit = next(name for name in ("tokens", "characters") if name in found.lengths)
    parts = {name: one for name, one in found.lengths[unit].items() if one.num_rows}
    figure = Figure(figsize=WIDE, layout="constrained")
    for axes, (name, one) in zip(
        np.atleast_1d(figure.subplots(1, len(parts), sharey=True)), parts.items(), strict=True
    ):
        edges = np.linspace(0, max(one.p99, 1), len(one.counts) + 1)
        axes.stairs(one.counts, edges, fill=True, color=COLOURS["train"])
        axes.axvline(one.median, color="black", linewidth=1)
        axes.set_title(f"{name}\nmedian {one.median:,.0f}", fontsize="small")
        axes.set_xlabel(unit, fontsize="small")
        axes.tick_params(labelsize="x-small")
    figure.axes[0].set_ylabel("rows", fontsize="small")
    return figure


def bias_figure(bias: LengthBias) -> Any:
    """How much longer chosen is than rejected: right of 0 the longer completion is preferred."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SMALL, layout="constrained")
    axes = figure.subplots()
    axes.stairs(bias.counts, bias.edges, fill=True, color=COLOURS["second"])
    axes.axvline(0, color="black", linewidth=1)
    axes.axvline(bias.median_difference, color=COLOURS["eval"], linestyle="--", label="median")
    axes.set_xlabel(f"{bias.unit} of chosen minus rejected")
    axes.set_ylabel("rows")
    axes.legend(fontsize="small")
    return figure


def layouts_figure(layouts: LayoutTokens, num_pairs: int) -> Any:
    """Tokens that the model computes for a pair, in each layout."""
    from matplotlib.figure import Figure

    names = ["padded", "packed", "shared prompt"]
    totals = [layouts.padded / num_pairs, layouts.packed / num_pairs, layouts.shared_prompt / num_pairs]
    figure = Figure(figsize=SMALL, layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh(names[::-1], totals[::-1], color=COLOURS["train"], hatch=HATCHES, edgecolor="white")
    axes.bar_label(drawn, labels=[f"{total:,.0f}" for total in totals[::-1]], padding=3, fontsize="small")
    axes.margins(x=0.15)
    axes.set_xlabel("tokens per pair")
    return figure
