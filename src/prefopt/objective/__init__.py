"""An `Objective`: bound losses, the added NLL, and what they need from the rest of the program.

`tables` says which name means which function, `rules` which options go together, `core` puts them to work; `columns`
which numbers of a row they can take.
"""

from prefopt.objective.columns import losses_with_column, refused_columns
from prefopt.objective.core import Objective, build_objective
from prefopt.objective.options import Method, ObjectiveOptions
from prefopt.objective.rules import objective_mistakes, objective_warnings
from prefopt.objective.tables import DIVERGENCES, LOSSES

__all__ = [
    "DIVERGENCES",
    "LOSSES",
    "Method",
    "Objective",
    "ObjectiveOptions",
    "build_objective",
    "losses_with_column",
    "objective_mistakes",
    "objective_warnings",
    "refused_columns",
]
