"""Random pairs without a model: token statistics, their layout and micro-batches of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch

from prefopt.types import Branch, BranchLayout, PreferenceBatch, TokenStats

LENGTHS: dict[Branch, list[int]] = {"chosen": [3, 1, 5, 2], "rejected": [2, 4, 5, 1], "gold": [6, 2, 1, 3]}
"""Four pairs: chosen longer, shorter, equally long."""


def make_layout(lengths: Mapping[Branch, Sequence[int]]) -> BranchLayout:
    """The layout of completions with these lengths."""
    flat = [n for branch in lengths.values() for n in branch]
    return BranchLayout(
        branches=tuple(lengths),
        num_pairs=len(next(iter(lengths.values()))),
        lengths=tuple(flat),
        num_tokens=torch.tensor(flat),
        sequence_index=torch.tensor([s for s, n in enumerate(flat) for _ in range(n)], dtype=torch.int64),
        position=torch.tensor([t for n in flat for t in range(n)], dtype=torch.int64),
    )


def random_tokens(layout: BranchLayout, seed: int, dtype: torch.dtype = torch.float64) -> TokenStats:
    """Log-probs that require a gradient, and log sums of squares within a factor of 2 of the probabilities."""
    generator = torch.Generator().manual_seed(seed)
    num = len(layout.position)
    logps = (-2 * torch.rand(num, dtype=dtype, generator=generator) - 0.01).requires_grad_()
    log_sum_sq = logps.detach() + (torch.rand(num, dtype=dtype, generator=generator) - 0.5)
    return TokenStats(logps=logps, log_sum_sq_prob=log_sum_sq)


def split_tokens(values: torch.Tensor, layout: BranchLayout) -> dict[Branch, list[list[float]]]:
    """branch -> the values of each completion, as lists."""
    ends = list(accumulate(layout.lengths))
    parts = [values.tolist()[end - n : end] for end, n in zip(ends, layout.lengths, strict=True)]
    num = layout.num_pairs
    return {branch: parts[i * num : (i + 1) * num] for i, branch in enumerate(layout.branches)}


def make_batch(layout: BranchLayout, weight: float = 1.0) -> PreferenceBatch:
    """A micro-batch of pairs (or of dummies, with weight 0) as far as counting needs it."""
    num = len(layout.position)
    return PreferenceBatch(
        model_inputs={},
        predict_from=torch.zeros(num, dtype=torch.int64),
        targets=torch.zeros(num, dtype=torch.int64),
        layout=layout,
        pair_weights=torch.full((layout.num_pairs,), weight),
        rows=tuple(range(layout.num_pairs)),
        num_model_tokens=num,
    )
