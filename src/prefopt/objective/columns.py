"""Which numbers of a row the losses can take: the columns ``margin`` and ``weight``."""

from __future__ import annotations

from collections.abc import Collection

from prefopt.objective.core import Objective
from prefopt.objective.tables import LOSSES, of_pairs
from prefopt.objective.terms import PairLoss

__all__ = ["losses_with_column", "refused_columns"]

NO_DIFFERENCE = "has a term of one completion alone, in which there is no difference to subtract a margin from"
SORTED = "compares quantiles, completions of different rows, and a margin is one row's"
SEVERAL = "a margin is of one pair, and a row of up to num_completions has several"
TWO_GIVEN = "reference log-probs come with a row for two completions, and it may have up to num_completions"
NO_PAIR = "is the likelihood of one completion, in which nothing is compared"
EQUAL_MASS = "matches the sorted values of a step one to one, which takes that all of them weigh the same"
RUNNING = "shifts rewards by a running mean, so that what a row twice means depends on where its copies fall"


def losses_with_column(objective: Objective, column: str) -> list[str]:
    """The terms of ``objective`` in which the rows' ``margin`` or ``weight`` acts."""
    acts = [term for term in objective.losses if column == "weight" or term_takes_margin(term)]
    return [term.name for term in acts]


def refused_columns(objective: Objective, columns: Collection[str]) -> dict[str, str]:
    """Which columns of a data set the objective cannot take, each with the reason and what to do.

    A margin is refused where no term is a function of a difference of scores; a weight where a loss is a function of
    the micro-batch, so that a row of weight 2 would not be the row twice.

    Args:
        objective: whose losses they are.
        columns: of the data set.

    Returns:
        column -> reason, as the end of a message that names the column.
    """
    refused: dict[str, str] = {}
    if "margin" in columns and len(objective.ranks) > 2:
        refused["margin"] = f"{SEVERAL}. Drop or rename the column, or set num_completions=2."
    elif "margin" in columns and not losses_with_column(objective, "margin"):
        reasons = "; ".join(f"{term.name!r} {why_no_margin(objective, term.name)}" for term in objective.losses)
        takers = ", ".join(repr(name) for name, row in LOSSES[objective.method].items() if row.takes_difference)
        refused["margin"] = f"no loss takes a margin: {reasons}. Drop or rename the column, or add one of {takers}."
    if "ref_chosen_logps" in columns and len(objective.ranks) > 2:
        refused["ref_chosen_logps"] = f"{TWO_GIVEN}. Drop both columns, or set num_completions=2."
    alike = (*objective.sorted_losses, *objective.shifted_losses)
    if "weight" in columns and alike:
        reasons = "; ".join(f"{name!r} {why_no_weight(objective, name)}" for name in alike)
        refused["weight"] = f"pairs cannot have weights: {reasons}. Drop or rename the column, or leave that loss out."
    return refused


def term_takes_margin(term: object) -> bool:
    return isinstance(term, PairLoss) and term.target_scale is not None


def why_no_margin(objective: Objective, name: str) -> str:
    """Why no margin can be subtracted in the loss ``name``."""
    row = LOSSES[objective.method].get(name)
    if row is None:
        return NO_PAIR
    return NO_DIFFERENCE if row.weigh is of_pairs else SORTED


def why_no_weight(objective: Objective, name: str) -> str:
    """Why the pairs of the loss ``name`` weigh the same."""
    return RUNNING if LOSSES[objective.method][name].weigh is of_pairs else EQUAL_MASS
