"""The terms of an objective: a loss with its options bound, from statistics of completions to unreduced values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from prefopt import losses
from prefopt.objective.inputs import Inputs, Score, Stats
from prefopt.objective.rankings import each_pair
from prefopt.objective.tables import Weigh
from prefopt.types import Branch, LossTerm

__all__ = ["PairLoss", "RankedLoss", "TokenLoss"]


@dataclass(frozen=True)
class PairLoss:
    """A loss of P pairs with its options bound."""

    name: str
    weight: float
    loss: Callable[..., Tensor]
    takes: Inputs
    score: Score
    weigh: Weigh | None
    """WPO's weight of each element; None: off."""
    target_scale: float | None
    """beta, where the loss is a function of a difference of scores; None: a target margin has no place in it."""

    def term(self, policy: Stats, reference: Stats, target_margins: Tensor | None) -> LossTerm:
        values = self.values(policy, reference, target_margins)
        return LossTerm(self.name, values, unit="pair", weight=self.weight)

    def values(self, policy: Stats, reference: Stats, target_margins: Tensor | None = None) -> Tensor:
        """[P] loss of each pair."""
        inputs = self.takes(policy, reference, self.score)
        if target_margins is not None and self.target_scale is not None:
            # f(beta delta - gamma_i) for every f(beta delta), whatever f is
            inputs = (inputs[0] - target_margins / self.target_scale,)
        values = self.loss(*inputs)
        if self.weigh is not None:
            values = values * self.weigh(inputs, log_weight(policy, "chosen"), log_weight(policy, "rejected"))
        return values


@dataclass(frozen=True)
class RankedLoss:
    """A loss of P rows that have up to ``len(ranks)`` completions each; a row weighs as one pair."""

    pair: PairLoss
    ranks: tuple[Branch, ...]
    combine: Callable[[Tensor, Tensor], Tensor]
    """One of `RANKINGS`."""

    @property
    def name(self) -> str:
        return self.pair.name

    def term(self, policy: Stats, reference: Stats, target_margins: Tensor | None) -> LossTerm:
        values, present = each_pair(self.pair.values, policy, reference, self.ranks)
        return LossTerm(self.name, self.combine(values, present), unit="pair", weight=self.pair.weight)


@dataclass(frozen=True)
class TokenLoss:
    """The NLL of the tokens of one branch. LD-DPO's and WPO's weights do not touch it."""

    name: str
    weight: float
    branch: Branch

    def term(self, policy: Stats, reference: Stats, target_margins: Tensor | None) -> LossTerm:
        token_logps = policy[self.branch].token_logps
        if token_logps is None:
            raise ValueError(
                f"The loss {self.name!r} needs the token log-probs of the {self.branch} completions, which were not "
                "kept: call sequence_stats with keep_tokens=True (Objective.needs_tokens)."
            )
        return LossTerm(self.name, losses.nll(token_logps), unit="token", weight=self.weight, branch=self.branch)


def log_weight(policy: Stats, branch: Branch) -> Tensor:
    """[P] log of WPO's weight of each completion of ``branch``."""
    value = policy[branch].log_weight
    if value is None:
        raise ValueError(
            f"use_weighting needs WPO's weights of the {branch} completions, which were not computed: call "
            "sequence_stats with with_weights=True (where Objective.statistics has 'log_sum_sq_prob')."
        )
    return value
