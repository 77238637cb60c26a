"""The `Objective`: from statistics of completions to unreduced loss terms, and what the log shows of the pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prefopt import losses
from prefopt.losses import RewardShift
from prefopt.objective.inputs import Inputs, Score, Stats, log_ratio, mean_log_prob_margin
from prefopt.objective.options import Method, ObjectiveOptions
from prefopt.objective.rankings import RANKINGS, as_pair, mean_of_others
from prefopt.objective.rules import canonical_names, objective_mistakes
from prefopt.objective.tables import LOSSES, TOKEN_LOSSES, divergence
from prefopt.objective.terms import PairLoss, RankedLoss, TokenLoss
from prefopt.types import PAIR, RANKS, Branch, LossTerms, Statistic

__all__ = ["Objective", "build_objective"]

Report = Callable[[Stats, Stats], tuple[dict[Branch, Tensor], dict[Branch, Tensor]]]
"""(policy, reference) -> rewards and log-probs of each side, [P]."""


@dataclass(frozen=True)
class Objective:
    """What is minimised: a weighted sum of losses, and what it takes to compute it.

    Called with the statistics of a micro-batch it returns unreduced terms; `prefopt.normalise` makes the scalar.
    """

    method: Method
    names: tuple[str, ...]
    losses: tuple[PairLoss | RankedLoss | TokenLoss, ...]
    report: Report
    needs_reference: bool
    branches: tuple[Branch, ...]
    """The completions that are computed; gold only where its NLL counts."""
    statistics: frozenset[Statistic]
    """Token statistics the losses need."""
    ld_alpha: float | None
    nll_branch: Branch | None
    """The completion whose NLL is logged; None: no NLL in the loss."""
    reward_shift: RewardShift | None = None
    """State of ``bco_pair`` with its shift: save it with the checkpoint."""
    ranks: tuple[Branch, ...] = PAIR
    """The completions of a ranking, best to worst; a row may lack the last ones."""

    @property
    def logs_nll(self) -> bool:
        return self.nll_branch is not None

    @property
    def needs_tokens(self) -> bool:
        """Whether a term is made of token log-probs."""
        return any(isinstance(loss, TokenLoss) for loss in self.losses)

    @property
    def sorted_losses(self) -> tuple[str, ...]:
        """The losses that sort all pairs of a step, so that a pair has none of its own."""
        return tuple(name for name in self.names if name in ("aot", "aot_unpaired"))

    @property
    def shifted_losses(self) -> tuple[str, ...]:
        """The losses that take a mean of rewards, those of the step among them."""
        return tuple(name for name in self.names if name == "bco_pair" and self.reward_shift is not None)

    @property
    def needs_whole_step(self) -> bool:
        """Whether a loss needs the scores of all pairs of a step before the gradient of the first."""
        return bool(self.sorted_losses or self.shifted_losses)

    def __call__(
        self,
        policy: Stats,
        reference: Stats | None = None,
        *,
        target_margins: Tensor | None = None,
        learn: bool = True,
    ) -> LossTerms:
        """The terms of a micro-batch.

        Args:
            policy: branch -> statistics of its P completions, with what `statistics` and `needs_tokens` ask for.
            reference: the same of the reference; None where `needs_reference` is False.
            target_margins: [P] gamma_i, what beta times each pair's difference of scores should exceed, no unit (it is
                not multiplied by beta): ODPO's offset, arXiv:2402.10571. It acts in the losses of a difference, in
                addition to their own gamma; rewards are without it. None: 0.
            learn: whether the running reward shift takes in these pairs; False for dummies. It never does where
                gradients are off, as in evaluation.

        Raises:
            ValueError: the method needs a reference and none is given.
        """
        if reference is None and self.needs_reference:
            raise ValueError(
                f"{self.method.upper()} compares with a reference policy and got no statistics of one: pass the "
                "reference's SequenceStats of the chosen and rejected completions."
            )
        rewards, logps = self.reported(policy, reference or {})
        if self.reward_shift is not None and learn and torch.is_grad_enabled():
            self.reward_shift.update(rewards["chosen"], rewards["rejected"])
        terms = tuple(loss.term(policy, reference or {}, target_margins) for loss in self.losses)
        return LossTerms(terms=terms, rewards=rewards, logps=logps)

    def reported(self, policy: Stats, reference: Stats) -> tuple[dict[Branch, Tensor], dict[Branch, Tensor]]:
        """Rewards and log-probs of each side, [P]; of a ranking, of the best and the mean of the others."""
        if self.ranks == PAIR:
            return self.report(policy, reference)
        best, *others = self.ranks
        reports = [self.report(as_pair(policy, best, rank), as_pair(reference, best, rank)) for rank in others]

        def both(of_pairs: Sequence[Mapping[Branch, Tensor]]) -> dict[Branch, Tensor]:
            others_mean = mean_of_others([own["rejected"] for own in of_pairs], policy, others)
            return {"chosen": of_pairs[0]["chosen"], "rejected": others_mean}

        return both([rewards for rewards, _ in reports]), both([logps for _, logps in reports])


def build_objective(method: Method, **options: Any) -> Objective:
    """The objective of a trainer's config.

    Args:
        method: ``dpo``, ``cpo`` or ``tpo``.
        options: fields of `ObjectiveOptions`; ``loss_type`` and ``beta`` are required.

    Raises:
        ValueError: with every mistake in the options (`objective_mistakes`).

    Example:
        >>> objective = build_objective("dpo", loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5], beta=0.1)
        >>> objective.names, objective.needs_reference, objective.branches
        (('sigmoid', 'sft'), True, ('chosen', 'rejected'))
    """
    mistakes = objective_mistakes(method, **options)
    if mistakes:
        raise ValueError("\n".join([f"{len(mistakes)} mistake(s) in the options of the loss:", *mistakes]))
    given = ObjectiveOptions(method=method, **options)
    names = canonical_names(given)
    nll_weight = added_nll_weight(given)
    nll_branch: Branch = "gold" if method == "tpo" else "chosen"
    shift = RewardShift() if given.bco_shift and "bco_pair" in names else None
    terms = [bind(name, weight, given, shift) for name, weight in zip(names, weights(given), strict=True)]
    if nll_weight != 0:
        terms.append(TokenLoss("nll", nll_weight, nll_branch))
    is_weighted = given.use_weighting and any(isinstance(term, PairLoss) for term in terms)
    ranks = RANKS[: given.num_completions]
    return Objective(
        method=method,
        names=names,
        losses=tuple(ranked(term, given) for term in terms),
        report=report_of(given),
        needs_reference=method == "dpo",
        branches=(*ranks, "gold") if method == "tpo" and nll_weight != 0 else ranks,
        statistics=frozenset({"log_sum_sq_prob"}) if is_weighted else frozenset(),
        ld_alpha=given.ld_alpha,
        nll_branch=nll_branch if method == "cpo" or any(isinstance(term, TokenLoss) for term in terms) else None,
        reward_shift=shift,
        ranks=ranks,
    )


def weights(options: ObjectiveOptions) -> list[float]:
    """The weight of each name."""
    return [1.0] * len(options.given_names) if options.loss_weights is None else list(options.loss_weights)


def added_nll_weight(options: ObjectiveOptions) -> float:
    """The weight of CPO's and TPO's NLL. AlphaPO has none; in a list with other losses the user's weight holds."""
    only_alphapo = set(options.given_names) == {"alphapo"}
    return 0.0 if options.method == "dpo" or only_alphapo else options.nll_weight


def bind(name: str, weight: float, options: ObjectiveOptions, shift: RewardShift | None) -> PairLoss | TokenLoss:
    """The loss called ``name`` with its options."""
    if name in TOKEN_LOSSES[options.method]:
        return TokenLoss(name, weight, "chosen")
    row = LOSSES[options.method][name]
    values = {
        "beta": options.beta,
        "label_smoothing": options.label_smoothing,
        "gamma": options.gamma,
        "tau": options.discopop_tau,
    }
    loss = partial(row.loss, **{option: values[option] for option in row.uses})
    if name == "bco_pair" and shift is not None:
        loss = partial(shifted_bco_pair, beta=options.beta, shift=shift)
    return PairLoss(
        name=name,
        weight=weight,
        loss=loss,
        takes=inputs_of(name, options),
        score=score_of(options),
        weigh=row.weigh if options.use_weighting else None,
        target_scale=options.beta if row.takes_difference else None,
    )


def ranked(term: PairLoss | TokenLoss, options: ObjectiveOptions) -> PairLoss | RankedLoss | TokenLoss:
    """The loss for as many completions as a row may have."""
    if options.num_completions == 2 or isinstance(term, TokenLoss):
        return term
    if options.ranking == "plackett_luce":
        uses = LOSSES[options.method][term.name].uses
        gamma = options.gamma if "gamma" in uses else 0.0
        term = replace(term, loss=partial(log_odds, beta=options.beta, gamma=gamma))
    return RankedLoss(term, RANKS[: options.num_completions], RANKINGS[options.ranking])  # type: ignore[index]


def log_odds(margin: Tensor, *, beta: float, gamma: float) -> Tensor:
    """[P] beta delta - gamma, what the logistic losses are functions of."""
    return beta * margin - gamma


def shifted_bco_pair(chosen: Tensor, rejected: Tensor, *, beta: float, shift: RewardShift) -> Tensor:
    """[P] `losses.bco_pair` with the shift as it is now."""
    return losses.bco_pair(chosen, rejected, beta=beta, shift=shift.value)


def inputs_of(name: str, options: ObjectiveOptions) -> Inputs:
    """What the loss called ``name`` takes: a shaped likelihood is the mean's, as a sum's would overflow."""
    if options.method == "cpo" and options.alpha != 0:
        return mean_log_prob_margin
    return LOSSES[options.method][name].takes


def score_of(options: ObjectiveOptions) -> Score:
    """What is applied to a log-ratio (DPO) or log-prob (CPO, TPO) before the difference is taken."""
    if options.method == "dpo":
        return divergence(options.f_divergence_type, coef=options.f_alpha_divergence_coef)
    return partial(losses.alpha_shape, alpha=options.alpha if options.method == "cpo" else 0.0)


def report_of(options: ObjectiveOptions) -> Report:
    """What the log shows of the pairs."""
    if options.method == "dpo":
        return partial(dpo_report, beta=options.beta)
    per_token = inputs_of(canonical_names(options)[0], options) is mean_log_prob_margin
    return partial(reference_free_report, beta=options.beta, score=score_of(options), per_token=per_token)


def dpo_report(policy: Stats, reference: Stats, *, beta: float) -> tuple[dict[Branch, Tensor], dict[Branch, Tensor]]:
    """beta d and log p of each side, whatever the loss or divergence."""
    logps: dict[Branch, Tensor] = {branch: policy[branch].sum_logps.detach() for branch in PAIR}
    rewards: dict[Branch, Tensor] = {branch: beta * log_ratio(policy, reference, branch).detach() for branch in PAIR}
    return rewards, logps


def reference_free_report(
    policy: Stats, reference: Stats, *, beta: float, score: Score, per_token: bool
) -> tuple[dict[Branch, Tensor], dict[Branch, Tensor]]:
    """beta r and log p of each side, as the first loss has them."""
    logps: dict[Branch, Tensor] = {
        branch: (policy[branch].mean_logps if per_token else policy[branch].sum_logps).detach() for branch in PAIR
    }
    rewards: dict[Branch, Tensor] = {branch: beta * score(logps[branch]) for branch in PAIR}
    return rewards, logps
