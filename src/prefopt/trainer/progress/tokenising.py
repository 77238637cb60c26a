"""How far tokenising is, whatever the number of processes that do it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prefopt.terminal import without_bars
from prefopt.trainer.progress.display import Display
from prefopt.trainer.progress.parts import Part

__all__ = ["CountRows", "tokenising"]


@dataclass(frozen=True)
class CountRows:
    """Counts rows in the length of a file, to which several processes can add at once.

    An object, because processes that are not forked are sent a pickle of it.
    """

    path: str

    def __call__(self, num_rows: int) -> None:
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(file, bytes(num_rows))
        finally:
            os.close(file)

    def total(self) -> int:
        return os.stat(self.path).st_size


@contextmanager
def tokenising(display: Display, name: str, num_rows: int) -> Iterator[Callable[[int], None] | None]:
    """Show the preparation of a set in place of the bars of ``datasets``.

    Args:
        display: of the run.
        name: of the set, as messages call it.
        num_rows: of the set.

    Yields:
        What is to be called with the number of rows of each batch; None where nothing is shown.
    """
    with without_bars():
        if display.is_silent:
            yield None
            return
        file, path = tempfile.mkstemp(prefix="prefopt-rows-")
        os.close(file)
        rows = CountRows(path)
        try:
            with display.part(f"tokenising {name} data", num_rows, "rows", count=rows.total, ending=ending):
                yield rows
        finally:
            os.unlink(path)


def ending(part: Part) -> str:
    return part.ending() if part.done else f"{part.name}: {part.total:,} rows from the cache"
