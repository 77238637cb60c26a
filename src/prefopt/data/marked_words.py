"""The words of BPE that writes a space as a mark, as Llama 2 does.

Such a tokenizer merges characters of the whole text. But where no token that is made by merging has a mark behind
another character, nothing is ever merged across the place before a mark, and the text may be tokenised in words that
end there. The same holds between letters and other characters. Whether a word ends between two characters depends on
these two alone, so an expression for words is right if it splits no merged token.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Collection
from dataclasses import dataclass
from string import ascii_letters
from typing import Any

from prefopt.data.pieces import LETTER, Ids, flat_steps

__all__ = ["MarkedWords", "marked_words"]

MARK = "\u2581"
_LETTERS = frozenset(ascii_letters)
_WORDS_OF_LETTERS = re.compile(f"{MARK}*[A-Za-z]+|{MARK}*[^A-Za-z{MARK}]+|{MARK}+")
_WORDS = re.compile(f"{MARK}*[^{MARK}]+|{MARK}+")
_NEAR_A_CUT = re.compile(rf"^[{LETTER}]|[{LETTER}]$|[ {MARK}]")

_PREPEND = {"type": "Prepend", "prepend": MARK}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
_SCHEMES = {"first": frozenset({"nothing"}), "always": frozenset({"nothing", "token"}), "never": frozenset()}


@dataclass(frozen=True)
class MarkedWords:
    """The words of texts, and their ids, for the BPE ``model``."""

    model: Any
    word: re.Pattern[str]
    marked_after: frozenset[str]
    """What stands before a text that gets a mark in front."""
    doubles: bool
    """Whether a text that begins with a mark gets another."""

    def split(self, text: str, before: str) -> list[str]:
        """Words, with marks for spaces."""
        marked = text.replace(" ", MARK)
        if before in self.marked_after and text and (self.doubles or not marked.startswith(MARK)):
            marked = MARK + marked
        return self.word.findall(marked)

    def tokenize(self, words: list[str]) -> list[Ids]:
        """The ids of each word."""
        return [array("i", [token.id for token in self.model.tokenize(word)]) for word in words]


def marked_words(tokenizer: Any, added: Collection[str]) -> MarkedWords | None:
    """The words of a BPE tokenizer that writes spaces as marks; ``None`` where it is another, or words could merge.

    Args:
        tokenizer: a fast one.
        added: the added tokens, which no place where a text may be cut must touch.
    """
    backend = tokenizer.backend_tokenizer
    model = backend.model
    marks = _marks(flat_steps(backend.normalizer), flat_steps(backend.pre_tokenizer))
    looks_at_whole_texts = model.ignore_merges or model.continuing_subword_prefix or model.end_of_word_suffix
    if marks is None or looks_at_whole_texts or any(map(_NEAR_A_CUT.search, added)):
        return None
    word = _word(json.loads(model.__getstate__()))
    return None if word is None else MarkedWords(model, word, *marks)


def _word(model: dict[str, Any]) -> re.Pattern[str] | None:
    """The expression for the shortest words across whose ends nothing merges.

    One character beside an end, the mark or a letter, must be known: two unknown ones may become a single token.
    """
    merged = ["".join(pair) for pair in model["merges"]]
    for word, known in ((_WORDS_OF_LETTERS, _LETTERS), (_WORDS, frozenset())):
        if model["vocab"].keys() >= known | {MARK} and all(len(word.findall(token)) == 1 for token in merged):
            return word
    return None


def _marks(normal: list[dict[str, Any]], splits: list[dict[str, Any]]) -> tuple[frozenset[str], bool] | None:
    """After what a text gets a mark in front, and whether also one that begins with a mark."""
    if not splits and normal == [_PREPEND, _REPLACE]:
        return _SCHEMES["always"], True
    if not splits and normal == [_REPLACE]:
        return _SCHEMES["never"], False
    if normal or [step["type"] for step in splits] != ["Metaspace"]:
        return None
    [step] = splits
    return (_SCHEMES[step["prepend_scheme"]], False) if step["replacement"] == MARK and not step["split"] else None
