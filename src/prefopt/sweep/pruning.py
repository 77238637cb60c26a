"""Which trials are not worth going on with: optuna's rules, asked about everything that the sweep knows.

A trial is judged when every trial in turn has had its chunk: all that have reached a step count there, also those that
reached it in the same round, so that the order of turns decides nothing. The study is made anew from the rows of the
trials each time, as for a search (`prefopt.sweep.search`).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefopt.sweep.search import Values, the_optuna
from prefopt.sweep.space import is_count
from prefopt.sweep.state import BEGUN, Status, Sweep, Trial

__all__ = ["DEFAULT_METRIC", "Pruning", "direction_of", "metric_problems", "pruned", "read_pruning"]

METHODS = ("asha", "hyperband", "median")
NONE = (None, False, "none")
"""Values of the key ``pruning`` with which no trial is given up."""
DEFAULT_METRIC = "eval_rewards/accuracies"
"""The one metric that every method logs and that another beta, loss or length of mean does not scale."""
OF_EVALUATION = (
    "loss",
    *(f"{kind}/{branch}" for kind in ("rewards", "logps", "logits") for branch in ("chosen", "rejected")),
    "rewards/margins",
    "rewards/accuracies",
    "entropy",
    "mean_token_accuracy",
    "nll_loss",
    "aux_loss",
)
"""Metrics that an evaluation may log, without ``eval_``; the last two where the objective has such a term."""
FALLING = ("loss", "perplexity", "nll_loss", "grad_norm")
"""Ends of the names of metrics that are better the lower they are."""


@dataclass(frozen=True)
class Pruning:
    """When trials are given up.

    Args:
        method: ``asha`` (Li et al., 2018, arXiv:1810.05934), ``hyperband`` (Li et al., 2018, arXiv:1603.06560), or
            ``median`` (Golovin et al., 2017): worse than half of those that have finished.
        min_steps: optimizer steps before which no trial is given up; None: a quarter of the shortest run.
        reduction_factor: of the trials that reach a rung one in so many goes on; the next rung is so many times as far.
        startup_trials: for ``median``: trials that must have finished first.
    """

    method: str
    min_steps: int | None = None
    reduction_factor: int = 2
    startup_trials: int = 5


def read_pruning(value: Any) -> Pruning | None:
    """The key ``pruning``: a name, or ``{method, min_steps, reduction_factor, startup_trials}``.

    Raises:
        ValueError: it does not fit.
    """
    if value in NONE:
        return None
    given = dict(value) if isinstance(value, Mapping) else {"method": value}
    known = ("method", "min_steps", "reduction_factor", "startup_trials")
    least = {"min_steps": 1, "reduction_factor": 2, "startup_trials": 1}
    problems = [f"pruning: unknown key {key!r}; it has {', '.join(known)}" for key in given if key not in known]
    if given.get("method") not in METHODS:
        problems.append(f"pruning={given.get('method')!r}: must be one of {', '.join(METHODS)}, none")
    for key, bound in least.items():
        if key in given and not (is_count(given[key]) and given[key] >= bound):
            problems.append(f"pruning: {key}={given[key]!r} must be a whole number, {bound} at least")
    if problems:
        raise ValueError("\n".join(problems))
    return Pruning(**given)


def direction_of(metric: str) -> str:
    """The direction of a metric that is given without one.

    >>> direction_of("eval_loss"), direction_of("eval_rewards/accuracies")
    ('minimize', 'maximize')
    """
    return "minimize" if metric.endswith(FALLING) else "maximize"


def metric_problems(metric: str, direction: str, eval_strategy: str, *, is_needed: bool) -> list[str]:
    """What keeps trials from being compared by a metric.

    Args:
        metric: its name in the rows.
        direction: ``maximize`` or ``minimize``.
        eval_strategy: of the trials.
        is_needed: whether there is a search or pruning, which act on its values.
    """
    problems = []
    if direction not in ("maximize", "minimize"):
        problems.append(f"direction={direction!r}: must be maximize or minimize")
    known = [f"eval_{name}" for name in OF_EVALUATION]
    of_a_set = metric.startswith("eval_") and metric.endswith(tuple(f"_{name}" for name in OF_EVALUATION))
    if metric not in known and not of_a_set:
        close = difflib.get_close_matches(metric, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f": {', '.join(known)}"
        problems.append(f"metric={metric!r}: is none of those that an evaluation logs{hint}")
    if is_needed and eval_strategy in ("no", "False"):  # YAML's `no` without quotes is false
        problems.append(
            f"search and pruning act on {metric}, and with eval_strategy=no nothing is evaluated: set eval_strategy: "
            "steps, eval_steps, and the data's evaluation split"
        )
    return problems


def pruned(pruning: Pruning, sweep: Sweep, values: Values) -> dict[str, str]:
    """Trials to be given up now, and why.

    A clone, and a trial that a command has resumed, are the user's own wish: they are neither given up nor compared
    with others.

    Args:
        pruning: the rule.
        sweep: all trials.
        values: name of a trial -> step -> the sweep's metric, over all its evaluations so far.
    """
    optuna = the_optuna(f"pruning={pruning.method}")
    judged = [trial for trial in sweep.trials if trial.cloned_from is None and not trial.spared]
    lengths = [trial.max_steps for trial in judged if trial.max_steps]
    if not lengths:
        return {}
    min_steps = pruning.min_steps or max(1, min(lengths) // 4)
    rule = make_pruner(optuna, pruning, min_steps, max(lengths))
    asked = [
        trial for trial in judged if trial.status in BEGUN and max(values.get(trial.name, {}), default=0) >= min_steps
    ]
    found = {}
    for trial in asked:
        step, value = max(values[trial.name].items())
        if answer(optuna, rule, sweep.direction, judged, values, trial):
            found[trial.name] = f"{pruning.method}: {sweep.metric} was {value:.4g} at step {step}"
    return found


def make_pruner(optuna: Any, pruning: Pruning, min_steps: int, max_steps: int) -> Any:
    pruners = optuna.pruners
    if pruning.method == "asha":
        return pruners.SuccessiveHalvingPruner(min_resource=min_steps, reduction_factor=pruning.reduction_factor)
    if pruning.method == "hyperband":
        return pruners.HyperbandPruner(min_steps, max_steps, pruning.reduction_factor)
    return pruners.MedianPruner(n_startup_trials=pruning.startup_trials, n_warmup_steps=min_steps)


def answer(optuna: Any, rule: Any, direction: str, judged: list[Trial], values: Values, asked: Trial) -> bool:
    """What the rule says of one trial where all others have reported before it."""
    study = optuna.create_study(
        study_name="sweep", direction=direction, pruner=rule, sampler=optuna.samplers.RandomSampler(seed=0)
    )
    trials = {trial.name: study.ask() for trial in judged}  # all of them first: Hyperband groups them by number
    for trial in [*(one for one in judged if one is not asked), asked]:
        says = False
        for step, value in sorted(values.get(trial.name, {}).items()):
            trials[trial.name].report(value, step)
            says = trials[trial.name].should_prune()  # also writes down which rungs the trial has reached
        if trial is asked:
            return says
        if trial.status is Status.FINISHED and trial.last is not None:
            study.tell(trials[trial.name], trial.last)
    raise AssertionError("the asked trial is one of those that are judged")
