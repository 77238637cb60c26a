"""Loaders whose items are whole optimizer steps, planned alike on every rank.

A step has ``per_device * accumulation * world`` pairs, always; the last one of an epoch has what is left. It is cut
into blocks of ``per_device * world`` pairs, and a block into one micro-batch per rank. Every rank makes the same plan
from the same numbers, so no rank runs more micro-batches than another (collectives would hang) and no communication is
needed; a rank without a pair of a block computes a dummy of weight 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from prefopt.types import OptimizerStep, PreferenceBatch

__all__ = ["Geometry", "StepLoader", "StepPlanner", "StepStream", "make_loader"]

Row = Mapping[str, Any]
Collate = Callable[[Sequence[Row], float], PreferenceBatch]
"""Rows of one micro-batch and their weight -> the batch."""


@dataclass(frozen=True)
class Geometry:
    """How a step is divided."""

    per_device: int
    accumulation: int
    world_size: int
    rank: int

    @property
    def pairs_per_step(self) -> int:
        return self.per_device * self.accumulation * self.world_size

    def micro_batches(self, items: Sequence[Any]) -> Iterator[tuple[Sequence[Any], float]]:
        """This rank's micro-batches of a step over ``items``, each with its weight (0: a dummy)."""
        block_size = self.per_device * self.world_size
        for start in range(0, len(items), block_size):
            block = items[start : start + block_size]
            share, extra = divmod(len(block), self.world_size)
            first = self.rank * share + min(self.rank, extra)
            own = block[first : first + share + (self.rank < extra)]
            yield (own, 1.0) if len(own) else (block[:1], 0.0)


@dataclass(frozen=True)
class StepPlan:
    """Row indices of one rank's micro-batches of a step, with their weights."""

    micro_batches: tuple[tuple[tuple[int, ...], float], ...]


class StepPlanner:
    """Batch sampler over a map-style data set: one `StepPlan` per optimizer step.

    Args:
        num_rows: rows of the data set.
        geometry: how a step is divided.
        order: epoch -> the row indices in the order of that epoch.
        drop_last: leave the last, smaller step out.
    """

    def __init__(
        self, num_rows: int, geometry: Geometry, order: Callable[[int], Sequence[int]], *, drop_last: bool = False
    ) -> None:
        self.num_rows, self.geometry, self.order, self.drop_last = num_rows, geometry, order, drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        size = self.geometry.pairs_per_step
        return self.num_rows // size if self.drop_last else -(-self.num_rows // size)

    def __iter__(self) -> Iterator[StepPlan]:
        order, size = self.order(self.epoch), self.geometry.pairs_per_step
        for start in range(0, len(self) * size, size):
            step = self.geometry.micro_batches(order[start : start + size])
            yield StepPlan(tuple((tuple(rows), weight) for rows, weight in step))


class PlannedRows(torch.utils.data.Dataset):
    """A map-style data set that is asked for plans and gives `OptimizerStep`; its length stays that of the rows."""

    def __init__(self, rows: Any, collate: Collate) -> None:
        self.rows, self.collate = rows, collate

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, plan: StepPlan) -> OptimizerStep:
        return OptimizerStep(
            tuple(self.collate(self.rows.__getitems__(list(rows)), weight) for rows, weight in plan.micro_batches)
        )

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


class StepStream(IterableDataset):
    """Optimizer steps from a stream of rows. Every rank reads every row and keeps its share of each step.

    So the position of a stream is the number of steps taken, whatever the number of ranks and workers, and a resumed
    run finds its place by counting.

    Args:
        rows: a `datasets.IterableDataset` of prepared rows.
        collate: rows of one micro-batch -> the batch.
        geometry: how a step is divided.
        endless: start over when the stream ends (training); else the last step has what is left (evaluation).
    """

    def __init__(self, rows: Any, collate: Collate, geometry: Geometry, *, endless: bool) -> None:
        self.rows, self.collate, self.geometry, self.endless = rows, collate, geometry, endless

    def __iter__(self) -> Iterator[OptimizerStep]:
        worker = get_worker_info()
        number, of = (worker.id, worker.num_workers) if worker else (0, 1)
        # A datasets stream would give each worker other shards; here every worker reads all and takes every n-th step.
        torch.utils.data._utils.worker._worker_info = None  # type: ignore[attr-defined]
        rows = self.endless_rows() if self.endless else iter(self.rows)
        step = 0
        while items := list(islice(rows, self.geometry.pairs_per_step)):
            if step % of == number:
                batches = (self.collate(own, weight) for own, weight in self.geometry.micro_batches(items))
                yield OptimizerStep(tuple(batches))
            step += 1

    def endless_rows(self) -> Iterator[Row]:
        epoch = 0
        while True:
            if hasattr(self.rows, "set_epoch"):
                self.rows.set_epoch(epoch)
            count = 0
            for row in self.rows:
                count += 1
                yield row
            if not count:
                raise ValueError(
                    "The streamed training set has no row to learn from. The log above says which rows were skipped "
                    "and why; check the columns and `max_length`."
                )
            epoch += 1


class StepLoader(DataLoader):
    """A `DataLoader` of optimizer steps that passes the epoch on to its planner."""

    def set_epoch(self, epoch: int) -> None:
        if isinstance(self.batch_sampler, StepPlanner):
            self.batch_sampler.set_epoch(epoch)


def first_item(items: Any) -> Any:
    """Collate function of loaders whose data set has already made the item."""
    return items


def make_loader(
    rows: Any, collate: Collate, geometry: Geometry, *, order: Any = None, drop_last: bool = False, **kwargs: Any
) -> StepLoader:
    """The loader over prepared rows.

    Args:
        rows: a map-style data set, or a stream.
        collate: rows of one micro-batch and their weight -> the batch.
        geometry: how a step is divided.
        order: epoch -> row indices; for training. None: once, in order (evaluation).
        drop_last: leave the last, smaller step out.
        kwargs: of `DataLoader` (workers, pinned memory).
    """
    if isinstance(rows, Sized):
        order = order or (lambda epoch: range(len(rows)))
        planner = StepPlanner(len(rows), geometry, order, drop_last=drop_last)
        return StepLoader(PlannedRows(rows, collate), batch_sampler=planner, collate_fn=first_item, **kwargs)  # type: ignore[arg-type]
    stream = StepStream(rows, collate, geometry, endless=order is not None)
    return StepLoader(stream, batch_size=None, collate_fn=first_item, **kwargs)
