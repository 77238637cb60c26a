"""The rows of a data set, all or a sample, and the facts of those that can be read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from prefopt.data.image_text import PictureReader
from prefopt.data.images import undecoded
from prefopt.inspection.statistics.facts import RowFacts, StoredImages, row_facts
from prefopt.inspection.statistics.result import BrokenRow
from prefopt.inspection.statistics.tokens import NumberedRow, RowTokens, TokenCounter
from prefopt.types import Branch

__all__ = ["Found", "Reader", "numbered_rows", "sample_of"]

ROWS_AT_A_TIME = 128


@dataclass
class Found:
    """What has been read so far; ``tokens`` are those of ``facts``, in order, or none without a counter."""

    facts: list[RowFacts] = field(default_factory=list)
    tokens: list[RowTokens] = field(default_factory=list)
    broken: list[BrokenRow] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return len(self.facts) + len(self.broken)


@dataclass(frozen=True)
class Reader:
    """Reads rows; one that is broken is written down and left out.

    Args:
        branches: the completions that a run needs.
        counter: counts tokens; None: only text is looked at.
    """

    branches: tuple[Branch, ...]
    counter: TokenCounter | None

    def read(self, rows: Iterator[NumberedRow]) -> Iterator[Found]:
        """What was found, after every few rows; always the same object."""
        found, reader = Found(), StoredImages() if self.counter is None else self.counter.encoder.read_image
        while batch := list(islice(rows, ROWS_AT_A_TIME)):
            self._add(found, batch, reader)
            yield found

    def _add(self, found: Found, rows: Sequence[NumberedRow], reader: PictureReader | None) -> None:
        good: list[tuple[NumberedRow, RowFacts]] = []
        for number, row in rows:
            try:
                good.append(((number, row), row_facts(row, number, self.branches, reader)))
            except ValueError as error:
                found.broken.append(BrokenRow(number, str(error)))
        counted = [None] * len(good) if self.counter is None else self.counter([row for row, _ in good])
        for ((number, _), facts), tokens in zip(good, counted, strict=True):
            if isinstance(tokens, ValueError):
                found.broken.append(BrokenRow(number, str(tokens)))
                continue
            found.facts.append(facts)
            found.tokens += [] if tokens is None else [tokens]


def numbered_rows(
    dataset: Dataset | IterableDataset, columns: Sequence[str], max_rows: int
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Number and ``columns`` of every row; of more than ``max_rows`` that many, of a stream the first ones."""
    numbers: Any = range(max_rows)
    rows = undecoded(dataset).select_columns(list(columns))
    if isinstance(dataset, Dataset) and len(dataset) > max_rows:
        numbers = np.linspace(0, len(dataset) - 1, max_rows).astype(int).tolist()
        rows = rows.select(numbers)
    batches = rows.iter(batch_size=ROWS_AT_A_TIME)
    single = (
        dict(zip(batch, values, strict=True)) for batch in batches for values in zip(*batch.values(), strict=True)
    )
    return zip(numbers, single, strict=False)


def sample_of(dataset: Dataset | IterableDataset, num_rows: int, max_rows: int) -> str:
    """Which rows were read, where they may not be all; else nothing."""
    if isinstance(dataset, Dataset):
        return f"{num_rows:,} of {len(dataset):,} rows, evenly spaced" if len(dataset) > max_rows else ""
    return f"the first {num_rows:,} rows of a stream" if num_rows == max_rows else ""
