"""Cutting sequences to ``max_length`` tokens, each completion with its prompt for itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

from prefopt.types import Branch, TokenizedExample

__all__ = ["TruncationMode", "truncate", "without_context_unscored"]

TruncationMode: TypeAlias = Literal["keep_start", "keep_end"]


def truncate(example: TokenizedExample, max_length: int | None, mode: TruncationMode) -> TokenizedExample:
    """The example with every sequence prompt + completion cut to ``max_length`` tokens.

    ``keep_start`` keeps the first ``max_length`` tokens, so that a prompt of that length leaves no completion.
    ``keep_end`` keeps the last ones. The longer completion of a row then keeps less of the prompt than the others;
    ``prompt_starts`` says where each one's prompt begins (what none of them keeps is cut from ``prompt_ids``).

    >>> example = TokenizedExample(0, [1, 2, 3], {"chosen": [4], "rejected": [5, 6]},
    ...                            {"chosen": [True], "rejected": [True, True]})
    >>> truncate(example, 4, "keep_end").prompt_starts
    {'chosen': 0, 'rejected': 1}
    >>> truncate(example, 4, "keep_start").completion_ids
    {'chosen': [4], 'rejected': [5]}
    """
    prompt_length = len(example.prompt_ids)
    longest = prompt_length + max(map(len, example.completion_ids.values()))
    if max_length is None or longest <= max_length:
        return example
    if mode == "keep_start":
        room = max(max_length - prompt_length, 0)
        return _with_completions(example, slice(0, room))
    starts: dict[Branch, int] = {
        branch: min(max(prompt_length + len(ids) - max_length, 0), prompt_length)
        for branch, ids in example.completion_ids.items()
    }
    common = min(starts.values())
    kept = _with_completions(example, slice(-max_length, None))
    starts = {branch: start - common for branch, start in starts.items()}
    return replace(kept, prompt_ids=example.prompt_ids[common:], prompt_starts=starts)


def _with_completions(example: TokenizedExample, kept: slice) -> TokenizedExample:
    return replace(
        example,
        completion_ids={branch: ids[kept] for branch, ids in example.completion_ids.items()},
        loss_masks={branch: mask[kept] for branch, mask in example.loss_masks.items()},
    )


def without_context_unscored(example: TokenizedExample) -> TokenizedExample:
    """The example where the first token of a sequence is not trained on: nothing stands before it to predict it."""

    def masked(branch: Branch) -> Sequence[bool]:
        mask = example.loss_masks[branch]
        has_prompt = example.prompt_starts.get(branch, 0) < len(example.prompt_ids)
        return mask if has_prompt or not mask else [False, *mask[1:]]

    return replace(example, loss_masks={branch: masked(branch) for branch in example.loss_masks})
