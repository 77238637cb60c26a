"""Some real optimizer steps of a run, in a folder that is gone afterwards: what they show, need, and take."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from prefopt.inspection.checking.plan import TrialPlan, plan_trial
from prefopt.reference.cache import OFF
from prefopt.trainer.best_metric import check_is_measured
from prefopt.trainer.saving.continuation import check_continuation, foreign_checkpoint

__all__ = ["PREFIX", "Trial", "set_aside", "try_run"]

ENOUGH_SECONDS = 30.0
"""Of timed steps; no further one is begun."""
PREFIX = "prefopt-check-"
"""Of the folder that a trial writes into."""
LN_2 = math.log(2)
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Trial:
    """What the steps showed."""

    plan: TrialPlan
    loss: float
    """Of the first step, whose policy still is the reference."""
    grad_norm: float
    learning_rate: float
    """Of the first step; 0 where the schedule warms up."""
    expected_loss: float | None
    """What the first loss must be; None where that depends on the rows."""
    seconds_per_step: float
    pairs_per_step: int
    peak: dict[str, int]
    """Kind of memory -> the most of it that was used so far, bytes."""
    eval_seconds_per_pair: float | None
    reference_seconds_per_pair: float | None
    """Of the pass before training, where there is one."""


class Watch(TrainerCallback):
    """Takes the times of steps, and ends the run after those of the plan."""

    def __init__(self, plan: TrialPlan) -> None:
        self.num_steps, self.untimed = len(plan.steps), 1 + len(plan.largest)
        self.begun: list[float] = []
        self.ended: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun.append(now())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended.append(now())
        timed = self.ended[-1] - self.begun[min(self.untimed, len(self.begun) - 1)]
        enough = len(self.ended) > self.untimed and timed > ENOUGH_SECONDS
        control.should_training_stop |= len(self.ended) >= self.num_steps or enough

    @property
    def seconds_per_step(self) -> float:
        """Of the typical steps, with what lies between them; of a run of few steps the fastest that there was."""
        begun, ended = self.begun[self.untimed :], self.ended
        if begun:
            return (ended[-1] - begun[0]) / len(begun)
        return min(end - begin for begin, end in zip(self.begun, ended, strict=True))


def set_aside(args: Any, folder: str) -> None:
    """Options of a run that is tried: it writes into ``folder`` alone, tells nobody, and saves nothing."""
    args.output_dir = folder
    args.report_to = []
    args.push_to_hub = args.load_best_model_at_end = False
    args.resume_from_checkpoint = None
    args.disable_tqdm = args.logging_first_step = True
    args.logging_strategy = IntervalStrategy.STEPS
    args.eval_strategy, args.save_strategy = IntervalStrategy.NO, SaveStrategy.NO


@contextmanager
def apart() -> Iterator[str]:
    """A folder for the trial; what references gave is neither read from the cache nor written there."""
    before = os.environ.get("PREFOPT_CACHE")
    os.environ["PREFOPT_CACHE"] = OFF
    try:
        with TemporaryDirectory(prefix=PREFIX) as folder:
            yield folder
    finally:
        os.environ.pop("PREFOPT_CACHE")
        if before is not None:
            os.environ["PREFOPT_CACHE"] = before


def try_run(args: Any, build: Callable[[], Any], checkpoint: str | None = None) -> tuple[Any, Trial]:
    """Makes the trainer and lets it run some steps of its run; returns the trainer too.

    Args:
        args: its config, which is changed.
        build: makes the trainer, on prepared rows.
        checkpoint: which the run would go on from; the steps that are tried are those from its beginning.

    Raises:
        Exception: whatever ends the run.
    """
    with apart() as folder:
        set_aside(args, folder)
        trainer = build()
        if checkpoint is not None and not foreign_checkpoint(checkpoint):
            check_continuation(trainer, checkpoint)
            trainer.changes, trainer.another_optimizer = {}, False
        plan = plan_trial(trainer)
        args.max_steps = plan.num_steps
        whole, sets = trainer.train_dataset, trainer.eval_dataset
        # what decides on activation checkpointing looks at the largest pairs of the set
        largest = np.argsort(trainer.pair_sizes(whole))[-trainer.get_total_train_batch_size(args) :]
        order = [row for step in plan.steps for row in step]
        trainer.train_dataset = whole.select([*order, *largest.tolist()])
        args.train_sampling_strategy = "sequential"
        before = reference_seconds(trainer)
        trainer.add_callback(watch := Watch(plan))
        trainer.train()
        first = trainer.state.log_history[0]
        seconds = evaluation_seconds(trainer, sets)
        trainer.train_dataset = whole
    return trainer, Trial(
        plan,
        first["loss"],
        first["grad_norm"],
        first["learning_rate"],
        expected_loss(trainer),
        watch.seconds_per_step,
        trainer.get_total_train_batch_size(args),
        peak_memory(),
        seconds,
        before,
    )


def reference_seconds(trainer: Any) -> float | None:
    """Seconds for each pair of the pass in which the reference scores the rows before training; None without one."""
    if not getattr(trainer.args, "precompute_ref_log_probs", False) or trainer.reference is None:
        return None
    start = now()
    trainer.get_train_dataloader()
    return (now() - start) / len(trainer.train_dataset)


def evaluation_seconds(trainer: Any, sets: Any) -> float | None:
    """Seconds for each pair of an evaluation, tried on the batch that needs most memory; None where there is no set."""
    found = sets if isinstance(sets, Dataset) else None
    if found is None:
        return None
    size = trainer.args.eval_batch_size
    sizes = trainer.pair_sizes(found)
    start = max(range(0, len(found), size), key=lambda index: sum(sizes[index : index + size]))
    begun = now()
    measured = trainer.evaluate(found.select(range(start, min(start + size, len(found)))))
    check_is_measured(trainer.args, measured)
    return (now() - begun) / min(size, len(found) - start)


def expected_loss(trainer: Any) -> float | None:
    """ln 2, the logistic loss of a policy that is its own reference; None for other losses."""
    objective, args, rows = trainer.preference, trainer.args, trainer.train_dataset
    reference = trainer.model_reference
    starts_equal = reference is not None and reference.derives_from_policy and args.disable_dropout
    is_plain = objective.names == ("sigmoid",) and not args.use_weighting and not trainer.aux_weight
    has_numbers = {"weight", "margin"} & set(rows.column_names)
    return LN_2 if starts_equal and is_plain and not has_numbers and args.loss_weights is None else None


def now() -> float:
    """Seconds, when all that the device was given is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def peak_memory() -> dict[str, int]:
    """The most memory that this process has had so far, bytes: of the device, or on a CPU all that is resident."""
    if torch.cuda.is_available():
        return {
            "device, allocated": torch.cuda.max_memory_allocated(),
            "device, reserved": torch.cuda.max_memory_reserved(),
        }
    if STATUS.is_file():
        (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return {"resident": int(line.split()[1]) * 1024}
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # what ru_maxrss is counted in
    return {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
