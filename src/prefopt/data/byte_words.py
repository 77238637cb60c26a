"""The words of byte-level BPE: what the tokenizer's regular expressions find.

They are found by Python's ``re``, in all text for which that is sure (see `expressions`). Passages with other
characters are cut out, and go through the tokenizer itself.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from tokenizers import pre_tokenizers

from prefopt.data.expressions import Forms, class_of, python_expression
from prefopt.data.pieces import CUT, Ids, flat_steps, last_cut, whole_ids

__all__ = ["ByteWords", "byte_words"]

_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
"""Steps that leave the known characters as they are."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The expression that the step ``ByteLevel`` of tokenizers has built in."""

_PROBE = (
    "It's I'LL, we've\tdone \n\n  in x=3.14; 1234567  !?.. (a_b) <|x|>\r\n\x1c\x0b/*c*/ UPPER Case aBc 1a a1 end \u00e9"
    " x \u2013 \u201cx\u201d \u00c4\u00d6n \u0416\u0443k \u0436 \u6f22\u5b57 \u2160\u3000\u2022\u0663 \u0444a\u00f8 f  "
)
_ALL_BYTES = "".join(map(chr, [*range(0x801), *range(0x1000, 0x10000, 0x1000)]))
"""Characters in whose UTF-8 every byte occurs that occurs in any of their plane."""


@dataclass(frozen=True)
class Step:
    """A step that splits: its matches are words and, where ``keeps_rest``, what stands between them too."""

    pattern: re.Pattern[str]
    """With one group around the whole."""
    keeps_rest: bool

    def __call__(self, text: str) -> list[str]:
        words = self.pattern.findall(text)
        if self.keeps_rest and len("".join(words)) != len(text):
            return [word for word in self.pattern.split(text) if word]
        return words


@dataclass(frozen=True)
class ByteWords:
    """The words of texts, and their ids, for a byte-level ``tokenizer``."""

    tokenizer: Any
    steps: tuple[Step, ...]
    spelling: dict[int, str]
    """Byte -> how the vocabulary writes it."""
    foreign: re.Pattern[str]
    """Finds characters that are not known."""

    def split(self, text: str, before: str) -> list[str]:
        """Words, and passages with foreign characters."""
        words: list[str] = []
        end = 0
        for start, stop in () if text.isascii() else self.foreign_passages(text):
            words += self.split_known(text[end:start])
            words.append(text[start:stop])
            end = stop
        return words + self.split_known(text[end:])

    def foreign_passages(self, text: str) -> Iterator[tuple[int, int]]:
        """Start and end of what must stay together around foreign characters."""
        stop = 0
        for match in self.foreign.finditer(text):
            if match.start() >= stop:
                start = stop + last_cut(text[stop : match.start()])
                following = CUT.search(text, match.end())
                stop = following.end() if following else len(text)
                yield start, stop

    def split_known(self, text: str) -> list[str]:
        """The words of text without foreign characters."""
        words = [text] if text else []
        for step in self.steps:
            words = step(words[0]) if len(words) == 1 else list(chain.from_iterable(map(step, words)))
        return words

    def spelled(self, word: str) -> str:
        """A word as the model takes it."""
        return word.encode().decode("latin-1").translate(self.spelling)

    def tokenize(self, words: list[str]) -> list[Ids]:
        """The ids of each word."""
        model = self.tokenizer.backend_tokenizer.model
        foreign = [word for word in words if not word.isascii() and self.foreign.search(word)]
        ids = dict(zip(foreign, whole_ids(self.tokenizer, foreign), strict=True))
        return [
            ids[word] if word in ids else array("i", [token.id for token in model.tokenize(self.spelled(word))])
            for word in words
        ]


def byte_words(tokenizer: Any) -> ByteWords | None:
    """The words of a byte-level BPE tokenizer; ``None`` where it is another, or splits as ``re`` cannot."""
    backend = tokenizer.backend_tokenizer
    splits = flat_steps(backend.pre_tokenizer)
    forms = tuple(step["type"] for step in flat_steps(backend.normalizer))
    if not splits or splits[-1]["type"] != "ByteLevel" or not set(forms) <= set(_FORMS):
        return None
    steps = [_step(step, forms) for step in splits if step["type"] != "ByteLevel" or step["use_regex"]]
    if any(step is None for step in steps) or any(step.get("add_prefix_space") for step in splits):
        return None
    foreign = re.compile(f"[^{class_of('', forms)}]+")
    words = ByteWords(tokenizer, tuple(step for step in steps if step), _spelling(), foreign)
    probe = foreign.sub("", _PROBE)
    expected = backend.pre_tokenizer.pre_tokenize_str(probe)
    if [words.spelled(word) for word in words.split_known(probe)] != [word for word, _ in expected]:
        return None
    cuts = {match.end() for match in CUT.finditer(probe)}
    return words if cuts <= {end for _, (_, end) in expected} else None


def _spelling() -> dict[int, str]:
    """Byte -> the character that byte-level vocabularies write for it."""
    [(spelled, _)] = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(_ALL_BYTES)
    return dict(zip(_ALL_BYTES.encode(), spelled, strict=True))


def _step(state: dict[str, Any], forms: Forms) -> Step | None:
    """A step of tokenizers as one that finds the same in text of known characters; ``None`` where that is not sure."""
    kind = state["type"]
    if kind == "Digits":
        pattern, keeps_rest = r"\p{N}" if state["individual_digits"] else r"\p{N}+", True
    elif kind == "ByteLevel":
        pattern, keeps_rest = _GPT2, True
    elif kind == "Split" and (state["behavior"], state["invert"]) in (("Isolated", False), ("Removed", True)):
        [(syntax, text)] = state["pattern"].items()
        pattern, keeps_rest = text if syntax == "Regex" else re.escape(text), state["behavior"] == "Isolated"
    else:
        return None
    expression = python_expression(pattern, forms)
    return None if expression is None else Step(expression, keeps_rest)
