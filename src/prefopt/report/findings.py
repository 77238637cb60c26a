"""A finding, and what it is found in."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prefopt.report.series import Row, Series, evaluation_sets, series

__all__ = ["Finding", "Level", "Run"]

Level = Literal["good", "warn", "bad"]

MEANS = ("ipo", "simpo", "alphapo", "tpo-l")
"""Losses without a reference that score means per token."""


@dataclass(frozen=True)
class Finding:
    """Something that the numbers of a run say.

    Args:
        name: short and fixed, such as ``"saturated margins"``; one of docs/numbers.md.
        level: ``bad`` needs an answer before the next run, ``warn`` a look.
        step: optimizer step from which it was true; None for what is true of the data.
        text: what was seen, with its figures.
        advice: what to do.
    """

    name: str
    level: Level
    step: int | None
    text: str
    advice: str


class Run:
    """Rows and facts of a run, as the rules ask for them.

    Args:
        rows, facts: see `prefopt.report.diagnosis.diagnose`.
    """

    def __init__(self, rows: Sequence[Row], facts: Mapping[str, Any]) -> None:
        self.rows, self.facts = rows, facts
        self.training = [row for row in rows if "loss" in row]

    @functools.cached_property
    def evaluation_sets(self) -> list[str]:
        """Prefix of each set's metrics: ``eval_``, ``eval_<name>_``; of sets with an accuracy and a margin that are
        finite."""
        needed = ("rewards/accuracies", "rewards/margins")
        return [p for p in evaluation_sets(self.rows) if all(len(self.evaluated(p, name)) for name in needed)]

    def trained(self, metric: str) -> Series:
        """A metric of the rows of training."""
        return series(self.training, metric)

    def evaluated(self, prefix: str, metric: str) -> Series:
        """A metric of an evaluation set."""
        return series(self.rows, f"{prefix}{metric}")

    def option(self, name: str) -> Any:
        return self.known("options").get(name)

    def known(self, name: str) -> Mapping[str, Any]:
        """A mapping among the facts; empty where it is missing."""
        value = self.facts.get(name)
        return value if isinstance(value, Mapping) else {}

    @property
    def has_reference(self) -> bool:
        """Whether rewards are differences from a reference, and 0 at the start."""
        return self.facts.get("method") == "dpo"

    @property
    def logs_means(self) -> bool:
        """Whether ``logps/`` are means per token, as the first loss without a reference decides, or AlphaPO's alpha."""
        losses = self.facts.get("losses") or self.option("loss_type") or ()
        first = losses if isinstance(losses, str) else next(iter(losses), "")
        return not self.has_reference and (str(first) in MEANS or bool(self.option("alpha")))

    @property
    def beta(self) -> float:
        """What rewards are divided by to be nats; 1 where it is not known."""
        beta = self.option("beta")
        return float(beta) if isinstance(beta, (int, float)) and beta > 0 else 1.0

    @property
    def progress(self) -> float:
        """Share of its steps that a run has done; 1 where that is not known."""
        if isinstance(given := self.facts.get("progress"), float):
            return given
        steps, epochs = self.option("max_steps"), self.option("num_train_epochs")
        last = self.training[-1] if self.training else {}
        if isinstance(steps, int) and steps > 0:
            return min(1.0, last.get("step", 0) / steps)
        if isinstance(epochs, (int, float)) and epochs > 0 and self.facts.get("status") != "finished":
            return min(1.0, (last.get("epoch") or 0.0) / epochs)
        return 1.0
