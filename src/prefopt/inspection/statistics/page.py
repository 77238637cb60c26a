"""The statistics of a data set as one HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from markupsafe import Markup

from prefopt.inspection.statistics.findings import findings, group_named, percent
from prefopt.inspection.statistics.plots import bias_figure, layouts_figure, lengths_figure
from prefopt.inspection.statistics.result import Statistics
from prefopt.inspection.statistics.terminal import overview
from prefopt.report.page import rendered, vector
from prefopt.terminal import harmless

__all__ = ["page"]

NUM_SHOWN = 200
"""Rows or groups of one kind that the page names; the JSON file has all."""
TEXT_LENGTH = 2000
"""Characters of a text whose length the data decide."""


def page(found: Statistics) -> str:
    """The page as text, well below 2 MB whatever the data hold."""
    return rendered(
        "stats.html",
        title=harmless(f"What is in {found.name[:TEXT_LENGTH]}"),
        overview=[(label, harmless(text[:TEXT_LENGTH])) for label, text in overview(found)],
        findings=findings(found),
        lengths={unit: list(length_rows(found, unit)) for unit in found.lengths},
        limits=list(limit_rows(found)),
        figures=list(figures(found)),
        lists=list(row_lists(found)),
        broken=[(row.row, row.message) for row in found.broken[:NUM_SHOWN]],
        num_broken=len(found.broken),
        num_shown=NUM_SHOWN,
    )


def length_rows(found: Statistics, unit: str) -> Iterator[tuple[str, ...]]:
    for name, one in found.lengths[unit].items():
        numbers = (one.median, one.mean, one.p90, one.p99, one.largest)
        yield (name, *(f"{number:,.0f}" for number in numbers))


def limit_rows(found: Statistics) -> Iterator[tuple[str, ...]]:
    for limit in found.limits:
        num_cut = len(limit.truncated) + len(limit.lost)
        share = percent(num_cut / max(found.num_rows, 1))
        yield f"{limit.max_length:,}", f"{num_cut:,}", share, f"{len(limit.lost):,}", limit.meaning


def figures(found: Statistics) -> Iterator[tuple[Markup, str]]:
    """Picture and caption."""
    if found.lengths:
        yield vector(lengths_figure(found)), "Lengths up to the 99th percentile; longer ones are in the last bar."
    if found.bias is not None:
        longer = percent(found.bias.share_longer)
        yield vector(bias_figure(found.bias)), f"In {longer} of the pairs the chosen completion is the longer one."
    if found.layouts is not None:
        caption = (
            f"Computed per pair, without the reference; padded in batches of {found.layouts.pairs_per_batch} pairs."
        )
        yield vector(layouts_figure(found.layouts, found.preparation.num_kept)), caption


def row_lists(found: Statistics) -> Iterator[tuple[str, int, str]]:
    """Name, number and rows of each kind of row that was found."""
    groups = found.duplicates
    grouped = (
        ("the same pair", groups.pairs),
        ("nearly the same pair", groups.near),
        ("the same pair, exchanged", groups.contradictory),
        ("the same prompt", groups.prompts),
    )
    for name, rows in grouped:
        if rows:
            yield name, len(rows), joined(list(map(group_named, rows)))
    rows = found.preparation
    single = {
        **rows.skipped,
        "cut to max_length": rows.truncated,
        "tokens merged at the end of the prompt": rows.merged,
    }
    for name, numbers in {**single, "with images": found.with_images}.items():
        if numbers:
            yield name, len(numbers), joined(list(map(str, numbers)))


def joined(items: Sequence[str]) -> str:
    more = f", and {len(items) - NUM_SHOWN:,} more" if len(items) > NUM_SHOWN else ""
    return ", ".join(items[:NUM_SHOWN]) + more
