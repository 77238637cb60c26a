"""A data set read once, row by row, and what its rows add up to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from datasets import Dataset, IterableDataset

from prefopt.batching import GroupLengths
from prefopt.data.report import PrepareReport, Status, skip_reason
from prefopt.data.schema import check_columns, known_columns
from prefopt.inspection.statistics.duplicates import find_duplicates
from prefopt.inspection.statistics.facts import RowFacts
from prefopt.inspection.statistics.lengths import distribution, layout_tokens, length_bias
from prefopt.inspection.statistics.reading import Found, Reader, numbered_rows, sample_of
from prefopt.inspection.statistics.result import (
    Conversations,
    Distribution,
    LayoutTokens,
    LengthBias,
    Limit,
    Preparation,
    Statistics,
)
from prefopt.inspection.statistics.tokens import RowTokens, TokenCounter
from prefopt.types import COLUMN_OF_BRANCH, PAIR, Branch

__all__ = ["measure"]

LONGEST, WHOLE = "longest sequence", "whole pair"
"""Prompt and the longest completion, which ``max_length`` cuts; prompt and all completions."""

LOST_BY_CUTTING = Status.CUT_AWAY | Status.EQUAL_WHEN_CUT | Status.IMAGES_CUT
"""Why a row is left out that was not without the cut."""


def measure(
    dataset: Dataset | IterableDataset,
    branches: tuple[Branch, ...],
    *,
    name: str,
    counter: TokenCounter | None = None,
    meanings: Mapping[int, str] | None = None,
    model: str = "",
    pairs_per_batch: int = 8,
    max_rows: int = 100_000,
    progress: Callable[[int], None] = lambda num_rows: None,
) -> Statistics:
    """What is in a data set. Holds 1 to 2 KB for each row that is read, however long its text.

    Args:
        dataset: rows in any format of docs/data.md.
        branches: the completions that a run needs.
        name: what the set is called.
        counter: counts tokens; None: characters and words alone.
        meanings: limit of the counter -> whose it is.
        model: whose tokens these are.
        pairs_per_batch: pairs of a padded batch.
        max_rows: of a larger set that many are read: evenly spaced ones, of a stream the first.
        progress: called with the number of rows that were read, now and then.

    Raises:
        ValueError: the set is empty, or a column is missing that every row needs.
    """
    columns = columns_of(dataset, branches, name)
    used = [column for column in columns if column in known_columns(branches)]
    found = Found()
    for found in Reader(branches, counter).read(numbered_rows(dataset, used, max_rows)):
        progress(found.num_rows)
    facts, tokens = found.facts, found.tokens
    preparation, kept = prepared(facts, tokens, name)
    return Statistics(
        name=name,
        num_rows=found.num_rows,
        sample=sample_of(dataset, found.num_rows, max_rows),
        columns=columns,
        unused=tuple(column for column in columns if column not in used),
        formats=dict(Counter(fact.form for fact in facts).most_common()),
        broken=tuple(found.broken),
        preparation=preparation,
        duplicates=find_duplicates(facts),
        lengths=lengths_of(facts, tokens, branches),
        bias=bias_of(facts, tokens, kept),
        limits=limits_of(tokens, counter, meanings or {}),
        conversations=conversations_of(facts),
        with_images=tuple(fact.row for fact in facts if fact.num_images),
        layouts=layouts_of(tokens, kept, counter, pairs_per_batch),
        model=model,
    )


def columns_of(dataset: Dataset | IterableDataset, branches: tuple[Branch, ...], name: str) -> tuple[str, ...]:
    """The columns of the set.

    Raises:
        ValueError: it is empty, or a column is missing that every row needs.
    """
    columns = tuple(dataset.column_names or next(iter(dataset), {}))
    if not columns or (isinstance(dataset, Dataset) and not len(dataset)):
        raise ValueError(f"{name}: the data set is empty. Give one with at least one row.")
    check_columns(columns, branches)
    return columns


def prepared(facts: Sequence[RowFacts], tokens: Sequence[RowTokens], name: str) -> tuple[Preparation, set[int]]:
    """What a run would say of the rows, and which it trains on; by text alone where no tokens were counted."""
    status = {row.row: row.status[0] for row in tokens} if tokens else {fact.row: fact.status for fact in facts}
    report = PrepareReport(name)
    for row, flags in status.items():
        report.add(row, flags)

    def kept_with(flag: Status) -> tuple[int, ...]:
        return tuple(row for row, flags in status.items() if flags & flag and skip_reason(flags) is None)

    skipped = {reason: tuple(rows) for reason, rows in report.skipped.items()}
    flagged = (kept_with(flag) for flag in (Status.TRUNCATED, Status.MERGED, Status.REWRITTEN))
    kept = status.keys() - {row for rows in skipped.values() for row in rows}
    return Preparation(report.num_kept, skipped, *flagged), kept


def lengths_of(
    facts: Sequence[RowFacts], tokens: Sequence[RowTokens], branches: Sequence[Branch]
) -> dict[str, dict[str, Distribution]]:
    """Unit -> part -> its lengths. Tokens are those of rows that may be trained on, before any cut."""
    units: dict[str, list[tuple[int, ...]]] = {}
    for unit, rows in (("characters", [fact.characters for fact in facts]), ("words", [fact.words for fact in facts])):
        units[unit] = [row for row in rows if row]
    units["tokens"] = [(row.prompt, *row.completions) for row in tokens if any(row.completions)]
    names = ["prompt", *(COLUMN_OF_BRANCH[branch] for branch in branches)]
    return {unit: parts_of(rows, names) for unit, rows in units.items() if rows}


def parts_of(rows: Sequence[tuple[int, ...]], names: Sequence[str]) -> dict[str, Distribution]:
    """The lengths of each part, and of the parts together; rankings have fewer or more parts."""
    found = {name: [row[place] for row in rows if place < len(row)] for place, name in enumerate(names)}
    found[LONGEST] = [row[0] + max(row[1:]) for row in rows]
    found[WHOLE] = [sum(row) for row in rows]
    return {name: distribution(values) for name, values in found.items()}


def bias_of(facts: Sequence[RowFacts], tokens: Sequence[RowTokens], kept: set[int]) -> LengthBias | None:
    """Of the rows that are trained on; in tokens where they were counted."""
    if tokens:
        pairs = [row.completions[: len(PAIR)] for row in tokens if row.row in kept]
    else:
        pairs = [fact.characters[1:3] for fact in facts if fact.row in kept and fact.characters]
    return length_bias([pair[0] for pair in pairs], [pair[1] for pair in pairs], "tokens" if tokens else "characters")


def limits_of(
    tokens: Sequence[RowTokens], counter: TokenCounter | None, meanings: Mapping[int, str]
) -> tuple[Limit, ...]:
    """What each limit would cut, the lowest first."""
    if counter is None or not tokens:
        return ()
    found = []
    for place, encoder in enumerate(counter.limited):
        if encoder.max_length is None:
            continue
        cut = [row for row in tokens if row.status[place] & Status.TRUNCATED]
        found.append(
            Limit(
                max_length=encoder.max_length,
                meaning=meanings.get(encoder.max_length, ""),
                truncated=tuple(row.row for row in cut if skip_reason(row.status[place]) is None),
                lost=tuple(row.row for row in tokens if row.status[place] & LOST_BY_CUTTING),
            )
        )
    return tuple(sorted(found, key=lambda limit: limit.max_length))


def conversations_of(facts: Sequence[RowFacts]) -> Conversations | None:
    """Of the rows of messages; None where there are none."""
    rows = [fact for fact in facts if fact.roles]
    if not rows:
        return None
    return Conversations(
        num_rows=len(rows),
        turns=dict(sorted(Counter(fact.num_turns for fact in rows).items())),
        roles=dict(Counter(role for fact in rows for role in sorted(fact.roles)).most_common()),
        num_system_prompts=len({fact.system for fact in rows if fact.system}),
        with_system=tuple(fact.row for fact in rows if fact.system),
        with_tools=tuple(fact.row for fact in rows if fact.has_tools),
    )


def layouts_of(
    tokens: Sequence[RowTokens], kept: set[int], counter: TokenCounter | None, pairs_per_batch: int
) -> LayoutTokens | None:
    """Of the rows that are trained on, as they are cut; None for encoder-decoder models, whose layout is another."""
    rows = [row for row in tokens if row.row in kept]
    if not rows or counter is None or counter.encoder.max_completion_length is not None:
        return None
    lengths = GroupLengths(
        prompts=np.array([row.cut_prompt for row in rows], dtype=np.int64),
        starts=np.array([row.cut_starts for row in rows], dtype=np.int64),
        completions=np.array([row.cut_completions for row in rows], dtype=np.int64),
    )
    return layout_tokens(lengths, pairs_per_batch)
