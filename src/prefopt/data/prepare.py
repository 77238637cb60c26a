"""A data set in any accepted format as token ids: once, in batches and in parallel, cached by content."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from uuid import uuid4

from datasets import Dataset, IterableDataset

from prefopt.data.cache import cache_key
from prefopt.data.columns import IMAGE_PARTS, features, prepared_columns
from prefopt.data.encode import RowEncoder, refusal
from prefopt.data.image_roots import DEFAULT_ROOTS
from prefopt.data.images import decoded_image, undecoded
from prefopt.data.pair_numbers import pair_numbers
from prefopt.data.report import PrepareReport, skip_reason
from prefopt.data.schema import check_columns
from prefopt.data.template_process import end_template_process
from prefopt.data.truncate import TruncationMode
from prefopt.terminal import harmless
from prefopt.types import COLUMN_OF_BRANCH, Branch, TokenizedExample

__all__ = ["PrepareOptions", "prepare_dataset", "prepare_report", "tokenized_example"]

_BATCH_ROWS = 128
_STREAM_BATCH_ROWS = 32
_REPORT = "_prefopt_report"


@dataclass(frozen=True)
class PrepareOptions:
    """How rows become token ids.

    Args:
        branches: completions that are needed; ``("chosen", "rejected")``, or with ``"gold"`` for TPO.
        max_length: tokens of prompt + completion that are kept; ``None``: all.
        truncation_mode: ``keep_start`` or ``keep_end``.
        num_proc: processes for sets that are not streamed.
        on_bad_row: what a row with nothing to learn from does: ``skip`` (counted and named) or ``error``.
        max_completion_length: of an encoder-decoder model, whose prompts and completions are sequences of their own:
            tokens of a completion that are kept, where ``max_length`` is the prompt's; ``None`` for other models.
        image_roots: folders and beginnings of URLs within which images must lie that rows name by path or URL.
        context: tokens that the model takes, where ``max_length`` is None: rows with more are counted and named.
    """

    branches: tuple[Branch, ...]
    max_length: int | None
    truncation_mode: TruncationMode
    num_proc: int | None = None
    on_bad_row: Literal["skip", "error"] = "skip"
    max_completion_length: int | None = None
    image_roots: tuple[str, ...] = DEFAULT_ROOTS
    context: int | None = None

    def __post_init__(self) -> None:
        for option, value, allowed in (
            ("truncation_mode", self.truncation_mode, ("keep_start", "keep_end")),
            ("on_bad_row", self.on_bad_row, ("skip", "error")),
        ):
            if value not in allowed:
                raise ValueError(f"{option} is {value!r}; set it to {' or '.join(map(repr, allowed))}.")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length is {self.max_length}; set it to at least 1, or None for no truncation.")


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    processing_class: Any,
    options: PrepareOptions,
    *,
    name: str,
    counted: Callable[[int], None] | None = None,
) -> Dataset | IterableDataset:
    """The rows that can be trained on, as token ids, cut to ``max_length``; a prepared set is returned as it is.

    Columns: ``row`` (number in ``dataset``), ``prompt_ids``, and for every completion ``<c>_ids`` and ``<c>_mask``
    (which tokens are trained on), with ``keep_end`` also ``<c>_prompt_start`` (index into ``prompt_ids`` of the first
    token kept for this completion), and ``ref_chosen_logps``, ``ref_rejected_logps``, ``weight``, ``margin`` where they
    were given. With a processor of images also ``images``, the row's images as ``{"bytes": .., "path": ..}``, and
    ``image_parts``, for each of them what it belongs to: prompt (0), chosen (1), rejected (2), gold (3), the
    third of a ranking (4) and so on.

    Args:
        dataset: rows in any format of docs/data.md.
        processing_class: tokenizer, or a processor that holds one.
        options: see :class:`PrepareOptions`.
        name: how messages call the set, e.g. ``"train"``.
        counted: called with the number of rows of each batch that is prepared, by the process that did it; of a
            stream it is not.

    Raises:
        TypeError: ``dataset`` is no data set.
        ValueError: a row is broken (row, column and fix are named), or no row is left (with the reasons). A stream
            raises these when it is read.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        fix = "Use Dataset.from_list, Dataset.from_dict or load_dataset; of a DatasetDict, give one of its splits."
        raise TypeError(f"{name} data: expected a Dataset or an IterableDataset, got {type(dataset).__name__}. {fix}")
    if isinstance(dataset, Dataset) and not len(dataset):
        PrepareReport(name).finish()
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if set(prepared_columns(options.branches)) <= set(columns):
        return dataset
    if columns:
        try:
            check_columns(columns, options.branches)
        except ValueError as error:
            raise ValueError(harmless(f"{name} data: {error}")) from None
    if isinstance(dataset, Dataset):
        return _prepare_rows(dataset, columns, processing_class, options, name, counted)
    return _prepare_stream(dataset, columns, processing_class, options, name)


def _prepare_rows(
    dataset: Dataset,
    columns: Sequence[str],
    processing_class: Any,
    options: PrepareOptions,
    name: str,
    counted: Callable[[int], None] | None,
) -> Dataset:
    settings = (options.branches, options.max_length, options.truncation_mode)
    apart = options.max_completion_length
    own = {"max_completion_length": apart, "image_roots": options.image_roots, "context": options.context}
    encode = RowEncoder(processing_class, *settings, name, **own)
    # What is made of a set in memory is not cached, and writing out a large vocabulary for a key takes long
    roots = [os.path.abspath(root) for root in options.image_roots]
    key = (
        cache_key(dataset, processing_class, *settings, apart, roots, options.context)
        if dataset.cache_files
        else uuid4().hex
    )
    mapped = undecoded(dataset).map(
        encode if counted is None else Counted(encode, counted),
        batched=True,
        batch_size=_BATCH_ROWS,
        with_indices=True,
        remove_columns=list(columns),
        features=features(encode.columns(columns)),
        num_proc=options.num_proc,
        new_fingerprint=key,
        desc=f"Tokenising {name} data",
    )
    end_template_process()
    report, kept = PrepareReport(name, context=options.context), []
    for row, status in enumerate(mapped.data.column("status").to_pylist()):
        report.add(row, status)
        reason = skip_reason(status)
        if reason is None:
            kept.append(row)
        elif options.on_bad_row == "error":
            raise ValueError(refusal(name, row, reason))
    report.finish()
    prepared = mapped.remove_columns(["status"])
    prepared = prepared if len(kept) == len(mapped) else prepared.select(kept)
    setattr(prepared, _REPORT, report)
    return prepared


@dataclass(frozen=True)
class Counted:
    """A `RowEncoder` that says how many rows it has done."""

    encode: RowEncoder
    counted: Callable[[int], None]

    def __call__(self, columns: Mapping[str, Sequence[Any]], row_numbers: Sequence[int]) -> dict[str, list[Any]]:
        encoded = self.encode(columns, row_numbers)
        self.counted(len(row_numbers))
        return encoded


class PreparedStream(IterableDataset):
    """A prepared stream: when it has been read to its end, it says what was skipped."""

    def __iter__(self) -> Iterator[Any]:
        report = prepare_report(self)
        report.restart()
        try:
            yield from super().__iter__()
        finally:
            end_template_process()
        report.finish()


def _prepare_stream(
    dataset: IterableDataset, columns: Sequence[str], processing_class: Any, options: PrepareOptions, name: str
) -> IterableDataset:
    report = PrepareReport(name, context=options.context)
    settings = (options.branches, options.max_length, options.truncation_mode)
    apart = options.max_completion_length
    own = (options.on_bad_row, report, apart, options.image_roots, options.context)
    encode = RowEncoder(processing_class, *settings, name, *own)
    stream = undecoded(dataset).map(
        encode,
        batched=True,
        batch_size=_STREAM_BATCH_ROWS,
        with_indices=True,
        remove_columns=list(columns),
        features=features(encode.columns(columns)),
    )
    stream.__class__ = PreparedStream  # `map` makes a plain IterableDataset, and offers no hook for the stream's end
    setattr(stream, _REPORT, report)
    return stream


def prepare_report(dataset: Dataset | IterableDataset) -> PrepareReport:
    """What :func:`prepare_dataset` skipped and noticed; ``dataset`` is what it returned, itself.

    Raises:
        ValueError: the set was not returned by ``prepare_dataset`` (sets derived from it do not count).
    """
    report = getattr(dataset, _REPORT, None)
    if report is None:
        raise ValueError("This data set has no report. Give the one that prepare_dataset returned, not one made of it.")
    return report


def tokenized_example(row: Mapping[str, Any], branches: Sequence[Branch]) -> TokenizedExample:
    """A prepared row as a :class:`~prefopt.types.TokenizedExample` with the completions of ``branches``."""
    columns: dict[Branch, str] = {branch: COLUMN_OF_BRANCH[branch] for branch in branches}
    given = row.get("ref_chosen_logps") is not None
    return TokenizedExample(
        row=row.get("row", -1),
        prompt_ids=row["prompt_ids"],
        completion_ids={branch: row[f"{column}_ids"] for branch, column in columns.items()},
        loss_masks={branch: row[f"{column}_mask"] for branch, column in columns.items()},
        ref_sum_logps={"chosen": row["ref_chosen_logps"], "rejected": row["ref_rejected_logps"]} if given else None,
        prompt_starts={branch: row.get(f"{column}_prompt_start", 0) for branch, column in columns.items()},
        images=_decoded_images(row, branches),
        **pair_numbers(row, row.get("row", -1)),
    )


def _decoded_images(row: Mapping[str, Any], branches: Sequence[Branch]) -> dict[str, list[Any]]:
    """``prompt`` or a branch -> its images, RGB, for those that have any."""
    images: dict[str, list[Any]] = {}
    for stored, number in zip(row.get("images") or (), row.get("image_parts") or (), strict=True):
        part = IMAGE_PARTS[number]
        if part != "prompt" and part not in branches:
            continue
        try:
            images.setdefault(part, []).append(decoded_image(stored))
        except OSError as error:
            place = f" ({stored['path']})" if stored.get("path") else ""
            raise OSError(
                f"row {row.get('row', -1)}: an image that was there when the data were prepared{place} cannot be read "
                f"({type(error).__name__}: {error}). Keep image files where they are until training ends."
            ) from error
    return images
