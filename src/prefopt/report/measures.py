"""What several rules ask of a run: how far log-probs have moved, whether margins rise, how many pairs there were."""

from __future__ import annotations

import math

from prefopt.report.findings import Run
from prefopt.report.series import Series

__all__ = [
    "any_evaluation_learns",
    "learned_trend",
    "pairs_of",
    "pairs_of_tail",
    "pairs_until",
    "rewards_in_nats",
    "start_of",
]


def rewards_in_nats(run: Run, branch: str) -> Series:
    """By how many nats the log-prob of a completion has moved since the start, row by row.

    Where there is a reference the rewards tell, of the same pairs: no noise of which pairs a row has. Else it is the
    log-prob beside that of the first rows.
    """
    logps = run.trained(f"logps/{branch}")
    if run.has_reference:
        rewards = run.trained(f"rewards/{branch}")
        return Series(rewards.steps, tuple(value / run.beta for value in rewards.values))
    start = logps.head.value
    return Series(logps.steps, tuple(value - start for value in logps.values))


def start_of(run: Run, branch: str) -> float:
    """The log-prob of a completion before training, nats."""
    return run.trained(f"logps/{branch}").head.value - rewards_in_nats(run, branch).head.value


def learned_trend(run: Run, *, down: bool = False) -> bool:
    """Whether the margins of training have risen (or fallen) by more than chance."""
    rise = run.trained("rewards/margins").rise
    return rise.differs(0.0) and (rise.value < 0) == down


def any_evaluation_learns(run: Run) -> bool:
    """Whether an evaluation set is told apart better than a coin does."""
    for prefix in run.evaluation_sets:
        accuracy = run.evaluated(prefix, "rewards/accuracies")
        if accuracy.values[-1] > 0.5 + 3 * math.sqrt(0.25 / pairs_of(run, prefix)):
            return True
    return False


def pairs_until(run: Run, step: int) -> float:
    """Pairs of all steps until one, all ranks included; infinite where the batch size is not known."""
    size, accumulation = run.option("per_device_train_batch_size"), run.option("gradient_accumulation_steps") or 1
    if not isinstance(size, int):
        return math.inf
    return size * accumulation * run.known("machine").get("processes", 1) * step


def pairs_of_tail(run: Run) -> float:
    """Pairs of the rows that `Series.tail` is of, about."""
    return max(1.0, min(pairs_until(run, run.training[-1]["step"]), 1e9) / 4)


def pairs_of(run: Run, prefix: str) -> float:
    """Pairs of an evaluation set, of what it took and how fast it was; 1 where that is not logged."""
    rates, times = (run.evaluated(prefix, name) for name in ("samples_per_second", "runtime"))
    both = rates.map(times, lambda rate, seconds: rate * seconds).values
    return max(1.0, both[-1]) if both else 1.0
