"""Texts as token ids, the prompt that several texts begin with tokenised once.

Byte-level BPE first splits a text into words with a regular expression, and tokens never cross these splits. Between
a letter and a space that a letter follows there is always one, whatever stands before or after; so a text may be cut
there, tokenised in pieces, and the ids joined. Tokenizers for which this is not sure get whole texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["TextEncoder"]

_CUT = re.compile(r"[A-Za-z](?= [A-Za-z])")
_PROBE = "one two three"
_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Sequence"}
_PRE_TOKENIZERS = {"ByteLevel", "Split", "Digits", "Sequence"}


@dataclass(frozen=True)
class TextEncoder:
    """Tokenises with ``tokenizer``, many texts in one call."""

    tokenizer: Any

    def __call__(self, texts: list[str], *, add_special_tokens: bool = False) -> list[list[int]]:
        """The ids of each text."""
        if not texts:
            return []
        quiet = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        return self.tokenizer(texts, add_special_tokens=add_special_tokens, **quiet)["input_ids"]

    def families(
        self, families: Sequence[tuple[str, Sequence[str]]], *, add_special_tokens: bool
    ) -> list[tuple[list[int], list[list[int]]]]:
        """For each prompt with the texts that go on from it: the ids of the prompt, and of each text."""
        if not self.can_cut:
            texts = [text for prompt, others in families for text in (prompt, *others)]
            ids = iter(self(texts, add_special_tokens=add_special_tokens))
            return [(next(ids), [next(ids) for _ in others]) for _, others in families]
        cuts = [_last_cut(prompt) if all(t.startswith(prompt) for t in others) else 0 for prompt, others in families]
        pieces: list[str] = []
        for (prompt, others), cut in zip(families, cuts, strict=True):
            pieces += [prompt[:cut], prompt[cut:], *(text[cut:] for text in others)]
        start, end = self._special_ends() if add_special_tokens else ([], [])
        return list(_joined(families, iter(self(pieces)), start, end))

    @property
    def can_cut(self) -> bool:
        """Whether ids of pieces are sure to be the pieces of the ids."""
        if not self.tokenizer.is_fast:
            return False
        backend = self.tokenizer.backend_tokenizer
        if type(backend.model).__name__ != "BPE" or backend.pre_tokenizer is None:
            return False
        known = _types(backend.normalizer) <= _NORMALIZERS and _types(backend.pre_tokenizer) <= _PRE_TOKENIZERS
        if not known or any(_CUT.search(token) for token in self.tokenizer.get_added_vocab()):
            return False
        words = [place for _, place in backend.pre_tokenizer.pre_tokenize_str(_PROBE)]
        return words == [(0, 3), (3, 7), (7, 13)]

    def _special_ends(self) -> tuple[list[int], list[int]]:
        """What the tokenizer itself puts before and after a text."""
        plain, special = self([_PROBE])[0], self([_PROBE], add_special_tokens=True)[0]
        start = next(i for i in range(len(special)) if special[i : i + len(plain)] == plain)
        return special[:start], special[start + len(plain) :]


def _joined(
    families: Sequence[tuple[str, Sequence[str]]], ids: Iterator[list[int]], start: list[int], end: list[int]
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """The ids of the pieces (shared head, rest of the prompt, rest of each text) put together again."""
    for _, others in families:
        head = [*start, *next(ids)]
        yield [*head, *next(ids), *end], [[*head, *next(ids), *end] for _ in others]


def _last_cut(text: str) -> int:
    """The last place in ``text`` where it may be cut; 0 where there is none."""
    end = 0
    # Searching a tail first spares a walk over a long prompt: nearly every one has a place in its last part.
    for tail_start in (max(len(text) - 200, 0), 0):
        for match in _CUT.finditer(text, tail_start):
            end = match.end()
        if end:
            break
    return end


def _types(part: Any) -> set[str]:
    """The kinds of steps that a normaliser or pre-tokeniser of ``tokenizers`` takes."""
    if part is None:
        return set()
    state = json.loads(part.__getstate__())

    def kinds(step: dict[str, Any]) -> set[str]:
        inner = step.get("normalizers") or step.get("pretokenizers") or []
        return {step["type"]}.union(*map(kinds, inner))

    return kinds(state)
