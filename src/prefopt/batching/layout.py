"""From tokenised examples to completions in sequence order, and their `BranchLayout`."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from prefopt.types import Branch, BranchLayout, TokenizedExample

__all__ = ["CompletionSequence", "branch_layout", "completion_sequences", "pair_values", "reference_sums"]


@dataclass(frozen=True)
class CompletionSequence:
    """A completion after its prompt, and which of its tokens are scored; int64 arrays."""

    prompt_ids: np.ndarray
    completion_ids: np.ndarray
    scored: np.ndarray
    """Places of the scored tokens in ``prompt + completion``; each is predicted from the place before it."""
    prompt_images: tuple[Any, ...] = ()
    completion_images: tuple[Any, ...] = ()

    @property
    def ids(self) -> np.ndarray:
        return np.concatenate([self.prompt_ids, self.completion_ids])

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


def completion_sequences(
    examples: Sequence[TokenizedExample], branches: Sequence[Branch]
) -> Iterator[CompletionSequence]:
    """The B * P completions, by branch, then by pair. A token without context is not scored."""
    for branch in branches:
        for example in examples:
            prompt_ids = int64_array(example.prompt_ids[example.prompt_starts.get(branch, 0) :])
            mask = example.loss_masks[branch]
            places = np.arange(len(mask)) if all(mask) else np.flatnonzero(mask)
            scored = places[places > 0] if len(prompt_ids) == 0 else places + len(prompt_ids)
            completion_ids = int64_array(example.completion_ids[branch])
            images = (tuple(example.images.get(part, ())) for part in ("prompt", branch))
            yield CompletionSequence(prompt_ids, completion_ids, scored, *images)


def int64_array(ids: Sequence[int]) -> np.ndarray:
    """Token ids as an array; a list goes through ``array``, which reads it in half the time that numpy needs."""
    return np.frombuffer(array("q", ids), dtype=np.int64)


def branch_layout(lengths: Sequence[int], branches: Sequence[Branch]) -> BranchLayout:
    """The layout of ``lengths`` scored tokens per sequence, B * P of them."""
    num_tokens = torch.tensor(lengths, dtype=torch.int64)
    sequence_index = torch.repeat_interleave(torch.arange(len(lengths)), num_tokens)
    starts = torch.cumsum(num_tokens, 0) - num_tokens
    return BranchLayout(
        branches=tuple(branches),
        num_pairs=len(lengths) // len(branches),
        lengths=tuple(lengths),
        num_tokens=num_tokens,
        sequence_index=sequence_index,
        position=torch.arange(int(num_tokens.sum())) - starts[sequence_index],
    )


def reference_sums(examples: Sequence[TokenizedExample]) -> dict[Branch, torch.Tensor] | None:
    """Branch -> [P] reference log-probs, where every example brings them; nats, float64."""
    if any(example.ref_sum_logps is None for example in examples):
        return None
    branches = examples[0].ref_sum_logps or {}
    return {
        branch: torch.tensor([(example.ref_sum_logps or {})[branch] for example in examples], dtype=torch.float64)
        for branch in branches
    }


def pair_values(values: Sequence[float | None], *, missing: float) -> torch.Tensor | None:
    """[P] float32, with ``missing`` for the pairs that have no value; None where no pair has one."""
    if all(value is None for value in values):
        return None
    return torch.tensor([missing if value is None else value for value in values], dtype=torch.float32)
