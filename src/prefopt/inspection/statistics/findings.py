"""What is worth knowing of a data set, in sentences, each with the rows that it is about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from prefopt.inspection.statistics.result import CONTEXT, MAX_LENGTH, LayoutTokens, LengthBias, Limit, Statistics

__all__ = ["Finding", "findings", "group_named", "percent", "rows_named"]

NUM_NAMED = 8
"""Rows or groups that a line names."""
MUCH_LONGER = 0.6
"""Share of the pairs of different lengths whose chosen completion is the longer one, from which it is said."""
MANY_CUT = 0.01
"""Share of the rows that ``max_length`` cuts from which it is said."""


@dataclass(frozen=True)
class Finding:
    """One line.

    Args:
        level: ``bad`` stops a run, ``warn`` costs something, ``good`` is how it should be.
        text: what it is.
        rows: the rows, or groups of rows, in a few words.
        advice: what to do.
    """

    level: Literal["bad", "warn", "good"]
    text: str
    rows: str = ""
    advice: str = ""


def findings(found: Statistics) -> list[Finding]:
    """The lines, the worst first."""
    lines = [
        *broken(found),
        *skipped(found),
        *repeated(found),
        *([] if found.bias is None else length_bias(found.bias)),
        *(line for limit in found.limits if MAX_LENGTH in limit.meaning for line in cut(limit, found)),
        *tokenised(found),
        *([] if found.layouts is None else [saved(found.layouts)]),
    ]
    order = ("bad", "warn", "good")
    return sorted(lines, key=lambda line: order.index(line.level))


def broken(found: Statistics) -> Iterator[Finding]:
    if found.broken:
        advice = "A run stops at the first of them. Mend them or leave them out."
        named = rows_named([row.row for row in found.broken])
        text = f"{counted(len(found.broken), found.num_rows, '')} cannot be read."
        yield Finding("bad", text, named, advice)
    if not found.preparation.num_kept:
        yield Finding("bad", "There is no row to train on.")


def skipped(found: Statistics) -> Iterator[Finding]:
    for reason, rows in found.preparation.skipped.items():
        text = f"{counted(len(rows), found.num_rows)} left out: {reason}."
        yield Finding("warn", text, rows_named(rows), "Runs leave them out and go on; with on_bad_row=error they stop.")


def repeated(found: Statistics) -> Iterator[Finding]:
    groups = found.duplicates
    num_extra = sum(len(group) - 1 for group in groups.pairs)
    if num_extra:
        text = f"{counted(num_extra, found.num_rows)} an earlier row once more: same prompt, same completions."
        yield Finding("warn", text, groups_named(groups.pairs), "Each copy adds weight to its pair. Keep one of each.")
    if groups.near:
        num_extra = sum(len(group) - 1 for group in groups.near)
        text = f"{counted(num_extra, found.num_rows)} nearly the same as another: at least 80 % of the text is shared."
        advice = "Look at some. Across training and evaluation sets they make the evaluation too good."
        yield Finding("warn", text, groups_named(groups.near), advice)
    if groups.contradictory:
        text = (
            f"{counted(sum(map(len, groups.contradictory)), found.num_rows)} contradicted by another: the same pair, "
        )
        text += "with chosen and rejected exchanged."
        yield Finding("warn", text, groups_named(groups.contradictory), "They cancel each other. Keep one or none.")


def length_bias(bias: LengthBias) -> Iterator[Finding]:
    unequal = 1 - bias.share_equal
    if unequal and bias.share_longer / unequal >= MUCH_LONGER:
        text = f"In {percent(bias.share_longer)} of the pairs chosen is the longer completion, "
        text += f"by {bias.median_difference:+,.0f} {bias.unit} in the median."
        advice = (
            "A model learns length from this too: watch the length of its samples. SimPO and LD-DPO (ld_alpha) help."
        )
        yield Finding("warn", text, "", advice)


def cut(limit: Limit, found: Statistics) -> Iterator[Finding]:
    num_cut = len(limit.truncated) + len(limit.lost)
    if num_cut > MANY_CUT * found.num_rows:
        text = f"{counted(num_cut, found.num_rows)} cut to {limit.max_length:,} tokens ({limit.meaning}), "
        text += f"{len(limit.lost):,} of them left out."
        raising = "Take a model with a longer context" if CONTEXT in limit.meaning else "Raise max_length"
        yield Finding("warn", text, rows_named(limit.lost or limit.truncated), f"{raising}, or leave them out.")


def tokenised(found: Statistics) -> Iterator[Finding]:
    rows = found.preparation
    if rows.merged:
        text = f"In {counted(len(rows.merged), found.num_rows, '')} tokens merge across the end of the prompt."
        advice = (
            "The completion starts where the two tokenisations part. End prompts of plain text with a line break, say."
        )
        yield Finding("warn", text, rows_named(rows.merged), advice)
    if rows.rewritten:
        text = f"In {counted(len(rows.rewritten), found.num_rows, '')} the chat template rewrites earlier turns."
        advice = "Such completions are trained on whole; a template with {% generation %} markers avoids it."
        yield Finding("warn", text, rows_named(rows.rewritten), advice)


def saved(layouts: LayoutTokens) -> Finding:
    shared = layouts.shared_prompt
    text = f"Shared prompts save a factor of {layouts.packed / shared:.2f} in tokens, and no padding another "
    text += f"{layouts.padded / layouts.packed:.2f} (against padded batches of {layouts.pairs_per_batch} pairs)."
    return Finding("good", text)


def counted(num: int, of: int, verb: str = " is") -> str:
    """How many rows, with the verb that follows them.

    >>> counted(1, 200), counted(6, 1000), counted(6, 1000, "")
    ('1 of 200 rows (0.5 %) is', '6 of 1,000 rows (0.6 %) are', '6 of 1,000 rows (0.6 %)')
    """
    verb = verb if num == 1 or not verb else " are"
    return f"{num:,} of {of:,} rows ({percent(num / of)}){verb}"


def percent(share: float) -> str:
    """A share in percent, with a decimal where it is small.

    >>> percent(0.006), percent(0.554), percent(0.0), percent(0.00004)
    ('0.6 %', '55 %', '0 %', '< 0.1 %')
    """
    if 0 < share < 0.0005:
        return "< 0.1 %"
    return f"{100 * share:.1f} %" if 0 < share < 0.0995 else f"{100 * share:.0f} %"


def rows_named(rows: Sequence[int]) -> str:
    """The first few row numbers.

    >>> rows_named([3, 4]), rows_named([7])
    ('rows 3, 4', 'row 7')
    """
    numbers = ", ".join(map(str, rows[:NUM_NAMED]))
    return f"row{'s' if len(rows) > 1 else ''} {numbers}{', ..' if len(rows) > NUM_NAMED else ''}"


def groups_named(groups: Sequence[Sequence[int]]) -> str:
    """The first few groups of rows.

    >>> groups_named([(3, 8), (5, 6, 9)])
    'rows 3 = 8, 5 = 6 = 9'
    """
    named = ", ".join(map(group_named, groups[:NUM_NAMED]))
    return f"rows {named}{', ..' if len(groups) > NUM_NAMED else ''}"


def group_named(group: Sequence[int]) -> str:
    """The first few rows of a group.

    >>> group_named([5, 6, 9])
    '5 = 6 = 9'
    """
    return " = ".join(map(str, group[:NUM_NAMED])) + (" = .." if len(group) > NUM_NAMED else "")
