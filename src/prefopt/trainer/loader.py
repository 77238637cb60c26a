"""Loaders whose items are whole optimizer steps: this rank's micro-batches of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from prefopt.batching import lengths_of_rows, lengths_of_set
from prefopt.trainer.geometry import Geometry, Share
from prefopt.types import OptimizerStep, PreferenceBatch

__all__ = ["StepLoader", "StepSampler", "StepStream", "make_loader"]

Row = Mapping[str, Any]
Collate = Callable[[Sequence[Row], float], PreferenceBatch]
"""Rows of one micro-batch and their weight -> the batch."""
Check = Callable[[Sequence[Row]], None]
"""Raises where rows cannot be of one step."""


class StepSampler:
    """Batch sampler over a map-style data set: the row indices of one optimizer step, on all ranks, at a time.

    Args:
        num_rows: rows of the data set.
        pairs_per_step: rows of a step.
        order: epoch -> the row indices in the order of that epoch.
        drop_last: leave the last, smaller step out.
    """

    def __init__(
        self, num_rows: int, pairs_per_step: int, order: Callable[[int], Sequence[int]], *, drop_last: bool = False
    ) -> None:
        self.num_rows, self.pairs_per_step, self.order, self.drop_last = num_rows, pairs_per_step, order, drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        size = self.pairs_per_step
        return self.num_rows // size if self.drop_last else -(-self.num_rows // size)

    def __iter__(self) -> Iterator[Sequence[int]]:
        order, size = self.order(self.epoch), self.pairs_per_step
        for start in range(0, len(self) * size, size):
            yield order[start : start + size]


class StepRows(torch.utils.data.Dataset):
    """A map-style data set that is asked for the rows of a step and gives `OptimizerStep`; its length is in rows."""

    def __init__(self, rows: Any, collate: Collate, geometry: Geometry) -> None:
        self.rows, self.collate, self.geometry = rows, collate, geometry
        self.lengths = lengths_of_set(rows, geometry.budget.branches) if geometry.budget else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int]) -> OptimizerStep:
        def fetch(places: Sequence[int]) -> Sequence[Row]:
            return self.rows.__getitems__([indices[place] for place in places])

        lengths = None if self.lengths is None else self.lengths.take(indices)
        return make_step(self.geometry.shares(len(indices), lengths), fetch, self.collate)

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
        check: refuses the rows of a step, of all ranks, so that all refuse them together.
    """

    def __init__(
        self, rows: Any, collate: Collate, geometry: Geometry, *, endless: bool, check: Check | None = None
    ) -> None:
        self.rows, self.collate, self.geometry, self.endless, self.check = rows, collate, geometry, endless, check

    def __iter__(self) -> Iterator[OptimizerStep]:
        worker = get_worker_info()
        number, of = (worker.id, worker.num_workers) if worker else (0, 1)
        # A datasets stream would give each worker other shards; here every worker reads all and takes every n-th step.
        torch.utils.data._utils.worker._worker_info = None  # type: ignore[attr-defined]
        rows = self.endless_rows() if self.endless else iter(self.rows)
        step = 0
        while items := list(islice(rows, self.geometry.pairs_per_step)):
            if step % of == number:
                yield self.step_of(items)
            step += 1

    def step_of(self, items: list[Row]) -> OptimizerStep:
        if self.check is not None:
            self.check(items)
        budget = self.geometry.budget
        lengths = lengths_of_rows(items, budget.branches) if budget else None
        shares = self.geometry.shares(len(items), lengths)
        return make_step(shares, lambda places: [items[place] for place in places], self.collate)

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


def make_step(
    shares: Iterable[Share], fetch: Callable[[Sequence[int]], Sequence[Row]], collate: Collate
) -> OptimizerStep:
    """The step of one rank.

    Args:
        shares: its micro-batches.
        fetch: places in the step -> the rows.
        collate: rows of one micro-batch and their weight -> the batch.
    """
    own = tuple(shares)
    sources = tuple(list(fetch(share.places)) for share in own)
    return OptimizerStep(
        micro_batches=tuple(collate(rows, share.weight) for rows, share in zip(sources, own, strict=True)),
        places=tuple(tuple(share.places) for share in own),
        sources=sources,
        most_pairs=tuple(share.most_pairs for share in own),
    )


class StepLoader(DataLoader):
    """A `DataLoader` of optimizer steps that passes the epoch on to its sampler."""

    def set_epoch(self, epoch: int) -> None:
        if isinstance(self.batch_sampler, StepSampler):
            self.batch_sampler.set_epoch(epoch)


def first_item(items: Any) -> Any:
    """Collate function of loaders whose data set has already made the item."""
    return items


def make_loader(
    rows: Any,
    collate: Collate,
    geometry: Geometry,
    *,
    order: Any = None,
    drop_last: bool = False,
    check: Check | None = None,
    **kwargs: Any,
) -> StepLoader:
    """The loader over prepared rows.

    Args:
        rows: a map-style data set, or a stream.
        collate: rows of one micro-batch and their weight -> the batch.
        geometry: how a step is divided.
        order: epoch -> row indices; for training. None: once, in order (evaluation).
        drop_last: leave the last, smaller step out.
        check: of `StepStream`; what a map-style set holds is known before.
        kwargs: of `DataLoader` (workers, pinned memory).
    """
    if isinstance(rows, Sized):
        order = order or (lambda epoch: range(len(rows)))
        sampler: Any = StepSampler(len(rows), geometry.pairs_per_step, order, drop_last=drop_last)
        steps = StepRows(rows, collate, geometry)
        return StepLoader(steps, batch_sampler=sampler, collate_fn=first_item, **kwargs)
    stream = StepStream(rows, collate, geometry, endless=order is not None, check=check)
    return StepLoader(stream, batch_size=None, collate_fn=first_item, **kwargs)
