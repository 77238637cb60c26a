"""The packed layouts: everything in one row, nothing padded.

``pack_batch`` puts complete sequences one after another. ``share_batch`` puts groups
``[prompt | chosen | rejected | gold]`` one after another, so that each prompt is computed once; position ids restart
after the prompt for every completion.

Which position sees which is not a mask but a list of *segments* ``(start, end, prefix_start, prefix_end)``: the
positions ``start..end`` see the prefix and, causally, themselves. The first completion follows its prompt, so the two
are one segment without a prefix; the prompt is the prefix of the completions after it. The list travels to the
attention function as the 4-D ``attention_mask`` (int64, [1, 1, segments, 4]); ``prefopt.scoring.attention`` reads it.
Where the tokens of an image see each other in both directions, they follow as blocks ``(start, end, -1, -1)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from prefopt.batching.images import Piece, VisionInputs
from prefopt.batching.layout import CompletionSequence, completion_sequences
from prefopt.batching.padded import make_batch
from prefopt.types import Branch, PreferenceBatch, Segment, TokenizedExample

__all__ = ["pack_batch", "share_batch"]


def pack_batch(
    examples: Sequence[TokenizedExample],
    branches: Sequence[Branch],
    vision: VisionInputs | None = None,
    *,
    weight: float = 1.0,
) -> PreferenceBatch:
    """The batch of P examples as one row of B * P complete sequences, each with its own images."""
    sequences = list(completion_sequences(examples, branches))
    row = PackedRow()
    predict_from: list[np.ndarray] = []
    for sequence in sequences:
        start = len(row)
        predict_from.append(start + sequence.scored - 1)
        row.add(Piece(sequence.ids, sequence.ids[:0], (*sequence.prompt_images, *sequence.completion_images)))
        row.segments.append((start, len(row), start, start))
    return make_batch(
        examples,
        branches,
        sequences,
        model_inputs=row.model_inputs(vision),
        predict_from=predict_from,
        weight=weight,
        segments=row.table(vision),
    )


def share_batch(
    examples: Sequence[TokenizedExample],
    branches: Sequence[Branch],
    vision: VisionInputs | None = None,
    *,
    weight: float = 1.0,
) -> PreferenceBatch:
    """The batch of P examples as one row of P groups ``[prompt | completion | completion ..]``.

    An image of a prompt is in it once. A pair whose branches keep different parts of the prompt (truncation at the
    start) becomes separate sequences.
    """
    sequences = list(completion_sequences(examples, branches))
    row = PackedRow()
    predict_from: dict[int, np.ndarray] = {}
    for pair in range(len(examples)):
        members = [branch * len(examples) + pair for branch in range(len(branches))]
        for group in sharing_groups(members, sequences):
            prompt_ids, images = sequences[group[0]].prompt_ids, sequences[group[0]].prompt_images
            start = row.add(Piece(prompt_ids, prompt_ids[:0], images))
            prompt_end = len(row)
            for member in group:
                sequence = sequences[member]
                own_start = row.add(Piece(sequence.completion_ids, prompt_ids, sequence.completion_images, images))
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
        model_inputs=row.model_inputs(vision),
        predict_from=[predict_from[member] for member in range(len(sequences))],
        weight=weight,
        segments=row.table(vision),
    )


def sharing_groups(members: list[int], sequences: Sequence[CompletionSequence]) -> list[list[int]]:
    """The sequences of a pair, together where they keep the same part of the prompt, else each alone."""
    if len({len(sequences[member].prompt_ids) for member in members}) == 1:
        return [members]
    return [[member] for member in members]


class PackedRow:
    """A row that pieces are added to."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.segments: list[Segment] = []
        self.length = 0

    def __len__(self) -> int:
        return self.length

    def add(self, piece: Piece) -> int:
        """Add a piece; where in the row it begins."""
        start = self.length
        self.pieces.append(piece)
        self.length += len(piece.ids)
        return start

    def table(self, vision: VisionInputs | None) -> list[Segment]:
        """The segments, and the blocks among them."""
        blocks: list[Segment] = []
        start = 0
        for piece in self.pieces:
            found = [] if vision is None else vision.blocks(piece.ids)
            blocks += [(start + first, start + end, -1, -1) for first, end in found]
            start += len(piece.ids)
        return [*self.segments, *blocks]

    def model_inputs(self, vision: VisionInputs | None) -> dict[str, torch.Tensor]:
        """The model's keyword arguments."""
        ids = np.concatenate([piece.ids for piece in self.pieces])
        inputs = {
            "input_ids": torch.from_numpy(ids)[None],
            "position_ids": torch.from_numpy(np.concatenate([piece.positions for piece in self.pieces]))[None],
            "attention_mask": torch.tensor(self.table(vision), dtype=torch.int64).view(1, 1, -1, 4),
        }
        if vision is None:
            return inputs
        tensors = vision.tensors([image for piece in self.pieces for image in piece.images])
        if (positions := vision.positions(self.pieces, tensors)) is not None:
            inputs["position_ids"] = torch.from_numpy(np.concatenate(positions, axis=1))[:, None]
        return {**inputs, **tensors, **vision.token_kinds(inputs["input_ids"])}
