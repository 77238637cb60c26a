"""The name tables: which name of a config means which loss, on which inputs, with which options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from prefopt import losses
from prefopt.objective.inputs import (
    DIFFERENCES,
    Inputs,
    log_prob_margin,
    log_ratios,
    mean_log_prob_margin,
    mean_score_margin,
    pair_ratios,
    score_margin,
)
from prefopt.objective.options import Method

__all__ = ["ALIASES", "DIVERGENCES", "LOSSES", "REFUSED", "TOKEN_LOSSES", "Row", "Weigh", "divergence"]

Weigh = Callable[[tuple[Tensor, ...], Tensor, Tensor], Tensor]
"""(the loss's inputs, log w(y_w), log w(y_l)) -> [P] WPO's weight of each element of the loss."""


def of_pairs(inputs: tuple[Tensor, ...], chosen: Tensor, rejected: Tensor) -> Tensor:
    """w(y_w) w(y_l)."""
    return (chosen + rejected).exp()


def of_sorted_pairs(inputs: tuple[Tensor, ...], chosen: Tensor, rejected: Tensor) -> Tensor:
    """The weight of the pair that gives the sorted policy ratio."""
    return (chosen + rejected).exp()[losses.ascending(inputs[0])]


def of_sorted_sides(inputs: tuple[Tensor, ...], chosen: Tensor, rejected: Tensor) -> Tensor:
    """Each side's weight follows its own sorted element."""
    return (chosen[losses.ascending(inputs[0])] + rejected[losses.ascending(inputs[1])]).exp()


@dataclass(frozen=True)
class Row:
    """What a name means."""

    loss: Callable[..., Tensor]
    takes: Inputs
    uses: tuple[str, ...] = ("beta",)
    """The options it is bound with, by the loss's own keywords."""
    weigh: Weigh = of_pairs

    @property
    def takes_difference(self) -> bool:
        """Whether it is a function of a difference of scores alone, from which a target margin can be subtracted."""
        return self.takes in DIFFERENCES


SMOOTHED = ("beta", "label_smoothing")
TARGET = ("beta", "gamma", "label_smoothing")

LOGISTIC = (losses.sigmoid, losses.sigmoid_norm, losses.simpo, losses.tpo_l)
"""-log sigmoid of a difference, which Plackett and Luce's model is for more than two completions."""

DPO = {
    "sigmoid": Row(losses.sigmoid, score_margin, SMOOTHED),
    "hinge": Row(losses.hinge, score_margin),
    "ipo": Row(losses.ipo, mean_score_margin),
    "exo_pair": Row(losses.exo_pair, score_margin, SMOOTHED),
    "nca_pair": Row(losses.nca_pair, log_ratios),
    "robust": Row(losses.robust, score_margin, SMOOTHED),
    "bco_pair": Row(losses.bco_pair, log_ratios),
    "sppo_hard": Row(losses.sppo_hard, log_ratios),
    "aot": Row(losses.aot, pair_ratios, SMOOTHED, of_sorted_pairs),
    "aot_unpaired": Row(losses.aot_unpaired, log_ratios, SMOOTHED, of_sorted_sides),
    "apo_zero": Row(losses.apo_zero, log_ratios),
    "apo_down": Row(losses.apo_down, log_ratios),
    "discopop": Row(losses.discopop, score_margin, ("beta", "tau")),
    "sigmoid_norm": Row(losses.sigmoid_norm, mean_score_margin, SMOOTHED),
}

CPO = {
    "sigmoid": Row(losses.sigmoid, log_prob_margin, SMOOTHED),
    "hinge": Row(losses.hinge, log_prob_margin),
    "ipo": Row(losses.ipo, mean_log_prob_margin),
    "simpo": Row(losses.simpo, mean_log_prob_margin, TARGET),
    "alphapo": Row(losses.simpo, mean_log_prob_margin, TARGET),  # alone: without the NLL
}

TPO = {
    "sigmoid": Row(losses.sigmoid, log_prob_margin, SMOOTHED),
    "hinge": Row(losses.hinge, log_prob_margin),
    "ipo": Row(losses.ipo, mean_log_prob_margin),
    "tpo-l": Row(losses.tpo_l, mean_log_prob_margin, TARGET),
}

LOSSES: dict[Method, dict[str, Row]] = {"dpo": DPO, "cpo": CPO, "tpo": TPO}
"""method -> name -> row."""

TOKEN_LOSSES: dict[Method, tuple[str, ...]] = {"dpo": ("sft",), "cpo": (), "tpo": ()}
"""Names that mean the NLL of the chosen tokens, not a function of the pair."""

ALIASES: dict[Method, dict[str, str]] = {"dpo": {"aot_pair": "aot_unpaired"}, "cpo": {}, "tpo": {}}
"""Older names, taken with a warning."""

REFUSED = {
    "kto_pair": "KTO judges single completions against the mean divergence of the batch; it is no function of a pair "
    "and needs a reference",
}
"""Names that users know from elsewhere, and why there is no such loss here."""

DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "reverse_kl": losses.reverse_kl,
    "forward_kl": losses.forward_kl,
    "js_divergence": losses.js_divergence,
    "alpha_divergence": losses.alpha_divergence,
}
"""f_divergence_type -> score of a log-ratio."""


def divergence(name: str, *, coef: float) -> Callable[[Tensor], Tensor]:
    """The score of ``name``, with the alpha-divergence's alpha bound."""
    score = DIVERGENCES[name]
    return partial(score, coef=coef) if name == "alpha_divergence" else score
