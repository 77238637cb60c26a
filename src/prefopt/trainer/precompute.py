"""The reference's pass over a data set before training, of which only what the cache does not know is computed."""

from __future__ import annotations

import logging
from typing import Any

from accelerate.utils import gather_object

from prefopt.reference import (
    Precomputed,
    ReferenceCache,
    missing_rows,
    record,
    row_keys,
    with_reference_logps,
)
from prefopt.trainer.loader import Collate, Geometry, make_loader

__all__ = ["with_precomputed_logps"]

logger = logging.getLogger(__name__)


def with_precomputed_logps(
    dataset: Any,
    reference: Precomputed,
    collate: Collate,
    geometry: Geometry,
    accelerator: Any,
    options: dict[str, Any],
) -> Any:
    """The prepared set with the columns ``ref_chosen_logps`` and ``ref_rejected_logps``.

    Args:
        dataset: prepared rows; a set that has the columns is returned as it is.
        reference: with a source that can score.
        collate: rows -> batch.
        geometry: of the pass; ranks share the work and exchange what they computed.
        accelerator: for devices, precision and ranks.
        options: of the loader.
    """
    source = reference.source
    if source is None or "ref_chosen_logps" in dataset.column_names:
        return dataset
    cache = ReferenceCache(None, source.fingerprint(precision=accelerator.mixed_precision))
    keys = row_keys(dataset, ld_alpha=source.ld_alpha)
    todo = missing_rows(cache, keys)
    logger.info("Reference log-probs: %d of %d rows are to be computed.", len(todo), len(keys))
    if todo:
        key_of_row = dict(zip(dataset["row"], keys, strict=True))
        for step in make_loader(dataset.select(todo), collate, geometry, **options):
            for batch in step.to(accelerator.device).micro_batches:
                with accelerator.autocast():
                    record(cache, key_of_row, batch, source(batch))
        for entries in gather_object([dict(cache.pending)]):
            cache.put(entries)
        if accelerator.is_main_process:
            cache.flush()
    return with_reference_logps(dataset, keys, cache)
