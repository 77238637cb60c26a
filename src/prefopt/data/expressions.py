"""Regular expressions of Oniguruma, which tokenizers use, as expressions of Python's ``re`` that find the same.

The two agree on the part of the syntax that is taken here, where a class such as ``\\p{L}`` is written out. For which
characters that is sure: those of one category in every version of Unicode, that no normalisation changes, and that are
no other case of an ASCII letter.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from itertools import chain, groupby
from typing import Any, TypeAlias

__all__ = ["class_of", "known_characters", "python_expression"]

_CATEGORY = r"\\p\{([LMNPSZC][a-z]?)\}"
_SIMPLE = rf"{_CATEGORY}|\\[rntfvsdD]|\\[^\w\s]"
_CLASS = rf"\[\^?(?:{_SIMPLE}|[^\[\]\\])+\]"
_PART = re.compile(rf"{_CLASS}|{_SIMPLE}|\\S|\((?:\?(?:i?:|=|!))?|[^\\\[\]()^$]")
_AMBIGUOUS = re.compile(r"\}\+|&&|--|\|\||~~|(?<!\\)-\0|\0-|\(\?i:[^)]*[\0\u0080-\uffff]")
"""What the two engines may read differently, where each category is written as the character 0."""

_CONTROL_SPACES = r"\t\n\v\f\r"
_CONJOINING = range(0x1100, 0x1200)
"""Letters of Hangul that normalisation joins with their neighbours."""
_NEVER_MET = "\uffff"
"""Stands in a class for no characters, because a class must not be empty; it is no known character."""


Forms: TypeAlias = tuple[Any, ...]
"""Normalisations that a text goes through: NFC, NFD, NFKC, NFKD."""


@cache
def known_characters(forms: Forms) -> dict[str, list[int]]:
    """Category -> the characters for which an expression is sure to find the same, after normalisation to ``forms``."""
    known: dict[str, list[int]] = {}
    before = unicodedata.ucd_3_2_0.category
    for code in (*range(0xD800), *range(0xE000, 0x10000)):  # without surrogates
        character = chr(code)
        category = unicodedata.category(character)
        if code < 128 or (
            category == before(character)
            and category[0] not in "CM"
            and code not in _CONJOINING
            and (category == "Lo" or not any(other.isascii() for other in character.casefold()))
            and all(unicodedata.is_normalized(form, character) for form in forms)
        ):
            known.setdefault(category, []).append(code)
    return known


@cache
def class_of(category: str, forms: Forms) -> str:
    """The known characters of a category ('' for all), as they are written between the brackets of a class."""
    groups = (codes for name, codes in known_characters(forms).items() if name.startswith(category))
    written: list[str] = []
    for _, run in groupby(enumerate(sorted(chain.from_iterable(groups))), key=lambda item: item[1] - item[0]):
        codes = [code for _, code in run]
        first, last = re.escape(chr(codes[0])), re.escape(chr(codes[-1]))
        written.append(first if len(codes) == 1 else f"{first}-{last}")
    return "".join(written) or _NEVER_MET


def python_expression(pattern: str, forms: Forms) -> re.Pattern[str] | None:
    """The expression for ``re``, in one group; ``None`` where it is not sure to find the same.

    >>> python_expression(r" ?[^\\s\\p{L}]+", ()).findall(" ab-? 1\u00e9")
    ['-?', ' 1']
    """
    if _AMBIGUOUS.search(re.sub(_CATEGORY, "\0", pattern)) or not re.fullmatch(f"(?:{_PART.pattern}|\\))*", pattern):
        return None
    spaces = _CONTROL_SPACES + class_of("Z", forms)

    def members(part: re.Match[str]) -> str:
        return spaces if part[0] == r"\s" else class_of(part[1], forms) if part[1] else part[0]

    def translated(part: re.Match[str]) -> str:
        text = part[0]
        if text in ("(", r"\S"):
            return "(?:" if text == "(" else f"[^{spaces}]"
        written = re.sub(_SIMPLE, members, text)
        return written if written == text or text.startswith("[") else f"[{written}]"

    try:
        compiled = re.compile(f"({_PART.sub(translated, pattern)})")
    except re.error:
        return None
    return None if compiled.fullmatch("") else compiled
