"""What a loss takes of a pair: functions from the statistics of policy and reference to tensors [P].

All have one signature, ``(policy, reference, score) -> tuple``. ``score`` is applied to the log-ratio (an f-divergence)
or to the log-prob (AlphaPO's shape); functions without a difference of scores do not use it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from torch import Tensor

from prefopt.types import Branch, SequenceStats

__all__ = [
    "DIFFERENCES",
    "Inputs",
    "Score",
    "Stats",
    "log_prob_margin",
    "log_ratio",
    "log_ratios",
    "mean_log_prob_margin",
    "mean_score_margin",
    "pair_ratios",
    "score_margin",
]

Stats: TypeAlias = Mapping[Branch, SequenceStats]
Score: TypeAlias = Callable[[Tensor], Tensor]
Inputs: TypeAlias = Callable[[Stats, Stats, Score], tuple[Tensor, ...]]


def log_ratio(policy: Stats, reference: Stats, branch: Branch) -> Tensor:
    """[P] d = log p(y) - log p_ref(y), nats."""
    return policy[branch].sum_logps - reference[branch].sum_logps


def score_margin(policy: Stats, reference: Stats, score: Score) -> tuple[Tensor]:
    """delta = s(d_w) - s(d_l)."""
    return (score(log_ratio(policy, reference, "chosen")) - score(log_ratio(policy, reference, "rejected")),)


def mean_score_margin(policy: Stats, reference: Stats, score: Score) -> tuple[Tensor]:
    """s(d_w) / |y_w| - s(d_l) / |y_l|."""
    chosen, rejected = (
        score(log_ratio(policy, reference, branch)) / policy[branch].num_tokens.clamp(min=1)
        for branch in ("chosen", "rejected")
    )
    return (chosen - rejected,)


def log_ratios(policy: Stats, reference: Stats, score: Score) -> tuple[Tensor, Tensor]:
    """d_w and d_l."""
    return log_ratio(policy, reference, "chosen"), log_ratio(policy, reference, "rejected")


def pair_ratios(policy: Stats, reference: Stats, score: Score) -> tuple[Tensor, Tensor]:
    """log p_w - log p_l of the policy, and of the reference."""
    return (
        policy["chosen"].sum_logps - policy["rejected"].sum_logps,
        reference["chosen"].sum_logps - reference["rejected"].sum_logps,
    )


def log_prob_margin(policy: Stats, reference: Stats, score: Score) -> tuple[Tensor]:
    """u = r(y_w) - r(y_l), r of log p."""
    return (score(policy["chosen"].sum_logps) - score(policy["rejected"].sum_logps),)


def mean_log_prob_margin(policy: Stats, reference: Stats, score: Score) -> tuple[Tensor]:
    """u = r(y_w) - r(y_l), r of log p / |y|."""
    return (score(policy["chosen"].mean_logps) - score(policy["rejected"].mean_logps),)


DIFFERENCES: tuple[Inputs, ...] = (score_margin, mean_score_margin, log_prob_margin, mean_log_prob_margin)
"""Those that give one number, the difference of the two scores."""
