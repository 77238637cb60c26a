"""Rows as the model will see them: prepared by the function that prepares them for training, and shown beside it.

A row goes through `RowEncoder` twice: with the run's options, whose ids and loss mask are shown, and without a limit,
which gives what truncation cuts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from datasets import Dataset, IterableDataset

from prefopt.data import PrepareOptions, tokenized_example
from prefopt.data.columns import prepared_columns
from prefopt.data.encode import RowEncoder, refusal
from prefopt.data.images import image_token_ids, undecoded
from prefopt.data.report import Status, skip_reason
from prefopt.data.schema import check_columns, known_columns
from prefopt.data.template import tokenizer_of
from prefopt.data.template_process import end_template_process
from prefopt.inspection.preview.cuts import kept_places
from prefopt.inspection.preview.tokens import Kind, Piece, Vocabulary, pieces_of, vocabulary, with_sizes
from prefopt.terminal import harmless
from prefopt.types import Branch, TokenizedExample

__all__ = ["RowPreview", "Sequences", "preview_rows"]

MOST_CHARACTERS = 500
"""Of a value of a row that has no tokens to show."""


@dataclass(frozen=True)
class Sequences:
    """A completion of a row with its prompt, as pieces."""

    prompt: tuple[Piece, ...]
    completion: tuple[Piece, ...]
    images: tuple[tuple[int, int], ...] = ()
    """Width and height of the images that belong to the completion, in the order of their places."""


@dataclass(frozen=True)
class RowPreview:
    """What the model sees of a row."""

    row: int
    """Number in the user's data set, from 0."""
    branches: Mapping[Branch, Sequences] = field(default_factory=dict)
    """Without those that a ranking lacks; empty where there are no tokens to show."""
    prompt_images: tuple[tuple[int, int], ...] = ()
    skipped: str | None = None
    """Why training leaves the row out."""
    problem: str | None = None
    """Why the row cannot be prepared: the message at which a run would end."""
    given: Mapping[str, str] = field(default_factory=dict)
    """Column -> its value as text, shortened; of rows without tokens to show."""
    is_merged: bool = False
    """Whether tokens merge across the end of the prompt."""
    is_rewritten: bool = False
    """Whether the chat template rewrites earlier turns, so that a completion of several turns is trained on whole."""
    is_beyond_context: bool = False
    """Whether it has more tokens than the model takes, and nothing is cut."""
    weight: float | None = None
    target_margin: float | None = None
    ref_sum_logps: Mapping[Branch, float] | None = None
    """Reference log-probs that came with the data, nats."""


@dataclass(frozen=True)
class Previewer:
    """Prepares and shows one row after the other."""

    processing_class: Any
    options: PrepareOptions
    name: str
    words: Vocabulary
    as_trained: RowEncoder
    uncut: RowEncoder

    def __call__(self, row: Mapping[str, Any], number: int) -> RowPreview:
        branches = self.options.branches
        if set(prepared_columns(branches)) <= set(row):
            example = tokenized_example(row, branches)
            return self.shown(example, example, Status(0))
        try:
            example, status = self.encoded(self.as_trained, row, number)
        except ValueError as error:
            return RowPreview(number, problem=str(error), given=self.given(row))
        reason = skip_reason(status)
        whole = self.encoded(self.uncut, row, number)[0] if reason or status & Status.TRUNCATED else example
        if not reason:
            return self.shown(example, whole, status)
        shown = self.shown(without_loss(whole), whole, status) if any(whole.completion_ids.values()) else None
        stops = refusal(self.name, number, reason) if self.options.on_bad_row == "error" else None
        return replace(shown or RowPreview(number, given=self.given(row)), skipped=reason, problem=stops)

    def encoded(self, encode: RowEncoder, row: Mapping[str, Any], number: int) -> tuple[TokenizedExample, Status]:
        """The row as ``encode`` prepares it, and what was noticed."""
        [prepared] = encode({name: [value] for name, value in row.items()}, [number]).to_pylist()
        return tokenized_example(prepared, self.options.branches), Status(prepared["status"])

    def given(self, row: Mapping[str, Any]) -> dict[str, str]:
        known = known_columns(self.options.branches)
        values = {name: value for name, value in row.items() if name in known}
        return {name: shortened_text(str(value)) for name, value in values.items()}

    def shown(self, example: TokenizedExample, whole: TokenizedExample, status: Status) -> RowPreview:
        """The row with the tokens of ``whole``; those that ``example`` lacks are shown as cut."""
        branches: list[Branch] = [branch for branch, ids in whole.completion_ids.items() if ids]
        return RowPreview(
            row=example.row,
            branches={branch: self.sequences(example, whole, branch) for branch in branches},
            prompt_images=sizes(whole.images.get("prompt", ())),
            is_merged=bool(status & Status.MERGED),
            is_rewritten=bool(status & Status.REWRITTEN),
            is_beyond_context=bool(status & Status.BEYOND_CONTEXT),
            weight=example.weight,
            target_margin=example.target_margin,
            ref_sum_logps=example.ref_sum_logps,
        )

    def sequences(self, example: TokenizedExample, whole: TokenizedExample, branch: Branch) -> Sequences:
        is_apart, mode = self.options.max_completion_length is not None, self.options.truncation_mode
        prompt_ids = example.prompt_ids[example.prompt_starts.get(branch, 0) :]
        prompt: list[Kind] = ["cut"] * len(whole.prompt_ids)
        for place in kept_places(whole.prompt_ids, prompt_ids, mode):
            prompt[place] = "prompt"
        completion: list[Kind] = ["cut"] * len(whole.completion_ids[branch])
        # A completion loses its beginning where nothing is left of what stands before it
        cut_at = "keep_end" if mode == "keep_end" and not prompt_ids and not is_apart else "keep_start"
        places = kept_places(whole.completion_ids[branch], example.completion_ids[branch], cut_at)
        for place, is_trained in zip(places, example.loss_masks[branch], strict=True):
            completion[place] = "trained" if is_trained else "untrained"
        parts = ((whole.prompt_ids, prompt), (whole.completion_ids[branch], completion))
        before, after = self.apart(parts) if is_apart else self.together(parts)
        of_prompt, images = (sizes(whole.images.get(part, ())) for part in ("prompt", branch))
        return Sequences(with_sizes(before, of_prompt), with_sizes(after, images), images)

    def together(self, parts: Any) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
        """Prompt and completion as one text."""
        (prompt_ids, prompt), (completion_ids, completion) = parts
        ids, kinds = [*prompt_ids, *completion_ids], prompt + completion
        return pieces_of(ids, kinds, tokenizer_of(self.processing_class), self.words, len(prompt_ids))

    def apart(self, parts: Any) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
        """Prompt and completion as a text of an encoder and one of a decoder."""
        tokenizer = tokenizer_of(self.processing_class)
        prompt, completion = (pieces_of(ids, kinds, tokenizer, self.words, 0)[1] for ids, kinds in parts)
        return prompt, completion


def preview_rows(
    dataset: Dataset | IterableDataset,
    numbers: Sequence[int],
    processing_class: Any,
    options: PrepareOptions,
    *,
    name: str,
) -> list[RowPreview]:
    """What the model sees of rows ``numbers`` of a data set, in ascending order.

    Args:
        dataset: rows in any format of docs/data.md, or prepared ones.
        numbers: of rows, from 0.
        processing_class: tokenizer, or a processor that holds one.
        options: the run's, as `prefopt.trainer.rows.prepare_options` makes them.
        name: how messages call the set, e.g. ``"train"``.

    Raises:
        ValueError: a column is missing, or there is no row of such a number. A row that cannot be prepared is shown
            with its `RowPreview.problem`.
    """
    columns = dataset.column_names
    if columns and not set(prepared_columns(options.branches)) <= set(columns):
        try:
            check_columns(columns, options.branches)
        except ValueError as error:
            raise ValueError(harmless(f"{name} data: {error}")) from None
    show = previewer(processing_class, options, name)
    try:
        return [show(row, number) for number, row in picked(dataset, sorted(set(numbers)), name)]
    finally:
        end_template_process()


def previewer(processing_class: Any, options: PrepareOptions, name: str) -> Previewer:
    """What shows rows under these options."""
    is_apart = options.max_completion_length is not None
    uncut = replace(options, max_length=None, max_completion_length=sys.maxsize if is_apart else None)
    words = vocabulary(tokenizer_of(processing_class), image_token_ids(processing_class))
    encoders = (row_encoder(processing_class, own, name) for own in (options, uncut))
    return Previewer(processing_class, options, name, words, *encoders)


def row_encoder(processing_class: Any, options: PrepareOptions, name: str) -> RowEncoder:
    """What prepares rows under these options, in training too."""
    return RowEncoder(
        processing_class,
        options.branches,
        options.max_length,
        options.truncation_mode,
        name,
        max_completion_length=options.max_completion_length,
        image_roots=options.image_roots,
        context=options.context,
    )


def picked(
    dataset: Dataset | IterableDataset, numbers: Sequence[int], name: str
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows with their numbers; images as they are stored."""
    rows = undecoded(dataset)
    if isinstance(dataset, Dataset):
        if numbers and numbers[-1] >= len(dataset):
            raise no_such_row(name, numbers[-1], len(dataset))
        yield from ((number, rows[number]) for number in numbers)
        return
    wanted, count = set(numbers), 0
    numbered: Iterable[tuple[int, Any]] = enumerate(islice(rows, max(numbers, default=-1) + 1))
    for number, row in numbered:
        count = number + 1
        if number in wanted:
            yield number, row
    if numbers and count <= numbers[-1]:
        raise no_such_row(name, numbers[-1], count)


def no_such_row(name: str, number: int, count: int) -> ValueError:
    """The error for a number that no row has."""
    there = f"they are numbered from 0 to {count - 1}" if count else "it is empty"
    return ValueError(f"--rows: there is no row {number}: the {name} data has {count} rows ({there}).")


def without_loss(example: TokenizedExample) -> TokenizedExample:
    """The example with no token that is trained on, as of a row that is left out."""
    return replace(example, loss_masks={branch: [False] * len(mask) for branch, mask in example.loss_masks.items()})


def sizes(images: Iterable[Any]) -> tuple[tuple[int, int], ...]:
    """Width and height of each picture."""
    return tuple(image.size for image in images)


def shortened_text(text: str) -> str:
    more = len(text) - MOST_CHARACTERS
    return text if more <= 0 else f"{text[:MOST_CHARACTERS]} .. and {more:,} more characters"
