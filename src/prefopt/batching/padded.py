"""The padded layout: one row per completion, [chosen..; rejected..; gold..], padded on the right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from prefopt.batching.images import Piece, VisionInputs
from prefopt.batching.layout import (
    CompletionSequence,
    branch_layout,
    completion_sequences,
    pair_values,
    reference_sums,
)
from prefopt.types import Branch, PreferenceBatch, Segment, TokenizedExample

__all__ = ["pad_batch"]


def pad_batch(
    examples: Sequence[TokenizedExample],
    branches: Sequence[Branch],
    vision: VisionInputs | None = None,
    *,
    pad_token_id: int = 0,
    pad_to_multiple_of: int | None = None,
    weight: float = 1.0,
) -> PreferenceBatch:
    """The batch of P examples as R = B * P rows.

    Args:
        examples: P tokenised pairs.
        branches: the completions to compute.
        vision: how images reach the model; None for a text model.
        pad_token_id: fills the rows; it is masked and changes no result.
        pad_to_multiple_of: T is rounded up to a multiple of it.
        weight: of every pair; 0 makes a dummy.
    """
    sequences = list(completion_sequences(examples, branches))
    width = padded_width(max(len(sequence) for sequence in sequences), pad_to_multiple_of)
    input_ids = torch.full((len(sequences), width), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(sequences), width), dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = torch.from_numpy(sequence.ids)
        attention_mask[row, : len(sequence)] = 1
    predict_from = [row * width + sequence.scored - 1 for row, sequence in enumerate(sequences)]
    return make_batch(
        examples,
        branches,
        sequences,
        model_inputs={
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            **({} if vision is None else padded_vision(vision, sequences, input_ids)),
        },
        predict_from=predict_from,
        weight=weight,
    )


def padded_vision(
    vision: VisionInputs, sequences: Sequence[CompletionSequence], input_ids: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What the images of R sequences add: row after row each image again, and positions where they count more than
    tokens."""
    pieces = [Piece(s.ids, s.ids[:0], (*s.prompt_images, *s.completion_images)) for s in sequences]
    tensors = vision.tensors([image for piece in pieces for image in piece.images])
    inputs = {**tensors, **vision.token_kinds(input_ids)}
    if (positions := vision.positions(pieces, tensors)) is not None:
        inputs["position_ids"] = torch.zeros((3, *input_ids.shape), dtype=torch.int64)
        for row, found in enumerate(positions):
            inputs["position_ids"][:, row, : found.shape[1]] = torch.from_numpy(found)
    return inputs


def padded_width(longest: int, multiple: int | None) -> int:
    """``longest`` rounded up to a multiple of ``multiple``."""
    return longest if not multiple else -(-longest // multiple) * multiple


def make_batch(
    examples: Sequence[TokenizedExample],
    branches: Sequence[Branch],
    sequences: Sequence[CompletionSequence],
    *,
    model_inputs: dict[str, torch.Tensor],
    predict_from: Sequence[np.ndarray],
    weight: float,
    segments: Sequence[Segment] | None = None,
) -> PreferenceBatch:
    """What all layouts share: targets in sequence order, the layout of the branches, counts.

    ``predict_from`` has an array for each sequence.
    """
    targets = [sequence.completion_ids[sequence.scored - len(sequence.prompt_ids)] for sequence in sequences]
    return PreferenceBatch(
        model_inputs=model_inputs,
        predict_from=torch.from_numpy(np.concatenate(predict_from)),
        targets=torch.from_numpy(np.concatenate(targets)),
        layout=branch_layout([len(sequence.scored) for sequence in sequences], branches),
        pair_weights=torch.full((len(examples),), weight, dtype=torch.float32),
        rows=tuple(example.row for example in examples),
        num_model_tokens=sum(len(own) for own in sequences if len(own.completion_ids)) if weight else 0,
        ref_sum_logps=reference_sums(examples),
        segments=None if segments is None else tuple(segments),
        row_weights=pair_values([example.weight for example in examples], missing=1.0),
        target_margins=pair_values([example.target_margin for example in examples], missing=0.0),
    )
