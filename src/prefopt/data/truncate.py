"""Cutting sequences to ``max_length`` tokens, each completion with its prompt for itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

from prefopt.types import Branch, TokenizedExample

__all__ = ["TruncationMode", "can_stay_whole", "truncate", "without_context_unscored"]

TruncationMode: TypeAlias = Literal["keep_start", "keep_end"]


def truncate(
    example: TokenizedExample,
    max_length: int | None,
    mode: TruncationMode,
    whole: Mapping[Branch, tuple[int, int]] | None = None,
) -> TokenizedExample:
    """The example with every sequence prompt + completion cut to ``max_length`` tokens.

    ``keep_start`` keeps the first ``max_length`` tokens, so that a prompt of that length leaves no completion.
    ``keep_end`` keeps the last ones. The longer completion of a row then keeps less of the prompt than the others;
    ``prompt_starts`` says where each one's prompt begins (what none of them keeps is cut from ``prompt_ids``).

    A stretch of ``whole``, branch -> begin and end within prompt + completion, is not cut where it `can_stay_whole`:
    ``keep_end`` then keeps at least what follows its begin, and cuts what is too much at the completion's end.

    >>> example = TokenizedExample(0, [1, 2, 3], {"chosen": [4], "rejected": [5, 6]},
    ...                            {"chosen": [True], "rejected": [True, True]})
    >>> truncate(example, 4, "keep_end").prompt_starts
    {'chosen': 0, 'rejected': 1}
    >>> truncate(example, 4, "keep_start").completion_ids
    {'chosen': [4], 'rejected': [5]}
    >>> truncate(example, 4, "keep_end", {"rejected": (0, 2)}).completion_ids
    {'chosen': [4], 'rejected': [5]}
    """
    prompt_length = len(example.prompt_ids)
    longest = prompt_length + max(map(len, example.completion_ids.values()))
    if max_length is None or longest <= max_length:
        return example
    stretches = whole or {}
    begins: dict[Branch, int] = dict.fromkeys(example.completion_ids, 0)
    if mode == "keep_end":
        for branch, ids in example.completion_ids.items():
            total = prompt_length + len(ids)
            begins[branch] = min(max(total - max_length, 0), stretches.get(branch, (total, total))[0])
    kept = {
        branch: slice(max(begin - prompt_length, 0), max(begin + max_length - prompt_length, 0))
        for branch, begin in begins.items()
    }
    cut = replace(
        example,
        completion_ids={branch: ids[kept[branch]] for branch, ids in example.completion_ids.items()},
        loss_masks={branch: mask[kept[branch]] for branch, mask in example.loss_masks.items()},
    )
    if mode == "keep_start":
        return cut
    starts: dict[Branch, int] = {branch: min(begin, prompt_length) for branch, begin in begins.items()}
    common = min(starts.values())
    starts = {branch: start - common for branch, start in starts.items()}
    return replace(cut, prompt_ids=example.prompt_ids[common:], prompt_starts=starts)


def can_stay_whole(stretch: tuple[int, int], max_length: int | None, mode: TruncationMode) -> bool:
    """Whether `truncate` can keep all of a stretch of a sequence.

    >>> can_stay_whole((2, 5), 3, "keep_start"), can_stay_whole((2, 5), 3, "keep_end")
    (False, True)
    """
    begin, end = stretch
    return max_length is None or (end if mode == "keep_start" else end - begin) <= max_length


def without_context_unscored(example: TokenizedExample) -> TokenizedExample:
    """The example where the first token of a sequence is not trained on: nothing stands before it to predict it."""

    def masked(branch: Branch) -> Sequence[bool]:
        mask = example.loss_masks[branch]
        has_prompt = example.prompt_starts.get(branch, 0) < len(example.prompt_ids)
        return mask if has_prompt or not mask else [False, *mask[1:]]

    return replace(example, loss_masks={branch: masked(branch) for branch in example.loss_masks})
