"""Which configuration a sweep tries next: ranges of options, and optuna's samplers over them.

A proposal depends on nothing but the sweep's own state: the study is made anew from the trials each time it is asked,
and the sampler is seeded with the number of the trial that it proposes. So a sweep that was killed and goes on proposes
what it would have proposed, and there is no second record beside ``sweep.json`` that could contradict it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from prefopt.sweep.space import Parameter, Range, choices, fits, grid, is_count
from prefopt.sweep.state import Status, Sweep, Trial

__all__ = ["Search", "Values", "read_search", "suggest", "the_optuna"]

METHODS = ("tpe", "random", "grid")
SCALARS = (bool, int, float, str, type(None))
SAME_AGAIN = 20
"""Proposals that repeat an earlier trial before the space counts as used up."""
Values = Mapping[str, Mapping[int, float]]
"""Name of a trial -> step -> the sweep's metric."""


@dataclass(frozen=True)
class Search:
    """How configurations are found.

    Args:
        method: ``tpe`` (tree-structured Parzen estimators: Bergstra et al., 2011), ``random`` or ``grid``.
        num_trials: how many configurations; None: a whole grid.
        seed: of the sampler.
        startup_trials: that TPE draws at random before it learns from what it has seen.
    """

    method: str
    num_trials: int | None
    seed: int = 0
    startup_trials: int = 10


def read_search(value: Any, num_trials: Any, parameters: Mapping[str, Parameter]) -> Search:
    """The keys ``search`` and ``num_trials``.

    Args:
        value: a name, ``{method, seed, startup_trials}``, or None: ``tpe`` where a parameter is a range without steps
            or ``num_trials`` is given, else a grid.
        num_trials: how many; None: a whole grid.
        parameters: what is searched.

    Raises:
        ValueError: one of them does not fit.
    """
    given = value if isinstance(value, Mapping) else {"method": value}
    endless = [name for name, one in parameters.items() if isinstance(one, Range) and choices(one) is None]
    method = given.get("method") or ("tpe" if endless or num_trials is not None else "grid")
    unknown = set(given) - {"method", "seed", "startup_trials"}
    whole = {key: given.get(key, default) for key, default in (("seed", 0), ("startup_trials", 10))}
    problems = [f"search: unknown key {key!r}; it has method, seed, startup_trials" for key in sorted(unknown)]
    if method not in METHODS:
        problems.append(f"search={method!r}: must be one of {', '.join(METHODS)}")
    elif method == "grid" and endless:
        problems.append(f"search=grid: {', '.join(endless)} has no steps; give a list, or a step without log")
    problems += [f"search: {key}={got!r} must be a whole number" for key, got in whole.items() if not is_count(got)]
    if method != "grid" and num_trials is None:
        problems.append(f"search={method}: num_trials must say how many configurations to try")
    if num_trials is not None and not (is_count(num_trials) and num_trials):
        problems.append(f"num_trials={num_trials!r} must be a whole number above 0")
    if problems:
        raise ValueError("\n".join(problems))
    return Search(method, num_trials, **whole)


def the_optuna(what: str) -> ModuleType:
    """The package optuna, quiet.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise ValueError(f"{what} needs optuna, which is not installed: pip install 'prefopt[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def suggest(search: Search, parameters: Mapping[str, Parameter], sweep: Sweep, values: Values) -> dict[str, Any] | None:
    """Options of the next trial; None where the search is at its end.

    Clones are the user's own trials: they are neither counted nor learned from, as they did not begin at the beginning.
    Trials outside a space that has been changed since are counted alone.

    Args:
        search: how.
        parameters: option -> what it may be.
        sweep: all trials so far; those that still run are taken into account as such.
        values: what they have reached.
    """
    past = [trial for trial in sweep.trials if trial.cloned_from is None]
    if search.num_trials is not None and len(past) >= search.num_trials:
        return None
    if search.method == "grid":
        return next(itertools.islice(grid(parameters), len(past), None), None)
    optuna = the_optuna(f"search={search.method}")
    space = {name: distribution(optuna, parameter) for name, parameter in parameters.items()}
    within = [trial for trial in past if all(fits(one, trial.options.get(name)) for name, one in parameters.items())]
    taken = [coded(trial.options, parameters) for trial in within]
    for attempt in range(SAME_AGAIN):
        study = optuna.create_study(direction=sweep.direction, sampler=sampler(optuna, search, len(past), attempt))
        study.add_trials([as_optuna(optuna, trial, space, values.get(trial.name, {})) for trial in within])
        found = study.ask(space).params
        if found not in taken:
            return {name: decoded(found[name], parameter) for name, parameter in parameters.items()}
    return None


def sampler(optuna: Any, search: Search, number: int, attempt: int) -> Any:
    import numpy as np

    seed = int(np.random.SeedSequence((search.seed, number, attempt)).generate_state(1)[0])
    if search.method == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=search.startup_trials, constant_liar=True)


def distribution(optuna: Any, parameter: Parameter) -> Any:
    kinds = optuna.distributions
    if isinstance(parameter, list):
        return kinds.CategoricalDistribution([code(value) for value in parameter])
    if parameter.is_whole:
        return kinds.IntDistribution(parameter.low, parameter.high, parameter.log, int(parameter.step or 1))
    return kinds.FloatDistribution(parameter.low, parameter.high, parameter.log, parameter.step)


def as_optuna(optuna: Any, trial: Trial, space: Mapping[str, Any], values: Mapping[int, float]) -> Any:
    """A trial of ours as one of optuna's; what ended without a value, or by a command, taught nothing."""
    states = optuna.trial.TrialState
    if trial.status is Status.FINISHED:
        state = states.COMPLETE if trial.last is not None else states.FAIL
    elif trial.status is Status.PRUNED:
        state = states.PRUNED
    else:
        state = states.FAIL if trial.status in (Status.FAILED, Status.STOPPED) else states.RUNNING
    return optuna.trial.create_trial(
        state=state,
        value=trial.last if state is states.COMPLETE else None,
        params=coded(trial.options, space),
        distributions=dict(space),
        intermediate_values=dict(values),
    )


def coded(options: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A trial's options as optuna's parameters."""
    return {name: code(options[name]) for name in names}


def code(value: Any) -> Any:
    """optuna's choices are scalars: a list, as of losses, is its JSON."""
    return value if isinstance(value, SCALARS) else json.dumps(value)


def decoded(value: Any, parameter: Parameter) -> Any:
    if isinstance(parameter, Range):
        return value
    return next(one for one in parameter if code(one) == value and type(code(one)) is type(value))
