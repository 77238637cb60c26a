"""What a sweep tries, and what it gives up: the keys of its file that say so, read in one place.

The scheduler asks `next_options` whenever it has room for another trial, and `given_up` when every trial that takes
turns has had its chunk. Both answer from ``sweep.json`` and the rows of the trials alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.sweep.pruning import DEFAULT_METRIC, NONE, Pruning, direction_of, metric_problems, pruned, read_pruning
from prefopt.sweep.search import Search, read_search, suggest, the_optuna
from prefopt.sweep.space import Parameter, grid, read_parameter
from prefopt.sweep.state import Sweep
from prefopt.sweep.summary import all_values, trial_rows

__all__ = ["Strategy", "given_up", "next_options", "read_strategy", "whole_grid"]


@dataclass(frozen=True)
class Strategy:
    """How a sweep chooses.

    Args:
        parameters: option -> what it may be; empty where the trials stand in the file one by one.
        search: how the next trial is found.
        pruning: when a trial is given up; None: never.
        metric: of evaluation, by which trials are compared.
        direction: ``maximize`` or ``minimize``.
    """

    parameters: Mapping[str, Parameter]
    search: Search
    pruning: Pruning | None
    metric: str
    direction: str

    @property
    def is_grid(self) -> bool:
        """Whether all configurations are known before the first one begins."""
        return self.search.method == "grid"


def read_strategy(values: Mapping[str, Any], eval_strategy: str) -> Strategy:
    """The keys ``parameters``, ``search``, ``num_trials``, ``pruning``, ``metric`` and ``direction`` of a sweep's file.

    Args:
        values: of the file.
        eval_strategy: of the run that is varied.

    Raises:
        ValueError: with every mistake, a line each; or optuna is wanted and not installed.
    """
    problems: list[str] = []

    def read(how: Callable[..., Any], *given: Any) -> Any:
        found: Any = None
        try:
            found = how(*given)
        except ValueError as error:
            problems.append(str(error))
        return found

    parameters = {name: read(read_parameter, name, value) for name, value in (values.get("parameters") or {}).items()}
    known = {name: parameter for name, parameter in parameters.items() if parameter is not None}
    search: Any = read(read_search, values.get("search"), values.get("num_trials"), known)
    pruning = read(read_pruning, values.get("pruning"))
    metric = str(values.get("metric", DEFAULT_METRIC))
    direction = values.get("direction", direction_of(metric))
    acts = values.get("pruning") not in NONE or getattr(search, "method", "grid") != "grid"
    problems += metric_problems(metric, direction, eval_strategy, is_needed=acts)
    if acts:
        read(the_optuna, "this search" if pruning is None else f"pruning={pruning.method}")
    if problems:
        raise ValueError("\n".join(problems))
    return Strategy(parameters, search, pruning, metric, direction)


def whole_grid(strategy: Strategy, most: int) -> list[dict[str, Any]]:
    """The options of the trials of a grid, of which ``num_trials`` are tried.

    Raises:
        ValueError: there are more than ``most``.
    """
    wanted = strategy.search.num_trials
    found = list(itertools.islice(grid(strategy.parameters), wanted or most + 1))
    if len(found) > most:
        raise ValueError(f"parameters: more than max_trials={most} combinations; set num_trials, or raise max_trials")
    return found


def next_options(strategy: Strategy, folder: Path, sweep: Sweep) -> dict[str, Any] | None:
    """Options of the next trial; None where there is none to come.

    Raises:
        ValueError: as of `given_up`.
    """
    return suggest(strategy.search, strategy.parameters, sweep, logged(folder, sweep))


def given_up(strategy: Strategy, folder: Path, sweep: Sweep) -> dict[str, str]:
    """Trials that are to be given up now, and why.

    Raises:
        ValueError: trials have been evaluated, and none of them has logged the metric.
    """
    return {} if strategy.pruning is None else pruned(strategy.pruning, sweep, logged(folder, sweep))


def logged(folder: Path, sweep: Sweep) -> dict[str, dict[int, float]]:
    values = all_values(folder, sweep)
    if any(values.values()):
        return values
    names = {key for trial in sweep.trials for row in trial_rows(folder, trial.name) for key in row}
    found = sorted(name for name in names if name.startswith("eval_"))
    if found and sweep.metric not in found:
        raise ValueError(f"metric={sweep.metric!r}: the evaluations have not logged it; they have {', '.join(found)}")
    return values
