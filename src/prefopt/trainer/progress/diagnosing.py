"""What the numbers of a run say, said while it runs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from prefopt.report.diagnosis import Finding, diagnose
from prefopt.trainer.ending.describing import described
from prefopt.trainer.ending.record import read_rows
from prefopt.trainer.ending.reporting import spared
from prefopt.trainer.samples import FILE

__all__ = ["SayFindings"]

logger = logging.getLogger(__name__)

GROWTH = 1.05
"""The rows are gone through again when there are five percent more, so that a run of n rows costs 20 n in all."""


class SayFindings(TrainerCallback):
    """Writes each finding of `diagnose` as a warning, once, when it is first true.

    Args:
        trainer: a `PreferenceTrainer`.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.facts: dict[str, Any] = {}
        self.said: set[str] = set()
        self.next_look = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Findings about the data are known by now."""
        self.facts = {"method": self.trainer.method, **described(self.trainer)} if state.is_world_process_zero else {}
        self.said, self.next_look = set(), 0.0
        self.say(args, state)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.facts and len(state.log_history) >= self.next_look:
            self.next_look = GROWTH * len(state.log_history)
            self.say(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.say(args, state)
        self.facts = {}

    def say(self, args: Any, state: Any) -> None:
        if not self.facts:
            return
        progress = state.global_step / state.max_steps if state.max_steps > 0 else 1.0
        found: list[Finding] = []
        with spared("The diagnosis"):  # of one rank, for which the others would wait
            found = diagnose(state.log_history, {**self.facts, "progress": progress, "samples": self.samples(args)})
        for finding in found:
            if finding.level != "good" and finding.name not in self.said:
                self.said.add(finding.name)
                where = "" if finding.step is None else f"Step {finding.step}: "
                logger.warning("%s%s: %s %s", where, finding.name, finding.text, finding.advice)

    def samples(self, args: Any) -> list[dict[str, Any]]:
        """What was sampled in this run so far."""
        if self.trainer.sampling is None:
            return []
        return read_rows(Path(self.trainer.sampling.folder, FILE))
