"""Rows of encoder-decoder models: prompt and completions are sequences of their own, each with its special tokens.

A text gets what the tokenizer itself puts around one (T5: EOS; BART: BOS and EOS), a completion what it puts around a
target, which for models of translation names another language. A conversation is rendered and cut where its prompt
ends, as for other models, and gets the same special tokens where the template has not written them. A completion ends
with EOS once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from prefopt.data.encoding import TextEncoder
from prefopt.data.errors import check_text
from prefopt.data.render import tokenize_examples
from prefopt.data.report import Status
from prefopt.data.truncate import TruncationMode
from prefopt.types import COLUMN_OF_BRANCH, Branch, PreferenceExample, TokenizedExample

__all__ = ["tokenize_apart", "truncate_apart"]


def tokenize_apart(
    examples: Sequence[PreferenceExample], processing_class: Any, encode: TextEncoder
) -> list[tuple[TokenizedExample, Status]]:
    """The examples as token ids of an encoder and of a decoder, in order, each with what was noticed.

    Raises:
        ValueError: the chat template fails on a row, which is named.
    """
    conversations = [example for example in examples if example.is_conversational]
    tokenized = iter(tokenize_examples(conversations, processing_class, encode))
    texts = iter(_tokenize_texts([example for example in examples if not example.is_conversational], encode))
    return [
        _with_special_ends(*next(tokenized), encode) if example.is_conversational else next(texts)
        for example in examples
    ]


def _tokenize_texts(
    examples: Sequence[PreferenceExample], encode: TextEncoder
) -> Iterator[tuple[TokenizedExample, Status]]:
    for example in examples:
        check_text(str(example.prompt), example.row, "prompt")
        for branch, text in example.completions.items():
            check_text(str(text), example.row, COLUMN_OF_BRANCH[branch])
    prompts = encode([str(example.prompt) for example in examples], add_special_tokens=True)
    texts = [str(text) for example in examples for text in example.completions.values()]
    *targets, around = _encode_targets([*texts, ""], encode.tokenizer)
    completions, eos = iter(targets), encode.tokenizer.eos_token_id
    for example, prompt_ids in zip(examples, prompts, strict=True):
        ids: dict[Branch, Any] = {branch: _ended(next(completions), eos, around) for branch in example.completions}
        says_nothing = any({*around, eos}.issuperset(own) for own in ids.values())
        tokens = TokenizedExample(
            row=example.row,
            prompt_ids=prompt_ids,
            completion_ids=ids,
            loss_masks={branch: [True] * len(own) for branch, own in ids.items()},
            ref_sum_logps=example.ref_sum_logps,
        )
        yield tokens, Status.EMPTY if says_nothing else Status(0)


def _encode_targets(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """The ids of what a decoder is to write; most tokenizers make no difference to what an encoder reads."""
    quiet = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    return tokenizer(text_target=texts, add_special_tokens=True, **quiet)["input_ids"]


def _ended(ids: Sequence[int], eos: int | None, around: Sequence[int]) -> list[int]:
    """``ids`` with EOS once at the end; as they are where the tokenizer puts something after its own EOS."""
    if eos is None or (eos in around and around[-1] != eos):
        return [*ids]
    end = len(ids)
    while end and ids[end - 1] == eos:
        end -= 1
    return [*ids[:end], eos]


def _with_special_ends(
    example: TokenizedExample, status: Status, encode: TextEncoder
) -> tuple[TokenizedExample, Status]:
    """A conversation with the special tokens that the tokenizer puts around a text, where it does not have them."""
    start, end = ([*ids] for ids in encode.special_ends)
    eos = encode.tokenizer.eos_token_id
    prompt_ids = [*example.prompt_ids]
    if prompt_ids[: len(start)] != start:
        prompt_ids = start + prompt_ids
    if prompt_ids[len(prompt_ids) - len(end) :] != end:
        prompt_ids += end
    closing = end if eos in end or eos is None else [*end, eos]
    completion_ids, loss_masks = dict(example.completion_ids), dict(example.loss_masks)
    for branch, ids in completion_ids.items():
        before = [] if [*ids[: len(start)]] == start else start
        after = [] if _has_ended(ids, encode.tokenizer) else closing
        completion_ids[branch] = [*before, *ids, *after]
        loss_masks[branch] = [True] * len(before) + [*loss_masks[branch]] + [True] * len(after)
    return replace(example, prompt_ids=prompt_ids, completion_ids=completion_ids, loss_masks=loss_masks), status


def _has_ended(ids: Sequence[int], tokenizer: Any) -> bool:
    """Whether EOS stands in ``ids`` with nothing but white space after it."""
    eos = tokenizer.eos_token_id
    if eos not in ids:
        return False
    last = len(ids) - 1 - [*reversed(ids)].index(eos)
    return not tokenizer.decode([*ids[last + 1 :]]).strip()


def truncate_apart(
    example: TokenizedExample,
    max_length: int | None,
    mode: TruncationMode,
    max_completion_length: int,
    special_ends: tuple[Sequence[int], Sequence[int]] = ((), ()),
) -> TokenizedExample:
    """The example with its prompt cut to ``max_length`` tokens, and every completion to ``max_completion_length``.

    A prompt keeps the special tokens at its ends; a completion is cut at its end, and what is cut does not end in EOS:
    it would teach to stop in the middle of a sentence.

    >>> example = TokenizedExample(0, [5, 6, 7, 2], {"chosen": [8, 2]}, {"chosen": [True, True]})
    >>> cut = truncate_apart(example, 3, "keep_start", 1, ((), (2,)))
    >>> cut.prompt_ids, cut.completion_ids
    ([5, 6, 2], {'chosen': [8]})
    """
    longest = max(map(len, example.completion_ids.values()))
    prompt_ids = example.prompt_ids
    if max_length is not None and len(prompt_ids) > max_length:
        prompt_ids = _cut([*prompt_ids], max_length, mode, special_ends)
    elif longest <= max_completion_length:
        return example
    kept = slice(max_completion_length)
    return replace(
        example,
        prompt_ids=prompt_ids,
        completion_ids={branch: ids[kept] for branch, ids in example.completion_ids.items()},
        loss_masks={branch: mask[kept] for branch, mask in example.loss_masks.items()},
    )


def _cut(
    ids: list[int], length: int, mode: TruncationMode, special_ends: tuple[Sequence[int], Sequence[int]]
) -> list[int]:
    """``length`` of more tokens, the special ones at both ends among them as far as they fit."""
    start, end = ([*special] for special in special_ends)
    start = start if ids[: len(start)] == start else []
    end = end if ids[len(ids) - len(end) :] == end else []
    content = ids[len(start) : len(ids) - len(end)]
    room = max(length - len(start) - len(end), 0)
    kept = content[:room] if mode == "keep_start" else content[len(content) - room :]
    return [*start, *kept, *end][:length]
