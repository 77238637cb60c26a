"""Rows as a page that is whole in one file."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from markupsafe import escape

from prefopt.inspection.preview.facts import facts_of, notes_of, parts_of
from prefopt.inspection.preview.rows import RowPreview
from prefopt.inspection.preview.tokens import Gap, Piece, shortened
from prefopt.report.page import rendered
from prefopt.terminal import harmless

__all__ = ["preview_page"]

MOST_BYTES = 1_800_000
"""Of all rows together; with the frame around them a page stays below 2 MB."""
MOST_BYTES_OF_A_PART = 150_000
"""Of a prompt or a completion."""
MARKUP = 90
"""Bytes, at most, of the markup around a piece, its ids not counted."""
BYTES_OF_AN_ID = 8
IDS_IN_A_TITLE = 16
"""Of an image's tokens, no more ids are named."""


def preview_page(previews: Sequence[RowPreview], title: str, about: str, eos: str | None) -> str:
    """The page as text, under 2 MB: rows that would not fit are named and left out.

    Args:
        previews: the rows.
        title: of the page.
        about: what the rows are of, and how they were prepared.
        eos: text of the tokenizer's EOS token.
    """
    rows: list[dict[str, Any]] = []
    total = 0
    for preview in previews:
        row, num_bytes = shown_row(preview, eos)
        total += num_bytes
        if total > MOST_BYTES:
            break
        rows.append(row)
    left_out = [preview.row for preview in previews[len(rows) :]]
    return rendered("show.html", title=title, about=about, rows=rows, left_out=left_out)


def shown_row(preview: RowPreview, eos: str | None) -> tuple[dict[str, Any], int]:
    """What the template shows of a row, and how many bytes that takes at most."""
    parts: list[dict[str, Any]] = []
    total = 0
    for heading, pieces, said in parts_of(preview, eos):
        fitted = within_bytes(shortened(pieces))
        total += sum(map(bytes_of, fitted))
        groups = [(kind, [shown(piece) for piece in group]) for kind, group in groupby(fitted, key=lambda p: p.kind)]
        parts.append({"heading": heading, "said": said, "groups": groups})
    notes, given = notes_of(preview), list(preview.given.items())
    total += sum(len(escape(harmless(text)).encode()) + MARKUP for text in [*notes, *(value for _, value in given)])
    number = preview.row
    return {"number": number, "facts": facts_of(preview), "notes": notes, "given": given, "parts": parts}, total


def shown(piece: Piece | Gap) -> dict[str, Any]:
    """Text, class and title of a piece."""
    if isinstance(piece, Gap):
        return {"text": f" .. {piece.num_tokens:,} more tokens .. ", "style": "gap", "title": ""}
    ids = " ".join(map(str, piece.ids[:IDS_IN_A_TITLE])) + (" .." if len(piece.ids) > IDS_IN_A_TITLE else "")
    if piece.is_image:
        return {"text": piece.image_label, "style": "image", "title": ids}
    if piece.special:
        return {"text": piece.text, "style": "special", "title": f"{ids} {piece.special}"}
    style = "several" if len(piece.ids) > 1 or not piece.text else "line" if "\n" in piece.text else ""
    return {"text": piece.text or "\u2026", "style": style, "title": ids}


def within_bytes(pieces: Sequence[Piece | Gap]) -> list[Piece | Gap]:
    """``pieces`` with a `Gap` in the middle of too many."""
    if sum(map(bytes_of, pieces)) <= MOST_BYTES_OF_A_PART:
        return [*pieces]
    first = taken(pieces, MOST_BYTES_OF_A_PART // 2)
    last = taken(pieces[::-1], MOST_BYTES_OF_A_PART // 2)
    between = pieces[first : len(pieces) - last]
    num_tokens = sum(piece.num_tokens if isinstance(piece, Gap) else len(piece.ids) for piece in between)
    return [*pieces[:first], Gap(num_tokens, between[0].kind), *pieces[len(pieces) - last :]]


def taken(pieces: Sequence[Piece | Gap], room: int) -> int:
    """How many of the first pieces fit into ``room`` bytes."""
    for place, piece in enumerate(pieces):
        room -= bytes_of(piece)
        if room < 0:
            return place
    return len(pieces)


def bytes_of(piece: Piece | Gap) -> int:
    """What a piece takes on the page at most."""
    if isinstance(piece, Gap):
        return MARKUP
    return MARKUP + BYTES_OF_AN_ID * min(len(piece.ids), IDS_IN_A_TITLE) + len(escape(harmless(piece.text)).encode())
