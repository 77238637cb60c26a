"""Which values and combinations of options are refused, and which have no effect."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from typing import Any

from prefopt.objective.inputs import mean_score_margin, score_margin
from prefopt.objective.options import Method, ObjectiveOptions
from prefopt.objective.rankings import RANKINGS
from prefopt.objective.tables import ALIASES, DIVERGENCES, LOGISTIC, LOSSES, REFUSED, TOKEN_LOSSES, Row, of_pairs
from prefopt.types import RANKS

__all__ = ["canonical_names", "objective_mistakes", "objective_warnings"]


def objective_mistakes(method: Method, **options: Any) -> list[str]:
    """Every mistake in the options, each with the option, its value, the rule and what to set instead.

    Args:
        method: whose losses the names are.
        options: fields of `ObjectiveOptions`.
    """
    if method not in LOSSES:
        return [f"method={method!r} is not a method: set one of {listed(LOSSES)}."]
    given = ObjectiveOptions(method=method, **options)
    checks = (
        name_mistakes,
        weight_mistakes,
        number_mistakes,
        smoothing_mistakes,
        divergence_mistakes,
        ranking_mistakes,
    )
    return [mistake for check in checks for mistake in check(given)]


def objective_warnings(method: Method, **options: Any) -> list[str]:
    """What the user should know of options that are valid: those without effect, and older names."""
    given = ObjectiveOptions(method=method, **options)
    return [*alias_warnings(given), *alphapo_warnings(given), *unused_warnings(given)]


def canonical_names(options: ObjectiveOptions) -> tuple[str, ...]:
    """The loss names, older ones replaced by today's."""
    return tuple(ALIASES[options.method].get(name, name) for name in options.given_names)


def rows(options: ObjectiveOptions) -> dict[str, Row]:
    """The table's rows of the names that are functions of a pair."""
    table = LOSSES[options.method]
    return {name: table[name] for name in canonical_names(options) if name in table}


def name_mistakes(options: ObjectiveOptions) -> Iterator[str]:
    known = [*LOSSES[options.method], *TOKEN_LOSSES[options.method]]
    if not options.given_names:
        yield f"loss_type is empty: set at least one of {listed(known)}."
    for name in canonical_names(options):
        if name not in known:
            yield f"loss_type {name!r} {unknown_name(name, options.method, known)}"


def unknown_name(name: str, method: Method, known: list[str]) -> str:
    """Why ``name`` is not taken, and what to set instead."""
    if name in REFUSED:
        return f"is refused: {REFUSED[name]}. Set one of {listed(known)}."
    elsewhere = [other for other in LOSSES if name in LOSSES[other] or name in TOKEN_LOSSES[other]]
    if elsewhere:
        owners = " and ".join(f"{other.upper()}Trainer" for other in elsewhere)
        return f"is a loss of {owners}, not of {method.upper()}Trainer: use that trainer or set one of {listed(known)}."
    near = difflib.get_close_matches(str(name), known)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"is unknown.{hint} Set one of {listed(known)}."


def weight_mistakes(options: ObjectiveOptions) -> Iterator[str]:
    if options.loss_weights is None:
        return
    names, weights = options.given_names, options.loss_weights
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        yield f"loss_weights={weights!r} must be a list: set one weight for each loss ({listed(names)})."
        return
    if len(weights) != len(names):
        yield (
            f"loss_weights={weights!r} has {len(weights)} values for {len(names)} losses ({listed(names)}): "
            "set one weight for each, or leave it out for 1 each."
        )
    if not all(is_number(weight) for weight in weights):
        yield f"loss_weights={weights!r} must be finite numbers: set for example 1.0 where they are not."


def number_mistakes(options: ObjectiveOptions) -> Iterator[str]:
    for option, example in (("beta", 0.1), ("discopop_tau", 0.05)):
        value = getattr(options, option)
        if not (is_number(value) and value > 0):
            yield f"{option}={value!r} must be a number above 0: set for example {example}."
    for option in ("gamma", "nll_weight", "alpha", "f_alpha_divergence_coef"):
        value = getattr(options, option)
        if not is_number(value):
            yield f"{options.user_name(option)}={value!r} must be a finite number: set for example 0.5."
    value = options.ld_alpha
    if value is not None and not (is_number(value) and 0 <= value <= 1):
        yield f"ld_alpha={value!r} must lie in [0, 1]: set for example 0.5, or None to switch LD-DPO off."


def smoothing_mistakes(options: ObjectiveOptions) -> Iterator[str]:
    value = options.label_smoothing
    if not (is_number(value) and 0 <= value <= 0.5):
        yield f"label_smoothing={value!r} must lie in [0, 0.5]: set for example 0.1, or 0 for labels that are right."
        return
    if "exo_pair" in options.given_names and not 0 < value < 0.5:
        yield (
            f"label_smoothing={value!r} must lie in (0, 0.5) with loss_type 'exo_pair', whose target is the smoothed "
            "label and infinitely far from a policy at 0: set for example 1e-3."
        )
    if "robust" in options.given_names and value == 0.5:
        yield (
            f"label_smoothing={value!r} must lie in [0, 0.5) with loss_type 'robust', which divides by 1 - 2 eps: "
            "set for example 0.1."
        )


def divergence_mistakes(options: ObjectiveOptions) -> Iterator[str]:
    name = options.f_divergence_type
    if name not in DIVERGENCES:
        yield f"f_divergence_type={name!r} is unknown: set one of {listed(DIVERGENCES)}."
        return
    if name == "reverse_kl":
        return
    if options.method != "dpo":
        yield (
            f"f_divergence_type={name!r} measures a distance from the reference, and {options.method.upper()} has "
            "none: set 'reverse_kl', or use DPOTrainer."
        )
        return
    against = [loss for loss, row in rows(options).items() if not takes_score(row)]
    if against:
        yield (
            f"f_divergence_type={name!r} does not go with loss_type {listed(against)}: only in a difference of the "
            "two completions' scores does the partition function log Z(x) cancel. Set 'reverse_kl', or one of "
            f"{listed([loss for loss, row in LOSSES['dpo'].items() if takes_score(row)])}."
        )


def ranking_mistakes(options: ObjectiveOptions) -> Iterator[str]:
    number, most = options.num_completions, len(RANKS)
    if options.ranking not in RANKINGS:
        yield f"ranking={options.ranking!r} is unknown: set one of {listed(RANKINGS)}."
    if not isinstance(number, int) or isinstance(number, bool) or not 2 <= number <= most:
        yield f"num_completions={number!r} must be a whole number from 2 to {most}: set the most that a row ranks."
        return
    if number == 2:
        return
    chosen, said = rows(options), f"num_completions={number}"
    for name in [name for name, row in chosen.items() if row.weigh is not of_pairs]:
        yield (
            f"{said} does not go with loss_type {name!r}, which sorts one pair of each row, and rows would have "
            "several: set another loss."
        )
    if options.bco_shift and "bco_pair" in chosen:
        yield f"{said} does not go with bco_shift=True, a mean of rewards of two sides: set one of them otherwise."
    if options.ld_alpha is not None:
        yield (
            f"{said} does not go with ld_alpha={options.ld_alpha!r}: the weight of a token depends on the partner's "
            "length, so that a completion would have another log-prob in each of its pairs. Set ld_alpha=None."
        )
    if options.ranking == "plackett_luce":
        yield from plackett_luce_mistakes(options, chosen)


def plackett_luce_mistakes(options: ObjectiveOptions, chosen: dict[str, Row]) -> Iterator[str]:
    said = "ranking='plackett_luce' is the likelihood of an order"
    against = [name for name, row in chosen.items() if row.loss not in LOGISTIC]
    if against:
        takers = listed([name for name, row in LOSSES[options.method].items() if row.loss in LOGISTIC])
        yield f"{said}, which loss_type {listed(against)} is not for two: set one of {takers}, or ranking='all_pairs'."
    if options.label_smoothing:
        yield f"{said}, in which no label of a pair can be wrong: set label_smoothing=0, or ranking='all_pairs'."
    if options.use_weighting:
        yield f"{said}, and WPO weighs pairs: set use_weighting=False, or ranking='all_pairs'."


def takes_score(row: Row) -> bool:
    """Whether the loss is a function of a difference of f-divergence scores."""
    return row.takes in (score_margin, mean_score_margin)


def alias_warnings(options: ObjectiveOptions) -> Iterator[str]:
    for name in options.given_names:
        if name in ALIASES[options.method]:
            yield f"loss_type {name!r} is an older name of {ALIASES[options.method][name]!r}, which is used."


def alphapo_warnings(options: ObjectiveOptions) -> Iterator[str]:
    if "alphapo" not in options.given_names:
        return
    if options.alpha == 0:
        yield "loss_type 'alphapo' with alpha=0 is SimPO: set alpha (for example 0.25) to shape the reward."
    # 1 is CPOConfig's default, so it does not tell that the user asked for it
    if set(options.given_names) == {"alphapo"} and options.nll_weight not in (0, 1):
        yield (
            f"cpo_alpha={options.nll_weight} has no effect: 'alphapo' has no NLL term. "
            "Set loss_type='simpo' with alpha to have both."
        )


def unused_warnings(options: ObjectiveOptions) -> Iterator[str]:
    chosen = rows(options)
    bound = {option for row in chosen.values() for option in row.uses}
    smoothing = [name for name, row in LOSSES[options.method].items() if "label_smoothing" in row.uses]
    # option -> (is it set, is it used, by what it is used); a trainer's own default does not count as set
    effects = {
        "label_smoothing": (options.label_smoothing != 0, "label_smoothing" in bound, listed(smoothing)),
        "discopop_tau": (options.discopop_tau != 0.05, "tau" in bound, "'discopop'"),
        "gamma": (options.gamma not in (0, 0.5), "gamma" in bound, "'simpo', 'alphapo', 'tpo-l'"),
        "f_divergence_type": (
            options.f_divergence_type != "reverse_kl",
            any(takes_score(row) for row in chosen.values()),
            "losses with a difference of scores",
        ),
        "f_alpha_divergence_coef": (
            options.f_alpha_divergence_coef != 0.5,
            options.f_divergence_type == "alpha_divergence",
            "f_divergence_type='alpha_divergence'",
        ),
        "alpha": (options.alpha != 0, options.method == "cpo", "CPOTrainer"),
        "nll_weight": (options.nll_weight != 0, options.method != "dpo", "CPOTrainer and TPOTrainer"),
        "bco_shift": (options.bco_shift, "bco_pair" in chosen, "'bco_pair'"),
        "ranking": (options.ranking != "all_pairs", options.num_completions != 2, "num_completions above 2"),
        "use_weighting": (options.use_weighting, bool(chosen), "losses of pairs, not by 'sft'"),
        "ld_alpha": (options.ld_alpha is not None, bool(chosen), "losses of pairs, not by 'sft'"),
    }
    for option, (is_set, is_used, users) in effects.items():
        if is_set and not is_used:
            yield (
                f"{options.user_name(option)}={getattr(options, option)!r} has no effect with loss_type "
                f"{listed(options.given_names)}: it is used by {users}."
            )


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite real number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def listed(names: Any) -> str:
    """``'a', 'b'``."""
    return ", ".join(repr(name) for name in names)
