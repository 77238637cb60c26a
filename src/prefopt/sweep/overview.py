"""``report.html`` of a sweep: all trials in one page, rewritten while it runs."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from prefopt.files import replace_file
from prefopt.report.folder import REPORT
from prefopt.report.page import rendered, vector
from prefopt.sweep.pictures import MOST_LINES, MOST_PANELS, as_number, curves, is_wide, scatter
from prefopt.sweep.search import code, the_optuna
from prefopt.sweep.state import OVER, TRIALS, Status, Sweep, trial_folder
from prefopt.sweep.summary import Seen, compact, counted, duration, remaining, seen, varied
from prefopt.trainer.ending.record import METRICS
from prefopt.trainer.ending.reporting import is_off, report

__all__ = ["Overview", "importances", "page"]

logger = logging.getLogger(__name__)

SECONDS_BETWEEN, LARGEST_SHARE = 10.0, 0.03
"""Between two pages while a sweep runs, at least; and the share of its time that making them may take."""
MOST_TRIALS, MOST_OPTIONS, LONGEST_VALUE, LONGEST_REASON = 500, 8, 60, 400
"""Of the table, so that the page stays under 2 MB."""
FEWEST_TRIALS = 8
"""Below it an option's importance is noise."""
BETTER_PART = 0.5
"""Of the trials, compared with all of them; optuna's tenth would be one trial of ten, and what it happens to have."""
GIVEN_UP = (Status.PRUNED, Status.STOPPED)
"""Trials whose runs did not end, so that these have drawn nothing."""


class Overview:
    """Writes the page of a sweep, not too often.

    Args:
        folder: of the sweep.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.due = folder, float("-inf")

    def update(self, sweep: Sweep, *, is_over: bool = False) -> None:
        """Write the page anew, where the last one is some seconds old or the sweep has ended.

        What goes wrong in drawing is a warning: the sweep goes on.
        """
        begun = time.monotonic()
        if is_off() or (begun < self.due and not is_over):
            return
        try:
            draw_given_up(self.folder, sweep)
            replace_file(self.folder / REPORT, page(self.folder, sweep))
        except Exception as error:
            logger.warning("%s was not written: %r", self.folder / REPORT, error)
        now = time.monotonic()
        self.due = now + max(SECONDS_BETWEEN, (now - begun) / LARGEST_SHARE)


def draw_given_up(folder: Path, sweep: Sweep) -> None:
    """The curves and the page of each trial that was stopped or pruned since the last time."""
    for trial in sweep.trials:
        run = trial_folder(folder, trial.name)
        if trial.status in GIVEN_UP and changed(run / METRICS) > changed(run / REPORT):
            report(run, f"{sweep.method.upper()}, {trial.status}")


def changed(path: Path) -> float:
    """When a file was written, in seconds; 0 where it is not there."""
    return path.stat().st_mtime if path.is_file() else 0.0


def page(folder: Path, sweep: Sweep) -> str:
    """The page as text.

    Args:
        folder: of the sweep; links are relative to it.
        sweep: how it stands.
    """
    trials, options = seen(folder, sweep), varied(sweep)
    measured = [item for item in trials if item.values]
    return rendered(
        "sweep.html",
        title=f"Sweep of {len(sweep.trials)} {sweep.method.upper()} trials",
        verdict=verdict(trials, sweep),
        sweep=sweep,
        counts=counted(sweep.trials),
        spent=duration(sweep.seconds),
        left=duration(remaining(trials) or None),
        options=options[:MOST_OPTIONS],
        rows=[row(folder, item, options[:MOST_OPTIONS]) for item in trials[:MOST_TRIALS]],
        num_left_out=max(0, len(trials) - MOST_TRIALS),
        options_left_out=options[MOST_OPTIONS:],
        curves=[vector(figure) for figure in curves(folder, sweep, trials)] if measured else [],
        curves_left_out=max(0, len(trials) - MOST_LINES),
        scatter=[vector(scatter(measured[:MOST_TRIALS], name, sweep.metric)) for name in options[:MOST_PANELS]],
        panels_left_out=options[MOST_PANELS:],
        importances=[(name, f"{share:.0%}") for name, share in importances(sweep, options).items()],
        reasons=[
            (item.trial.name, item.trial.status, item.trial.reason[:LONGEST_REASON])
            for item in trials[:MOST_TRIALS]
            if item.trial.reason
        ],
        fewest_trials=FEWEST_TRIALS,
    )


def verdict(trials: Sequence[Seen], sweep: Sweep) -> tuple[str, str]:
    """Level and sentence: what is best so far, and by how much."""
    measured = [item.trial for item in trials if item.trial.last is not None]
    if not measured:
        return "", "No trial has been evaluated yet."
    best = measured[0]
    text = f"Best {sweep.metric}: {compact(best.last)}, by {best.name} at step {best.steps}"
    if len(measured) > 1 and measured[1].last == best.last:
        ties = sum(trial.last == best.last for trial in measured)
        text += f" ({ties} trials are level)"
    elif len(measured) > 1:
        text += f"; second {compact(measured[1].last)}, last {compact(measured[-1].last)}"
    statuses = {item.trial.status for item in trials}
    return "warn" if Status.FAILED in statuses else "good" if statuses <= OVER else "", f"{text}."


def row(folder: Path, item: Seen, options: Sequence[str]) -> dict[str, Any]:
    trial = item.trial
    figures = [item.loss, item.margin, item.accuracy]
    has_page = (trial_folder(folder, trial.name) / REPORT).is_file()
    return {
        "name": trial.name,
        "link": f"{TRIALS}/{quote(trial.name)}/{REPORT}" if has_page else None,
        "status": trial.status,
        "level": {Status.FINISHED: "good", Status.FAILED: "bad", Status.PRUNED: "warn"}.get(trial.status, ""),
        "steps": f"{trial.steps}/{trial.max_steps or '?'}",
        "figures": [compact(trial.last), compact(trial.best)],
        "training": [*(compact(figure) for figure in figures), duration(trial.seconds)],
        "options": [shown(trial.options.get(name)) for name in options],
        "cloned_from": trial.cloned_from,
        "clone_step": trial.clone_step,
    }


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(shown, value))[:LONGEST_VALUE]
    text = "" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"


def importances(sweep: Sweep, options: Sequence[str]) -> Mapping[str, float]:
    """Share of the metric's differences that each option explains, most first; empty where that cannot be said.

    PED-ANOVA of optuna (Watanabe et al., 2023, arXiv:2304.10255) over the trials that finished, clones left out.
    """
    finished = [trial for trial in sweep.trials if trial.status is Status.FINISHED and trial.cloned_from is None]
    done = [trial for trial in finished if trial.last is not None]
    if len(done) < FEWEST_TRIALS or len({trial.last for trial in done}) == 1:
        return {}
    try:
        optuna: Any = the_optuna("an importance")
    except ValueError:
        return {}
    columns = {name: [trial.options.get(name) for trial in done] for name in options}
    space = {name: kind(optuna.distributions, values) for name, values in columns.items()}
    study = optuna.create_study(direction=sweep.direction)
    for place, trial in enumerate(done):
        params = {name: of_kind(space[name], values[place]) for name, values in columns.items()}
        study.add_trial(optuna.trial.create_trial(value=trial.last, params=params, distributions=space))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=BETTER_PART)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)


def kind(distributions: Any, values: Sequence[Any]) -> Any:
    """Numbers as a range, anything else as choices."""
    numbers = [number for number in map(as_number, values) if number is not None]
    if len(numbers) == len(values) and len(set(numbers)) > 2:
        return distributions.FloatDistribution(min(numbers), max(numbers), log=is_wide(numbers))
    return distributions.CategoricalDistribution(list(dict.fromkeys(code(value) for value in values)))


def of_kind(distribution: Any, value: Any) -> Any:
    return code(value) if hasattr(distribution, "choices") else as_number(value)
