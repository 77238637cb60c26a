"""What there is to say of a row beside its tokens, in words: alike in the terminal and on a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from prefopt.inspection.preview.rows import RowPreview, Sequences
from prefopt.inspection.preview.tokens import Kind, Piece
from prefopt.types import COLUMN_OF_BRANCH, Branch

__all__ = ["Part", "count_of", "ends_with_eos", "facts_of", "first_token", "notes_of", "parts_of"]

Part = tuple[str, tuple[Piece, ...], str]
"""Heading, pieces, and what there is to say of them."""


def parts_of(preview: RowPreview, eos: str | None) -> list[Part]:
    """The prompt, once where all completions keep the same of it, and the completions.

    Args:
        preview: of a row with tokens.
        eos: text of the tokenizer's EOS token, to say where it is missing; None where it has none.
    """
    branches = preview.branches
    prompts = {sequences.prompt for sequences in branches.values()}
    shared = len(prompts) == 1
    parts: list[Part] = []
    for place, (branch, sequences) in enumerate(branches.items()):
        column = COLUMN_OF_BRANCH[branch]
        if not shared or place == 0:
            heading = "prompt" if shared else f"prompt as {column} keeps it"
            parts.append((heading, sequences.prompt, counted(sequences.prompt, preview.prompt_images)))
        parts.append((column, sequences.completion, completion_facts(sequences, eos, bool(preview.skipped))))
    return parts


def completion_facts(sequences: Sequences, eos: str | None, is_skipped: bool) -> str:
    facts = [counted(sequences.completion, sequences.images)]
    if first := first_token(sequences.completion):
        facts.append(f"first token {first}")
    if eos is not None and not is_skipped and not ends_with_eos(sequences.completion):
        facts.append(f"does not end with {eos} (EOS)")
    return "; ".join(facts)


def counted(pieces: Sequence[Piece], images: Sequence[tuple[int, int]]) -> str:
    """Numbers of tokens of each kind, and sizes of images."""
    counts = {kind: count_of(pieces, kind) for kind in ("prompt", "trained", "untrained", "cut")}
    total = sum(count for kind, count in counts.items() if kind != "cut")
    details = [f"{counts[kind]:,} {kind}" for kind in ("trained", "untrained") if counts[kind]]
    text = f"{total:,} token{'' if total == 1 else 's'}{': ' if details else ''}{', '.join(details)}"
    text += f"; {counts['cut']:,} cut" if counts["cut"] else ""
    return text + (f"; images {', '.join(f'{width}x{height}' for width, height in images)}" if images else "")


def count_of(pieces: Iterable[Piece], kind: Kind) -> int:
    """Tokens of a kind."""
    return sum(len(piece.ids) for piece in pieces if piece.kind == kind)


def first_token(completion: Sequence[Piece]) -> str:
    """The first token that is kept, as text and id; empty where none is."""
    kept = (place for place, piece in enumerate(completion) if piece.kind != "cut")
    place = next(kept, None)
    if place is None:
        return ""
    piece = completion[place]
    text = "an image" if piece.is_image else repr(piece.text) if piece.text else "a part of a character"
    return f"{text} (id {piece.ids[0]}{', and more' if len(piece.ids) > 1 else ''})"


def ends_with_eos(completion: Sequence[Piece]) -> bool:
    """Whether the last token that is trained on is EOS, but for white space after it."""
    trained = (piece for piece in reversed(completion) if piece.kind == "trained")
    last = next((piece for piece in trained if piece.text.strip()), None)
    return last is not None and "eos" in last.special.split()


def facts_of(preview: RowPreview) -> str:
    """The numbers that the row brings."""
    numbers: dict[str, float | None] = {"weight": preview.weight, "margin": preview.target_margin}
    sums: Mapping[Branch, float] = preview.ref_sum_logps or {}
    numbers |= {f"ref_{COLUMN_OF_BRANCH[branch]}_logps": value for branch, value in sums.items()}
    return ", ".join(f"{name} {value:g}" for name, value in numbers.items() if value is not None)


def notes_of(preview: RowPreview) -> list[str]:
    """What should be looked at."""
    notes = []
    if preview.problem:
        notes.append(f"training would stop here: {preview.problem}")
    elif preview.skipped:
        notes.append(f"training leaves this row out: {preview.skipped}")
    if preview.is_merged:
        notes.append(
            "tokens merge across the end of the prompt, or the template renders the prompt alone differently: the "
            "completions start where the two tokenisations part, so their first tokens may hold the prompt's last text"
        )
    if preview.is_rewritten:
        notes.append(
            "the chat template rewrites earlier turns: a completion of several turns is trained on whole, not on the "
            "assistant's turns alone; a template with {% generation %} markers avoids it"
        )
    if preview.is_beyond_context:
        notes.append("the row has more tokens than the model's context; set max_length to cut it")
    starts = {count_of(sequences.prompt, "cut") for sequences in preview.branches.values()}
    if len(starts) > 1:
        notes.append("the completions keep different parts of the prompt: each is cut to max_length for itself")
    return notes
