"""What a second terminal asks of a sweep: requests as files, answered by the process that runs it.

A request is a file in ``commands/``; its answer stands beside it until it has been read. Where nobody runs the sweep,
the command itself does what is asked: `apply` is the same.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from prefopt import files
from prefopt.checkpoints.folder import checkpoints_in, final_folder, put_in_order, staging_folder
from prefopt.checkpoints.manifest import faults
from prefopt.sweep.plan import refused_in_trials, trial_name
from prefopt.sweep.state import OVER, Status, Sweep, Trial, note_event, trial_folder
from prefopt.trainer.saving.masking import without_secrets

__all__ = ["Check", "Request", "answer", "apply", "ask", "newest_checkpoint", "pending", "wait_for_answer"]

FOLDER = "commands"
REQUEST, ANSWER = ".request.json", ".answer.json"
POLL_SECONDS = 0.05

Check = Callable[[Mapping[str, Any]], list[str]]
"""What is wrong with the run of a trial's options."""


@dataclass(frozen=True)
class Request:
    """One command."""

    command: Literal["stop", "resume", "clone"]
    trial: str
    options: dict[str, Any] = field(default_factory=dict)
    """What a clone has instead of its original's."""
    from_scratch: bool = False
    """Whether a clone begins anew, rather than with its original's newest checkpoint."""
    name: str = ""
    """Of its file."""


# -- requests and answers as files -------------------------------------------------------------------------------------


def ask(folder: Path, request: Request) -> str:
    """Leave a request; returns the name by which it is answered.

    Raises:
        ValueError: it would write down a secret.
    """
    refuse_secrets(request.options)
    name = f"{time.time_ns()}-{uuid4().hex[:8]}"
    (folder / FOLDER).mkdir(exist_ok=True)
    files.replace_file(folder / FOLDER / f"{name}{REQUEST}", json.dumps(asdict(replace(request, name=name))))
    return name


def pending(folder: Path) -> list[Request]:
    """Requests that have no answer yet, in their order; what is no request is deleted."""
    found = []
    for path in sorted((folder / FOLDER).glob(f"*{REQUEST}")):
        try:
            found.append(Request(**json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, TypeError):
            path.unlink(missing_ok=True)
    return found


def answer(folder: Path, request: Request, text: str, *, is_done: bool) -> None:
    """Say what came of a request."""
    content = json.dumps({"text": text, "is_done": is_done})
    files.replace_file(folder / FOLDER / f"{request.name}{ANSWER}", content)
    (folder / FOLDER / f"{request.name}{REQUEST}").unlink(missing_ok=True)


def wait_for_answer(folder: Path, name: str, seconds: float) -> tuple[str, bool] | None:
    """What came of a request, and whether it was done; None where no answer came within this time."""
    path, end = folder / FOLDER / f"{name}{ANSWER}", time.monotonic() + seconds
    while time.monotonic() < end:
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            path.unlink()
            return content["text"], content["is_done"]
        time.sleep(POLL_SECONDS)
    return None


# -- what they do ------------------------------------------------------------------------------------------------------


def apply(folder: Path, sweep: Sweep, request: Request, check: Check) -> tuple[Sweep, str]:
    """The sweep after a request, and what to say. No trial that is asked about is in the middle of a chunk.

    Raises:
        ValueError: it cannot be done; with what can.
    """
    trial = next((trial for trial in sweep.trials if trial.name == request.trial), None)
    if trial is None:
        names = "\n".join(f"  {trial.name}" for trial in sweep.trials)
        raise ValueError(f"{folder} has no trial {request.trial!r}; it has:\n{names}")
    if request.command == "clone":
        changed, text = cloned(folder, sweep, trial, request, check)
    else:
        changed, text = stopped(trial) if request.command == "stop" else resumed(folder, trial)
    note_event(folder, request.command, changed.name, options=request.options, answer=text)
    return sweep.with_trial(changed), text


def stopped(trial: Trial) -> tuple[Trial, str]:
    if trial.status in OVER:
        raise ValueError(f"{trial.name} is {trial.status} already")
    after = replace(trial, status=Status.STOPPED, reason="stopped by a command")
    return after, f"{trial.name}: stopped after step {trial.steps}"


def resumed(folder: Path, trial: Trial) -> tuple[Trial, str]:
    if trial.status is Status.FINISHED:
        raise ValueError(f"{trial.name} is finished; clone it with a larger max_steps to train it further")
    if trial.status not in OVER:
        raise ValueError(f"{trial.name} is {trial.status}: it goes on by itself")
    failed = trial.status is Status.FAILED  # maybe some steps after its newest checkpoint
    steps = (newest_checkpoint(trial_folder(folder, trial.name)) or 0) if failed else trial.steps
    status = Status.PAUSED if steps else Status.WAITING
    after = replace(trial, status=status, steps=steps, reason=None, spared=True)
    return after, f"{trial.name}: {f'goes on from step {steps}' if steps else 'begins anew'} when its turn comes"


def cloned(folder: Path, sweep: Sweep, trial: Trial, request: Request, check: Check) -> tuple[Trial, str]:
    """A new trial with some options changed; its name says which."""
    changes = request.options
    options = {**trial.options, **changes}
    refuse_secrets(changes)
    clone = Trial(
        trial_name(len(sweep.trials) + 1, {**changes, "from": trial.name.partition("-")[0]}),
        options,
        cloned_from=trial.name,
        max_steps=trial.max_steps,
        turn=sweep.turn,
    )
    if problems := refused_in_trials(changes) or check(options):
        raise ValueError("\n".join(problems))
    if request.from_scratch:
        return clone, f"{clone.name}: begins anew when its turn comes"
    step = copy_checkpoint(trial_folder(folder, trial.name), trial_folder(folder, clone.name))
    if step is None:
        raise ValueError(f"{trial.name} has no checkpoint yet; --from_scratch begins its clone anew")
    clone = replace(clone, status=Status.PAUSED, steps=step, clone_step=step, extra_checkpoint=step)
    return clone, f"{clone.name}: goes on from step {step} of {trial.name} when its turn comes"


def refuse_secrets(options: Mapping[str, Any]) -> None:
    if without_secrets(dict(options)) != options:
        raise ValueError("a clone's options are written down with the sweep, and one of these is a secret")


def newest_checkpoint(run: Path) -> int | None:
    """The step of the newest checkpoint of a run that is whole."""
    return next((step for step, path in checkpoints_in(run).items() if not faults(path)), None)


def copy_checkpoint(source: Path, target: Path) -> int | None:
    """Give a new run the newest checkpoint of another, whole or not at all; returns its step."""
    step = newest_checkpoint(source)
    if step is None:
        return None
    files.remove_tree(target)  # a clone that was killed before anyone knew of it
    target.mkdir(parents=True)
    shutil.copytree(final_folder(source, step), staging_folder(target, step))
    files.sync_tree(staging_folder(target, step))
    put_in_order(target)
    return step
