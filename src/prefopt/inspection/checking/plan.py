"""Which steps of a run are tried: the one that needs most memory, and some that are like most others.

The order of the rows is known before training, so these are steps that the run will make, of its own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from prefopt.batching import lengths_of_set
from prefopt.batching.budget import micro_batch_tokens
from prefopt.trainer.loading import PADDING_LAYOUTS

__all__ = ["TrialPlan", "num_steps", "plan_trial"]

LOOKED_AT = 20_000
"""Steps of a run whose size is worked out."""
NUM_TYPICAL = 4


@dataclass(frozen=True)
class StepSize:
    """A step, as far as memory and time are concerned."""

    rows: tuple[int, ...]
    tokens: int
    """Of all its micro-batches."""
    largest: int
    """Of the micro-batch with most tokens."""
    widest: int
    """The most that a micro-batch's tokens times those of its longest pair come to: attention that holds its weights
    needs memory in proportion."""


@dataclass(frozen=True)
class TrialPlan:
    """Steps to try, each as indices of prepared rows."""

    first: tuple[int, ...]
    """A step of about average size, for the policy that still is the reference."""
    largest: tuple[tuple[int, ...], ...]
    """Those that need most memory."""
    typical: tuple[tuple[int, ...], ...]
    """Others of about average size, for the time; none in a run of few steps."""
    num_steps: int
    """Of the run."""

    @property
    def steps(self) -> list[tuple[int, ...]]:
        return [self.first, *self.largest, *self.typical]


def num_steps(trainer: Any) -> int:
    """Optimizer steps of the whole run."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    return int(np.ceil(args.num_train_epochs * steps_per_epoch(trainer)))


def steps_per_epoch(trainer: Any) -> int:
    size = trainer.get_total_train_batch_size(trainer.args)
    whole, rest = divmod(len(trainer.train_dataset), size)
    return max(1, whole + (rest > 0 and not trainer.args.dataloader_drop_last))


def plan_trial(trainer: Any) -> TrialPlan:
    """The steps to try of the run that ``trainer`` would make; its rows are a ``datasets.Dataset``."""
    total = num_steps(trainer)
    steps = list(islice(step_sizes(trainer), min(total, LOOKED_AT)))
    mean = np.mean([step.tokens for step in steps])
    by_likeness = sorted(range(len(steps)), key=lambda index: abs(steps[index].tokens - mean))
    largest = {
        max(range(len(steps)), key=lambda index: steps[index].largest),
        max(range(len(steps)), key=lambda index: steps[index].widest),
    }
    first = next((index for index in by_likeness if index not in largest), by_likeness[0])
    largest -= {first}
    others = [index for index in by_likeness if index not in {first, *largest}][:NUM_TYPICAL]
    return TrialPlan(
        first=steps[first].rows,
        largest=tuple(steps[index].rows for index in sorted(largest)),
        typical=tuple(steps[index].rows for index in others),
        num_steps=total,
    )


def step_sizes(trainer: Any) -> Iterator[StepSize]:
    """The steps of the run, epoch by epoch, without end."""
    rows, args = trainer.train_dataset, trainer.args
    geometry = trainer.geometry(trainer._train_batch_size, args.gradient_accumulation_steps)
    order: Callable[[int], Sequence[int]] = trainer.training_order(rows, geometry)
    sizes = np.array(trainer.pair_sizes(rows))
    lengths = lengths_of_set(rows, trainer.preference.branches) if geometry.budget else None
    padded = trainer.layout.layout in PADDING_LAYOUTS
    epoch = 0
    while True:
        indices, per_step = list(order(epoch)), geometry.pairs_per_step
        for start in range(0, steps_per_epoch(trainer) * per_step, per_step):
            chosen = indices[start : start + per_step]
            shares = geometry.shares(len(chosen), lengths.take(chosen) if lengths else None)
            batches = [[int(sizes[chosen[place]]) for place in share.places] for share in shares]
            tokens = [micro_batch_tokens(sorted(batch), padded=padded) for batch in batches]
            widest = max(total * max(batch) for total, batch in zip(tokens, batches, strict=True))
            yield StepSize(tuple(chosen), sum(tokens), max(tokens), widest)
        epoch += 1
