"""A part of a run as a display shows it: how far it is, how fast, and what its last numbers were."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from prefopt.types import OptimizerStep

__all__ = ["Part", "counts", "duration", "quantity"]

WINDOW = 50
"""Advances over which speeds are taken: enough to be steady, few enough to follow a change."""


@dataclass
class Part:
    """Tokenising, the reference's pass, training, an evaluation, samples.

    Args:
        name: what is done.
        total: how much there is to do; None for streams, whose end is not known.
        unit: of ``total`` and ``done``: rows, pairs, steps, prompts.
        done: what was done before, in a resumed run.
        count: asked for what is done, where it is done by other processes.
        clock: seconds.
    """

    name: str
    total: int | None
    unit: str
    done: int = 0
    count: Callable[[], int] | None = None
    clock: Callable[[], float] = time.monotonic
    pairs: int = 0
    tokens: int = 0
    figures: str = ""
    """The last numbers, in words."""
    resting: float = 0.0
    """Seconds that other parts within this one took."""
    within: list[str] = field(default_factory=list)
    """What these were, each once."""
    sign: Callable[[Part], None] | None = None
    """Called after each advance."""
    last_sign: float = 0.0
    """Seconds after the beginning at which ``sign`` was last heeded."""
    recent: deque[tuple[float, int, int]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    """After each advance: seconds of work, pairs and tokens until then."""

    def __post_init__(self) -> None:
        self.started, self.before = self.clock(), self.done
        self.recent.append((0.0, 0, 0))

    @property
    def seconds(self) -> float:
        """Since it began, parts within it included."""
        return self.clock() - self.started

    def advance(self, done: int = 1, pairs: int = 0, tokens: int = 0) -> None:
        """Count what was done just now."""
        self.done += done
        self.pairs += pairs
        self.tokens += tokens
        self.recent.append((self.seconds - self.resting, self.pairs, self.tokens))
        if self.sign is not None:
            self.sign(self)

    def advance_by(self, step: OptimizerStep, num_ranks: int) -> None:
        """Count the pairs and tokens of an item of a loader; the other ranks have as many as this one, or one less."""
        pairs, tokens = counts(step, num_ranks)
        if self.total is not None:
            pairs = min(pairs, self.total - self.done)
        self.advance(pairs, pairs, tokens)

    def refresh(self) -> None:
        """Ask for what others have done."""
        if self.count is not None and (found := self.count()) != self.done:
            self.advance(found - self.done)

    def progress(self) -> str:
        """How far it is: ``120/600 steps``."""
        of = "" if self.total is None else f"/{self.total:,}"
        return f"{self.done:,}{of} {self.unit}"

    def speeds(self, *, whole: bool = False) -> str:
        """Pairs and tokens a second, or what is counted; of late, or of the whole part."""
        first, last = (0.0, 0, 0) if whole else self.recent[0], self.recent[-1]
        seconds, pairs, tokens = (b - a for a, b in zip(first, last, strict=True))
        if seconds <= 0:
            return ""
        if not self.pairs:
            return f"{quantity((self.done - self.before) / max(self.seconds, 1e-9))} {self.unit}/s"
        rates = [f"{quantity(pairs / seconds)} pairs/s"]
        return "  ".join(rates + ([f"{quantity(tokens / seconds)} tokens/s"] if tokens else []))

    def remaining(self) -> str:
        """The time that the rest takes, if it goes on as it did from the start; empty where that is not known."""
        done = self.done - self.before
        if self.total is None or done <= 0:
            return ""
        return f"ETA {duration(max(self.total - self.done, 0) * self.seconds / done)}"

    def beginning(self) -> str:
        """The line with which it begins, where there is no bar."""
        amount = "" if self.total is None else f"{self.total:,} "
        return f"{self.name}: {amount}{self.unit}{f', from {self.done:,} on' if self.done else ''}"

    def ending(self) -> str:
        """The line that remains of it."""
        whole = self.total is None or self.done >= self.total
        amount = f"{self.done:,} {self.unit}" if whole else f"{self.done:,} of {self.total:,} {self.unit}"
        speeds = self.speeds(whole=True).replace("  ", ", ")
        without = f" without {' and '.join(self.within)}" if self.pairs and self.within else ""
        between = ("; " if without else ", ") if speeds else ""
        return f"{self.name}: {amount} in {duration(self.seconds)}{between}{speeds}{without if speeds else ''}"

    def rest(self, part: Part) -> None:
        """Leave the time of a part within this one out of its speeds."""
        self.resting += part.seconds - part.resting
        if (kind := part.name.partition(" of ")[0]) not in self.within:
            self.within.append(kind)


def counts(step: OptimizerStep, num_ranks: int) -> tuple[int, int]:
    """Pairs and tokens of a step, known on the host: of this rank, times the ranks."""
    own = [batch for batch in step.micro_batches if batch.num_model_tokens]  # the others are dummies
    return num_ranks * sum(len(batch.rows) for batch in own), num_ranks * sum(batch.num_model_tokens for batch in own)


def quantity(value: float) -> str:
    """A number as short as a glance wants it.

    >>> quantity(0.2345), quantity(12.34), quantity(1234.5), quantity(12345)
    ('0.23', '12.3', '1,234', '12.3k')
    """
    if value >= 10_000:
        return f"{value / 1000:,.1f}k"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def duration(seconds: float) -> str:
    """Seconds in words of a clock.

    >>> duration(3.21), duration(75), duration(3675)
    ('3.2 s', '1:15', '1:01:15')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
