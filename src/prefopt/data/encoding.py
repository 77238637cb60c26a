"""Texts as token ids, the prompt that several texts begin with tokenised once."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from prefopt.data.pieces import Ids, last_cut, whole_ids
from prefopt.data.words import Before, WordTokenizer, word_tokenizer

__all__ = ["TextEncoder"]

Family = tuple[str, Sequence[str]]
"""A prompt, and the texts that go on from it."""


class TextEncoder:
    """Tokenises with ``tokenizer``, which must stay as it is meanwhile: what was tokenised is remembered."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __reduce__(self) -> Any:
        return TextEncoder, (self.tokenizer,)  # another process remembers for itself

    @cached_property
    def by_words(self) -> WordTokenizer | None:
        """``None``: only whole texts are sure to give the tokenizer's ids."""
        return word_tokenizer(self.tokenizer)

    def __call__(self, texts: list[str]) -> list[Ids]:
        """The ids of each text, nothing added."""
        if self.by_words is None:
            return whole_ids(self.tokenizer, texts)
        return self.by_words([(text, "nothing") for text in texts])

    def families(self, families: Sequence[Family], *, add_special_tokens: bool) -> list[tuple[Ids, list[Ids]]]:
        """For each prompt with the texts that go on from it: the ids of the prompt, and of each text."""
        if self.by_words is None:
            texts = [text for prompt, others in families for text in (prompt, *others)]
            ids = iter(whole_ids(self.tokenizer, texts, add_special_tokens=add_special_tokens))
            return [(next(ids), [next(ids) for _ in others]) for _, others in families]
        pieces: list[tuple[str, Before]] = []
        for prompt, others in families:
            cut = last_cut(prompt) if all(text.startswith(prompt) for text in others) else 0
            pieces.append((prompt[:cut], "nothing"))
            pieces.extend((text[cut:], "text" if cut else "nothing") for text in (prompt, *others))
        start, end = self.special_ends if add_special_tokens else (array("i"), array("i"))
        return list(joined_pieces(families, iter(self.by_words(pieces)), start, end))

    @cached_property
    def special_ends(self) -> tuple[Ids, Ids]:
        """What the tokenizer itself puts before and after a text."""
        probe = ["one two three"]
        [plain], [special] = whole_ids(self.tokenizer, probe), whole_ids(self.tokenizer, probe, add_special_tokens=True)
        start = next(i for i in range(len(special)) if special[i : i + len(plain)] == plain)
        return special[:start], special[start + len(plain) :]


def joined_pieces(
    families: Sequence[Family], ids: Iterator[Ids], start: Ids, end: Ids
) -> Iterator[tuple[Ids, list[Ids]]]:
    """The ids of the pieces (shared head, rest of the prompt, rest of each text) put together again."""
    for _, others in families:
        head = start + next(ids)
        yield head + next(ids) + end, [head + next(ids) + end for _ in others]
