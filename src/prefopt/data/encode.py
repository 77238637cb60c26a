"""Batches of the user's rows as batches of prepared rows: the function that ``datasets.map`` runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefopt.data.messages import is_blank
from prefopt.data.render import tokenize_examples
from prefopt.data.report import PrepareReport, Status, skip_reason
from prefopt.data.schema import known_columns, parse_row
from prefopt.data.truncate import TruncationMode, truncate, without_context_unscored
from prefopt.types import COLUMN_OF_BRANCH, Branch, PreferenceExample, TokenizedExample

__all__ = ["RowEncoder", "prepared_columns"]


@dataclass(frozen=True)
class RowEncoder:
    """Called with the columns of a batch and its row numbers, returns the columns of the prepared rows.

    Without a ``report`` every row gives one row, and a column ``status`` says which have nothing to learn from. With
    one (streams), those are left out and counted there, or refused with ``on_bad_row="error"``.
    """

    processing_class: Any
    branches: tuple[Branch, ...]
    max_length: int | None
    truncation_mode: TruncationMode
    name: str
    on_bad_row: str = "skip"
    report: PrepareReport | None = None

    def __call__(self, columns: Mapping[str, Sequence[Any]], row_numbers: Sequence[int]) -> dict[str, list[Any]]:
        known = [name for name in columns if name in known_columns(self.branches)]
        values = {name: columns[name] for name in known}
        rows = [{name: values[name][i] for name in known} for i in range(len(row_numbers))]
        try:
            encoded = self._encode(rows, row_numbers)
        except ValueError as error:
            raise ValueError(f"{self.name} data, {error}") from error.__cause__
        if self.report is not None:
            encoded = [item for item in encoded if self._is_kept(*item)]
        with_reference = "ref_chosen_logps" in known
        with_status = self.report is None
        names = prepared_columns(self.branches, with_reference, self._cuts_prompts, with_status)
        prepared = [_prepared_row(example, status, self.branches) for example, status in encoded]
        return {name: [row[name] for row in prepared] for name in names}

    @property
    def _cuts_prompts(self) -> bool:
        return self.max_length is not None and self.truncation_mode == "keep_end"

    def _encode(
        self, rows: Sequence[Mapping[str, Any]], row_numbers: Sequence[int]
    ) -> list[tuple[TokenizedExample, Status]]:
        parsed = [parse_row(row, number, self.branches) for row, number in zip(rows, row_numbers, strict=True)]
        status = [_status_of_text(item) if isinstance(item, PreferenceExample) else Status(0) for item in parsed]
        pairs = zip(parsed, status, strict=True)
        texts = [item for item, flags in pairs if isinstance(item, PreferenceExample) and not flags]
        tokenized = iter(tokenize_examples(texts, self.processing_class))
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


def refusal(name: str, row: int, reason: str) -> str:
    """The message of ``on_bad_row="error"``."""
    return f"{name} data, row {row}: {reason}. Remove the row, or leave such rows out with on_bad_row='skip'."


def prepared_columns(
    branches: Sequence[Branch], with_reference: bool, with_starts: bool, with_status: bool
) -> dict[str, str]:
    """The columns of a prepared set -> ``ids``, ``mask``, ``int`` or ``float``."""
    kinds = {"row": "int", "prompt_ids": "ids"}
    for column in (COLUMN_OF_BRANCH[branch] for branch in branches):
        kinds |= {f"{column}_ids": "ids", f"{column}_mask": "mask"}
        kinds |= {f"{column}_prompt_start": "int"} if with_starts else {}
    kinds |= {"ref_chosen_logps": "float", "ref_rejected_logps": "float"} if with_reference else {}
    return kinds | ({"status": "int"} if with_status else {})


def _prepared_row(example: TokenizedExample, status: Status, branches: Sequence[Branch]) -> dict[str, Any]:
    row: dict[str, Any] = {"row": example.row, "prompt_ids": example.prompt_ids, "status": int(status)}
    for branch in branches:
        column = COLUMN_OF_BRANCH[branch]
        row[f"{column}_ids"] = example.completion_ids[branch]
        row[f"{column}_mask"] = example.loss_masks[branch]
        row[f"{column}_prompt_start"] = example.prompt_starts.get(branch, 0)
    for branch, value in (example.ref_sum_logps or {}).items():
        row[f"ref_{branch}_logps"] = value
    return row


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
