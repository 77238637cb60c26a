"""What a process shows of its work: bars on a terminal, plain lines elsewhere, nothing on other ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import psutil
import torch
from accelerate import PartialState
from transformers.utils.import_utils import is_in_notebook

from prefopt.terminal import harmless, without_bars
from prefopt.trainer.progress.parts import Part
from prefopt.trainer.progress.screen import SCREEN, Screen, has_terminal

__all__ = ["SILENT", "Display", "display_for", "memory_of"]

SIGN_EVERY = 30.0
"""Seconds."""


class Display:
    """Shows the parts of a run.

    Args:
        write: takes the lines that remain; None: nothing is shown.
        screen: draws bars; None: there are lines alone.
        memory: what the run's memory is, in words; asked when a picture is drawn.
        clock: seconds.
    """

    def __init__(
        self,
        write: Callable[[str], None] | None,
        screen: Screen | None = None,
        memory: Callable[[], str] = str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.write, self.screen, self.memory, self.clock = write, screen, memory, clock
        self.open: list[Part] = []

    @property
    def is_silent(self) -> bool:
        return self.write is None

    def line(self, text: str) -> None:
        """A line that remains; text of others in it cannot steer the terminal."""
        if self.write is not None:
            self.write(harmless(text).replace("\n", " "))

    @contextmanager
    def part(
        self,
        name: str,
        total: int | None,
        unit: str,
        *,
        done: int = 0,
        count: Callable[[], int] | None = None,
        ending: Callable[[Part], str] = Part.ending,
    ) -> Iterator[Part]:
        """Show a part while it is worked on; it ends with a line, also where it fails.

        Args:
            name, total, unit, done, count: of `Part`.
            ending: the part -> its last line; empty: none.
        """
        part = Part(harmless(name), total, unit, done, count, self.clock)
        with nullcontext() if self.is_silent or self.open else without_bars():
            self.begin(part)
            try:
                yield part
            finally:
                self.close(part, ending)

    def begin(self, part: Part) -> None:
        if not self.is_silent and self.screen is not None:
            self.screen.begin(part, self.memory)
        elif not self.open:
            self.line(part.beginning())
        part.sign = self.sign_of_life if self.screen is None and self.open else None
        self.open.append(part)

    def sign_of_life(self, part: Part) -> None:
        """A line now and then of a part within another, where there is no bar and nothing else is said meanwhile."""
        if part.seconds - part.last_sign > SIGN_EVERY:
            part.last_sign = part.seconds
            words = (f"{part.name}: {part.progress()}", part.speeds().replace("  ", ", "), part.remaining())
            self.line(", ".join(filter(None, words)))

    def close(self, part: Part, ending: Callable[[Part], str]) -> None:
        part.refresh()
        self.open.remove(part)
        for around in self.open:
            around.rest(part)
        if self.is_silent:
            return
        if self.screen is not None:
            self.screen.end(part)
        if text := ending(part):
            self.line(text)


SILENT = Display(None)


def display_for(args: Any) -> Display:
    """The display of a run: silent with ``disable_tqdm``, on other ranks than the first, and in notebooks, where
    transformers has its own.

    Args:
        args: the run's config.
    """
    if args.disable_tqdm or is_in_notebook() or not PartialState().is_main_process:
        return SILENT
    return Display(printed, SCREEN if has_terminal() else None, lambda: memory_of(args.device))


def printed(line: str) -> None:
    print(line, flush=True)


def memory_of(device: torch.device) -> str:
    """What the process holds of its device's memory, in words; on a CPU, and where a device does not tell, of the
    machine's. Nothing is waited for."""
    reserved = getattr(getattr(torch, device.type, None), "memory_reserved", None)
    size = reserved(device) if reserved else psutil.Process().memory_info().rss
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
