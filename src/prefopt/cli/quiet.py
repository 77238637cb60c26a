"""Without what libraries say of small work: a command's own lines are what is read."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["without_bars", "without_retries"]


@contextmanager
def without_bars() -> Iterator[None]:
    """No bars of datasets and transformers within, such as for loading weights, which take a moment."""
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets_had = not datasets.are_progress_bars_disabled()
    transformers_had = transformers_logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if datasets_had:
            datasets.enable_progress_bars()
        if transformers_had:
            transformers_logging.enable_progress_bar()


@contextmanager
def without_retries() -> Iterator[None]:
    """No line within for each time that the Hub is asked again; what comes of it is said anyway."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
