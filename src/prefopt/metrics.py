"""What the log shows: sums and counts kept on the device, and means that do not depend on how data was split.

A mean of batch means depends on the batch size and counts padded or repeated rows; a sum over the units divided by
their number does not. So every metric is a pair ``(sum, count)``; pairs add up over micro-batches, steps and ranks,
and are divided once, when the log is written. Dummy pairs have weight 0 in both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prefopt.types import PAIR, Branch, LossTerms, PreferenceBatch, Scores, Statistic

__all__ = ["LOGGED_STATISTICS", "MetricSums", "batch_metrics", "means"]

LOGGED_STATISTICS: frozenset[Statistic] = frozenset({"entropy", "mean_logit", "is_top1"})
"""Token statistics that the metrics are made from."""

NUM_TOKENS = "num_tokens"


@dataclass
class MetricSums:
    """Running sums of metrics: name -> (sum, count), 0-d float64 tensors on the device."""

    sums: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def add(self, name: str, values: Tensor, weights: Tensor) -> None:
        """Add ``values`` [n] with ``weights`` [n]."""
        weights = weights.to(accumulator_dtype(weights.device))
        # nan * 0 is nan: a dummy must not poison the sum
        total = torch.where(weights > 0, values.detach().to(weights.dtype), 0) * weights
        self.add_sum(name, total.sum(), weights.sum())

    def add_sum(self, name: str, total: Tensor, count: Tensor) -> None:
        """Add a sum over ``count`` units."""
        if name in self.sums:
            old_total, old_count = self.sums[name]
            total, count = old_total + total, old_count + count
        self.sums[name] = (total, count)

    def merge(self, other: MetricSums) -> None:
        """Add another set of sums."""
        for name, (total, count) in other.sums.items():
            self.add_sum(name, total, count)

    def reduced(self, all_reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, tuple[float, float]]:
        """Name -> (sum, count) over all ranks: one collective and one transfer to the host.

        Args:
            all_reduce: sums a tensor over the ranks; every rank must hold the same names.
        """
        if not self.sums:
            return {}
        names = sorted(self.sums)
        table = torch.stack([torch.stack(self.sums[name]) for name in names])
        if all_reduce is not None:
            table = all_reduce(table)
        return {name: (row[0], row[1]) for name, row in zip(names, table.tolist(), strict=True)}


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """float64, but float32 on devices that have no more."""
    return torch.float32 if device.type == "mps" else torch.float64


def means(reduced: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Name -> mean; ``num_tokens`` stays a sum, and what was never counted is left out."""
    result = {name: total / count for name, (total, count) in reduced.items() if count and name != NUM_TOKENS}
    if NUM_TOKENS in reduced:
        result[NUM_TOKENS] = reduced[NUM_TOKENS][0]
    return result


def batch_metrics(
    batch: PreferenceBatch, scores: Scores, terms: LossTerms, *, nll_branch: Branch | None = None
) -> MetricSums:
    """The sums of one micro-batch.

    Args:
        batch: P pairs.
        scores: the policy's; with `LOGGED_STATISTICS`.
        terms: the objective's, with rewards and log-probs per pair.
        nll_branch: the completion whose negative log-likelihood is logged as ``nll_loss``.
    """
    metrics = MetricSums()
    layout, tokens, weights = batch.layout, scores.tokens, batch.pair_weights
    token_weights = weights[layout.sequence_index % layout.num_pairs]
    one = torch.ones((), dtype=accumulator_dtype(weights.device), device=weights.device)

    for branch in PAIR:
        metrics.add(f"rewards/{branch}", terms.rewards[branch], weights)
        metrics.add(f"logps/{branch}", terms.logps[branch], weights)
    margin = terms.rewards["chosen"] - terms.rewards["rejected"]
    metrics.add("rewards/margins", margin, weights)
    metrics.add("rewards/accuracies", accuracy(margin), weights)

    if tokens.entropy is not None:
        metrics.add("entropy", tokens.entropy, token_weights)
    if tokens.mean_logit is not None:
        for branch in PAIR:
            where = layout.token_slice(branch)
            metrics.add(f"logits/{branch}", tokens.mean_logit[where], token_weights[where])
    if tokens.is_top1 is not None:
        where = layout.token_slice("chosen")
        metrics.add("mean_token_accuracy", tokens.is_top1[where], token_weights[where])
    if nll_branch is not None:
        where = layout.token_slice(nll_branch)
        metrics.add("nll_loss", -tokens.logps[where], token_weights[where])
    if scores.aux_loss is not None:
        metrics.add("aux_loss", scores.aux_loss[None], weights[:1])
    metrics.add_sum(NUM_TOKENS, one * batch.num_model_tokens, one)
    return metrics


def accuracy(margin: Tensor) -> Tensor:
    """1 where the chosen reward is strictly the higher, 0 where not, NaN where the margin is."""
    return torch.where(margin.isnan(), margin, (margin > 0).to(margin.dtype))
