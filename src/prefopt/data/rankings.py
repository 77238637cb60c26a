"""Rows that rank their completions: ``completions``, best to worst, in the place of ``chosen`` and ``rejected``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from prefopt.data.errors import bad_row, described
from prefopt.types import COLUMN_OF_BRANCH, PAIR, RANKS, Branch, TokenizedExample

__all__ = ["RANKED", "filled_up", "is_ranked", "ranked_row"]

RANKED = "completions"
"""The column."""


def is_ranked(row: Mapping[str, Any]) -> bool:
    """Whether the row gives its completions in one column; one that also has ``chosen`` means something else by it."""
    return row.get(RANKED) is not None and row.get(COLUMN_OF_BRANCH["chosen"]) is None


def ranked_row(
    row: Mapping[str, Any], row_number: int, branches: Sequence[Branch]
) -> tuple[Mapping[str, Any], tuple[Branch, ...]]:
    """The row with a column for each of its completions, and those of ``branches`` that it has.

    Args:
        row: column name -> value.
        row_number: place in the user's data set; messages name it.
        branches: the completions that are computed of rows that have as many.

    Raises:
        ValueError: the column holds no list, or too few or too many completions.

    >>> ranked_row({"completions": [" a", " b", " c"]}, 0, ("chosen", "rejected", "rank_3", "rank_4"))
    ({'chosen': ' a', 'rejected': ' b', 'rank_3': ' c'}, ('chosen', 'rejected', 'rank_3'))
    """
    ranks: list[Branch] = [branch for branch in branches if branch in RANKS]
    others: list[Branch] = [branch for branch in branches if branch not in RANKS]
    if not is_ranked(row):
        return row, (*PAIR, *others)
    value = row[RANKED]
    if not isinstance(value, list | tuple) or not all(isinstance(item, str | list | tuple) for item in value):
        fix = "Give a list of texts, or of lists of messages, best to worst."
        raise bad_row(row_number, RANKED, f"expected a list of completions, got {described(value)}", fix)
    if not 2 <= len(value) <= len(ranks):
        fix = f"Set num_completions (at most {len(RANKS)}), or cut the list." if len(value) > 2 else "Give two or more."
        problem = f"there are {len(value)} completions, and num_completions is {len(ranks)}"
        raise bad_row(row_number, RANKED, problem, fix)
    own = ranks[: len(value)]
    columns = {COLUMN_OF_BRANCH[rank]: item for rank, item in zip(own, value, strict=True)}
    return {**{name: item for name, item in row.items() if name != RANKED}, **columns}, (*own, *others)


def filled_up(example: TokenizedExample, branches: Sequence[Branch]) -> TokenizedExample:
    """The example with an empty completion for each of ``branches`` that it lacks, after chosen's prompt."""
    absent: list[Branch] = [branch for branch in branches if branch not in example.completion_ids]
    if not absent:
        return example
    empty: dict[Branch, Sequence[Any]] = {branch: [] for branch in absent}
    start = example.prompt_starts.get("chosen", 0)
    return replace(
        example,
        completion_ids={**example.completion_ids, **empty},
        loss_masks={**example.loss_masks, **empty},
        prompt_starts={**example.prompt_starts, **dict.fromkeys(absent, start)},
    )
