"""All the logic there is in a step: score, compare with the reference, apply the objective, sum the metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from prefopt.metrics import LOGGED_STATISTICS, MetricSums, batch_metrics
from prefopt.objective import Objective
from prefopt.scoring.forward import score
from prefopt.scoring.sequences import sequence_stats
from prefopt.types import Branch, LossTerm, LossTerms, PreferenceBatch, SequenceStats

__all__ = ["StepResult", "preference_step"]

Reference = Callable[[PreferenceBatch], Mapping[Branch, SequenceStats]]


@dataclass(frozen=True)
class StepResult:
    """What a micro-batch gives: the terms to differentiate, the sums to log, and the statistics they came from."""

    terms: LossTerms
    metrics: MetricSums
    policy: Mapping[Branch, SequenceStats]
    reference: Mapping[Branch, SequenceStats] | None


def preference_step(
    policy: nn.Module,
    reference: Reference | None,
    batch: PreferenceBatch,
    objective: Objective,
    *,
    aux_weight: float = 0.0,
    learn: bool = True,
) -> StepResult:
    """The unreduced loss and the metrics of one micro-batch.

    Args:
        policy: a model (or a wrapper of one) that can score.
        reference: gives the reference's statistics of a batch; None where the objective needs no reference.
        batch: P pairs on the policy's device.
        objective: the losses.
        aux_weight: weight of the mixture-of-experts load-balancing loss; 0 leaves it out.
        learn: whether the objective's running reward shift takes in these pairs; dummies never enter it.
    """
    reference_stats = reference(batch) if reference is not None and objective.needs_reference else None
    scores = score(policy, batch, objective.statistics | LOGGED_STATISTICS, with_aux_loss=bool(aux_weight))
    policy_stats = sequence_stats(
        scores.tokens,
        batch.layout,
        ld_alpha=objective.ld_alpha,
        with_weights="log_sum_sq_prob" in objective.statistics,
        keep_tokens=True,
    )
    learn = learn and batch.num_model_tokens > 0
    terms = objective(policy_stats, reference_stats, target_margins=batch.target_margins, learn=learn)
    if scores.aux_loss is not None:
        aux = LossTerm("aux_loss", scores.aux_loss, unit="micro_batch", weight=aux_weight)
        terms = replace(terms, terms=(*terms.terms, aux))
    metrics = batch_metrics(batch, scores, terms, nll_branch=objective.nll_branch)
    return StepResult(terms, metrics, policy_stats, reference_stats)
