"""How a sweep stands: one file, written whole at each change, beside the folders of its trials.

=========================== ==================================================================================
in the folder of a sweep    what is in it
=========================== ==================================================================================
``sweep.json``              `Sweep`: which trials there are, and how each of them stands
``events.jsonl``            a line for each thing that happened, with its time
``commands/``               requests from a second terminal, each a file (`prefopt.sweep.commands`)
``trials/NAME/``            the folder of a run, as any run leaves it: rows, record, checkpoints, model
=========================== ==================================================================================
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from prefopt.checkpoints.folder import FolderInUseError, held
from prefopt.files import append_line, replace_file
from prefopt.trainer.ending.record import now, read_rows
from prefopt.trainer.saving.masking import without_secrets

__all__ = [
    "BEGUN",
    "EVENTS",
    "OVER",
    "STATE",
    "TRIALS",
    "FolderInUseError",
    "Status",
    "Sweep",
    "Trial",
    "held",
    "note_event",
    "read_events",
    "read_sweep",
    "trial_folder",
    "write_sweep",
]

STATE, EVENTS, TRIALS = "sweep.json", "events.jsonl", "trials"
VERSION = 1
"""Of the form of ``sweep.json``."""


class Status(StrEnum):
    """How a trial stands."""

    WAITING = "waiting"
    """It has not begun."""
    RUNNING = "running"
    """One of its chunks is being trained."""
    PAUSED = "paused"
    """It has begun, and others have their turn."""
    STOPPED = "stopped"
    """A command stopped it; another may resume it."""
    PRUNED = "pruned"
    """It was stopped for others that do better; a command may resume it."""
    FINISHED = "finished"
    FAILED = "failed"
    """It ended with an error, which is its reason; a command may resume it."""


BEGUN = frozenset({Status.RUNNING, Status.PAUSED})
"""Trials that take turns."""
OVER = frozenset({Status.STOPPED, Status.PRUNED, Status.FINISHED, Status.FAILED})
"""Trials that are given no more turns, unless a command says so."""


@dataclass(frozen=True)
class Trial:
    """One configuration, and how far it is."""

    name: str
    """Also of its folder."""
    options: Mapping[str, Any]
    """What is its own; all other options are the sweep's."""
    status: Status = Status.WAITING
    steps: int = 0
    """Optimizer steps done."""
    max_steps: int | None = None
    """Of its whole run; None until its first chunk."""
    last: float | None = None
    """The sweep's metric at its newest evaluation; None before the first one, and where it is not finite."""
    best: float | None = None
    """The best value of that metric so far."""
    seconds: float = 0.0
    """Spent on it, its trainer's construction and its checkpoints included."""
    first_seen: float | None = None
    """Seconds from the sweep's start to its first evaluation."""
    cloned_from: str | None = None
    clone_step: int = 0
    """The step of the checkpoint that a clone began with; 0: anew."""
    reason: str | None = None
    """Why it failed, was stopped or pruned."""
    spared: bool = False
    """A command has resumed it: it is not pruned."""
    turn: int = 0
    """The last of the sweep's rounds in which it had its turn."""
    extra_checkpoint: int | None = None
    """The step of a checkpoint that was made for its pause alone, and goes when there is a newer one."""


@dataclass(frozen=True)
class Sweep:
    """All trials in their order, and what they are compared by."""

    source: str
    """The file that describes the sweep."""
    method: str
    """``dpo``, ``cpo`` or ``tpo``."""
    metric: str
    """A metric of evaluation, such as ``eval_rewards/accuracies``."""
    direction: str = "maximize"
    """Or ``minimize``."""
    chunk_steps: int | None = None
    """Optimizer steps of a turn; None: an eighth of each trial's run."""
    seconds: float = 0.0
    """The sweep's own time until now, over all its starts."""
    started: str = ""
    """When it was begun, UTC."""
    turn: int = 0
    """The round: in each, every trial that takes turns has one."""
    trials: tuple[Trial, ...] = field(default=())

    def trial(self, name: str) -> Trial:
        """The trial of this name.

        Raises:
            KeyError: There is none.
        """
        for trial in self.trials:
            if trial.name == name:
                return trial
        raise KeyError(name)

    def with_trial(self, trial: Trial) -> Sweep:
        """The sweep with this trial in place of the one of its name, or as its last."""
        names = [one.name for one in self.trials]
        if trial.name not in names:
            return replace(self, trials=(*self.trials, trial))
        return replace(self, trials=tuple(trial if one.name == trial.name else one for one in self.trials))


def trial_folder(folder: Path, name: str) -> Path:
    """Where a trial's run lies."""
    return folder / TRIALS / name


def write_sweep(folder: Path, sweep: Sweep) -> None:
    """Write how a sweep stands, whole and without secrets."""
    content = {"version": VERSION, **asdict(sweep)}
    replace_file(folder / STATE, json.dumps(without_secrets(content), indent=1))


def read_sweep(folder: Path) -> Sweep | None:
    """How the sweep in a folder stands; None where there is none.

    Raises:
        ValueError: the file is of another version of prefopt, or no such file.
    """
    path = folder / STATE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("version") != VERSION:
            raise ValueError("it is of another version of prefopt")
        trials = [Trial(**{**trial, "status": Status(trial["status"])}) for trial in content.pop("trials")]
        return Sweep(**content, trials=tuple(trials))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: is no state of a sweep that can be read: {error}") from error


def note_event(folder: Path, what: str, trial: str | None = None, **values: Any) -> None:
    """Append to ``events.jsonl``: what happened, to which trial, when, and what else there is to know."""
    event = {"time": now(), "event": what, "trial": trial} | without_secrets(values)
    append_line(folder / EVENTS, json.dumps(event, default=str))


def read_events(folder: Path) -> list[dict[str, Any]]:
    """All that happened, in order."""
    return read_rows(folder / EVENTS)
