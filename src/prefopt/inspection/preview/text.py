"""Which text belongs to which tokens, so that the texts joined are the text of all tokens.

A token of byte-level BPE may be a part of a character (of an emoji there are up to four), and decoders drop the space
before a text's first word: tokens decoded one by one give another text. So a token's text is what it adds to the text
of the tokens before it, and tokens that make one character together are one span.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

__all__ = ["TextSpan", "decoded", "text_spans"]

BROKEN = "\ufffd"
"""What a decoder writes for bytes that are no character, or not yet one."""
MOST_TOKENS_OF_A_CHARACTER = 16
"""Of bytes that never become a character, no more than this many are waited for."""


class TextSpan(NamedTuple):
    """The text of the tokens ``begin`` to ``end``."""

    begin: int
    end: int
    text: str


def decoded(ids: Sequence[int], tokenizer: Any) -> str:
    """The text of ``ids``, special tokens written out, nothing tidied."""
    return tokenizer.decode([*ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)


def text_spans(ids: Sequence[int], tokenizer: Any) -> list[TextSpan]:
    """Spans of ``ids``, in order and without gaps, whose texts joined are `decoded`.

    Args:
        ids: [n] token ids of a sequence.
        tokenizer: with ``decode``.
    """

    def decode(begin: int, end: int) -> str:
        return decoded(ids[begin:end], tokenizer)

    spans = _spans(len(ids), decode, from_the_start=False)
    whole = decode(0, len(ids))
    if "".join(span.text for span in spans) != whole:
        # A decoder to which more than the span before matters; every span after all that stands before it
        spans = _closed(_spans(len(ids), decode, from_the_start=True), len(ids), whole)
    return spans


def _spans(count: int, decode: Callable[[int, int], str], *, from_the_start: bool) -> list[TextSpan]:
    """Each span's text is what it adds to the span before it, or to all before it."""
    spans: list[TextSpan] = []
    context = begin = 0
    for end in range(1, count + 1):
        before, now = decode(context, begin), decode(context, end)
        is_open = now.endswith(BROKEN) and end - begin < MOST_TOKENS_OF_A_CHARACTER
        if end < count and (is_open or not now.startswith(before)):
            continue
        spans.append(TextSpan(begin, end, now[len(before) :]))
        context, begin = (0 if from_the_start else begin), end
    return spans


def _closed(spans: list[TextSpan], count: int, whole: str) -> list[TextSpan]:
    """``spans`` as far as they are the beginning of ``whole``, and one more for the rest."""
    kept = spans[:-1]
    while not whole.startswith(joined := "".join(span.text for span in kept)):
        kept.pop()
    return [*kept, TextSpan(kept[-1].end if kept else 0, count, whole[len(joined) :])]
