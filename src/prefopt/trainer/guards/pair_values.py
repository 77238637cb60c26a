"""What a step gives each of its pairs by itself, kept until it is known whether all of it is finite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prefopt.metrics import accumulator_dtype
from prefopt.step import StepResult
from prefopt.types import Branch, LossTerms, PreferenceBatch

__all__ = ["PairValues", "pair_losses"]


@dataclass(frozen=True)
class PairValues:
    """Of the P pairs of a micro-batch, detached."""

    terms: LossTerms
    policy: Mapping[Branch, Tensor]
    """branch -> [P] log p of the policy, nats."""
    reference: Mapping[Branch, Tensor]
    """branch -> [P] log p of the reference, nats; empty where there is none."""
    chosen_tokens: Tensor
    """[n_chosen] log-probs of the chosen completions' tokens under the policy, nats."""

    @classmethod
    def of(cls, result: StepResult, terms: LossTerms) -> PairValues:
        """Args:
        result: of the micro-batch.
        terms: those that are differentiated.
        """
        detached = tuple(replace(term, values=term.values.detach()) for term in terms.terms)
        policy: Any = {branch: stats.sum_logps.detach() for branch, stats in result.policy.items()}
        reference: Any = {branch: stats.sum_logps.detach() for branch, stats in (result.reference or {}).items()}
        tokens = result.policy["chosen"].token_logps
        assert tokens is not None, "the step keeps the policy's"
        return cls(replace(terms, terms=detached), policy, reference, tokens.detach())

    def columns(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Name -> [P] float64 on the host: the loss, and the log-probs of policy and reference."""
        found = {"loss": pair_losses(self.terms, batch)}
        for name, logps in (("policy", self.policy), ("reference", self.reference)):
            found |= {f"{name}/{branch}": values for branch, values in logps.items()}
        return {name: values.detach().cpu().double() for name, values in found.items()}


def pair_losses(terms: LossTerms, batch: PreferenceBatch) -> Tensor:
    """[P] the loss of each pair by itself: its pair losses, and the mean NLL of its own tokens, weighted.

    Not in it are the load-balancing loss, which is no pair's, and the weights of rows.
    """
    num_pairs = batch.layout.num_pairs
    losses = torch.zeros(
        num_pairs, dtype=accumulator_dtype(batch.pair_weights.device), device=batch.pair_weights.device
    )
    for term in terms.terms:
        values = term.weight * term.values.detach().to(losses.dtype)
        if term.unit == "pair":
            losses += values
        elif term.unit == "token":
            assert term.branch is not None
            lengths = batch.layout.num_tokens[batch.layout.sequence_slice(term.branch)]
            pairs = batch.layout.pair_index(term.branch)
            losses += torch.zeros_like(losses).index_add(0, pairs, values) / lengths.clamp(min=1)
    return losses
