"""Pieces of text: where a text may be cut, and a piece tokenised as it stands."""

from __future__ import annotations

import json
import re
from array import array
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

__all__ = ["CUT", "LETTER", "Ids", "flat_steps", "is_plain", "last_cut", "whole_ids"]

Ids: TypeAlias = "array[int]"
"""Token ids, type code ``i``: smaller than a list, and compared and copied as a block."""

LETTER = "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u0391-\u03a1\u03a3-\u03c9\u0400-\u0481\u048a-\u04ff"
"""Latin, Greek and Cyrillic letters, as they stand in a class."""

CUT = re.compile(f"[{LETTER}](?= [{LETTER}])")
"""Finds places where a text may be cut: between a letter and a space that a letter follows.

Regular expressions that find words end one here, whatever stands before or after, and where a space is written as
a mark that begins a token, no token goes on across it.
"""


def last_cut(text: str) -> int:
    """The last place in ``text`` where it may be cut; 0 where there is none."""
    end = 0
    # Searching a tail first spares a walk over a long text: nearly every one has a place in its last part.
    for start in (max(len(text) - 200, 0), 0):
        for match in CUT.finditer(text, start):
            end = match.end()
        if end:
            break
    return end


def is_plain(tokenizer: Any) -> bool:
    """Whether the tokenizer does nothing but call its backend."""
    kind: Any = type(tokenizer)
    as_they_are = (PreTrainedTokenizerBase.__call__, PreTrainedTokenizerFast._encode_plus)
    return tokenizer.is_fast and (kind.__call__, kind._encode_plus) == as_they_are


def whole_ids(tokenizer: Any, texts: list[str], *, add_special_tokens: bool = False) -> list[Ids]:
    """The ids of each text, all in one call."""
    if not texts:
        return []
    if not is_plain(tokenizer):
        quiet = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        return [
            array("i", ids) for ids in tokenizer(texts, add_special_tokens=add_special_tokens, **quiet)["input_ids"]
        ]
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # an earlier call may have left both on
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    encodings = backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
    return [array("i", encoding.ids) for encoding in encodings]


def flat_steps(part: Any) -> list[dict[str, Any]]:
    """The settings of the steps that a normaliser or pre-tokeniser of ``tokenizers`` takes, one after another."""
    if part is None:
        return []
    state = json.loads(part.__getstate__())
    return state.get("normalizers", state.get("pretokenizers", [state]))
