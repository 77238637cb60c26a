"""Words that a tokenizer takes each for itself: tokenised once, looked up ever after.

A fast BPE tokenizer first takes out its added tokens. The rest it splits into words (`byte_words`), or nothing goes on
across the ends of words (`marked_words`). Text repeats its words, so that most of it is a matter of looking them up.
A tokenizer of which this is not sure, by its settings and on a probe, has no words here.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, Literal, Protocol, TypeAlias

from prefopt.data.byte_words import byte_words
from prefopt.data.marked_words import marked_words
from prefopt.data.pieces import LETTER, Ids, is_plain

__all__ = ["Before", "WordTokenizer", "word_tokenizer"]

Before: TypeAlias = Literal["nothing", "token", "text"]
"""What stands before a text: nothing, an added token, or the text that it was cut from (at a `last_cut`)."""

_MAX_WORDS = 200_000
_MAX_CHARACTERS = 60
"""A longer word is not kept: it is a passage that could not be split, and will hardly come again."""

_LETTER_SPACE = re.compile(f"[{LETTER}] ")

_PROBE = (
    "one two three. It's  I'LL, we've\tdone\n\n  in\r\nx=3.14; 1234567 !?... (a_b)\x1c\x0b <s> </s>a </ s> na\u00efve"
    " caf\u00e9 \u2013 \u201cquoted\u201d \ud55c\uad6d\uc5b4 text\u0301 e\u0301 \u00a0\u3000 \u2581a \u2581\u2581 z  "
)


class Words(Protocol):
    """How text without added tokens falls into words, and what their ids are."""

    def split(self, text: str, before: Before) -> list[str]:
        """The words of a text."""
        ...

    def tokenize(self, words: list[str]) -> list[Ids]:
        """The ids of each word."""
        ...


class WordTokenizer:
    """Tokenises by words.

    Args:
        words: how text without added tokens falls into words.
        added: added tokens and their ids, in groups that are looked for one after another.
    """

    def __init__(self, words: Words, added: Sequence[dict[str, int]]) -> None:
        self.words = words
        self.added = [any_of(group) for group in added if group]
        self.fixed = {token: array("i", [number]).tobytes() for group in added for token, number in group.items()}
        self.known: dict[str, bytes] = dict(self.fixed)
        """Word -> its ids as bytes, which are joined faster than anything else."""

    def __call__(self, texts: Iterable[tuple[str, Before]]) -> list[Ids]:
        """The ids of each text, nothing added."""
        found = [list(self.found(text, before)) for text, before in texts]
        unknown = list(set(chain.from_iterable(found)).difference(self.known))
        self.known.update(zip(unknown, (ids.tobytes() for ids in self.words.tokenize(unknown)), strict=True))
        ids = [array("i", b"".join(map(self.known.__getitem__, words))) for words in found]
        self.forget(unknown)
        return ids

    def found(self, text: str, before: Before, group: int = 0) -> Iterable[str]:
        """The words of a text in which the groups of added tokens from ``group`` on are to be looked for."""
        if group == len(self.added):
            return self.words.split(text, before)
        parts = self.added[group].split(text)  # text, token, text, ..
        if len(parts) == 1:
            return self.found(text, before, group + 1)
        return chain.from_iterable(
            [part] if place % 2 else self.found(part, "token" if place else before, group + 1)
            for place, part in enumerate(parts)
        )

    def forget(self, new: Iterable[str]) -> None:
        """Keep the words that were looked up within bounds."""
        for word in new:
            if len(word) > _MAX_CHARACTERS:
                del self.known[word]
        if len(self.known) > _MAX_WORDS:
            self.known = dict(self.fixed)


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Finds the leftmost token, and the longest of those that begin there."""
    return re.compile(f"({'|'.join(map(re.escape, sorted(tokens, key=len, reverse=True)))})")


def word_tokenizer(tokenizer: Any) -> WordTokenizer | None:
    """The tokenizer by words; ``None`` where it is not sure to give the same ids."""
    if not is_plain(tokenizer) or tokenizer.split_special_tokens:
        return None
    backend = tokenizer.backend_tokenizer
    added = added_tokens(backend)
    if type(backend.model).__name__ != "BPE" or backend.model.dropout or added is None:
        return None
    words = byte_words(tokenizer) or marked_words(tokenizer, [*added[0], *added[1]])
    if words is None:
        return None
    by_words = WordTokenizer(words, added)
    probes = [_PROBE, "", " a", "a", _PROBE.join(["", *chain.from_iterable(added), ""])]
    whole = tokenizer(probes, add_special_tokens=False, verbose=False)["input_ids"]
    ids = by_words([(probe, "nothing") for probe in probes])
    return by_words if [probe_ids.tolist() for probe_ids in ids] == whole else None


def added_tokens(backend: Any) -> tuple[dict[str, int], dict[str, int]] | None:
    """Added tokens and their ids: those found in the text as it is, then those found in normalised text.

    ``None`` where one also depends on what stands beside it, may reach across a place where texts are cut, or is looked
    for in a text that a normaliser changed.
    """
    groups: tuple[dict[str, int], dict[str, int]] = ({}, {})
    for number, token in backend.get_added_tokens_decoder().items():
        if token.lstrip or token.rstrip or token.single_word or _LETTER_SPACE.search(token.content):
            return None
        if token.normalized and backend.normalizer is not None:
            return None
        groups[token.normalized][token.content] = number
    return groups
