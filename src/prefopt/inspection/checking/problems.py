"""What a check finds: where, what, and what to do; and what the run itself would have said."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Findings", "Level", "Problem", "divided", "overheard"]

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")
VERBS = "set|leave|name|choose|see|use|give|load|lower|the default is"
FIX = re.compile(rf"; (?=(?:{VERBS})\b)|: (?=set\b)|(?<=[.)]) (?=[A-Z])|\. (?=[A-Z])")
"""Where messages go over from what is wrong to what to do."""
SHOWN_ELSEWHERE = "prefopt.data.report"
"""Logger of what is listed by row."""
NOTED = ("prefopt.trainer.setup", "prefopt.trainer.rows", "prefopt.trainer.precision", "prefopt.trainer.preparing")
"""Loggers whose lines are worth a note; what others say is of a run that is under way."""


@dataclass(frozen=True)
class Problem:
    """One line of the list."""

    level: Level
    """``error``: the run would not go through; ``warning``: it would, and should be looked at; ``note``: harmless."""
    place: str
    """An option with file and line, a row with its column, or the part of the run."""
    what: str
    fix: str = ""
    count: int = 1
    """Rows that the line stands for."""


@dataclass
class Findings:
    """All that was found, in the order in which it was."""

    problems: list[Problem] = field(default_factory=list)

    def add(self, level: Level, place: str, what: str, fix: str = "", count: int = 1) -> None:
        """Adds a problem; the same one twice is one."""
        problem = Problem(level, place, what, fix, count)
        if problem not in self.problems:
            self.problems.append(problem)

    def add_message(self, level: Level, place: str, message: str) -> None:
        """The same, from a message in one piece."""
        self.add(level, place, *divided(message))

    def of(self, level: Level) -> list[Problem]:
        return [problem for problem in self.problems if problem.level == level]

    def count(self, level: Level) -> int:
        """How many there are, with those that one line stands for."""
        return sum(problem.count for problem in self.of(level))

    @property
    def will_run(self) -> bool:
        return not self.of("error")


def divided(message: str) -> tuple[str, str]:
    """A message as what is wrong, and what to do.

    Example:
        >>> divided("beta=-1.0 must be a number above 0: set for example 0.1.")
        ('beta=-1.0 must be a number above 0', 'set for example 0.1.')
        >>> divided("The file is gone.")
        ('The file is gone.', '')
    """
    what, *fix = FIX.split(message.strip(), maxsplit=1)
    return what, fix[0] if fix else ""


class Overhearing(logging.Handler):
    """Hands on what is logged, as far as it is not listed anyway."""

    def __init__(self, hear: Callable[[Level, str], None]) -> None:
        super().__init__(logging.INFO)
        self.hear = hear

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING and record.name != SHOWN_ELSEWHERE:
            self.hear("warning", record.getMessage())
        elif record.name in NOTED:
            self.hear("note", record.getMessage())


@contextmanager
def overheard(hear: Callable[[Level, str], None]) -> Iterator[None]:
    """What the package logs and warns of within goes to ``hear`` in place of the terminal."""
    logger = logging.getLogger("prefopt")
    level, propagate, handlers = logger.level, logger.propagate, list(logger.handlers)
    logger.handlers = [Overhearing(hear)]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
        for item in caught:
            if "Config: " in str(item.message):  # other warnings are libraries', for programmers
                hear("warning", str(item.message).partition("Config: ")[2])
