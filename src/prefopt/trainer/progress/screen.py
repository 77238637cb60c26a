"""The terminal of a process, which all displays of it share: bars at its foot, and lines that scroll above them."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from prefopt.trainer.progress.parts import Part

__all__ = ["SCREEN", "Screen", "has_terminal"]

PER_SECOND = 2
"""Pictures a second; each takes a few milliseconds of another thread."""
BAR_WIDTH, SHORTEST_BAR = 24, 8


def has_terminal() -> bool:
    """Whether standard error, where bars are drawn, is a terminal that can go back in a line."""
    return sys.stderr.isatty() and Console(stderr=True).is_terminal and os.environ.get("TERM") != "dumb"


class Screen:
    """Draws the parts that are under way, from the first that begins to the last that ends."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.live: Live | None = None
        self.memory: Callable[[], str] = str
        self.moved: list[tuple[logging.StreamHandler[Any], Any, Any]] = []
        """Handlers of the log, the stream that each had, and the one it has meanwhile."""

    def begin(self, part: Part, memory: Callable[[], str]) -> None:
        """Draw a part, below those that are under way."""
        self.parts.append(part)
        self.memory = memory
        if self.live is not None:
            self.live.refresh()
            return
        console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)  # paths stay whole
        streams = sys.stdout, sys.stderr
        self.live = Live(
            console=console,
            get_renderable=self.picture,
            refresh_per_second=PER_SECOND,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # what goes to a file stays there
        )
        self.live.start()
        console.show_cursor(True)  # a process that is killed must leave it visible
        self.move_handlers(dict(zip(map(id, streams), (sys.stdout, sys.stderr), strict=True)))

    def end(self, part: Part) -> None:
        """Draw it no longer; with the last one the terminal is as it was."""
        self.parts.remove(part)
        if self.parts or self.live is None:
            return
        live, self.live = self.live, None
        self.move_handlers_back()
        live.stop()

    def leave(self) -> None:
        """A process that was forked off writes as if there were no display: its drawing thread is not there, and a lock
        that this thread held would never be given back."""
        self.move_handlers_back()
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            setattr(sys, name, getattr(stream, "rich_proxied_file", stream))
        self.parts, self.live = [], None

    # -- the log -----------------------------------------------------------------------------------------------------

    def move_handlers(self, places: dict[int, Any]) -> None:
        """Handlers that have taken hold of the terminal write above the bars.

        Args:
            places: id of a stream -> the stream to write to instead.
        """
        for handler in stream_handlers():
            before = handler.stream
            after = places.get(id(before), before)
            if after is not before:
                handler.setStream(after)
                self.moved.append((handler, before, after))

    def move_handlers_back(self) -> None:
        for handler, before, after in self.moved:
            if handler.stream is after:
                handler.setStream(before)
        self.moved.clear()

    # -- the picture -------------------------------------------------------------------------------------------------

    def picture(self) -> RenderableType:
        """All parts, one below the other; asked by the drawing thread."""
        parts, width = tuple(self.parts), self.live.console.width if self.live is not None else 80
        return Group(
            *(line for part in parts for line in drawn(part, self.memory() if part is parts[-1] else "", width))
        )


def stream_handlers() -> Iterator[logging.StreamHandler[Any]]:
    """Handlers of all loggers that write to a stream, each once."""
    loggers = [logging.getLogger(), *list(logging.root.manager.loggerDict.values())]
    handlers = {id(handler): handler for logger in loggers for handler in getattr(logger, "handlers", ())}
    return (handler for handler in handlers.values() if isinstance(handler, logging.StreamHandler))


def drawn(part: Part, memory: str, width: int) -> Iterator[RenderableType]:
    """A part as a line with a bar, where there is room for one, and its last numbers below."""
    part.refresh()
    label = f"{part.name} {part.progress()}"
    facts = "  ".join(filter(None, (part.speeds(), memory, part.remaining())))
    room = min(BAR_WIDTH, width - len(label) - len(facts) - 4)
    if room < SHORTEST_BAR:
        yield Text(f"{label}  {facts}", no_wrap=True, overflow="ellipsis")
    else:
        line = Table.grid(padding=(0, 1))
        line.add_row(Text(label), ProgressBar(part.total, part.done, width=room, pulse=part.total is None), Text(facts))
        yield line
    if part.figures:
        yield Text(f"  {part.figures}", no_wrap=True, overflow="ellipsis")


SCREEN = Screen()
"""There is one terminal, whatever the number of trainers."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=SCREEN.leave)
