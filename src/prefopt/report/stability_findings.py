"""Runs that broke: numbers that are none, and learning rates that are too high."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from prefopt.report.findings import Finding, Run
from prefopt.report.series import MIN_ROWS, Series, evaluation_sets, first_step_where

__all__ = ["stability_findings"]

LOSS_RISE = 0.5
"""Of the loss at the start, by which it has risen. A loss of preferences starts at what indifference costs (ln 2 for
sigmoid); a run whose present loss is half as much again is worse than a model that was never trained."""
SPIKE, BEFORE, SPIKE_SHARE, MIN_SPIKES = 10.0, 100, 0.05, 3
"""A gradient norm of ten times the median of the rows before, a hundred at most, is a spike; single ones are a strange
batch, and clipping takes care of them. Three, and one row in twenty, are the step size."""
COLLAPSE, COLLAPSE_NATS = 1.0, 20.0
"""Share of its first log-prob by which the chosen completion fell, and nats: training on preferences moves log-probs by
tenths. A model that finds the answer it is taught the square as unlikely has lost its language."""
EVALUATED = ("loss", "rewards/accuracies", "rewards/margins")
"""Metrics of an evaluation set that are always finite; a metric of the user's need not be."""


def stability_findings(run: Run) -> list[Finding]:
    """What broke the run; the first of them, as the others follow from it."""
    return [*not_finite(run)][:1] or [*learning_rate_too_high(run)][:1]


def not_finite(run: Run) -> Iterator[Finding]:
    """A row that is NaN or infinite, or that misses steps for it."""
    evaluated = {f"{prefix}{name}" for prefix in evaluation_sets(run.rows) for name in EVALUATED}
    for row in run.rows:
        odd = not_numbers(row)
        if "loss" not in row:
            if odd := {name: value for name, value in odd.items() if name in evaluated}:
                yield broken_evaluation(row["step"], odd)
                return
        elif odd or row.get("skipped_steps"):
            what = ", ".join(f"{name} is {value}" for name, value in odd.items()) or "steps were left out"
            advice = "Look into the folder `_nonfinite-step-N`: it has the rows and what was computed of them."
            if odd.keys() <= {"loss"} and row.get("skipped_steps"):
                what = f"{row['skipped_steps']:g} steps were left out, whose loss or gradient was not finite"
            yield Finding("not finite", "bad", row.get("step"), f"In the log {what}.", advice)
            return


def not_numbers(row: Mapping[str, Any]) -> dict[str, str]:
    """Metric -> what it is in place of a finite number."""
    found = {name: str(value) for name, value in row.items() if isinstance(value, float) and value != value}
    written = row.get("not_finite")
    return {**written, **found} if isinstance(written, Mapping) else found


def broken_evaluation(step: int, odd: Mapping[str, str]) -> Finding:
    what = ", ".join(f"{name} is {value}" for name, value in odd.items())
    advice = (
        "Look at the rows of this set with `prefopt show`: one of them, or the type of the weights (float16 "
        "overflows), gives log-probs that are not finite."
    )
    return Finding("not finite", "bad", step, f"In an evaluation {what}.", advice)


def learning_rate_too_high(run: Run) -> Iterator[Finding]:
    """The loss above that of the model it began with, the chosen answers lost, or gradients that jump."""
    rate = run.option("learning_rate")
    given = f" ({rate:g})" if isinstance(rate, (int, float)) else ""
    advice = f"Lower `learning_rate`{given}, by a factor of ten for a first try; a longer `warmup_ratio` helps little."
    for step, text in (*risen_loss(run.trained("loss")), *collapse(run), *spikes(run.trained("grad_norm"))):
        yield Finding("learning rate too high", "bad", step, text, advice)


def risen_loss(loss: Series) -> Iterator[tuple[int | None, str]]:
    if len(loss) < 2 * MIN_ROWS:
        return
    first, now = loss.values[0], loss.tail.value
    limit = first + max(LOSS_RISE * abs(first), 3 * loss.scatter)  # the first row scatters as the last ones do
    if now > limit:
        step = first_step_where(loss, lambda value: value > limit)
        yield step, f"The loss rose from {first:.3g} to {now:.3g}, above that of the model before training."


def collapse(run: Run) -> Iterator[tuple[int | None, str]]:
    chosen = run.trained("logps/chosen")
    if len(chosen) < 2 * MIN_ROWS:
        return
    start = chosen.values[0]
    limit = start - max(COLLAPSE * abs(start), COLLAPSE_NATS)
    if chosen.tail.value < limit:
        step = first_step_where(chosen, lambda value: value < limit)
        text = f"log p(chosen) fell from {start:.3g} to {chosen.tail.value:.3g} nats: the model loses what it could."
        yield step, text


def spikes(norms: Series) -> Iterator[tuple[int | None, str]]:
    found, least = [], math.inf
    for place, (step, value) in enumerate(norms.items()):
        if place >= MIN_ROWS and value > SPIKE * least:  # as it must be to be above the median
            before = statistics.median(norms.values[max(0, place - BEFORE) : place])
            found += [(step, value)] if value > SPIKE * before > 0 else []
        least = min(least, value)
    if len(found) >= max(MIN_SPIKES, SPIKE_SHARE * len(norms)):
        largest = max(value for _, value in found)
        text = (
            f"In {len(found)} of {len(norms)} rows the gradient norm was over {SPIKE:g} times the median before it "
            f"(up to {largest:.3g})."
        )
        yield found[0][0], text
