"""Every row of a set: which are broken, which are left out, and how long the others are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from numpy.typing import NDArray

from prefopt.batching import lengths_of_set
from prefopt.data import PrepareOptions, prepare_dataset
from prefopt.data.encode import RowEncoder
from prefopt.data.errors import RowError
from prefopt.data.images import undecoded
from prefopt.data.prepare import prepare_report
from prefopt.data.report import PrepareReport
from prefopt.data.schema import check_columns, known_columns
from prefopt.types import COLUMN_OF_BRANCH

__all__ = ["CheckedRows", "Lengths", "check_rows"]

BATCH_ROWS = 128
STREAMED_ROWS = 10_000
"""Of a stream that are looked at: it may have no end."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of one part of the rows that are kept, as they are trained on."""

    part: str
    mean: float
    median: float
    high: float
    """95 of 100 are at most as long."""
    most: int


@dataclass
class CheckedRows:
    """What was found out about one set."""

    name: str
    num_rows: int
    is_stream: bool = False
    broken: list[RowError] = field(default_factory=list)
    message: str | None = None
    """Why the set as a whole cannot be used."""
    report: PrepareReport = field(default_factory=lambda: PrepareReport(""))
    """What became of the rows that are not broken, by their numbers in the user's set."""
    lengths: list[Lengths] = field(default_factory=list)
    prepared: Dataset | None = None
    """The rows that can be trained on; None where there are none."""


def check_rows(dataset: Any, processing_class: Any, options: PrepareOptions, name: str) -> CheckedRows:
    """Prepares the set as a run does; where broken rows stand in the way, finds all of them and goes on without.

    Args:
        dataset: the user's; of a stream the first `STREAMED_ROWS` rows are read.
        processing_class: tokenizer or processor.
        options: of the run; rows with nothing to learn from are left out and reported, whatever they say.
        name: of the set, in messages.
    """
    options = replace(options, on_bad_row="skip")
    is_stream = isinstance(dataset, IterableDataset)
    rows = Dataset.from_list(list(islice(dataset, STREAMED_ROWS))) if is_stream else dataset
    checked = CheckedRows(name, len(rows), is_stream)
    numbers: Sequence[int] = range(len(rows))
    try:
        prepared = prepare_dataset(rows, processing_class, options, name=name)
    except ValueError as error:
        checked.broken = list(broken_rows(rows, processing_class, options, name))
        if not checked.broken:
            checked.message = str(error)
            return checked
        numbers = sorted(set(numbers) - {found.row for found in checked.broken})
        try:
            prepared = prepare_dataset(rows.select(numbers), processing_class, options, name=name)
        except ValueError:  # none is left, which the broken rows say already
            return checked
    assert isinstance(prepared, Dataset), "what is prepared of a Dataset is one"
    checked.report = renumbered(prepare_report(prepared), numbers)
    if checked.broken:
        own = [numbers[row] for row in prepared["row"]]
        prepared = prepared.remove_columns("row").add_column("row", own)  # type: ignore[call-arg]
    checked.prepared = prepared
    checked.lengths = list(lengths_of(prepared, options))
    return checked


def broken_rows(rows: Dataset, processing_class: Any, options: PrepareOptions, name: str) -> Iterator[RowError]:
    """What is wrong with each row that cannot be prepared; nothing where it is the columns that are wrong."""
    try:
        check_columns(rows.column_names, options.branches)
    except ValueError:
        return
    settings = (options.branches, options.max_length, options.truncation_mode)
    own = {"max_completion_length": options.max_completion_length, "image_roots": options.image_roots}
    encode = RowEncoder(processing_class, *settings, name, **own)
    known = known_columns(options.branches)
    rows = undecoded(rows)  # type: ignore[assignment]
    for start in range(0, len(rows), BATCH_ROWS):
        numbers = range(start, min(start + BATCH_ROWS, len(rows)))
        batch = rows[start : start + BATCH_ROWS]
        columns = {column: values for column, values in batch.items() if column in known}
        yield from encode.mistakes([{name: columns[name][i] for name in columns} for i in range(len(numbers))], numbers)


def renumbered(report: PrepareReport, numbers: Sequence[int]) -> PrepareReport:
    """The report with the numbers that rows have in the user's set.

    Args:
        report: of some of its rows.
        numbers: of these rows.
    """
    skipped = {reason: [numbers[row] for row in rows] for reason, rows in report.skipped.items()}
    return replace(report, skipped=skipped, beyond_context=[numbers[row] for row in report.beyond_context])


def lengths_of(prepared: Dataset, options: PrepareOptions) -> Iterator[Lengths]:
    """Of the prompt, of each completion, and of prompt and completion together."""
    lengths = lengths_of_set(prepared, options.branches)
    yield summarised("prompt", lengths.prompts)
    for index, branch in enumerate(options.branches):
        yield summarised(COLUMN_OF_BRANCH[branch], lengths.completions[:, index])
    yield summarised("prompt + longest completion", lengths.sequences.max(1))


def summarised(part: str, tokens: NDArray[np.int64]) -> Lengths:
    """How long a part is: [n] tokens of each row."""
    median, high = np.percentile(tokens, (50, 95))
    return Lengths(part, float(tokens.mean()), float(median), float(high), int(tokens.max()))
