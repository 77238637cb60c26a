"""From flat token statistics to one number per completion: log p(y), |y|, and the weights of LD-DPO and WPO."""

from __future__ import annotations

import torch
from torch import Tensor

from prefopt.losses.transforms import ld_token_weights, wpo_token_log_weights
from prefopt.types import PAIR, Branch, BranchLayout, SequenceStats, TokenStats

__all__ = ["sequence_stats"]


def sequence_stats(
    tokens: TokenStats,
    layout: BranchLayout,
    *,
    ld_alpha: float | None = None,
    with_weights: bool = False,
    keep_tokens: bool = False,
) -> dict[Branch, SequenceStats]:
    """Sum the N scored tokens of a micro-batch per completion, accumulating in float32.

    Args:
        tokens: statistics of the N tokens; with ``log_sum_sq_prob`` where ``with_weights``.
        layout: which token belongs to which of the B * P completions.
        ld_alpha: LD-DPO's alpha: tokens of the chosen and rejected completion beyond the length of the shorter one
            count alpha times in ``sum_logps``. The gold completion has no partner and is not touched. None: off.
        with_weights: also the log of WPO's weight of each completion.
        keep_tokens: also the token log-probs of each branch, unweighted, which an NLL needs.

    Returns:
        Branch -> statistics of its P completions.

    Raises:
        ValueError: ``with_weights`` without ``log_sum_sq_prob``.
    """
    logps = at_least_float32(tokens.logps)
    weighted = logps if ld_alpha is None else logps * excess_weights(layout, ld_alpha)
    sums = sum_per_sequence(weighted, layout)
    log_weights = mean_log_weights(tokens, layout) if with_weights else None
    stats = {}
    for branch in layout.branches:
        where = layout.sequence_slice(branch)
        stats[branch] = SequenceStats(
            sum_logps=sums[where],
            num_tokens=layout.num_tokens[where].to(torch.float32),
            token_logps=logps[layout.token_slice(branch)] if keep_tokens else None,
            log_weight=None if log_weights is None else log_weights[where],
        )
    return stats


def at_least_float32(values: Tensor) -> Tensor:
    """``values`` in float32, or in float64 where they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def sum_per_sequence(values: Tensor, layout: BranchLayout) -> Tensor:
    """[N] -> [B * P] sums over the tokens of each completion; 0 for one without tokens."""
    zeros = values.new_zeros(len(layout.lengths))
    return zeros.index_add(0, layout.sequence_index, values)


def excess_weights(layout: BranchLayout, ld_alpha: float) -> Tensor:
    """[N] LD-DPO's weight of each token; 1 in the gold completion."""
    public = layout.num_tokens.clone()
    chosen, rejected = (layout.sequence_slice(branch) for branch in PAIR)
    public[chosen] = public[rejected] = torch.minimum(public[chosen], public[rejected])
    return ld_token_weights(layout.position, public[layout.sequence_index], ld_alpha=ld_alpha)


def mean_log_weights(tokens: TokenStats, layout: BranchLayout) -> Tensor:
    """[B * P] log w(y), the mean over a completion's tokens of WPO's log weight; 0 for one without tokens."""
    if tokens.log_sum_sq_prob is None:
        raise ValueError(
            "WPO's weights need log_sum_sq_prob of every token, which was not computed: "
            "ask for the statistic 'log_sum_sq_prob' (Objective.statistics) when scoring."
        )
    log_weights = wpo_token_log_weights(at_least_float32(tokens.logps), at_least_float32(tokens.log_sum_sq_prob))
    return sum_per_sequence(log_weights, layout) / layout.num_tokens.clamp(min=1)
