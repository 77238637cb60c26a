"""How the pairs moved, as a picture."""

from __future__ import annotations

from typing import Any

import numpy as np

from prefopt.inspection.comparing.statistics import PairScores

__all__ = ["draw_pairs"]

BASE, TUNED = "#0072B2", "#D55E00"
"""Okabe and Ito's (2008), as in a run's curves."""
BINS = 40
NUM_DOTS = 2000


def draw_pairs(scores: PairScores) -> Any:
    """The margins of both models, and where the two log-probs of each pair went, as a ``matplotlib.figure.Figure``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    margins, moves = figure.subplots(1, 2)
    sides = {"base": scores.base_chosen - scores.base_rejected, "tuned": scores.tuned_chosen - scores.tuned_rejected}
    edges = np.histogram_bin_edges(np.concatenate([*sides.values()]), BINS)
    for (name, values), colour in zip(sides.items(), (BASE, TUNED), strict=True):
        margins.hist(values, edges, alpha=0.55, color=colour, label=name)
    margins.axvline(0, color="grey", linewidth=0.8)
    margins.set(title="margins", xlabel="log p(chosen) - log p(rejected), nats", ylabel="pairs")
    margins.legend()
    chosen, rejected = scores.tuned_chosen - scores.base_chosen, scores.tuned_rejected - scores.base_rejected
    moves.plot(rejected[:NUM_DOTS], chosen[:NUM_DOTS], ".", color=TUNED, alpha=0.5, rasterized=len(chosen) > BINS)
    moves.axline((0, 0), slope=1, color="grey", linewidth=0.8)
    moves.set(
        title="shift of the log-probs: above the line is the right way", xlabel="rejected, nats", ylabel="chosen, nats"
    )
    for axes in (margins, moves):
        axes.grid(alpha=0.3)
    return figure
