"""How many tokens pairs have, without reading the tokens: what micro-batches by a budget are planned from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from prefopt.types import COLUMN_OF_BRANCH, Branch

__all__ = ["GroupLengths", "image_counts", "lengths_of_rows", "lengths_of_set"]

Column: TypeAlias = Callable[[str], NDArray[np.int64]]
"""Name of a column -> [n] a number of each row."""

READ_ROWS = 1000
"""Rows whose tokens are gathered at a time, where a set was shuffled or selected from."""


@dataclass(frozen=True)
class GroupLengths:
    """Tokens of the parts of n prepared rows, int64."""

    prompts: NDArray[np.int64]
    """[n]"""
    starts: NDArray[np.int64]
    """[n, B] index of the first prompt token that each completion keeps."""
    completions: NDArray[np.int64]
    """[n, B]"""

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, indices: Sequence[int]) -> GroupLengths:
        """The lengths of these rows, in this order."""
        chosen = np.asarray(indices, dtype=np.int64)
        return GroupLengths(self.prompts[chosen], self.starts[chosen], self.completions[chosen])

    @property
    def sequences(self) -> NDArray[np.int64]:
        """[n, B] each completion with what it keeps of the prompt."""
        return self.prompts[:, None] - self.starts + self.completions

    @property
    def totals(self) -> NDArray[np.int64]:
        """[n] prompt and completions, each once."""
        return self.prompts + self.completions.sum(1)


def lengths_of_set(dataset: Any, branches: Sequence[Branch]) -> GroupLengths:
    """The lengths of a prepared ``datasets.Dataset``, from the offsets that Arrow keeps of its lists.

    Args:
        dataset: prepared rows.
        branches: the completions that are computed.
    """
    columns = [column for column in columns_of(branches) if column in dataset.column_names]
    tables = dataset.select_columns(columns).with_format("arrow").iter(READ_ROWS)
    parts = [lengths_of_rows([], branches), *(lengths_of_table(table, branches) for table in tables)]
    return GroupLengths(
        prompts=np.concatenate([part.prompts for part in parts]),
        starts=np.concatenate([part.starts for part in parts]),
        completions=np.concatenate([part.completions for part in parts]),
    )


def lengths_of_table(table: Any, branches: Sequence[Branch]) -> GroupLengths:
    """The lengths of the rows of an Arrow table."""

    def length(column: str) -> NDArray[np.int64]:
        return np.asarray(pc.call_function("list_value_length", [table.column(column)]), dtype=np.int64)

    def start(column: str) -> NDArray[np.int64]:
        if column not in table.column_names:  # only truncation at the start writes it
            return np.zeros(len(table), dtype=np.int64)
        return np.asarray(table.column(column), dtype=np.int64)

    return measured(branches, length, start)


def image_counts(dataset: Any) -> NDArray[np.int64]:
    """[n] how many images each row of a prepared ``datasets.Dataset`` has, without reading them."""
    if "images" not in dataset.column_names:
        return np.zeros(len(dataset), dtype=np.int64)
    tables = dataset.select_columns(["images"]).with_format("arrow").iter(READ_ROWS)
    counts = [pc.call_function("list_value_length", [table.column("images")]) for table in tables]
    return np.concatenate([np.asarray(column.fill_null(0), dtype=np.int64) for column in counts])


def lengths_of_rows(rows: Sequence[Mapping[str, Any]], branches: Sequence[Branch]) -> GroupLengths:
    """The same for prepared rows that have been read, such as those of a stream."""
    return measured(
        branches,
        lambda column: np.array([len(row[column]) for row in rows], dtype=np.int64),
        lambda column: np.array([row.get(column, 0) for row in rows], dtype=np.int64),
    )


def columns_of(branches: Sequence[Branch]) -> list[str]:
    """The columns that lengths are read from."""
    completions = [COLUMN_OF_BRANCH[branch] for branch in branches]
    return ["prompt_ids", *(f"{name}_{kind}" for name in completions for kind in ("ids", "prompt_start"))]


def measured(branches: Sequence[Branch], length: Column, start: Column) -> GroupLengths:
    """The lengths, from the length of a list column and the value of a column of prompt starts."""
    completions = [COLUMN_OF_BRANCH[branch] for branch in branches]
    return GroupLengths(
        prompts=length("prompt_ids"),
        starts=np.stack([start(f"{name}_prompt_start") for name in completions], axis=1),
        completions=np.stack([length(f"{name}_ids") for name in completions], axis=1),
    )
