"""A row in any accepted format, as a ``PreferenceExample`` or, where it comes as token ids, a ``TokenizedExample``.

The format is found row by row, so that one data set may mix them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from prefopt.data.errors import bad_row, described, nearest
from prefopt.data.image_places import image_columns, place_images, read_columns
from prefopt.data.image_text import PictureReader
from prefopt.data.messages import parse_json, parse_messages
from prefopt.data.pair_numbers import PAIR_NUMBERS
from prefopt.data.prompts import shared_messages, shared_text
from prefopt.data.rankings import RANKED, is_ranked, ranked_row
from prefopt.data.token_rows import is_tokenized, parse_tokens
from prefopt.types import COLUMN_OF_BRANCH, RANKS, Branch, Message, PreferenceExample, TokenizedExample

__all__ = ["check_columns", "known_columns", "parse_row"]

Completion = str | list[Message]

_OPTIONAL_COLUMNS = ("prompt", "tools", "chat_template_kwargs", "ref_chosen_logps", "ref_rejected_logps")


def known_columns(branches: Sequence[Branch]) -> frozenset[str]:
    """The columns that are read; all others are left alone."""
    columns = [COLUMN_OF_BRANCH[branch] for branch in branches]
    suffixes = ("_ids", "_input_ids", "_labels")
    tokens = (f"{column}{suffix}" for column in ("prompt", *columns) for suffix in suffixes)
    return frozenset([*columns, *_OPTIONAL_COLUMNS, *image_columns(branches), *PAIR_NUMBERS, RANKED, *tokens])


def check_columns(columns: Sequence[str], branches: Sequence[Branch]) -> None:
    """Raises ValueError where a data set with these columns cannot be read, whatever its rows hold."""
    if is_tokenized(columns, branches):
        return
    ranked = is_ranked(dict.fromkeys(columns, ()))
    for column in (COLUMN_OF_BRANCH[branch] for branch in branches if branch not in (RANKS if ranked else RANKS[2:])):
        if column not in columns:
            raise ValueError(
                f"no column {column!r} (columns: {', '.join(columns) or 'none'}).{nearest(column, columns)} "
                f"Rename yours, e.g. with `columns: {{{column}: <your column>}}` in the data set's config or with "
                f"dataset.rename_column."
            )


def parse_row(
    row: Mapping[str, Any], row_number: int, branches: Sequence[Branch], read_image: PictureReader | None = None
) -> PreferenceExample | TokenizedExample:
    """One row of the user's data as an example.

    Args:
        row: column name -> value; see docs/data.md for the formats.
        row_number: place in the user's data set, from 0; messages name it.
        branches: the completions that are needed.
        read_image: reads the row's images; ``None``: a row with images is broken.

    Raises:
        ValueError: the row is broken; row, column and what to do are named.

    >>> parse_row({"chosen": "Sky? Blue.", "rejected": "Sky? Red."}, 0, ("chosen", "rejected")).prompt
    'Sky?'
    """
    row, branches = ranked_row(row, row_number, branches)
    given = read_columns(row, row_number, branches, read_image)
    ref_sum_logps = _reference_sums(row, row_number)
    if is_tokenized([name for name, value in row.items() if value is not None], branches):
        return parse_tokens(row, row_number, branches, ref_sum_logps, given, read_image)
    completions: dict[Branch, Completion] = {
        branch: _completion(row, row_number, COLUMN_OF_BRANCH[branch], read_image) for branch in branches
    }
    prompt, completions = _with_prompt(row, row_number, completions, read_image, one_sided=not given.keys() <= {""})
    images: Mapping[Branch, Sequence[Any]] = {}
    if read_image is not None:
        prompt, completions, images = place_images(prompt, completions, given, row_number, read_image.token)
    kwargs = parse_json(row.get("chat_template_kwargs"), row_number, "chat_template_kwargs") or {}
    tools = parse_json(row.get("tools"), row_number, "tools")
    for column, value, kind in (("tools", tools, list), ("chat_template_kwargs", kwargs, dict)):
        if value is not None and not isinstance(value, kind):
            raise bad_row(row_number, column, f"expected a {kind.__name__}, got {described(value)}", "Write one.")
    return PreferenceExample(row_number, prompt, completions, tools, kwargs, ref_sum_logps, images)


def _completion(row: Mapping[str, Any], row_number: int, column: str, read_image: PictureReader | None) -> Completion:
    if column not in row:
        columns = list(row)
        fix = f"Every row needs it (this one has: {', '.join(columns)}).{nearest(column, columns)}"
        raise bad_row(row_number, column, "the column is missing", fix)
    return _text_or_messages(row[column], row_number, column, read_image)


def _text_or_messages(value: Any, row_number: int, column: str, read_image: PictureReader | None) -> Completion:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return parse_messages(value, row_number, column, read_image)
    if value is None:
        fix = "Fill the value in or drop the row; for prompts inside the completions drop the column `prompt`."
        raise bad_row(row_number, column, "the value is None", fix)
    fix = "Convert the column to text, or to a list of messages {'role': .., 'content': ..}."
    raise bad_row(row_number, column, f"expected text or a list of messages, got {described(value)}", fix)


def _with_prompt(
    row: Mapping[str, Any],
    row_number: int,
    completions: dict[Branch, Completion],
    read_image: PictureReader | None,
    *,
    one_sided: bool,
) -> tuple[Completion, dict[Branch, Completion]]:
    """The prompt and the completions without it, all of them text or all of them messages.

    Completions that say the same may still differ, where images are ``one_sided``: of one branch and not of all.
    """
    kinds = {isinstance(completion, str) for completion in completions.values()}
    if len(kinds) > 1:
        columns = ", ".join(COLUMN_OF_BRANCH[branch] for branch in completions)
        raise bad_row(row_number, columns, "some are text and some are messages", "Write all of them the same way.")
    is_text = kinds == {True}
    if "prompt" not in row:
        return _split(completions, row_number, is_text, one_sided)
    prompt = _text_or_messages(row["prompt"], row_number, "prompt", read_image)
    if isinstance(prompt, str) == is_text:
        return prompt, completions
    if is_text:
        return prompt, {branch: [_assistant(completion)] for branch, completion in completions.items()}
    return _with_text_prompt(str(prompt), completions)


def _assistant(completion: Completion) -> Message:
    return {"role": "assistant", "content": completion}


def _with_text_prompt(
    prompt: str, completions: dict[Branch, Completion]
) -> tuple[Completion, dict[Branch, Completion]]:
    """A text prompt beside completions of messages: a user turn, unless the completions hold the prompt already."""
    conversations: list[Any] = list(completions.values())
    length = shared_messages(conversations) if all(conversations) else 0
    shared = conversations[0][:length]
    if any(message["role"] == "user" for message in shared):
        return shared, {branch: messages[length:] for branch, messages in completions.items()}
    return [{"role": "user", "content": prompt}] if prompt else [], completions


def _split(
    completions: dict[Branch, Completion], row_number: int, is_text: bool, one_sided: bool
) -> tuple[Completion, dict[Branch, Completion]]:
    """The prefix that all completions share, and what is left of each; an empty side leaves the prompt empty."""
    find = shared_text if is_text else shared_messages
    whole: list[Any] = list(completions.values())
    alike = all(whole[0] == other for branch, other in completions.items() if branch in RANKS)
    if not all(whole) or (alike and not one_sided):
        return "" if is_text else [], completions
    length = find(whole)
    if length == 0 and "gold" in completions and find(whole[:-1]) > 0:
        problem = "it does not begin with the implicit prompt, the one that chosen and rejected share"
        fix = "Put the prompt before it too, or give it as a column `prompt` and leave it out of all three."
        raise bad_row(row_number, COLUMN_OF_BRANCH["gold"], problem, fix)
    return whole[0][:length], {branch: completion[length:] for branch, completion in completions.items()}


def _reference_sums(row: Mapping[str, Any], row_number: int) -> dict[Branch, float] | None:
    """The reference log-probs that came with the row, nats; both sides or none."""
    given = {side: row[f"ref_{side}_logps"] for side in ("chosen", "rejected") if f"ref_{side}_logps" in row}
    if not given:
        return None
    for side in ("chosen", "rejected"):
        value = given.get(side)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            fix = "Give a finite number (the summed log-prob, nats) for both sides of every row, or drop both columns."
            raise bad_row(row_number, f"ref_{side}_logps", f"expected a number, got {described(value)}", fix)
    return {"chosen": float(given["chosen"]), "rejected": float(given["rejected"])}
