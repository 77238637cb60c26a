"""The only place with a denominator: from unreduced terms to the scalar whose gradient is taken.

A pair loss is the mean over the pairs of one optimizer step, an NLL the mean over its tokens of one optimizer step,
over all micro-batches and ranks. So each micro-batch contributes its *sum*, divided by the count of the *whole* step;
a mean per micro-batch would weigh a token more where it has fewer neighbours. docs/normalisation.md proves it.
A row's weight multiplies its pair and its tokens in the sum and in the count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prefopt.types import Branch, LossTerm, LossTerms, PreferenceBatch, StepCounts

__all__ = ["local_counts", "term_sum", "total"]


def local_counts(batches: Sequence[PreferenceBatch]) -> StepCounts:
    """What the micro-batches of one rank count in one optimizer step; the sum over ranks is the denominator.

    Args:
        batches: this rank's micro-batches of the step. A pair and its tokens count as often as its row's weight says,
            dummies not at all.

    Returns:
        0-d tensors on the batches' device: no synchronisation.
    """
    num_pairs: Tensor | float = 0.0
    num_micro_batches: Tensor | float = 0.0
    num_tokens: dict[Branch, Tensor | float] = {}
    for batch in batches:
        weights = pair_counts(batch)
        num_pairs = num_pairs + weights.sum()
        num_micro_batches = num_micro_batches + micro_batch_weight(batch)
        for branch in batch.layout.branches:
            lengths = batch.layout.num_tokens[batch.layout.sequence_slice(branch)]
            num_tokens[branch] = num_tokens.get(branch, 0.0) + (lengths * weights).sum()
    return StepCounts(num_pairs=num_pairs, num_tokens=num_tokens, num_micro_batches=num_micro_batches)


def total(terms: LossTerms, batch: PreferenceBatch, counts: StepCounts) -> Tensor:
    """This micro-batch's share of the step's loss.

    ``sum_i weight_i * sum(values_i * pair_counts) / count of the unit of i``

    Summed over the micro-batches and ranks of a step it is the loss of the step. Where gradients are averaged over
    ranks (DDP, FSDP), multiply it by their number.

    Args:
        terms: what the objective made of ``batch``.
        batch: the micro-batch, for the weights of its pairs.
        counts: of the whole step, over all micro-batches and ranks.

    Returns:
        [] the share; 0 for a micro-batch of dummies, also where their values are not finite.
    """
    return torch.stack([share(term, batch, counts) for term in terms.terms]).sum()


def share(term: LossTerm, batch: PreferenceBatch, counts: StepCounts) -> Tensor:
    """[] one term's share, weighted."""
    if term.unit == "pair":
        count = counts.num_pairs
    elif term.unit == "token":
        count = counts.num_tokens[branch_of(term)]
    else:
        count = counts.num_micro_batches
    count = torch.as_tensor(count)
    # a step of dummies alone is 0, not 0 / 0
    return term.weight * term_sum(term, batch)[0] / torch.where(count > 0, count, 1.0)


def term_sum(term: LossTerm, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
    """([], []) the sum of a term over a micro-batch, without the term's weight, and the units it is over."""
    if term.unit == "pair":
        weights = pair_counts(batch)
    elif term.unit == "token":
        weights = pair_counts(batch)[batch.layout.pair_index(branch_of(term))]
    else:
        weights = micro_batch_weight(batch)
    # nan * 0 is nan: a dummy must not poison the sum, but stays in the graph, as every rank runs its backward
    return torch.where(weights > 0, term.values * weights, 0).sum(), weights.sum()


def pair_counts(batch: PreferenceBatch) -> Tensor:
    """[P] how often each pair counts in the loss: its row's weight, 1 where it has none, 0 for a dummy."""
    return batch.pair_weights if batch.row_weights is None else batch.pair_weights * batch.row_weights


def branch_of(term: LossTerm) -> Branch:
    assert term.branch is not None, f"the token term {term.name!r} names no branch"
    return term.branch


def micro_batch_weight(batch: PreferenceBatch) -> Tensor:
    """[] 1 for a micro-batch of pairs, whatever the weights of their rows, 0 for one of dummies."""
    return (batch.pair_weights > 0).any().to(batch.pair_weights.dtype)
