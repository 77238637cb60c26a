"""The reference's pass over a data set before training, of which only what the cache does not know is computed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from prefopt.reference import (
    ReferenceCache,
    Remembered,
    missing_rows,
    row_keys,
    with_reference_logps,
)
from prefopt.trainer.ending.interrupting import LeftEarly
from prefopt.trainer.geometry import Geometry
from prefopt.trainer.loader import Collate, make_loader
from prefopt.trainer.remembering import exchange, with_keys
from prefopt.types import OptimizerStep

__all__ = ["with_precomputed_logps"]

logger = logging.getLogger(__name__)


def with_precomputed_logps(
    dataset: Any,
    remembered: Remembered,
    collate: Collate,
    geometry: Geometry,
    accelerator: Any,
    options: dict[str, Any],
    stopping: Callable[[], bool],
    in_fitting_batches: Callable[..., None],
    part: Callable[..., AbstractContextManager[Any]],
) -> Any:
    """The prepared set with the columns ``ref_chosen_logps`` and ``ref_rejected_logps``.

    Args:
        dataset: prepared rows; a set that has the columns is returned as it is.
        remembered: the reference.
        collate: rows -> batch.
        geometry: of the pass; ranks share the work and exchange what they computed.
        accelerator: for devices, precision and ranks.
        options: of the loader.
        stopping: whether the run is to stop, on all ranks; asked before each batch.
        in_fitting_batches: computes a step, in smaller micro-batches where memory runs out; of `RetryingTrainer`.
        part: shows how far the pass is; of `ShowingTrainer`.

    Raises:
        ValueError: a log-prob is not finite; names the row.
        LeftEarly: the run is to stop; what was scored is in the cache.
    """
    if "ref_chosen_logps" in dataset.column_names:
        return dataset
    cache, ld_alpha = remembered.opened(), remembered.source.ld_alpha
    keys = row_keys(dataset, ld_alpha=ld_alpha)
    agree(cache, keys)
    todo = missing_rows(cache, keys)
    logger.info("Reference log-probs: %d of %d rows are to be computed.", len(todo), len(keys))

    def score(step: OptimizerStep) -> None:
        for batch in step.to(accelerator.device).micro_batches:
            with accelerator.autocast():
                remembered(batch)

    if todo:
        stopped, keyed = False, with_keys(collate, ld_alpha=ld_alpha)
        own = torch.Generator()  # or the run's random numbers would depend on whether there is something to score
        with part("reference log-probs", len(todo), "pairs") as shown:
            for step in make_loader(dataset.select(todo), keyed, geometry, generator=own, **options):
                if stopped := stopping():
                    break
                in_fitting_batches(score, "the reference's pass over the data", step, lambda: keyed)
                shown.advance_by(step, accelerator.num_processes)
        if complaint := exchange(remembered, writes=accelerator.is_local_main_process):
            raise ValueError(complaint)
        if stopped:
            raise LeftEarly
    return with_reference_logps(dataset, keys, cache)


def agree(cache: ReferenceCache, keys: Sequence[bytes]) -> None:
    """Every rank knows of these rows what the main process does, so that all have the same rest to compute.

    On nodes with disks of their own the caches may differ, and ranks with different rests would wait for each other.
    """
    known = [{key: cache.values[key] for key in keys if key in cache}]
    broadcast_object_list(known)
    for key in keys:
        cache.values.pop(key, None)
    cache.values.update(known[0])
