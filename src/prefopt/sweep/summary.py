"""The figures of all trials, best first: what the live table and the report show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from prefopt.sweep.state import OVER, Status, Sweep, Trial, trial_folder
from prefopt.trainer.ending.record import METRICS, read_rows

__all__ = [
    "Seen",
    "all_values",
    "compact",
    "counted",
    "duration",
    "one",
    "remaining",
    "seen",
    "trial_rows",
    "varied",
    "with_values",
]

FILES_KEPT = 1024
"""Files of rows that are kept parsed, as all of them are read at every change of one."""


@dataclass(frozen=True)
class Seen:
    """A trial and what its rows say.

    Args:
        trial: how it stands.
        values: step -> the sweep's metric, of each evaluation.
        loss, margin, accuracy: of the newest row of training; None before the first one.
        seconds_left: that its remaining steps take at its own speed; None where that is not known yet, 0 where it is
            over.
    """

    trial: Trial
    values: Mapping[int, float]
    loss: float | None
    margin: float | None
    accuracy: float | None
    seconds_left: float | None


def trial_rows(folder: Path, name: str) -> Sequence[Mapping[str, Any]]:
    """The rows of a trial; read again where its file has changed."""
    path = trial_folder(folder, name) / METRICS
    if not path.is_file():
        return ()
    status = path.stat()
    return parsed(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=FILES_KEPT)
def parsed(path: Path, modified: int, size: int) -> tuple[Mapping[str, Any], ...]:
    return tuple(read_rows(path))


def all_values(folder: Path, sweep: Sweep) -> dict[str, dict[int, float]]:
    """Name of a trial -> step -> the sweep's metric; values that are not finite are left out."""
    return {trial.name: values_of(folder, trial.name, sweep.metric) for trial in sweep.trials}


def values_of(folder: Path, name: str, metric: str) -> dict[int, float]:
    """Step -> value of a metric in the rows of a trial; values that are not finite are left out."""
    return {row["step"]: float(row[metric]) for row in trial_rows(folder, name) if row.get(metric) is not None}


def with_values(folder: Path, sweep: Sweep, trial: Trial) -> Trial:
    """The trial with the newest and the best value of the sweep's metric."""
    values = values_of(folder, trial.name, sweep.metric)
    best = (max if sweep.direction == "maximize" else min)(values.values(), default=None)
    return replace(trial, last=values[max(values)] if values else None, best=best)


def seen(folder: Path, sweep: Sweep) -> list[Seen]:
    """All trials, the best at its newest evaluation first; those without one last, in their order."""
    values = all_values(folder, sweep)
    found = [one(trial, values[trial.name], trial_rows(folder, trial.name)) for trial in sweep.trials]
    sign = -1 if sweep.direction == "maximize" else 1
    return sorted(found, key=lambda item: (item.trial.last is None, sign * (item.trial.last or 0.0)))


def one(trial: Trial, values: Mapping[int, float], rows: Sequence[Mapping[str, Any]]) -> Seen:
    """A trial beside its rows.

    Args:
        trial: how it stands.
        values: step -> the sweep's metric.
        rows: all that it has logged.
    """
    newest = {name: value for row in rows for name, value in row.items() if value is not None}
    found = [newest.get(name) for name in ("loss", "rewards/margins", "rewards/accuracies")]
    if trial.status in OVER:
        left = 0.0
    elif trial.max_steps and trial.steps:
        left = trial.seconds / trial.steps * (trial.max_steps - trial.steps)
    else:
        left = None
    return Seen(trial, values, *found, seconds_left=left)


def remaining(trials: Sequence[Seen]) -> float | None:
    """Seconds until all have ended, one after another; those that have not begun are taken to be like the others."""
    open_ones = [item for item in trials if item.trial.status not in OVER]
    begun = [item.trial for item in trials if item.trial.steps and item.trial.max_steps]
    if not begun:
        return None if open_ones else 0.0
    whole = sum(trial.seconds / trial.steps * (trial.max_steps or 0) for trial in begun) / len(begun)
    return sum(whole if item.seconds_left is None else item.seconds_left for item in open_ones)


def varied(sweep: Sweep) -> list[str]:
    """Options that are not the same in all trials, in the order in which they first appear."""
    names = dict.fromkeys(name for trial in sweep.trials for name in trial.options)
    return [name for name in names if len({repr(trial.options.get(name)) for trial in sweep.trials}) > 1]


def compact(value: float | None) -> str:
    """A number in a table.

    >>> compact(0.6171875), compact(-12.5), compact(1234.5), compact(2e-5), compact(None)
    ('0.617', '-12.500', '1.23e+03', '2e-05', '')
    """
    if value is None:
        return ""
    return f"{value:.3f}" if value == 0 or 0.001 <= abs(value) < 100 else f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """Seconds in words.

    >>> duration(8.24), duration(75), duration(7_300), duration(None)
    ('8 s', '1 min 15 s', '2 h 01 min', '')
    """
    if seconds is None:
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def counted(trials: Sequence[Trial]) -> str:
    """How many trials there are of each status, in words: ``1 running, 3 paused, 2 pruned``."""
    counts = {status: sum(trial.status is status for trial in trials) for status in Status}
    return ", ".join(f"{count} {status}" for status, count in counts.items() if count)
