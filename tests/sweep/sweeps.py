"""Sweeps whose trials train nothing: what is trained by a formula is known beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prefopt.sweep.chunks import Chunk
from prefopt.sweep.state import Status, Sweep, Trial, trial_folder

METRIC = "eval_rewards/accuracies"
MAX_STEPS = 40
Value = Callable[[Mapping[str, Any], int], float]
"""Options of a trial, a step -> the metric."""


def sweep_of(trials: list[Trial], direction: str = "maximize") -> Sweep:
    return Sweep("sweep.yaml", "dpo", METRIC, direction, trials=tuple(trials))


def trial(name: str, status: Status = Status.PAUSED, last: float | None = None, **values: Any) -> Trial:
    values = {"steps": 10, "max_steps": MAX_STEPS, "seconds": 5.0, "options": {"beta": 0.1}, **values}
    return Trial(name, values.pop("options"), status, last=last, best=last, **values)


def write_rows(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    run = trial_folder(folder, name)
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


class Formula:
    """Stands in for training in `prefopt.sweep.scheduler`: a trial evaluates every 5 steps, to what a formula says.

    Args:
        value: the formula.
        dies_at: number of the chunk in which the process is killed.
    """

    def __init__(self, value: Value, dies_at: int | None = None) -> None:
        self.value, self.dies_at, self.num_chunks = value, dies_at, 0

    def make(self, trial: Trial) -> Any:
        """What the scheduler calls a run."""
        self.trial = trial
        options = {"eval_strategy": "steps", "eval_steps": 5, "allow_changes": False}
        return type("Run", (), {"args": type("Args", (), options)(), "trial": trial})()

    def train_chunk(self, run: Any, shared: Any, at_step: Any, *, resume: bool) -> Chunk:
        """In place of the real one."""
        self.num_chunks += 1
        if self.num_chunks == self.dies_at:
            raise SystemExit("killed")
        for step in range(run.trial.steps + 1, MAX_STEPS + 1):
            if step % 5 == 0:
                found = [{"step": at, METRIC: self.value(run.trial.options, at)} for at in range(5, step + 1, 5)]
                write_rows(self.folder, run.trial.name, found)
            if at_step(step, MAX_STEPS, []) and step < MAX_STEPS:
                return Chunk(step, MAX_STEPS, False)
        return Chunk(MAX_STEPS, MAX_STEPS, True)

    folder: Path
