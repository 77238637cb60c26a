"""The layout of encoder-decoder models: each prompt is a row of the encoder, each completion a row of the decoder.

``input_ids`` [P, T_prompt] has every prompt once, ``labels`` [B * P, T_completion] the completions in sequence order,
both padded on the right. Place t of a decoder row predicts label t: its inputs are the labels one place later, after
the token that the model starts with, and to make them is the scorer's affair. Unlike transformers' labels these hold
all tokens of a completion, also those that are not scored, because later tokens are predicted from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from prefopt.batching.layout import CompletionSequence, int64_array
from prefopt.batching.padded import make_batch, padded_width
from prefopt.types import Branch, PreferenceBatch, TokenizedExample

__all__ = ["NO_TOKEN", "encoder_decoder_batch"]

NO_TOKEN = -100
"""Fills ``labels``: no token id, and what transformers' own models leave out of a loss."""


def encoder_decoder_batch(
    examples: Sequence[TokenizedExample],
    branches: Sequence[Branch],
    *,
    pad_token_id: int = 0,
    pad_to_multiple_of: int | None = None,
    weight: float = 1.0,
) -> PreferenceBatch:
    """The batch of P examples as P rows of the encoder and B * P rows of the decoder.

    Args:
        examples: P tokenised pairs.
        branches: the completions to compute.
        pad_token_id: fills the prompts; it is masked and changes no result. An empty prompt is one token of it that is
            not masked, because an encoder needs something to attend to.
        pad_to_multiple_of: T_prompt and T_completion are rounded up to a multiple of it.
        weight: of every pair; 0 makes a dummy.
    """
    prompts = [int64_array(example.prompt_ids) for example in examples]
    sequences = list(decoder_sequences(examples, branches))
    input_ids = padded_rows(prompts, pad_token_id, pad_to_multiple_of)
    lengths = torch.tensor([[max(len(ids), 1)] for ids in prompts])
    labels = padded_rows([sequence.completion_ids for sequence in sequences], NO_TOKEN, pad_to_multiple_of)
    return make_batch(
        examples,
        branches,
        sequences,
        model_inputs={
            "input_ids": input_ids,
            "attention_mask": (torch.arange(input_ids.shape[1]) < lengths).long(),
            "labels": labels,
        },
        predict_from=[
            row * labels.shape[1] + sequence.scored - len(sequence.prompt_ids) for row, sequence in enumerate(sequences)
        ],
        weight=weight,
    )


def decoder_sequences(examples: Sequence[TokenizedExample], branches: Sequence[Branch]) -> Iterator[CompletionSequence]:
    """The B * P completions, by branch, then by pair. The first token is scored too: the start token precedes it."""
    for branch in branches:
        for example in examples:
            prompt_ids = int64_array(example.prompt_ids)
            scored = np.flatnonzero(example.loss_masks[branch]) + len(prompt_ids)
            yield CompletionSequence(prompt_ids, int64_array(example.completion_ids[branch]), scored)


def padded_rows(rows: Sequence[np.ndarray], value: int, multiple: int | None) -> Tensor:
    """[R, T] int64, filled up with ``value`` on the right; at least one place wide."""
    width = padded_width(max(1, *map(len, rows)), multiple)
    filled = torch.full((len(rows), width), value, dtype=torch.int64)
    for row, ids in enumerate(rows):
        filled[row, : len(ids)] = torch.from_numpy(ids)
    return filled
