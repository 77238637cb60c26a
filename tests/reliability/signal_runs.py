"""Runs that are signalled at a certain place, and what they are held against."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from scale import scaled
from short_runs import dataset, log_rows, trainer, weights
from tiny_models import tiny_model
from transformers import EarlyStoppingCallback, TrainerCallback

from prefopt.trainer.ending.record import METRICS, read_rows
from prefopt.trainer.ending.signals import InterruptedRun, TerminatedRun

STOPPED = (InterruptedRun, TerminatedRun)
MOMENTS = scaled(6, 100)
PLANNED = 10
"""Steps of the runs that are stopped at random."""
START_SECONDS = 300
"""A limit that tells a run that hangs from a machine that is busy."""


class At(TrainerCallback):
    """Sends a signal to this process at the ``count``-th time that an event comes."""

    def __init__(self, event: str, count: int, number: int) -> None:
        self.left = count
        setattr(self, event, self.maybe)
        self.number = number

    def maybe(self, *args: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)


def made(folder: Path, *callbacks: Any, **options: Any) -> Any:
    """A run with dropout, whose evaluation and order use random numbers, and that crosses an epoch's end."""
    options = {
        "model": tiny_model(seed=1, attention_dropout=0.3),
        "disable_dropout": False,
        "count": 16,
        "max_steps": 7,
        "eval_dataset": dataset(10, seed=3),
        "per_device_eval_batch_size": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        **options,
    }
    if options.pop("callbacks", None):
        callbacks = (*callbacks, EarlyStoppingCallback(early_stopping_patience=2))
    return trainer(folder, callbacks=list(callbacks), **options)


def rows_on_disk(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run without times."""
    return [
        {name: value for name, value in row.items() if name != "time" and not name.endswith(("runtime", "per_second"))}
        for row in read_rows(folder / METRICS)
    ]


def assert_same(run: Any, expected: Any) -> None:
    assert torch.equal(weights(run.model), weights(expected.model))
    assert log_rows(run) == log_rows(expected)
    assert rows_on_disk(Path(run.args.output_dir)) == rows_on_disk(Path(expected.args.output_dir))


WHOLE: dict[str, Any] = {}
"""Options -> the run that was not interrupted."""


def whole(root: Path, **options: Any) -> Any:
    key = repr(sorted(options)) + repr([value for _, value in sorted(options.items()) if isinstance(value, str | int)])
    if key not in WHOLE:
        WHOLE[key] = made(root / "whole", **options)
        WHOLE[key].train()
    return WHOLE[key]


def resumed(folder: Path, **options: Any) -> Any:
    run = made(folder, **options)
    run.train(resume_from_checkpoint=True)
    return run
