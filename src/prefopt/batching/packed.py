"""The packed layouts: everything in one row, nothing padded.

``pack_batch`` puts complete sequences one after another. ``share_batch`` puts groups
``[prompt | chosen | rejected | gold]`` one after another, so that each prompt is computed once; position ids restart
after the prompt for every completion.

Which position sees which is not a mask but a list of *segments* ``(start, end, prefix_start, prefix_end)``: the
positions ``start..end`` see the prefix and, causally, themselves. The first completion follows its prompt, so the two
are one segment without a prefix; the prompt is the prefix of the completions after it. The list travels to the
attention function as the 4-D ``attention_mask`` (int64, [1, 1, segments, 4]); ``prefopt.scoring.attention`` reads it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from prefopt.batching.layout import CompletionSequence, completion_sequences
from prefopt.batching.padded import make_batch
from prefopt.types import Branch, PreferenceBatch, Segment, TokenizedExample

__all__ = ["pack_batch", "share_batch"]


def pack_batch(
    examples: Sequence[TokenizedExample], branches: Sequence[Branch], *, weight: float = 1.0
) -> PreferenceBatch:
    """The batch of P examples as one row of B * P complete sequences."""
    sequences = list(completion_sequences(examples, branches))
    row = PackedRow()
    predict_from: list[np.ndarray] = []
    for sequence in sequences:
        start = len(row)
        predict_from.append(start + sequence.scored - 1)
        row.add(sequence.ids, 0)
        row.segments.append((start, len(row), start, start))
    return make_batch(
        examples,
        branches,
        sequences,
        model_inputs=row.model_inputs(),
        predict_from=predict_from,
        weight=weight,
        segments=row.segments,
    )


def share_batch(
    examples: Sequence[TokenizedExample], branches: Sequence[Branch], *, weight: float = 1.0
) -> PreferenceBatch:
    """The batch of P examples as one row of P groups ``[prompt | completion | completion ..]``.

    A pair whose branches keep different parts of the prompt (truncation at the start) becomes separate sequences.
    """
    sequences = list(completion_sequences(examples, branches))
    row = PackedRow()
    predict_from: dict[int, np.ndarray] = {}
    for pair in range(len(examples)):
        members = [branch * len(examples) + pair for branch in range(len(branches))]
        for group in sharing_groups(members, sequences):
            prompt_ids = sequences[group[0]].prompt_ids
            start = row.add(prompt_ids, 0)
            prompt_end = len(row)
            for member in group:
                sequence = sequences[member]
                own_start = row.add(sequence.completion_ids, len(prompt_ids))
                places = sequence.scored - len(prompt_ids)
                predict_from[member] = np.where(places == 0, prompt_end, own_start + places) - 1
                first = member == group[0]
                segment = (start, len(row), start, start) if first else (own_start, len(row), start, prompt_end)
                if segment[0] < len(row):  # a completion may be empty
                    row.segments.append(segment)
    return make_batch(
        examples,
        branches,
        sequences,
        model_inputs=row.model_inputs(),
        predict_from=[predict_from[member] for member in range(len(sequences))],
        weight=weight,
        segments=row.segments,
    )


def sharing_groups(members: list[int], sequences: Sequence[CompletionSequence]) -> list[list[int]]:
    """The sequences of a pair, together where they keep the same part of the prompt, else each alone."""
    if len({len(sequences[member].prompt_ids) for member in members}) == 1:
        return [members]
    return [[member] for member in members]


class PackedRow:
    """A row that pieces are added to."""

    def __init__(self) -> None:
        self.ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.segments: list[Segment] = []
        self.length = 0

    def __len__(self) -> int:
        return self.length

    def add(self, ids: np.ndarray, first_position: int) -> int:
        """Add tokens whose position ids count from ``first_position``; where in the row they begin."""
        start = self.length
        self.ids.append(ids)
        self.positions.append(np.arange(first_position, first_position + len(ids)))
        self.length += len(ids)
        return start

    def model_inputs(self) -> dict[str, torch.Tensor]:
        """The model's keyword arguments."""
        return {
            "input_ids": torch.from_numpy(np.concatenate(self.ids))[None],
            "position_ids": torch.from_numpy(np.concatenate(self.positions))[None],
            "attention_mask": torch.tensor(self.segments, dtype=torch.int64).view(1, 1, -1, 4),
        }
