"""What a run that did not break has learned: nothing, the wrong way, too much, or at the chosen answers' expense."""

from __future__ import annotations

import math
from collections.abc import Iterator

from prefopt.report.excess_findings import displacement, learned, overfitting, saturation
from prefopt.report.findings import Finding, Run
from prefopt.report.measures import (
    any_evaluation_learns,
    learned_trend,
    pairs_of,
    pairs_of_tail,
    pairs_until,
    rewards_in_nats,
)
from prefopt.report.series import MIN_ROWS, Mean, series

__all__ = ["learning_findings"]

SWAPPED_ACCURACY, LEARNED_ACCURACY = 0.4, 0.65
"""An evaluation accuracy below the first, while the training set's is above the second: what is preferred in one is
rejected in the other."""
HALF = 0.05
"""Accuracies within 0.5 plus or minus this are those of a coin."""
ENOUGH = 0.5
"""Share of its steps after which a run that has learned nothing is told so; warm-up and small steps take their time."""
MIN_PAIRS = 2000
"""Pairs that have been seen before accuracy says anything: small models and small steps need their time, and short
trials of a command are no training. Its standard error is 0.016 then, over half of them."""
NO_MOVEMENT = 1e-4
"""Share of its log-prob by which an answer moved, in either direction, at most, where nothing is learned: bfloat16's
own rounding is ten times as much."""


def learning_findings(run: Run) -> list[Finding]:
    """Of nothing learned, learned the wrong way, and overfitting the first; then the others."""
    if len(run.training) < 2 * MIN_ROWS:
        return []
    first = next((found for rule in (no_movement, swapped, coin, overfitting) for found in rule(run)), None)
    others = [found for rule in (displacement, saturation) for found in rule(run)]
    findings = [*([first] if first else []), *others]
    return findings or [*learned(run)]


def no_movement(run: Run) -> Iterator[Finding]:
    """Learning rate too low: with a reference in training, else between the first and the last evaluation."""
    if run.progress < ENOUGH:
        return
    share = largest_movement(run)
    if share is None or share > NO_MOVEMENT:
        return
    rate = run.option("learning_rate")
    given = f" ({rate:g})" if isinstance(rate, (int, float)) else ""
    yield Finding(
        "learning rate too low",
        "bad",
        run.training[-1]["step"],
        f"Log-probs have moved by no more than {share:.1g} of what they are: the policy is the model it began as.",
        f"Raise `learning_rate`{given}, or look whether the weights that should be trained are frozen.",
    )


def largest_movement(run: Run) -> float | None:
    """How far log-probs have moved, as a share of them; None where the rows do not tell."""
    found = []
    if run.has_reference:
        for branch in ("chosen", "rejected"):
            moved, logps = rewards_in_nats(run, branch), run.trained(f"logps/{branch}")
            found += [abs(x) for x in moved.map(logps, lambda r, p: r / p if p else 0.0).values[len(moved) // 2 :]]
    for prefix in run.evaluation_sets:
        logps = run.evaluated(prefix, "logps/chosen")
        if len(logps) >= 2 and logps.values[0]:
            found.append(abs(logps.values[-1] / logps.values[0] - 1))
    return max(found, default=None)


def swapped(run: Run) -> Iterator[Finding]:
    """The two sets disagree about what is preferred, or the run has learned the opposite."""
    train = run.trained("rewards/accuracies").tail
    for prefix in run.evaluation_sets:
        accuracy, margin = (run.evaluated(prefix, name) for name in ("rewards/accuracies", "rewards/margins"))
        now = accuracy.values[-1]
        limit = 0.5 - 3 * math.sqrt(0.25 / pairs_of(run, prefix))
        falls = margin.values[-1] < margin.values[0] and margin.values[-1] < 0
        if train.value > LEARNED_ACCURACY and now < min(SWAPPED_ACCURACY, limit) and falls and learned_trend(run):
            yield Finding(
                "chosen and rejected swapped",
                "bad",
                accuracy.steps[-1],
                f"Accuracy is {train.value:.2f} in training and {now:.2f} in evaluation ({prefix.removesuffix('_')}), "
                "where margins fall: what one set prefers, the other rejects.",
                "Look whether the columns `chosen` and `rejected` are exchanged in one of the sets.",
            )
            return
    low = Mean(train.value, max(train.error, math.sqrt(0.25 / pairs_of_tail(run))))
    if run.has_reference and train.value < SWAPPED_ACCURACY and low.differs(0.5) and learned_trend(run, down=True):
        yield Finding(
            "chosen and rejected swapped",
            "bad",
            run.training[-1]["step"],
            f"Accuracy in training is {train.value:.2f}, and margins fall: the policy learns to prefer the rejected "
            "answers.",
            "Look whether columns are exchanged, and at the loss: it should fall with the margin.",
        )


def coin(run: Run) -> Iterator[Finding]:
    """Accuracy 0.5 and margin 0 although the policy has moved: the pairs do not agree with each other."""
    first = [row for row in run.training if (row.get("epoch") or 0.0) <= 1.0]  # in later ones it knows the pairs
    if run.progress < ENOUGH or len(first) < 2 * MIN_ROWS or pairs_until(run, first[-1]["step"]) < MIN_PAIRS:
        return
    right, margin = (series(first, f"rewards/{name}").second_half for name in ("accuracies", "margins"))
    if abs(right.value - 0.5) > HALF or margin.differs(0.0, 2.0) or any_evaluation_learns(run):
        return
    yield Finding(
        "accuracy 0.5, margin 0",
        "bad",
        first[-1]["step"],
        f"Of pairs that were new to it the policy told {right.value:.0%} right, with a margin of {margin.value:.2g} "
        f"(+- {margin.error:.1g}), until step {first[-1]['step']:,}: no preference was learned.",
        "Look at pairs with `prefopt show`: answers that belong to other prompts, or columns exchanged in half of the "
        "rows, look like this. If the pairs are right, the learning rate is too low or the run too short.",
    )
