"""Tokens as they are shown: pieces of text, each with what becomes of it in training."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any, Literal, TypeAlias

from prefopt.inspection.preview.text import text_spans

__all__ = ["Gap", "Kind", "Piece", "Vocabulary", "pieces_of", "shortened", "vocabulary", "with_sizes"]

Kind: TypeAlias = Literal["prompt", "trained", "untrained", "cut"]
"""Of a token: the prompt's, of a completion with or without a loss, or cut away by truncation."""

NAMES = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
"""What a special token may be to its tokenizer, as in ``eos_token_id``."""
SHOWN_OF_A_CUT = 40
"""Pieces of a long stretch that was cut away, on the side where the rest begins."""


@dataclass(frozen=True)
class Piece:
    """Tokens that are shown as one: a token, those of one character, or those of an image."""

    text: str
    """Empty where they begin a character that ends in the next piece."""
    ids: tuple[int, ...]
    kind: Kind
    special: str = ""
    """Of a special token: what it is to the tokenizer (``eos``, ``eos pad``), or else ``special``."""
    is_image: bool = False
    size: tuple[int, int] | None = None
    """Width and height of the image, where the part has as many stretches of image tokens as images."""

    @property
    def image_label(self) -> str:
        """What stands for image tokens."""
        tokens = f"{len(self.ids):,} image token{'' if len(self.ids) == 1 else 's'}"
        return tokens if self.size is None else f"image {self.size[0]}x{self.size[1]}, {tokens}"


@dataclass(frozen=True)
class Gap:
    """Tokens that are left out of what is shown."""

    num_tokens: int
    kind: Kind


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer says of single ids."""

    special: Mapping[int, str]
    """Id -> what the special token is."""
    images: Collection[int]
    """Ids in the place of which the model sees an image."""


def vocabulary(tokenizer: Any, image_ids: Collection[int] = ()) -> Vocabulary:
    """The special tokens of ``tokenizer`` by id, with those that its attributes name."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    names: dict[int, str] = dict.fromkeys([*special, *tokenizer.all_special_ids], "")
    for name in NAMES:
        index = getattr(tokenizer, f"{name}_token_id", None)
        if index is not None:
            names[index] = f"{names.get(index, '')} {name}".strip()
    return Vocabulary({index: name or "special" for index, name in names.items()}, image_ids)


def pieces_of(
    ids: Sequence[int], kinds: Sequence[Kind], tokenizer: Any, words: Vocabulary, boundary: int
) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """The pieces of a sequence, before and from ``boundary`` on; their texts joined are that of ``ids``.

    Args:
        ids: [n] token ids.
        kinds: [n] what becomes of each.
        tokenizer: decodes them.
        words: of the tokenizer.
        boundary: a place that no piece goes across: the end of the prompt.
    """
    before: list[Piece] = []
    after: list[Piece] = []
    for begin, end, text in text_spans(ids, tokenizer):
        changes = [i for i in range(begin + 1, end) if i == boundary or kinds[i] != kinds[i - 1]]
        for first, last in pairwise([begin, *changes, end]):
            piece = _piece(ids[first:last], kinds[first], text if last == end else "", words)
            (before if first < boundary else after).append(piece)
    return tuple(_with_images_joined(before)), tuple(_with_images_joined(after))


def _piece(ids: Sequence[int], kind: Kind, text: str, words: Vocabulary) -> Piece:
    special = words.special.get(ids[0], "") if len(ids) == 1 else ""
    return Piece(text, tuple(ids), kind, special, is_image=all(index in words.images for index in ids))


def _with_images_joined(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """The placeholders of an image as one piece."""
    for (is_image, _), group in groupby(pieces, key=lambda piece: (piece.is_image, piece.kind)):
        members = list(group)
        if not is_image:
            yield from members
            continue
        ids = tuple(index for member in members for index in member.ids)
        yield replace(members[0], text="".join(member.text for member in members), ids=ids)


def with_sizes(pieces: tuple[Piece, ...], sizes: Sequence[tuple[int, int]]) -> tuple[Piece, ...]:
    """``pieces`` with the sizes of their images; a processor may cut one image into several stretches of tokens."""
    if sum(piece.is_image for piece in pieces) != len(sizes):
        return pieces
    rest = iter(sizes)
    return tuple(replace(piece, size=next(rest)) if piece.is_image else piece for piece in pieces)


def shortened(pieces: Sequence[Piece]) -> list[Piece | Gap]:
    """``pieces`` with a `Gap` in each long stretch that was cut away, on the side away from what is kept."""
    found: list[Piece | Gap] = []
    for kind, group in groupby(pieces, key=lambda piece: piece.kind):
        members = list(group)
        too_many = len(members) - SHOWN_OF_A_CUT
        if kind != "cut" or too_many <= 1:
            found += members
        elif found:
            found += [*members[:SHOWN_OF_A_CUT], Gap(num_ids(members[SHOWN_OF_A_CUT:]), kind)]
        else:
            found += [Gap(num_ids(members[:too_many]), kind), *members[too_many:]]
    return found


def num_ids(pieces: Sequence[Piece]) -> int:
    return sum(len(piece.ids) for piece in pieces)
