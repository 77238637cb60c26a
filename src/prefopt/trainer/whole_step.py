"""Losses of all pairs of a step at once (AOT, BCO's shift): first every score, then the gradient of each.

A pair's partner is found by sorting the pairs of the whole optimizer step, over its micro-batches and ranks. So these
are run forward once without a gradient, and what they give is put into one table. The loss is differentiated with
respect to the log-probs in it, and in the second run each completion's log-prob is multiplied by its own derivative:
the gradient of the whole, whatever the split. The running reward shift takes in the rewards of the table, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from prefopt.objective import Objective
from prefopt.step import StepResult
from prefopt.types import PAIR, Branch, LossTerm, LossTerms, OptimizerStep, PreferenceBatch, SequenceStats

__all__ = ["ScoredBatch", "pair_table", "scored_step", "shares_of_pairs"]

Stats = Mapping[Branch, SequenceStats]


class Share(NamedTuple):
    """What one loss gives the pairs of a table."""

    values: Tensor
    """[P] the loss of the quantiles; which pair has which does not matter for their sum."""
    gradients: Tensor
    """[2, P] derivative of the sum with respect to log p of the chosen and of the rejected completion."""
    weight: float
    """Of the loss among the others."""

    def of(self, rows: Tensor) -> Share:
        """The share of some rows of the table."""
        return Share(self.values[rows], self.gradients[:, rows], self.weight)


@dataclass(frozen=True)
class ScoredBatch:
    """A micro-batch after its run without a gradient."""

    known: Stats
    """What the reference gave: it is not asked again."""
    shares: Mapping[int, Share]
    """Number of the term -> its share of these pairs."""

    def reference(self, batch: PreferenceBatch) -> Stats:
        return self.known

    def applied(self, terms: LossTerms, policy: Stats) -> LossTerms:
        """``terms`` with those that sort replaced by what has the value and the gradient of the whole step's."""
        replaced = [
            self.term(term, self.shares[number], policy) if number in self.shares else term
            for number, term in enumerate(terms.terms)
        ]
        return replace(terms, terms=tuple(replaced))

    def term(self, term: LossTerm, share: Share, policy: Stats) -> LossTerm:
        values = share.values
        for branch, gradient in zip(PAIR, share.gradients, strict=True):
            logps = policy[branch].sum_logps
            values = values + gradient * (logps - logps.detach())
        return replace(term, values=values)


def scored_step(
    step: OptimizerStep,
    run: Callable[[PreferenceBatch], StepResult],
    objective: Objective,
    num_pairs: int,
    all_reduce: Callable[[Tensor], Tensor],
) -> list[ScoredBatch]:
    """Every micro-batch of a rank, scored, with its share of the losses of the whole step.

    Args:
        step: of this rank.
        run: a micro-batch forward, to be called without gradients.
        objective: the losses; their reward shift is updated.
        num_pairs: the most that a step has, over all ranks.
        all_reduce: sums a tensor over the ranks.
    """
    device = step.micro_batches[0].pair_weights.device
    with torch.no_grad():
        results = [run(batch) for batch in step.micro_batches]
        tables = [pair_table(result, batch) for result, batch in zip(results, step.micro_batches, strict=True)]
        whole = torch.zeros(num_pairs, tables[0].shape[1], dtype=tables[0].dtype, device=device)
        places = [torch.tensor(places, device=device) for places in step.places]
        for table, rows in zip(tables, places, strict=True):
            whole.index_add_(0, rows, table)  # a dummy adds zeros to the pair that it repeats
        whole = all_reduce(whole)
    whole = whole[whole[:, -1] > 0]  # the places of a step are counted from 0 without gaps
    shares = shares_of_pairs(objective, whole)
    if objective.reward_shift is not None:
        policy, reference = stats_of(whole)
        rewards, _ = objective.report(policy, reference)
        objective.reward_shift.update(rewards["chosen"], rewards["rejected"])
    scored = []
    for result, rows in zip(results, places, strict=True):
        assert result.reference is not None, "only losses with a reference sort"
        own = {number: share.of(rows) for number, share in shares.items()}
        scored.append(ScoredBatch(result.reference, own))
    return scored


def pair_table(result: StepResult, batch: PreferenceBatch) -> Tensor:
    """[P, 9] what losses that sort take of each pair, and 1 in the last column; a row of a dummy is 0."""
    assert result.reference is not None, "only losses with a reference sort"
    columns = []
    for branch in PAIR:
        policy, reference = result.policy[branch], result.reference[branch]
        log_weight = torch.zeros_like(policy.sum_logps) if policy.log_weight is None else policy.log_weight
        columns += [policy.sum_logps, reference.sum_logps, policy.num_tokens, log_weight]
    weights = batch.pair_weights
    table = torch.stack([column.detach().to(weights.dtype) for column in (*columns, weights)], dim=1)
    return torch.where(weights[:, None] > 0, table, 0)


def shares_of_pairs(objective: Objective, table: Tensor) -> dict[int, Share]:
    """The losses that sort, over all pairs of a table: number of the term -> its `Share`."""
    shares = {}
    for number, loss in enumerate(objective.losses):
        if loss.name not in objective.sorted_losses:
            continue
        with torch.enable_grad():
            policy, reference = stats_of(table)
            term = loss.term(policy, reference, None)
            gradients = torch.autograd.grad(term.values.sum(), [policy[branch].sum_logps for branch in PAIR])
        shares[number] = Share(term.values.detach(), torch.stack(gradients), term.weight)
    return shares


def stats_of(table: Tensor) -> tuple[Stats, Stats]:
    """Policy and reference of the pairs of a table; a gradient can be taken with respect to the policy's log-probs."""
    policy, reference = {}, {}
    for branch, columns in zip(PAIR, (table[:, :4], table[:, 4:8]), strict=True):
        sums, known, num_tokens, log_weight = columns.unbind(1)
        policy[branch] = SequenceStats(sums.clone().requires_grad_(), num_tokens, log_weight=log_weight)
        reference[branch] = SequenceStats(known, num_tokens)
    return policy, reference
