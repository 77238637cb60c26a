"""Checkpoints of TRL and transformers: a new run begins from their weights, for the rest of them is pickled."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

__all__ = ["begin_from_foreign", "foreign_checkpoint", "load_foreign_weights"]

logger = logging.getLogger(__name__)

PICKLES = ("training_args.bin", "optimizer.pt", "scheduler.pt")
"""What transformers' trainer writes, and prefopt never does."""
OWN = ("manifest.json", "continuation.json", "training_args.json")
"""What every checkpoint of prefopt has: one that has lost some of it is damaged, not foreign."""


def foreign_checkpoint(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is a checkpoint of transformers' trainer, or of one that stands on it."""
    present = set(os.listdir(folder)) if Path(folder).is_dir() else set()
    return bool(present.intersection(PICKLES)) and not present.intersection(OWN)


def load_foreign_weights(trainer: Any, folder: str | os.PathLike[str]) -> None:
    """Let the run that begins next start from the weights of a `foreign_checkpoint`.

    The reference stays what it is: that of the model which the trainer was given.

    Raises:
        ValueError: the engine has divided the weights among ranks already.
    """
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError(
            f"{folder} is a checkpoint of transformers or TRL, of which only the weights can be used, and FSDP and "
            "DeepSpeed divide the weights before they could be loaded. Give the folder as the model (the reference as "
            "`ref_model`), and leave `resume_from_checkpoint` out."
        )
    trainer.starts_from = str(folder)
    if trainer.is_world_process_zero():
        logger.warning(
            "%s is a checkpoint of transformers or TRL: a new run begins from its weights, at step 0. Its optimizer, "
            "learning rate, random numbers and place in the data are not continued, because they are pickled, and "
            "pickle may run any code when it is read.",
            folder,
        )


def begin_from_foreign(trainer: Any) -> None:
    """Read the weights that `load_foreign_weights` named, into the model that the run has now."""
    if trainer.starts_from is not None:
        trainer.load_saved_weights(trainer.starts_from)
        trainer.unchecked_identity = False  # the policy has moved away from what the reference was taken of
        trainer.starts_from = None
