"""The statistics of a data set as a terminal shows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefopt.inspection.statistics.findings import Finding, findings, percent
from prefopt.inspection.statistics.result import Distribution, Statistics
from prefopt.terminal import harmless

__all__ = ["print_statistics"]

BARS = " ▁▂▃▄▅▆▇█"
STYLES = {"bad": "bold red", "warn": "yellow", "good": "green"}
NUM_MESSAGES = 5
"""Broken rows whose messages are shown."""


def print_statistics(found: Statistics, console: Console) -> None:
    """Prints tables, then what is worth knowing in sentences."""
    console.print(Text(harmless(found.name), style="bold"))
    for label, text in overview(found):
        console.print(Text(f"  {label:<18}{harmless(text)}"), soft_wrap=True)
    for unit, parts in found.lengths.items():
        console.print()
        console.print(lengths_table(unit, parts))
    if found.limits:
        console.print()
        console.print(limits_table(found))
    console.print()
    for finding in findings(found):
        console.print(line_of(finding), soft_wrap=True)
    for row in found.broken[:NUM_MESSAGES]:
        console.print(Text(f"    {harmless(row.message)}"), soft_wrap=True)
    if len(found.broken) > NUM_MESSAGES:
        console.print(f"    .. and {len(found.broken) - NUM_MESSAGES:,} more")


def overview(found: Statistics) -> Iterator[tuple[str, str]]:
    """Label and text of what fits in a line."""
    yield "rows", f"{found.num_rows:,}" + (f" (a sample: {found.sample})" if found.sample else "")
    yield "columns", ", ".join(found.columns) + (f" (not read: {', '.join(found.unused)})" if found.unused else "")
    yield "format", "; ".join(f"{form} ({num:,} rows)" for form, num in found.formats.items()) or "not recognised"
    trained = found.preparation.num_kept
    yield "to be trained on", f"{trained:,} rows" + (f", tokens as {found.model} has them" if found.model else "")
    num_repeated = sum(len(group) - 1 for group in found.duplicates.prompts)
    yield "prompts", f"{num_repeated:,} rows have the prompt of an earlier row"
    if found.bias is not None:
        bias = found.bias
        longer = (
            f"chosen is longer in {percent(bias.share_longer)} of the pairs, as long in {percent(bias.share_equal)}"
        )
        yield "length", f"{longer}; in the median by {bias.median_difference:+,.0f} {bias.unit}"
    yield from conversations(found)
    if found.with_images:
        yield "images", f"in {len(found.with_images):,} rows"
    if found.layouts is not None:
        tokens, num = found.layouts, max(trained, 1)
        named = (("padded", tokens.padded), ("packed", tokens.packed), ("shared prompt", tokens.shared_prompt))
        yield "tokens per pair", ", ".join(f"{name} {total / num:,.0f}" for name, total in named)


def conversations(found: Statistics) -> Iterator[tuple[str, str]]:
    if found.conversations is None:
        return
    talks = found.conversations
    yield "turns", ", ".join(f"{turns} ({num:,} rows)" for turns, num in talks.turns.items())
    yield "roles", ", ".join(f"{role} ({num:,} rows)" for role, num in talks.roles.items())
    if talks.with_system:
        yield "system prompts", f"in {len(talks.with_system):,} rows, {talks.num_system_prompts:,} different ones"
    if talks.with_tools:
        yield "tools", f"in {len(talks.with_tools):,} rows"


def lengths_table(unit: str, parts: Mapping[str, Distribution]) -> Table:
    """Lengths of all parts in one unit, each with a histogram."""
    table = plain_table(unit, ["median", "mean", "p90", "p99", "longest"], "0 to p99")
    for name, one in parts.items():
        numbers = (one.median, one.mean, one.p90, one.p99, one.largest)
        table.add_row(name, *(f"{number:,.0f}" for number in numbers), bars(one.counts))
    return table


def limits_table(found: Statistics) -> Table:
    """What several limits cut."""
    table = plain_table("max_length", ["cut", "of the rows", "left out"], "")
    for limit in found.limits:
        num_cut = len(limit.truncated) + len(limit.lost)
        share = percent(num_cut / max(found.num_rows, 1))
        table.add_row(f"{limit.max_length:,}", f"{num_cut:,}", share, f"{len(limit.lost):,}", limit.meaning)
    return table


def plain_table(first: str, numbers: Sequence[str], last: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column(first, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(last, no_wrap=True)
    return table


def bars(counts: Sequence[int]) -> str:
    """A histogram in one line.

    >>> bars([0, 1, 8])
    ' ▁█'
    """
    highest = max(max(counts), 1)
    return "".join(BARS[-(-count * (len(BARS) - 1) // highest)] for count in counts)


def line_of(finding: Finding) -> Text:
    """A finding in one line, its level as a word too."""
    text = Text(f"{finding.level:<5}", style=STYLES[finding.level])
    text.append(finding.text, style="none")
    if finding.rows:
        text.append(f" ({finding.rows})", style="none")
    if finding.advice:
        text.append(f" {finding.advice}", style="dim")
    return text
