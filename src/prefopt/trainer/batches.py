"""From prepared rows to batches and loaders: what the trainer's data hooks call.

What makes a batch can be pickled, since workers that are not forked are sent it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from prefopt.batching import collated_batch, encoder_decoder_batch, pack_batch, pad_batch, share_batch
from prefopt.batching.images import VisionInputs
from prefopt.batching.layout import pair_values
from prefopt.data import tokenized_example
from prefopt.trainer.ending.signals import heed_only_the_run
from prefopt.trainer.loader import Collate, Row
from prefopt.types import Branch, PreferenceBatch

__all__ = ["collate_into", "collate_with", "epoch_order", "loader_options", "trial_row"]

LOOKED_AT = 64
"""Rows among which one with images is looked for."""


def collate_into(
    layout: str,
    branches: Sequence[Branch],
    vision: VisionInputs | None = None,
    *,
    pad_token_id: int,
    pad_to_multiple_of: int | None,
) -> Collate:
    """Rows -> batch in one of prefopt's layouts."""
    padding = {"pad_token_id": pad_token_id, "pad_to_multiple_of": pad_to_multiple_of}
    return partial(laid_out, layout=layout, branches=branches, vision=vision, padding=padding)


def laid_out(
    rows: Sequence[Row],
    weight: float,
    *,
    layout: str,
    branches: Sequence[Branch],
    vision: VisionInputs | None,
    padding: Mapping[str, Any],
) -> PreferenceBatch:
    """The batch of `collate_into`."""
    examples = [tokenized_example(row, branches) for row in rows]
    if layout == "shared_prompt":
        return share_batch(examples, branches, vision, weight=weight)
    if layout == "packed":
        return pack_batch(examples, branches, vision, weight=weight)
    if layout == "encoder_decoder":
        return encoder_decoder_batch(examples, branches, **padding, weight=weight)
    return pad_batch(examples, branches, vision, **padding, weight=weight)


def collate_with(data_collator: Callable[[list[Any]], Any], branches: Sequence[Branch]) -> Collate:
    """Rows -> batch through a collator that the user gave; what the loss takes of a row does not go through it."""
    return partial(collated, data_collator=data_collator, branches=branches)


def collated(
    rows: Sequence[Row], weight: float, *, data_collator: Callable[[list[Any]], Any], branches: Sequence[Branch]
) -> PreferenceBatch:
    """The batch of `collate_with`."""
    numbers = [int(row.get("row", -1)) for row in rows]
    batch = collated_batch(data_collator([dict(row) for row in rows]), branches, numbers, weight=weight)
    return replace(
        batch,
        row_weights=pair_values([row.get("weight") for row in rows], missing=1.0),
        target_margins=pair_values([row.get("margin") for row in rows], missing=0.0),
    )


def trial_row(rows: Any) -> Row | None:
    """A prepared row to try a model on: one of the first that has images, else the first."""
    may_have_images = "images" in (rows.column_names or ("images",))  # a stream may not know its columns
    first = list(islice(rows, LOOKED_AT if may_have_images else 1))
    return next((row for row in first if row.get("images")), first[0] if first else None)


def epoch_order(strategy: str, num_rows: int, *, seed: int, batch_size: int, lengths: Callable[[], list[int]]) -> Any:
    """Epoch -> row indices in training order.

    ``random`` is the order that transformers' trainer gives with the same seed; ``group_by_length`` puts rows of like
    length together, in random order otherwise.

    Args:
        strategy: ``random``, ``sequential`` or ``group_by_length``.
        num_rows: rows of the data set.
        seed: of the run.
        batch_size: pairs that are computed together, over all ranks, and should have like lengths.
        lengths: gives the length of every row; asked for only where it is needed.
    """
    if strategy == "sequential":
        return lambda epoch: range(num_rows)

    def order(epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed + epoch)
        if strategy == "group_by_length":
            return get_length_grouped_indices(lengths(), batch_size, generator=generator)
        return torch.randperm(num_rows, generator=generator).tolist()

    return order


def loader_options(args: Any) -> dict[str, Any]:
    """`DataLoader` keyword arguments from the training arguments."""
    workers = args.dataloader_num_workers
    return {
        "num_workers": workers,
        "pin_memory": args.dataloader_pin_memory and args.device.type != "cpu",
        "persistent_workers": args.dataloader_persistent_workers and workers > 0,
        "prefetch_factor": args.dataloader_prefetch_factor if workers else None,
        "multiprocessing_context": args.dataloader_multiprocessing_context if workers else None,
        "in_order": args.dataloader_in_order,
        "worker_init_fn": heed_only_the_run if workers else None,
    }
