"""Rows that come as token ids."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from prefopt.data.errors import bad_row, described
from prefopt.data.image_text import ImageReader, PictureReader, RowImage
from prefopt.data.image_tokens import divided
from prefopt.data.prompts import common_prefix_length
from prefopt.types import COLUMN_OF_BRANCH, Branch, TokenizedExample

__all__ = ["is_tokenized", "parse_tokens"]

_SUFFIXES = ("_ids", "_input_ids")
IGNORED_LABEL = -100


def is_tokenized(columns: Collection[str], branches: Sequence[Branch]) -> bool:
    """Whether columns of these names hold completions as token ids (they then win over text columns)."""
    return all(_column(columns, COLUMN_OF_BRANCH[branch]) for branch in branches)


def _column(columns: Collection[str], name: str) -> str | None:
    return next((f"{name}{suffix}" for suffix in _SUFFIXES if f"{name}{suffix}" in columns), None)


def parse_tokens(
    row: Mapping[str, Any],
    row_number: int,
    branches: Sequence[Branch],
    ref_sum_logps: Mapping[Branch, float] | None,
    images: Mapping[str, Sequence[RowImage]],
    read_image: PictureReader | None,
) -> TokenizedExample:
    """The row's ids as they are: nothing is added, every completion token is trained on but those of images.

    With a column ``<side>_labels`` beside the ids (the older TRL spelling) ``<side>_input_ids`` is prompt and
    completion in one; then what the prompt shares with it is cut off, and labels of -100 are not trained on.
    The ids hold the tokens of ``images``, as many as the processor makes of them.
    """
    prompt_ids = _token_ids(row, row_number, "prompt")
    sequences: dict[Branch, list[int]] = {
        branch: _token_ids(row, row_number, COLUMN_OF_BRANCH[branch]) for branch in branches
    }
    labels: dict[Branch, Any] = {branch: row.get(f"{COLUMN_OF_BRANCH[branch]}_labels") for branch in branches}
    masks: dict[Branch, list[bool]] = {branch: [True] * len(ids) for branch, ids in sequences.items()}
    if all(value is not None for value in labels.values()):
        cut = min(common_prefix_length(prompt_ids, ids) for ids in sequences.values())
        prompt_ids = prompt_ids[:cut]
        for branch in branches:
            sequences[branch] = sequences[branch][cut:]
            masks[branch] = [label != IGNORED_LABEL for label in labels[branch]][cut:]
    for branch, ids in sequences.items():
        if len(masks[branch]) != len(ids):
            column = f"{COLUMN_OF_BRANCH[branch]}_labels"
            raise bad_row(row_number, column, "there are not as many labels as ids", "Give one label per token.")
    tokens = TokenizedExample(row_number, prompt_ids, sequences, masks, ref_sum_logps=ref_sum_logps)
    if not isinstance(read_image, ImageReader):
        return tokens
    return divided(tokens, {branch: images.get(branch) or images.get("", []) for branch in branches}, read_image)


def _token_ids(row: Mapping[str, Any], row_number: int, name: str) -> list[int]:
    column = _column([key for key, value in row.items() if value is not None], name)
    if column is None:
        fix = "Rows of token ids need ids for the prompt and for every completion (a prompt may be [])."
        raise bad_row(row_number, f"{name}_ids", "the column is missing or None", fix)
    value = row[column]
    if not isinstance(value, list | tuple) or not all(type(token) is int and token >= 0 for token in value):
        fix = "Give a list of whole numbers from 0."
        raise bad_row(row_number, column, f"expected token ids, got {described(value)}", fix)
    return list(value)
