"""What became of the rows: which were skipped and why, and what was noticed about the others."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from enum import IntFlag

__all__ = ["SKIPPED", "PrepareReport", "Status"]

logger = logging.getLogger(__name__)

_NUM_NAMED = 5


class Status(IntFlag):
    """What happened to one row; the values are stored with cached rows, so they stay as they are."""

    EMPTY = 1
    EQUAL = 2
    UNTRAINABLE = 4
    CUT_AWAY = 8
    EQUAL_WHEN_CUT = 16
    MERGED = 32
    REWRITTEN = 64
    TRUNCATED = 128
    IMAGES_CUT = 256
    BEYOND_CONTEXT = 512


SKIPPED = {
    Status.EMPTY: "empty completion",
    Status.EQUAL: "chosen equal to rejected",
    Status.UNTRAINABLE: "no token to train on (no assistant turn, or a single token without a prompt)",
    Status.IMAGES_CUT: "images that do not fit within max_length",
    Status.CUT_AWAY: "no completion token left within max_length",
    Status.EQUAL_WHEN_CUT: "chosen equal to rejected within max_length",
}
"""Why a row is skipped: it has nothing to learn from."""

_ANY_SKIPPED = sum(int(flag) for flag in SKIPPED)


def skip_reason(status: int) -> str | None:
    """Why a row of this status is skipped; ``None`` for one that is kept."""
    if not int(status) & _ANY_SKIPPED:  # nearly every row; operators of IntFlag are slow
        return None
    return next(reason for flag, reason in SKIPPED.items() if status & flag)


@dataclass
class PrepareReport:
    """A tally over the rows of one data set; of a stream, over those of its first full reading, so far.

    A data loader with worker processes reads a stream in them, and counts there.
    """

    name: str
    num_rows: int = 0
    num_truncated: int = 0
    """Kept rows with at least one completion or prompt cut to ``max_length``."""
    num_merged: int = 0
    """Kept rows whose tokens merge across the end of the prompt."""
    num_rewritten: int = 0
    """Kept rows with a completion of several turns that is trained on whole."""
    skipped: dict[str, list[int]] = field(default_factory=dict)
    """Reason -> row numbers."""
    beyond_context: list[int] = field(default_factory=list)
    """Numbers of kept rows that are longer than the model's context, where nothing is cut."""
    context: int | None = None
    """Tokens that the model takes, where nothing is cut."""
    is_complete: bool = False
    """Whether every row was counted; from then on the tally stays as it is."""

    @property
    def num_kept(self) -> int:
        return self.num_rows - sum(map(len, self.skipped.values()))

    def add(self, row: int, status: int) -> None:
        """Counts one row."""
        if self.is_complete:
            return
        self.num_rows += 1
        reason = skip_reason(status)
        if reason is not None:
            self.skipped.setdefault(reason, []).append(row)
            return
        if not status:
            return
        self.num_truncated += bool(status & Status.TRUNCATED)
        self.num_merged += bool(status & Status.MERGED)
        self.num_rewritten += bool(status & Status.REWRITTEN)
        if status & Status.BEYOND_CONTEXT:
            self.beyond_context.append(row)

    def lines(self) -> list[str]:
        """What is worth saying, one line each; nothing where all is well."""
        of_rows = f"of {self.num_rows} rows"
        lines = [
            f"{self.name} data: skipped {len(rows)} {of_rows}: {reason} ({named(rows)})."
            for reason, rows in self.skipped.items()
        ]
        if self.num_merged:
            lines.append(
                f"{self.name} data: in {self.num_merged} {of_rows} tokens merge across the end of the prompt, or the "
                "template renders the prompt alone differently; the completion starts where the two tokenisations part."
            )
        if self.num_rewritten:
            lines.append(
                f"{self.name} data: in {self.num_rewritten} {of_rows} the chat template rewrites earlier turns, so "
                "that completions of several turns are trained on whole, not on the assistant's turns alone; a "
                "template with {% generation %} markers avoids it."
            )
        if self.beyond_context:
            lines.append(
                f"{self.name} data: {len(self.beyond_context)} {of_rows} are longer than the model's context of "
                f"{self.context} tokens ({named(self.beyond_context)}): it has not learned such positions, and fails "
                f"on them where it has a table of them. Set max_length={self.context} to cut them."
            )
        return lines

    def restart(self) -> None:
        """Counts from the start again, unless the tally is complete."""
        if not self.is_complete:
            self.num_rows = self.num_truncated = self.num_merged = self.num_rewritten = 0
            self.skipped.clear()
            self.beyond_context.clear()

    def finish(self) -> None:
        """Every row was counted: writes the lines as warnings, once.

        Raises:
            ValueError: no row is left; the reasons are named.
        """
        if self.num_kept > 0:
            if not self.is_complete:
                self.is_complete = True
                for line in self.lines():
                    logger.warning(line)
            return
        self.is_complete = True
        if not self.num_rows:
            raise ValueError(f"{self.name} data: the data set is empty. Give one with at least one row.")
        reasons = "; ".join(f"{len(rows)} x {reason} ({named(rows)})" for reason, rows in self.skipped.items())
        too_long = {SKIPPED[Status.CUT_AWAY], SKIPPED[Status.IMAGES_CUT]}
        hint = " Raise max_length." if too_long & self.skipped.keys() else ""
        raise ValueError(f"{self.name} data: none of the {self.num_rows} rows can be trained on: {reasons}.{hint}")


def named(rows: list[int]) -> str:
    """The first few row numbers.

    >>> named([3, 4])
    'rows 3, 4'
    """
    numbers = ", ".join(map(str, rows[:_NUM_NAMED]))
    return f"row{'s' if len(rows) > 1 else ''} {numbers}{', ..' if len(rows) > _NUM_NAMED else ''}"
