"""Where the prompt ends: the prefix that completions without a ``prompt`` column share."""

from __future__ import annotations

from collections.abc import Sequence

from prefopt.types import Message

__all__ = ["common_prefix_length", "shared_messages", "shared_text"]


def common_prefix_length(first: Sequence, second: Sequence) -> int:
    """Number of leading items that two sequences have in common.

    >>> common_prefix_length([1, 2, 3], [1, 2, 4, 5])
    2
    """
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:
        return shorter
    known, differs = 0, shorter  # comparing halves is faster than comparing items one by one
    while differs - known > 1:
        middle = (known + differs) // 2
        if first[known:middle] == second[known:middle]:
            known = middle
        else:
            differs = middle
    return known


def shared_messages(completions: Sequence[Sequence[Message]]) -> int:
    """Number of leading messages that are the prompt: the longest common prefix that leaves each side a message.

    The prefix never ends between two turns of the assistant: an assistant turn that another one follows belongs to
    the completions, because a *given* prompt that ends in an assistant turn is continued, and this one is not.
    """
    length = min(len(completion) for completion in completions) - 1
    for other in completions[1:]:
        length = min(length, common_prefix_length(completions[0], other))
    while length > 0 and completions[0][length - 1]["role"] == "assistant" and _assistant_follows(completions, length):
        length -= 1
    return max(length, 0)


def _assistant_follows(completions: Sequence[Sequence[Message]], length: int) -> bool:
    return any(completion[length]["role"] == "assistant" for completion in completions)


def shared_text(completions: Sequence[str]) -> int:
    """Number of leading characters that are the prompt: the longest common prefix that ends before a word.

    A space before the word goes to the completions, as tokenizers join it to the word.

    >>> shared_text(["Sky? It is blue.", "Sky? It is black."])
    10
    >>> shared_text(["a b", "a b c"])  # each side keeps a word
    1
    """
    length = min(len(completion) for completion in completions) - 1
    for other in completions[1:]:
        length = min(length, common_prefix_length(completions[0], other))
    text = completions[0]
    while length > 0 and _is_inside_word(completions, length):
        length -= 1
    return length - 1 if length > 0 and text[length - 1] == " " else max(length, 0)


def _is_inside_word(completions: Sequence[str], length: int) -> bool:
    """Whether a word goes on across ``length`` in one of the texts (they agree on what stands before it)."""
    return completions[0][length - 1].isalnum() and any(text[length].isalnum() for text in completions)
