"""What a run makes of its rows: how they are prepared, and which of their columns its losses take."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefopt.batching import DataCollatorForVisionPreference
from prefopt.data import PrepareOptions
from prefopt.data.image_roots import DEFAULT_ROOTS
from prefopt.data.pair_numbers import PAIR_NUMBERS
from prefopt.objective import Objective, losses_with_column, refused_columns
from prefopt.trainer.config import PreferenceConfig
from prefopt.trainer.setup import has_two_bodies
from prefopt.types import Branch

__all__ = ["check_pair_numbers", "custom_collator", "prepare_options", "refuse_mixed", "refuse_mixed_step"]

logger = logging.getLogger(__name__)

DEFAULT_COMPLETION_LENGTH = 128
"""TRL's, for encoder-decoder models."""


def custom_collator(data_collator: Any, args: PreferenceConfig) -> Any:
    """The collator that a user gave; None in place of the one for images, as the trainers make its batches themselves.

    Raises:
        ValueError: that one has a length other than the config's.
    """
    if not isinstance(data_collator, DataCollatorForVisionPreference):
        return data_collator
    for name in ("max_length", "pad_to_multiple_of"):
        value = getattr(data_collator, name)
        if value is not None and value != getattr(args, name):
            raise ValueError(
                f"{name}={value} of the DataCollatorForVisionPreference differs from the config's "
                f"{name}={getattr(args, name)}. Rows are made before they are collated: set it in the config."
            )
    logger.info("Batches are made as without `data_collator`: the trainer reads images itself, each once a pair.")
    return None


def check_pair_numbers(rows: Any, objective: Objective, name: str) -> None:
    """Say in which losses the columns ``weight`` and ``margin`` of a prepared set act.

    Raises:
        ValueError: in none of them, or one of them cannot do with it.
    """
    columns = rows.column_names or ()
    for column, reason in refused_columns(objective, columns).items():
        raise ValueError(f"{name} data, column {column!r}: {reason}")
    for column in [column for column in PAIR_NUMBERS if column in columns]:
        losses = ", ".join(losses_with_column(objective, column))
        logger.info("%s data: the column %r acts in %s.", name, column, losses)


def refuse_mixed(num_images: NDArray[np.int64]) -> None:
    """Rows with and without images cannot stand in one step where weights are divided among ranks.

    Args:
        num_images: [n] of each row.

    Raises:
        ValueError: some rows have images and others have none.
    """
    some = num_images > 0
    if some.any() and not some.all():
        raise ValueError(
            f"{int(some.sum())} of {len(some)} rows have images. Under FSDP and DeepSpeed the weights that encode them "
            "are gathered from all ranks: a rank whose micro-batch has none would leave the others waiting for ever. "
            "Train on rows with images and rows without in two runs, or without FSDP and DeepSpeed."
        )


def refuse_mixed_step(rows: Sequence[Mapping[str, Any]]) -> None:
    """The same for the rows of one step of a stream, on all ranks."""
    refuse_mixed(np.array([len(row.get("images") or ()) for row in rows]))


def prepare_options(
    args: PreferenceConfig, branches: tuple[Branch, ...], config: Any, limit: int | None = None
) -> PrepareOptions:
    """How rows are prepared; ``max_length`` is capped at the model's context, said in one line.

    Args:
        args: the config of the run.
        branches: the completions of a pair.
        config: the model's; None where it is not known.
        limit: tokens that the model takes, where it says so itself, as Unsloth's models do.
    """
    text_config = config.get_text_config() if config is not None else None
    context = getattr(text_config, "max_position_embeddings", None)
    context = min((length for length in (context, limit) if length is not None), default=None)
    max_length = args.max_length
    if max_length is not None and context is not None and max_length > context:
        level = logger.warning if args.was_set("max_length") else logger.info
        level("max_length=%d is above the model's context; sequences are cut to %d tokens.", max_length, context)
        max_length = context
    apart = has_two_bodies(config, args)
    if args.max_completion_length is not None and not apart:
        logger.warning(
            "max_completion_length=%d has no effect: it is for encoder-decoder models; here max_length limits prompt "
            "and completion together.",
            args.max_completion_length,
        )
    return PrepareOptions(
        branches=branches,
        max_length=max_length,
        truncation_mode=args.truncation_mode,  # type: ignore[arg-type]
        num_proc=args.dataset_num_proc,
        on_bad_row=args.on_bad_row,  # type: ignore[arg-type]
        max_completion_length=completion_limit(args, context) if apart else None,
        image_roots=DEFAULT_ROOTS if args.image_roots is None else tuple(args.image_roots),
        context=context if max_length is None and not apart else None,
    )


def completion_limit(args: PreferenceConfig, context: int | None) -> int:
    """The most tokens of a completion under an encoder-decoder model, at most ``context``; a default is said once."""
    limit = args.max_completion_length
    if limit is None:
        limit = min(DEFAULT_COMPLETION_LENGTH, context or DEFAULT_COMPLETION_LENGTH)
        logger.warning("Completions are cut to %d tokens; set max_completion_length to change that.", limit)
    elif context is not None and limit > context:
        logger.warning(
            "max_completion_length=%d is above the model's context; completions are cut to %d tokens.", limit, context
        )
        limit = context
    return limit
