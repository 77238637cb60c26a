"""From prepared rows to batches and loaders: what the trainer's data hooks call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from prefopt.batching import collated_batch, pack_batch, pad_batch, share_batch
from prefopt.data import tokenized_example
from prefopt.trainer.loader import Collate, Row
from prefopt.types import Branch, PreferenceBatch

__all__ = ["collate_into", "collate_with", "epoch_order", "loader_options"]


def collate_into(
    layout: str, branches: Sequence[Branch], *, pad_token_id: int, pad_to_multiple_of: int | None
) -> Collate:
    """Rows -> batch in one of prefopt's layouts."""

    def collate(rows: Sequence[Row], weight: float) -> PreferenceBatch:
        examples = [tokenized_example(row, branches) for row in rows]
        if layout == "shared_prompt":
            return share_batch(examples, branches, weight=weight)
        if layout == "packed":
            return pack_batch(examples, branches, weight=weight)
        return pad_batch(
            examples, branches, pad_token_id=pad_token_id, pad_to_multiple_of=pad_to_multiple_of, weight=weight
        )

    return collate


def collate_with(data_collator: Callable[[list[Any]], Any], branches: Sequence[Branch]) -> Collate:
    """Rows -> batch through a collator that the user gave."""

    def collate(rows: Sequence[Row], weight: float) -> PreferenceBatch:
        numbers = [int(row.get("row", -1)) for row in rows]
        return collated_batch(data_collator([dict(row) for row in rows]), branches, numbers, weight=weight)

    return collate


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
    }
