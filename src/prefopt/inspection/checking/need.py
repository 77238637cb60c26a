"""What a run will need: time by what it goes into, and memory, from the steps that were tried."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from prefopt.inspection.checking.trial import Trial

__all__ = ["Need", "duration", "parts", "run_need"]

UNITS = (("s", 1), ("min", 60), ("h", 3600))


@dataclass(frozen=True)
class Need:
    """Seconds of a run, apart by what they go into; None: it has no such part, or its length is not known."""

    step: float
    epoch: float | None
    training: float
    evaluation: float | None
    """All of them together."""
    num_evaluations: int
    reference: float | None
    """The pass before training."""

    @property
    def total(self) -> float:
        return self.training + (self.evaluation or 0.0) + (self.reference or 0.0)


def run_need(args: Any, trial: Trial, num_train: int, num_eval: int, *, is_stream: bool) -> Need:
    """The time of the run that was tried.

    Args:
        args: of the run as its user gave them, in the parts that say how often it evaluates.
        trial: what its steps took.
        num_train, num_eval: rows that are trained on, that are evaluated.
        is_stream: the number of training rows is not known.
    """
    per_epoch = math.ceil(num_train / trial.pairs_per_step)
    evaluations = num_evaluations(args, trial.plan.num_steps, per_epoch)
    evaluation = None if trial.eval_seconds_per_pair is None else trial.eval_seconds_per_pair * num_eval * evaluations
    scored = num_train + num_eval
    before = None if trial.reference_seconds_per_pair is None else trial.reference_seconds_per_pair * scored
    return Need(
        step=trial.seconds_per_step,
        epoch=None if is_stream else trial.seconds_per_step * per_epoch,
        training=trial.seconds_per_step * trial.plan.num_steps,
        evaluation=evaluation,
        num_evaluations=evaluations,
        reference=before,
    )


def num_evaluations(args: Any, num_steps: int, steps_per_epoch: int) -> int:
    """How often the run evaluates.

    Args:
        args: with ``eval_strategy``, ``eval_steps`` and ``eval_on_start``.
        num_steps: of the run.
        steps_per_epoch: of its steps.
    """
    strategy, found = str(getattr(args.eval_strategy, "value", args.eval_strategy)), int(bool(args.eval_on_start))
    if strategy == "steps":
        every = args.eval_steps if args.eval_steps >= 1 else math.ceil(num_steps * args.eval_steps)
        return found + num_steps // int(every)
    return found + (math.ceil(num_steps / steps_per_epoch) if strategy == "epoch" else 0)


def duration(seconds: float) -> str:
    """A time as one reads it.

    Example:
        >>> duration(0.0421), duration(42), duration(150), duration(9000)
        ('42 ms', '42.0 s', '2.5 min', '2.5 h')
    """
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    unit, size = next((item for item in UNITS if seconds < 100 * item[1]), UNITS[-1])
    return f"{seconds / size:.1f} {unit}"


def parts(need: Need, num_steps: int) -> Iterator[tuple[str, float]]:
    """What is said of the time: name, seconds."""
    yield "a step", need.step
    if need.epoch is not None:
        yield "an epoch", need.epoch
    if need.reference is not None:
        yield "the reference's pass before training", need.reference
    yield f"training, {num_steps:,} steps", need.training
    if need.evaluation is not None:
        yield f"evaluation, {need.num_evaluations:,} times", need.evaluation
    yield "the whole run", need.total
