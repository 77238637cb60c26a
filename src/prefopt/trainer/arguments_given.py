"""What a trainer is given, looked at before anything is made of it."""

from __future__ import annotations

import logging
from typing import Any

import datasets

from prefopt.trainer.config import PreferenceConfig

__all__ = ["check_given", "use_one_device"]

logger = logging.getLogger(__name__)


def check_given(model: Any, model_init: Any, train_dataset: Any, processing_class: Any) -> None:
    """Arguments that must be there, and of the right kind."""
    if train_dataset is None:
        raise ValueError("`train_dataset` is required: give a `datasets.Dataset` or `IterableDataset`.")
    if not isinstance(train_dataset, datasets.Dataset | datasets.IterableDataset):
        raise TypeError(
            f"`train_dataset` must be a `Dataset` or `IterableDataset`, not {type(train_dataset).__name__}; of a "
            "`DatasetDict` give one split."
        )
    if model is None and model_init is None:
        raise ValueError("Give a `model` (a path, an instance, a PeftModel), or a `model_init` that makes one.")
    if model is not None and model_init is not None:
        raise ValueError("`model` and `model_init` were both given; leave one of them out.")
    if model is None and processing_class is None:
        raise ValueError("With `model_init`, pass `processing_class` too: there is no name to load a tokenizer by.")


def use_one_device(args: PreferenceConfig) -> None:
    """A process trains on one GPU: ``DataParallel`` copies the model for every batch and would not reach the scorer."""
    if args.n_gpu > 1:
        logger.warning("%d GPUs are visible, one is used; `accelerate launch` trains on all of them.", args.n_gpu)
        args._n_gpu = 1
