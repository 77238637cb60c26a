"""What a run has learned too much of, or at the expense of the chosen answers; and the good word, where it has not."""

from __future__ import annotations

import math
from collections.abc import Iterator

from prefopt.report.findings import Finding, Run
from prefopt.report.measures import learned_trend, pairs_of, rewards_in_nats, start_of
from prefopt.report.series import MIN_ROWS, Mean, first_step_where

__all__ = ["displacement", "learned", "overfitting", "saturation"]

FALL_SHARE, FALL_NATS, FALL_PER_TOKEN = 0.1, 2.0, 0.2
"""Likelihood displacement: by how much log p(chosen) fell, of what it was and in nats. Some fall is usual in DPO and
harmless (Pal et al., Rafailov et al.); a tenth makes an answer of 200 nats e^20 times less likely, and two nats keep
answers of a few tokens from counting. Where the log has means per token, two nats are 0.2 in ten tokens."""
SATURATED_ACCURACY, SATURATED_GRADIENT = 0.99, 0.05
"""Saturation: (nearly) every pair is won, and the gradient is a twentieth of what it was."""
DROP, LOSS_ABOVE, MIN_EVALUATIONS = 0.05, 0.2, 3
"""Overfitting: by how much the accuracy of evaluation is below its best, beside what its number of pairs explains; or
by which share its loss is above its lowest, at an accuracy that has not risen since."""


def overfitting(run: Run) -> Iterator[Finding]:
    """Evaluation is behind its best while margins of training rise: fewer pairs are told right, or as many as when its
    loss was lowest, at a higher loss."""
    for prefix in run.evaluation_sets:
        accuracy, loss = (run.evaluated(prefix, name) for name in ("rewards/accuracies", "loss"))
        if len(loss) != len(accuracy) or len(accuracy) < MIN_EVALUATIONS or not learned_trend(run):
            continue
        lowest = loss.values.index(min(loss.values))
        best = accuracy.values.index(max(accuracy.values))
        worse_loss = loss.values[-1] - loss.values[lowest] > LOSS_ABOVE * abs(loss.values[lowest])
        gained = accuracy.values[-1] - accuracy.values[lowest]
        lost = accuracy.values[best] - accuracy.values[-1]
        noise = 2 * math.sqrt(max(accuracy.values[best] * (1 - accuracy.values[best]), 0.01) / pairs_of(run, prefix))
        if (lost > max(DROP, noise) and loss.values[-1] > loss.values[lowest]) or (worse_loss and gained < noise):
            place = best if lost > max(DROP, noise) else lowest
            yield Finding(
                "overfitting",
                "warn",
                accuracy.steps[place],
                f"Evaluation ({prefix.removesuffix('_')}) had accuracy {accuracy.values[place]:.3f} and loss "
                f"{loss.values[place]:.3g} at step {accuracy.steps[place]}, and has {accuracy.values[-1]:.3f} and "
                f"{loss.values[-1]:.3g}, while the margins of training rise.",
                "Take the best checkpoint (`load_best_model_at_end`), train for fewer epochs, or raise `beta`.",
            )
            return


def displacement(run: Run) -> Iterator[Finding]:
    """Both answers became less likely, the rejected one by more (Razin et al. 2024, Pal et al. 2024)."""
    chosen, rejected = (rewards_in_nats(run, branch) for branch in ("chosen", "rejected"))
    start = start_of(run, "chosen")
    limit = max(FALL_PER_TOKEN if run.logs_means else FALL_NATS, FALL_SHARE * abs(start))
    fell, other = -chosen.tail.value, -rejected.tail.value
    sure = Mean(fell, math.hypot(chosen.tail.error, 0 if run.has_reference else chosen.head.error))
    per = " per token" if run.logs_means else ""
    if fell > limit and other > fell and sure.differs(0.0) and learned_trend(run):
        yield Finding(
            "likelihood displacement",
            "warn",
            first_step_where(chosen, lambda value: value < -limit) or chosen.steps[-1],
            f"log p(chosen){per} fell by {fell:.3g} nats from {start:.3g}, log p(rejected) by {other:.3g}: margins "
            "grow because the rejected answers fall faster, and what rises is some other answer.",
            "If answers get worse: a term that holds the chosen one (`loss_type` with sft, `cpo_alpha`), a higher "
            "`beta`, a lower `learning_rate`, or pairs that differ in more than a few words.",
        )


def saturation(run: Run) -> Iterator[Finding]:
    """Every pair is won and nothing is left to learn from."""
    accuracy, norm = run.trained("rewards/accuracies"), run.trained("grad_norm")
    if len(norm) < 2 * MIN_ROWS:
        return
    weak = SATURATED_GRADIENT * norm.head.value
    if accuracy.tail.value >= SATURATED_ACCURACY and norm.tail.value < weak:
        yield Finding(
            "saturated margins",
            "warn",
            first_step_where(norm, lambda value: value < weak) or norm.steps[-1],
            f"Accuracy in training is {accuracy.tail.value:.3f} and the gradient norm {norm.tail.value:.2g}, of "
            f"{norm.head.value:.2g} at the start: these pairs teach nothing more.",
            "Stop earlier, lower `beta` or `learning_rate`, or take harder pairs.",
        )


def learned(run: Run) -> Iterator[Finding]:
    """The good word: evaluation, or training where there is none, prefers the chosen answers, more than at first."""
    for prefix in run.evaluation_sets:
        accuracy = run.evaluated(prefix, "rewards/accuracies")
        if accuracy.values[-1] > 0.5 + 2 * math.sqrt(0.25 / pairs_of(run, prefix)) and learned_trend(run):
            yield Finding(
                "preferences learned",
                "good",
                accuracy.steps[-1],
                f"Accuracy of evaluation ({prefix.removesuffix('_')}) is {accuracy.values[-1]:.3f}; margins rise.",
                "",
            )
