"""What a terminal is shown: text of data and models made harmless, and no chatter of libraries."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["harmless", "only_errors", "without_bars"]

KEPT = "\n\t"


def harmless(text: str) -> str:
    r"""``text`` with whatever a terminal would obey written out: escape sequences, carriage returns, directions.

    Those are the characters that Python does not call printable, but for line breaks and tabs.

    >>> harmless("red \x1b[31m, back\r, turned \u202e")
    'red \\x1b[31m, back\\r, turned \\u202e'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in KEPT else c.encode("unicode_escape").decode("ascii") for c in text)


@contextmanager
def without_bars() -> Iterator[None]:
    """No bars of datasets and transformers within; those that were off before stay off."""
    import datasets
    from transformers.utils import logging as of_transformers

    switches = (
        (datasets.are_progress_bars_disabled(), datasets.disable_progress_bars, datasets.enable_progress_bars),
        (
            not of_transformers.is_progress_bar_enabled(),
            of_transformers.disable_progress_bar,
            of_transformers.enable_progress_bar,
        ),
    )
    changed = [(disable, enable) for was_off, disable, enable in switches if not was_off]
    for disable, _ in changed:
        disable()
    try:
        yield
    finally:
        for _, enable in changed:
            enable()


@contextmanager
def only_errors(package: str) -> Iterator[None]:
    """Of what a package logs within, nothing below an error."""
    logger = logging.getLogger(package)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
