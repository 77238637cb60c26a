"""Texts as token ids, the prompt that several texts begin with tokenised once where that is sure to give the same ids.

Byte-level BPE first splits a text into words with regular expressions, and no token goes on from one word into the
next. Between a letter and a space that a letter follows one word ends, whatever stands before or after: there a text
may be cut, its pieces tokenised, and the ids joined. Tokenizers for which this is not sure get whole texts.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

__all__ = ["Ids", "TextEncoder"]

Ids: TypeAlias = "array[int]"
"""Token ids, type code ``i``: smaller than a list, and compared and copied as a block."""

Family = tuple[str, Sequence[str]]
"""A prompt, and the texts that go on from it."""

_LETTER = "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u0391-\u03a1\u03a3-\u03c9\u0400-\u0481\u048a-\u04ff"
"""Latin, Greek and Cyrillic letters."""
_CUT = re.compile(f"[{_LETTER}](?= [{_LETTER}])")
_LETTER_SPACE = re.compile(f"[{_LETTER}] ")

_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD"}
_PRE_TOKENIZERS = {"ByteLevel", "Split", "Digits"}
_PROBE = (
    "one Two THREE four. It's I'LL we've 1 a b2 c (d e) f\u00e9 g \u0416\u0443k l\n\nm n  o \u00c4 \u00f6 P Q x=y z"
)


@dataclass(frozen=True)
class TextEncoder:
    """Tokenises with ``tokenizer``, which must stay as it is meanwhile."""

    tokenizer: Any

    def __call__(self, texts: list[str], *, add_special_tokens: bool = False) -> list[Ids]:
        """The ids of each text, all in one call."""
        if not texts:
            return []
        if not self.is_plain:
            quiet = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
            encoded = self.tokenizer(texts, add_special_tokens=add_special_tokens, **quiet)
            return [array("i", ids) for ids in encoded["input_ids"]]
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()  # an earlier call may have left both on
        backend.no_padding()
        backend.encode_special_tokens = self.tokenizer.split_special_tokens
        encodings = backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [array("i", encoding.ids) for encoding in encodings]

    def families(self, families: Sequence[Family], *, add_special_tokens: bool) -> list[tuple[Ids, list[Ids]]]:
        """For each prompt with the texts that go on from it: the ids of the prompt, and of each text."""
        if not self.can_cut:
            texts = [text for prompt, others in families for text in (prompt, *others)]
            ids = iter(self(texts, add_special_tokens=add_special_tokens))
            return [(next(ids), [next(ids) for _ in others]) for _, others in families]
        pieces: list[str] = []
        for prompt, others in families:
            cut = last_cut(prompt) if all(text.startswith(prompt) for text in others) else 0
            pieces += [prompt[:cut], prompt[cut:], *(text[cut:] for text in others)]
        start, end = self.special_ends if add_special_tokens else (array("i"), array("i"))
        return list(joined(families, iter(self(pieces)), start, end))

    @cached_property
    def is_plain(self) -> bool:
        """Whether the tokenizer does nothing but call its backend."""
        kind: Any = type(self.tokenizer)
        as_they_are = (PreTrainedTokenizerBase.__call__, PreTrainedTokenizerFast._encode_plus)
        return self.tokenizer.is_fast and (kind.__call__, kind._encode_plus) == as_they_are

    @cached_property
    def can_cut(self) -> bool:
        """Whether the ids of a text are those of its pieces, for a text cut at a :func:`last_cut`."""
        if not self.is_plain:
            return False
        backend = self.tokenizer.backend_tokenizer
        splits = flat_steps(backend.pre_tokenizer)
        if type(backend.model).__name__ != "BPE" or not splits or any(step.get("add_prefix_space") for step in splits):
            return False
        if not {step["type"] for step in splits} <= _PRE_TOKENIZERS:
            return False
        if not {step["type"] for step in flat_steps(backend.normalizer)} <= _NORMALIZERS:
            return False
        for token in backend.get_added_tokens_decoder().values():
            # They are found before words are, in the whole text
            beside = token.lstrip or token.rstrip or token.single_word
            if beside or (token.normalized and backend.normalizer) or _LETTER_SPACE.search(token.content):
                return False
        ends = {end for _, (_, end) in backend.pre_tokenizer.pre_tokenize_str(_PROBE)}
        return {match.end() for match in _CUT.finditer(_PROBE)} <= ends

    @cached_property
    def special_ends(self) -> tuple[Ids, Ids]:
        """What the tokenizer itself puts before and after a text."""
        probe = ["one two three"]
        [plain], [special] = self(probe), self(probe, add_special_tokens=True)
        start = next(i for i in range(len(special)) if special[i : i + len(plain)] == plain)
        return special[:start], special[start + len(plain) :]


def joined(families: Sequence[Family], ids: Iterator[Ids], start: Ids, end: Ids) -> Iterator[tuple[Ids, list[Ids]]]:
    """The ids of the pieces (shared head, rest of the prompt, rest of each text) put together again."""
    for _, others in families:
        head = start + next(ids)
        yield head + next(ids) + end, [head + next(ids) + end for _ in others]


def last_cut(text: str) -> int:
    """The last place in ``text`` where it may be cut; 0 where there is none."""
    end = 0
    # Searching a tail first spares a walk over a long text: nearly every one has a place in its last part.
    for start in (max(len(text) - 200, 0), 0):
        for match in _CUT.finditer(text, start):
            end = match.end()
        if end:
            break
    return end


def flat_steps(part: Any) -> list[dict[str, Any]]:
    """The settings of the steps that a normaliser or pre-tokeniser of ``tokenizers`` takes, one after another."""
    if part is None:
        return []
    state = json.loads(part.__getstate__())
    return state.get("normalizers", state.get("pretokenizers", [state]))
