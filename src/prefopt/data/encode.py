"""Batches of the user's rows as batches of prepared rows: the function that ``datasets.map`` runs."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from prefopt.data.columns import prepared_columns, prepared_row, table
from prefopt.data.encoder_decoder import tokenize_apart, truncate_apart
from prefopt.data.encoding import TextEncoder
from prefopt.data.errors import RowError, bad_row
from prefopt.data.image_roots import DEFAULT_ROOTS
from prefopt.data.image_text import ImageReader, make_reader
from prefopt.data.image_tokens import image_stretches
from prefopt.data.images import has_images
from prefopt.data.messages import is_blank
from prefopt.data.pair_numbers import PAIR_NUMBERS, pair_numbers
from prefopt.data.rankings import filled_up
from prefopt.data.render import tokenize_examples
from prefopt.data.report import PrepareReport, Status, skip_reason
from prefopt.data.schema import known_columns, parse_row
from prefopt.data.template import tokenizer_of
from prefopt.data.truncate import TruncationMode, can_stay_whole, truncate, without_context_unscored
from prefopt.types import RANKS, Branch, PreferenceExample, TokenizedExample

__all__ = ["RowEncoder", "refusal", "status_of_text", "unforeseen"]


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
    max_completion_length: int | None = None
    """Of encoder-decoder models, whose prompts and completions are apart; None: they are one sequence."""
    image_roots: tuple[str, ...] = DEFAULT_ROOTS
    context: int | None = None
    """Tokens that the model takes, where nothing is cut; longer rows are marked."""

    def __call__(self, columns: Mapping[str, Sequence[Any]], row_numbers: Sequence[int]) -> Any:
        known = [name for name in columns if name in known_columns(self.branches)]
        values = {name: columns[name] for name in known}
        rows = [{name: values[name][i] for name in known} for i in range(len(row_numbers))]
        try:
            encoded = self.encode(rows, row_numbers)
        except RowError as error:
            raise ValueError(f"{self.name} data, {error}") from error.__cause__
        except Exception as error:  # a library's, about something in these rows that none of the rules foresees
            raise ValueError(f"{self.name} data, {self._guilty(rows, row_numbers, error)}") from error
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
            with_images=has_images(self.processing_class),
            numbers=[column for column in PAIR_NUMBERS if column in given],
        )

    @cached_property
    def _text_encoder(self) -> TextEncoder:
        return TextEncoder(tokenizer_of(self.processing_class))

    @cached_property
    def read_image(self) -> ImageReader | None:
        """What reads the images of rows; None for a tokenizer."""
        return make_reader(self.processing_class, self.image_roots) if self.max_completion_length is None else None

    def encode(
        self, rows: Sequence[Mapping[str, Any]], row_numbers: Sequence[int]
    ) -> list[tuple[TokenizedExample, Status]]:
        """The rows as token ids within ``max_length``, in order; of those with nothing to learn from, no ids.

        Raises:
            RowError: a row is broken; the first one is named.
        """
        numbers = [pair_numbers(row, number) for row, number in zip(rows, row_numbers, strict=True)]
        encoded = [self.fit(*item) for item in self.tokenized(rows, row_numbers)]
        filled = [(filled_up(example, self.branches), flags) for example, flags in encoded]
        return [(replace(example, **own), flags) for (example, flags), own in zip(filled, numbers, strict=True)]

    def tokenized(
        self, rows: Sequence[Mapping[str, Any]], row_numbers: Sequence[int]
    ) -> list[tuple[TokenizedExample, Status]]:
        """The rows as token ids before any cut, in order; of those whose text has nothing to learn from, no ids.

        Raises:
            RowError: a row is broken; the first one is named.
        """
        numbered = zip(rows, row_numbers, strict=True)
        parsed = [parse_row(row, number, self.branches, self.read_image) for row, number in numbered]
        status = [status_of_text(item) if isinstance(item, PreferenceExample) else Status(0) for item in parsed]
        pairs = zip(parsed, status, strict=True)
        texts = [item for item, flags in pairs if isinstance(item, PreferenceExample) and not flags]
        tokenize = tokenize_examples if self.max_completion_length is None else tokenize_apart
        tokenized = iter(tokenize(texts, self.processing_class, self._text_encoder))
        found: list[tuple[TokenizedExample, Status]] = []
        for item, flags in zip(parsed, status, strict=True):
            if flags:
                found.append((_nothing(item, self.branches), flags))
            else:
                found.append(next(tokenized) if isinstance(item, PreferenceExample) else (item, flags))
        return found

    def mistakes(self, rows: Sequence[Mapping[str, Any]], row_numbers: Sequence[int]) -> list[RowError]:
        """What is wrong with each of the rows that are broken; nothing where all can be prepared."""
        try:
            self.encode(rows, row_numbers)
        except Exception as error:  # as in `__call__`
            pairs = zip(rows, row_numbers, strict=True)
            found = (self._guilty([row], [number], error) for row, number in pairs)
            return [item for item in found if item is not error and isinstance(item, RowError)]
        return []

    def _guilty(self, rows: Sequence[Mapping[str, Any]], row_numbers: Sequence[int], error: Exception) -> Exception:
        """What is wrong with the first row that cannot be prepared by itself."""
        for row, number in zip(rows, row_numbers, strict=True):
            try:
                self.encode([row], [number])
            except RowError as own:
                return own
            except Exception as own:
                return unforeseen(row, number, own)
        return error

    def fit(self, example: TokenizedExample, status: Status) -> tuple[TokenizedExample, Status]:
        """The example within ``max_length``, and why there is nothing to learn from it, if so."""
        if skip_reason(status):
            return _nothing(example, self.branches), status
        status |= _status_of_tokens(example, Status.EMPTY, Status.UNTRAINABLE, Status.EQUAL)
        stretches = image_stretches(example, self.read_image) if self.read_image and example.images else {}
        fitted = self._cut(example, stretches)
        if fitted is not example:
            status |= Status.TRUNCATED
        if not all(can_stay_whole(own, self.max_length, self.truncation_mode) for own in stretches.values()):
            status |= Status.IMAGES_CUT
        if self.context is not None and longest_sequence(example) > self.context:
            status |= Status.BEYOND_CONTEXT
        scored = without_context_unscored(fitted) if self.max_completion_length is None else fitted
        if not skip_reason(status):
            cut = (Status.CUT_AWAY, Status.CUT_AWAY, Status.EQUAL_WHEN_CUT)
            whole = (Status.UNTRAINABLE, Status.UNTRAINABLE, Status.EQUAL)
            status |= _status_of_tokens(scored, *(whole if fitted is example else cut))
        return (_nothing(example, self.branches) if skip_reason(status) else scored), status

    def _cut(self, example: TokenizedExample, whole: Mapping[Branch, tuple[int, int]]) -> TokenizedExample:
        """The example within the limits; itself where it is."""
        if self.max_completion_length is None:
            return truncate(example, self.max_length, self.truncation_mode, whole)
        limits = (self.max_length, self.truncation_mode, self.max_completion_length)
        return truncate_apart(example, *limits, self._text_encoder.special_ends)

    def _is_kept(self, example: TokenizedExample, status: Status) -> bool:
        assert self.report is not None
        reason = skip_reason(status)
        if reason and self.on_bad_row == "error":
            raise ValueError(refusal(self.name, example.row, reason))
        self.report.add(example.row, status)
        return reason is None


def longest_sequence(example: TokenizedExample) -> int:
    """Tokens of the prompt and the longest completion."""
    return len(example.prompt_ids) + max(map(len, example.completion_ids.values()))


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, array) else value


def unforeseen(row: Mapping[str, Any], number: int, error: Exception) -> RowError:
    """The error for a row on which a library fails."""
    fix = "Look at the row, and change it or leave it out."
    return bad_row(number, ", ".join(row), f"it cannot be prepared ({type(error).__name__}: {error})", fix)


def refusal(name: str, row: int, reason: str) -> str:
    """The message of ``on_bad_row="error"``."""
    return f"{name} data, row {row}: {reason}. Remove the row, or leave such rows out with on_bad_row='skip'."


def _nothing(example: PreferenceExample | TokenizedExample, branches: Sequence[Branch]) -> TokenizedExample:
    """What stands in for a row that will be left out."""
    empty: dict[Branch, list[Any]] = {branch: [] for branch in branches}
    return TokenizedExample(example.row, [], empty, empty, ref_sum_logps=example.ref_sum_logps)


def status_of_text(example: PreferenceExample) -> Status:
    """Whether a row has nothing to learn from, as far as its text tells."""
    if any(is_blank(completion) for completion in example.completions.values()):
        return Status.EMPTY
    return Status.EQUAL if _are_alike(example, example.completions) else Status(0)


def _status_of_tokens(example: TokenizedExample, empty: Status, untrainable: Status, equal: Status) -> Status:
    """The flag that fits: a completion without tokens, without a token to train on, or two sides alike."""
    if not all(example.completion_ids.values()):
        return empty
    if not all(any(mask) for mask in example.loss_masks.values()):
        return untrainable

    parts = (example.completion_ids, example.loss_masks, example.prompt_starts)
    return equal if _are_alike(example, *parts) else Status(0)


def _are_alike(example: PreferenceExample | TokenizedExample, *parts: Mapping[Branch, Any]) -> bool:
    """Whether all that are ranked have the same in each of ``parts``, and the same images."""
    ranks: list[Branch] = [branch for branch in parts[0] if branch in RANKS]
    return all(part.get("chosen") == part.get(rank) for part in (*parts, example.images) for rank in ranks)
