"""What the reference gave a pair is remembered: between epochs, evaluations, ranks and runs."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from prefopt.reference import Precomputed, Remembered, cache_folder, row_keys
from prefopt.reference.policy import SeparateModel
from prefopt.trainer.callbacks import updates_reference
from prefopt.trainer.loader import Collate, Row
from prefopt.trainer.moving import MovingTrainer, has_reference_logps
from prefopt.types import PreferenceBatch

__all__ = ["KeepReference", "RememberingTrainer", "exchange", "with_keys"]

logger = logging.getLogger(__name__)


class RememberingTrainer(MovingTrainer):
    """Decides whether the reference remembers, and when what it has scored is shared and written."""

    collate_given: Callable[[list[Any]], Any] | None
    """The data collator that the user gave."""

    @property
    def remembered(self) -> Remembered | None:
        """The part of the reference that can remember; None where the reference moves."""
        return None if self.reference is None else self.reference.find(Remembered)

    @property
    def looked_up(self) -> Remembered | None:
        """The same, where a rank may look up what a row was given before (`why_not_looked_up`)."""
        return self.remembered if self.why_not_looked_up() is None else None

    def why_not_looked_up(self) -> str | None:
        """What keeps a rank from looking up what a row was given before; None: nothing."""
        args, remembered = self.args, self.remembered
        if remembered is None:
            return "it has none, or it moves"
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return "a rank that looks up would leave the others alone in the collectives of a model they share"
        if len(self.preference.ranks) > 2:
            return "what is kept of a row is the log-probs of two completions"
        if self.collate_given is not None:
            return "a data collator of your own may make anything of a row"
        if (args.fp16_full_eval or args.bf16_full_eval) and not isinstance(remembered.source, SeparateModel):
            return "an evaluation turns the weights to half precision, and the reference's are among them"
        if updates_reference(args, self.callback_handler.callbacks):
            return "it moves"
        return "PREFOPT_CACHE is off" if cache_folder() is None else None

    def take_given_logps(self, rows: Any) -> None:
        """Let reference log-probs that come with ``rows`` be used as they are.

        Raises:
            ValueError: the reference moves.
        """
        if not has_reference_logps(rows) or isinstance(self.reference, Precomputed):
            return
        if self.reference is None:
            logger.warning(
                "%s has no reference: the columns `ref_*_logps` are not used.", self.preference.method.upper()
            )
            return
        self.refuse_given_logps(rows)
        given = Precomputed(self.reference)
        given.derives_from_policy = self.reference.derives_from_policy  # in training, whose rows bring none
        self.reference = given

    def with_keys(self, collate: Collate) -> Collate:
        """``collate`` with the keys of rows, where they are looked up."""
        return with_keys(collate, ld_alpha=self.looked_up.source.ld_alpha) if self.looked_up else collate

    def begin_reference(self) -> None:
        """A run begins: what is remembered holds for the weights and the precision of now."""
        if self.remembered is not None:
            # what a collator of the user's makes of a row is known to this trainer alone
            settings: dict[str, Any] = {} if self.collate_given is None else {"collator": self.own_batches}
            if (images := getattr(self.processing_class, "image_processor", None)) is not None:
                settings["images"] = images.to_dict()
            self.remembered.begin(
                autocast=self.accelerator.mixed_precision, matmul=torch.get_float32_matmul_precision(), **settings
            )

    @functools.cached_property
    def own_batches(self) -> str:
        """A name that no other trainer has."""
        return uuid4().hex

    def keep_reference(self) -> None:
        """What the reference has scored since the last time reaches the other ranks and the disk; collective.

        Raises:
            ValueError: a log-prob is not finite, unless ``on_nonfinite`` is to skip.
        """
        if self.looked_up is None:
            return
        complaint = exchange(self.looked_up, writes=self.args.local_process_index == 0)
        if complaint and self.args.on_nonfinite == "stop":
            raise ValueError(complaint)
        if complaint:
            logger.warning(complaint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        self.keep_reference()
        if self.looked_up is not None and self.args.should_save:
            self.looked_up.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.looked_up is not None and checkpoint is not None:
            self.looked_up.load(checkpoint)


class KeepReference(TrainerCallback):
    """Calls ``keep`` at the points that all ranks of a run reach; checkpoints are the others."""

    def __init__(self, keep: Callable[[], None]) -> None:
        self.keep = keep

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.keep()

    on_evaluate = on_predict = on_train_end = on_epoch_end


def with_keys(collate: Collate, *, ld_alpha: float | None) -> Collate:
    """``collate`` with the key of each pair in the batch, unless their log-probs come with the rows."""
    return WithKeys(collate, ld_alpha)


@dataclass
class WithKeys:
    """See `with_keys`; an object, because a worker that is not forked is sent a pickle of it."""

    collate: Collate
    ld_alpha: float | None
    has_keys: bool = True
    """False once a row had none."""

    def __call__(self, rows: Sequence[Row], weight: float) -> PreferenceBatch:
        batch = self.collate(rows, weight)
        if batch.ref_sum_logps is not None or not self.has_keys:
            return batch
        try:
            return replace(batch, keys=tuple(row_keys(rows, ld_alpha=self.ld_alpha)))
        except TypeError as error:
            logger.warning("The reference is computed anew in every epoch. %s", error)
            self.has_keys = False
            return batch


def exchange(remembered: Remembered, *, writes: bool) -> str | None:
    """All ranks take in what each has scored since the last time; collective.

    Of two values of a pair all take the one of the first rank.

    Args:
        remembered: of this rank.
        writes: whether this rank writes it to the disk: one of each node, as nodes may not share theirs.

    Returns:
        About a log-prob that is not finite on some rank; None where there is none.
    """
    shares = gather_object([remembered.take()])
    entries = {key: values for pending, _ in reversed(shares) for key, values in pending.items()}
    if entries:
        cache = remembered.opened()
        cache.put(entries)
        cache.flush() if writes else cache.take()
    return next((complaint for _, complaint in shares if complaint), None)
