"""The packed layouts: everything in one row, nothing padded.

``pack_batch`` puts complete sequences one after another. ``share_batch`` puts groups
``[prompt | chosen | rejected | gold]`` one after another, so that each prompt is computed once; position ids restart
after the prompt for every completion.

Which position sees which is not a mask but a list of *segments* ``(start, end, prefix_start, prefix_end)``: the
positions ``start..end`` see the prefix and, causally, themselves. It travels to the attention function as the 4-D
``attention_mask`` (int64, [1, 1, segments, 4]); ``prefopt.scoring.attention`` reads it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prefopt.batching.layout import CompletionSequence, completion_sequences
from prefopt.batching.padded import make_batch
from prefopt.types import Branch, PreferenceBatch, TokenizedExample

__all__ = ["pack_batch", "share_batch"]

Segment = tuple[int, int, int, int]


def pack_batch(
    examples: Sequence[TokenizedExample], branches: Sequence[Branch], *, weight: float = 1.0
) -> PreferenceBatch:
    """The batch of P examples as one row of B * P complete sequences."""
    sequences = list(completion_sequences(examples, branches))
    input_ids: list[int] = []
    position_ids: list[int] = []
    segments: list[Segment] = []
    predict_from: list[int] = []
    for sequence in sequences:
        start = len(input_ids)
        predict_from += [start + place - 1 for place in sequence.scored]
        input_ids += sequence.ids
        position_ids += range(len(sequence))
        segments.append((start, len(input_ids), start, start))
    return make_batch(
        examples,
        branches,
        sequences,
        model_inputs=row_inputs(input_ids, position_ids, segments),
        predict_from=predict_from,
        weight=weight,
    )


def share_batch(
    examples: Sequence[TokenizedExample], branches: Sequence[Branch], *, weight: float = 1.0
) -> PreferenceBatch:
    """The batch of P examples as one row of P groups ``[prompt | completion | completion ..]``.

    A pair whose branches keep different parts of the prompt (truncation at the start) becomes separate sequences.
    """
    sequences = list(completion_sequences(examples, branches))
    input_ids: list[int] = []
    position_ids: list[int] = []
    segments: list[Segment] = []
    predict_from: dict[int, list[int]] = {}
    for pair in range(len(examples)):
        members = [branch * len(examples) + pair for branch in range(len(branches))]
        for group in sharing_groups(members, sequences):
            prompt_ids = sequences[group[0]].prompt_ids
            start, prompt_end = len(input_ids), len(input_ids) + len(prompt_ids)
            input_ids += prompt_ids
            position_ids += range(len(prompt_ids))
            if prompt_ids:
                segments.append((start, prompt_end, start, start))
            for member in group:
                own_start = len(input_ids)
                completion_ids = sequences[member].completion_ids
                predict_from[member] = [
                    prompt_end - 1 if place == len(prompt_ids) else own_start + place - len(prompt_ids) - 1
                    for place in sequences[member].scored
                ]
                input_ids += completion_ids
                position_ids += range(len(prompt_ids), len(prompt_ids) + len(completion_ids))
                if completion_ids:
                    segments.append((own_start, len(input_ids), start, prompt_end))
    return make_batch(
        examples,
        branches,
        sequences,
        model_inputs=row_inputs(input_ids, position_ids, segments),
        predict_from=[place for member in range(len(sequences)) for place in predict_from[member]],
        weight=weight,
    )


def sharing_groups(members: list[int], sequences: Sequence[CompletionSequence]) -> list[list[int]]:
    """The sequences of a pair, together where they keep the same part of the prompt, else each alone."""
    if len({len(sequences[member].prompt_ids) for member in members}) == 1:
        return [members]
    return [[member] for member in members]


def row_inputs(input_ids: list[int], position_ids: list[int], segments: list[Segment]) -> dict[str, torch.Tensor]:
    """The model's keyword arguments for one packed row."""
    return {
        "input_ids": torch.tensor([input_ids], dtype=torch.int64),
        "position_ids": torch.tensor([position_ids], dtype=torch.int64),
        "attention_mask": torch.tensor(segments, dtype=torch.int64).view(1, 1, -1, 4),
    }
