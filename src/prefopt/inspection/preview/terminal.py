"""Rows for the terminal: colours, and beside them marks that stay where there are none."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.text import Text

from prefopt.inspection.preview.facts import facts_of, notes_of, parts_of
from prefopt.inspection.preview.rows import RowPreview
from prefopt.inspection.preview.tokens import Gap, Kind, Piece, shortened
from prefopt.terminal import harmless

__all__ = ["MARKS", "legend", "row_text", "tokens_text"]

STYLES: dict[Kind, str] = {"prompt": "cyan", "trained": "green", "untrained": "yellow", "cut": "dim strike"}
MARKS: dict[Kind, tuple[str, str]] = {
    "prompt": ("", ""),
    "trained": ("\u27e6", "\u27e7"),
    "untrained": ("\u27ea", "\u27eb"),
    "cut": ("\u2702{", "}\u2702"),
}
"""Kind -> what stands before and after tokens of it."""
SPECIAL, IMAGE, NOTE, HEADING, QUIET = "magenta", "bold blue", "bold red", "bold", "dim"
SUBSCRIPTS = str.maketrans("0123456789", "".join(chr(0x2080 + digit) for digit in range(10)))
LINE_END = "\u23ce\n"


def legend() -> Text:
    """What the marks mean."""
    text = Text("marks: ")
    names: dict[Kind, str] = {"trained": "trained on", "untrained": "of a completion, not trained on", "cut": "cut"}
    for kind, name in names.items():
        opened, closed = MARKS[kind]
        text.append(f"{opened}{name}{closed}", STYLES[kind]).append("  ")
    text.append("\u2039special token=what it is\u203a", SPECIAL).append("  ")
    text.append("\u25a3 image", IMAGE).append("  ")
    return text.append("\u2082 made of 2 tokens  \u23ce line break", QUIET)


def row_text(preview: RowPreview, eos: str | None, *, with_ids: bool) -> Text:
    """A row as the terminal shows it.

    Args:
        preview: the row.
        eos: text of the tokenizer's EOS token.
        with_ids: also the token ids of each part.
    """
    facts = facts_of(preview)
    text = Text("\n").append(f"\u2500\u2500 row {preview.row}", HEADING)
    text.append(f"  {facts}" if facts else "", QUIET).append("\n")
    for note in notes_of(preview):
        text.append(f"! {harmless(note)}\n", NOTE)
    for column, value in preview.given.items():
        text.append(f"{column}: ", HEADING).append(f"{harmless(repr(value))}\n")
    for heading, pieces, said in parts_of(preview, eos):
        text.append(f"{heading}  ", HEADING).append(f"{harmless(said)}\n", QUIET)
        text.append_text(tokens_text(pieces)).append("\n")
        if with_ids:
            text.append("ids  ", HEADING).append_text(ids_text(pieces)).append("\n")
    return text


def tokens_text(pieces: Sequence[Piece]) -> Text:
    """Pieces with styles and marks."""
    text = Text()
    for kind, group in grouped(pieces):
        opened, closed = MARKS[kind]
        text.append(opened, STYLES[kind])
        for piece in group:
            text.append(*shown(piece))
        text.append(closed, STYLES[kind])
    return text


def ids_text(pieces: Sequence[Piece]) -> Text:
    """Their ids, tokens of one character joined by +; of an image the first and how many."""
    text = Text()
    for kind, group in grouped(pieces):
        opened, closed = MARKS[kind]
        words = " ".join(ids_of(piece) for piece in group)
        text.append(f"{opened}{words}{closed} ", STYLES[kind])
    return text


def ids_of(piece: Piece | Gap) -> str:
    if isinstance(piece, Gap):
        return f".. {piece.num_tokens:,} more .."
    return f"{piece.ids[0]} x {len(piece.ids)}" if piece.is_image else "+".join(map(str, piece.ids))


def grouped(pieces: Sequence[Piece]) -> Any:
    """Neighbours of one kind together, each group after its kind, with long cuts shortened."""
    return groupby(shortened(pieces), key=lambda piece: piece.kind)


def shown(piece: Piece | Gap) -> tuple[str, str]:
    """Text and style of a piece."""
    style = STYLES[piece.kind]
    if isinstance(piece, Gap):
        return f" .. {piece.num_tokens:,} more tokens .. ", style
    if piece.is_image:
        return f"\u25a3 {piece.image_label} \u25a3", f"{style} {IMAGE}"
    text = harmless(piece.text).replace("\n", LINE_END)
    if piece.special:
        name = "" if piece.special == "special" else "=" + piece.special.replace(" ", "=")
        return f"\u2039{text}{name}\u203a", f"{style} {SPECIAL}"
    if len(piece.ids) > 1 or not piece.text:
        return f"{text}{str(len(piece.ids)).translate(SUBSCRIPTS)}", style
    return text, style
