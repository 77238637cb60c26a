"""Batches of the user's rows as batches of prepared rows: the function that ``datasets.map`` runs."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from prefopt.data.columns import prepared_columns, prepared_row, table
from prefopt.data.encoding import TextEncoder
from prefopt.data.messages import is_blank
from prefopt.data.render import tokenize_examples
from prefopt.data.report import PrepareReport, Status, skip_reason
from prefopt.data.schema import known_columns, parse_row
from prefopt.data.template import tokenizer_of
from prefopt.data.truncate import TruncationMode, truncate, without_context_unscored
from prefopt.types import Branch, PreferenceExample, TokenizedExample

__all__ = ["RowEncoder", "refusal"]


@dataclass(frozen=True)
class RowEncoder:
    """Called with the columns of a batch and its row numbers, returns the columns of the prepared rows.

    Without a ``report`` every row gives one row of an Arrow table, and a column ``status`` says which have nothing to
    learn from. With one (streams), those are left out and counted there, or refused with ``on_bad_row="error"``.
    """

    processing_class: Any
    branches: tuple[Branch, ...]
    max_length: int | None
    truncation_mode: TruncationMode
    name: str
    on_bad_row: str = "skip"
    report: PrepareReport | None = None

    def __call__(self, columns: Mapping[str, Sequence[Any]], row_numbers: Sequence[int]) -> Any:
        known = [name for name in columns if name in known_columns(self.branches)]
        values = {name: columns[name] for name in known}
        rows = [{name: values[name][i] for name in known} for i in range(len(row_numbers))]
        try:
            encoded = self._encode(rows, row_numbers)
        except ValueError as error:
            raise ValueError(f"{self.name} data, {error}") from error.__cause__
        if self.report is not None:
            encoded = [item for item in encoded if self._is_kept(*item)]
        prepared = [prepared_row(example, status) for example, status in encoded]
        kinds = self.columns(known)
        if self.report is None:
            return table(prepared, kinds)
        return {name: [plain(row[name]) for row in prepared] for name in kinds}

    def columns(self, given: Collection[str]) -> dict[str, str]:
        """The columns of the prepared rows, from rows with the columns ``given``, and what each holds."""
        return prepared_columns(
            self.branches,
            with_reference="ref_chosen_logps" in given,
            with_starts=self.max_length is not None and self.truncation_mode == "keep_end",
            with_status=self.report is None,
        )

    @cached_property
    def _text_encoder(self) -> TextEncoder:
        return TextEncoder(tokenizer_of(self.processing_class))

    def _encode(
        self, rows: Sequence[Mapping[str, Any]], row_numbers: Sequence[int]
    ) -> list[tuple[TokenizedExample, Status]]:
        parsed = [parse_row(row, number, self.branches) for row, number in zip(rows, row_numbers, strict=True)]
        status = [_status_of_text(item) if isinstance(item, PreferenceExample) else Status(0) for item in parsed]
        pairs = zip(parsed, status, strict=True)
        texts = [item for item, flags in pairs if isinstance(item, PreferenceExample) and not flags]
        tokenized = iter(tokenize_examples(texts, self.processing_class, self._text_encoder))
        encoded: list[tuple[TokenizedExample, Status]] = []
        for item, flags in zip(parsed, status, strict=True):
            if flags:
                encoded.append((_nothing(item, self.branches), flags))
            elif isinstance(item, PreferenceExample):
                encoded.append(self._fit(*next(tokenized)))
            else:
                encoded.append(self._fit(item, Status(0)))
        return encoded

    def _fit(self, example: TokenizedExample, status: Status) -> tuple[TokenizedExample, Status]:
        """The example within ``max_length``, and why there is nothing to learn from it, if so."""
        status |= _status_of_tokens(example, Status.EMPTY, Status.UNTRAINABLE, Status.EQUAL)
        fitted = truncate(example, self.max_length, self.truncation_mode)
        if fitted is not example:
            status |= Status.TRUNCATED
        scored = without_context_unscored(fitted)
        if not skip_reason(status):
            cut = (Status.CUT_AWAY, Status.CUT_AWAY, Status.EQUAL_WHEN_CUT)
            whole = (Status.UNTRAINABLE, Status.UNTRAINABLE, Status.EQUAL)
            status |= _status_of_tokens(scored, *(whole if fitted is example else cut))
        return (_nothing(example, self.branches) if skip_reason(status) else scored), status

    def _is_kept(self, example: TokenizedExample, status: Status) -> bool:
        assert self.report is not None
        reason = skip_reason(status)
        if reason and self.on_bad_row == "error":
            raise ValueError(refusal(self.name, example.row, reason))
        self.report.add(example.row, status)
        return reason is None


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, array) else value


def refusal(name: str, row: int, reason: str) -> str:
    """The message of ``on_bad_row="error"``."""
    return f"{name} data, row {row}: {reason}. Remove the row, or leave such rows out with on_bad_row='skip'."


def _nothing(example: PreferenceExample | TokenizedExample, branches: Sequence[Branch]) -> TokenizedExample:
    """What stands in for a row that will be left out."""
    empty: dict[Branch, list[Any]] = {branch: [] for branch in branches}
    return TokenizedExample(example.row, [], empty, empty, ref_sum_logps=example.ref_sum_logps)


def _status_of_text(example: PreferenceExample) -> Status:
    if any(is_blank(completion) for completion in example.completions.values()):
        return Status.EMPTY
    return Status.EQUAL if example.completions["chosen"] == example.completions["rejected"] else Status(0)


def _status_of_tokens(example: TokenizedExample, empty: Status, untrainable: Status, equal: Status) -> Status:
    """The flag that fits: a completion without tokens, without a token to train on, or two sides alike."""
    if not all(example.completion_ids.values()):
        return empty
    if not all(any(mask) for mask in example.loss_masks.values()):
        return untrainable

    parts = (example.completion_ids, example.loss_masks, example.prompt_starts)
    return equal if all(part.get("chosen") == part.get("rejected") for part in parts) else Status(0)
