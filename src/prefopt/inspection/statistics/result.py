"""What was found in a data set: plain numbers and row numbers, for the terminal, a page and a JSON file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = [
    "CONTEXT",
    "MAX_LENGTH",
    "BrokenRow",
    "Conversations",
    "Distribution",
    "Duplicates",
    "LayoutTokens",
    "LengthBias",
    "Limit",
    "Preparation",
    "Statistics",
]

MAX_LENGTH, CONTEXT = "max_length", "the model's context"
"""Whose a limit is."""
Rows = tuple[int, ...]
"""Row numbers of the user's data set, from 0."""


@dataclass(frozen=True)
class Distribution:
    """Lengths of one part of the rows.

    Args:
        num_rows: how many were measured.
        mean, median, p90, p99, largest: of their lengths.
        counts: rows in each of equal steps from 0 to ``p99``; longer ones are in the last step.
    """

    num_rows: int
    mean: float
    median: float
    p90: float
    p99: float
    largest: int
    counts: tuple[int, ...]


@dataclass(frozen=True)
class BrokenRow:
    """A row that cannot be read, and the message with which a run would stop."""

    row: int
    message: str


@dataclass(frozen=True)
class Preparation:
    """What a run's `prefopt.data.PrepareReport` says of the rows; without a model, as far as the text tells.

    Args:
        num_kept: rows that are trained on.
        skipped: reason -> rows that are left out.
        truncated: kept rows that ``max_length`` cuts.
        merged: kept rows whose tokens merge across the end of the prompt.
        rewritten: kept rows with a completion of several turns that is trained on whole.
    """

    num_kept: int
    skipped: Mapping[str, Rows]
    truncated: Rows
    merged: Rows
    rewritten: Rows


@dataclass(frozen=True)
class Duplicates:
    """Groups of rows that say the same; of each, all but the first could go.

    Args:
        pairs: the same prompt and completions.
        near: not the same, but nearly: most of their text is shared.
        prompts: the same prompt, whatever the completions.
        contradictory: the same two completions of a prompt, once this way and once that way preferred.
    """

    pairs: tuple[Rows, ...]
    near: tuple[Rows, ...]
    prompts: tuple[Rows, ...]
    contradictory: tuple[Rows, ...]


@dataclass(frozen=True)
class LengthBias:
    """Whether the longer completion is the chosen one, over the rows that are trained on.

    Args:
        unit: ``tokens`` or ``characters``.
        share_longer, share_equal: of the rows whose chosen completion is the longer one, or as long; from 0 to 1.
        median_difference: chosen minus rejected.
        counts, edges: rows in each step of the difference; what lies outside is in the outermost steps.
    """

    unit: str
    share_longer: float
    share_equal: float
    median_difference: float
    counts: tuple[int, ...]
    edges: tuple[float, ...]


@dataclass(frozen=True)
class Limit:
    """What a ``max_length`` would do.

    Args:
        max_length: tokens of a prompt with one completion.
        meaning: `MAX_LENGTH`, `CONTEXT`, both, or empty.
        truncated: rows that are cut and trained on.
        lost: rows that are left out because of the cut.
    """

    max_length: int
    meaning: str
    truncated: Rows
    lost: Rows


@dataclass(frozen=True)
class Conversations:
    """Of the rows that are made of messages.

    Args:
        num_rows: how many there are.
        turns: turns of the user in a row -> rows.
        roles: role -> rows in which it speaks.
        num_system_prompts: how many different ones there are.
        with_system: rows with a system prompt.
        with_tools: rows that offer tools.
    """

    num_rows: int
    turns: Mapping[int, int]
    roles: Mapping[str, int]
    num_system_prompts: int
    with_system: Rows
    with_tools: Rows


@dataclass(frozen=True)
class LayoutTokens:
    """Tokens that the model computes for all rows once, by batch layout, after truncation.

    Args:
        pairs_per_batch: pairs of a padded batch, drawn at random.
        padded, packed, shared_prompt: see docs/notation.md; ``packed`` is the padded one without its padding.
    """

    pairs_per_batch: int
    padded: int
    packed: int
    shared_prompt: int


@dataclass(frozen=True)
class Statistics:
    """What `measure` found.

    Args:
        name: what the set is called.
        num_rows: rows that were measured.
        sample: how they were chosen, where they are not all; else empty.
        columns: of the set.
        unused: those of them that no run reads.
        formats: format of a row -> rows.
        broken: rows that cannot be read.
        preparation: what a run would make of the rows.
        duplicates: rows that say the same.
        lengths: unit (``characters``, ``words``, ``tokens``) -> part of a row -> lengths.
        bias: whether the longer completion is chosen; None where nothing was compared.
        limits: what several values of ``max_length`` would cut; none without a model.
        conversations: None where no row is made of messages.
        with_images: rows with images.
        layouts: None without a model.
        model: whose tokens were counted; empty for none.
    """

    name: str
    num_rows: int
    sample: str
    columns: tuple[str, ...]
    unused: tuple[str, ...]
    formats: Mapping[str, int]
    broken: tuple[BrokenRow, ...]
    preparation: Preparation
    duplicates: Duplicates
    lengths: Mapping[str, Mapping[str, Distribution]]
    bias: LengthBias | None
    limits: tuple[Limit, ...]
    conversations: Conversations | None
    with_images: Rows
    layouts: LayoutTokens | None
    model: str
