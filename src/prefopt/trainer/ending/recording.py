"""``train()`` as users call it: under signals, and with a record of how it went, also where it did not go well."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from transformers import TrainerCallback

from prefopt.checkpoints.folder import FolderInUseError
from prefopt.files import replace_file
from prefopt.report.curves import draw, png
from prefopt.trainer.ending.interrupting import LeftEarly
from prefopt.trainer.ending.record import (
    CURVES,
    METRICS,
    RUN,
    append_row,
    keep_rows,
    now,
    read_rows,
    read_run,
    reason,
    rows_until,
    set_aside,
    write_run,
)
from prefopt.trainer.ending.signals import TO_GO_ON, Request, interruption
from prefopt.trainer.installed import versions
from prefopt.trainer.search import SearchingTrainer

__all__ = ["Record", "RecordingTrainer"]

logger = logging.getLogger(__name__)

VARIABLE = "PREFOPT_CURVES"
"""``off``: no ``curves.png`` is drawn."""


@contextmanager
def warned(path: Path) -> Iterator[None]:
    """A file of the record that cannot be written, on a full disk for example, changes nothing of the run's end."""
    try:
        yield
    except OSError as error:
        logger.warning("%s was not written: %s. The run goes on, or ends as it would have.", path, error)


class Record:
    """The files of one call of ``train()``, on its main process.

    Args:
        folder: of the run.
        method: of the trainer.
    """

    def __init__(self, folder: Path, method: str) -> None:
        self.folder, self.has_begun, self.has_rows = folder, False, False
        self.values: dict[str, Any] = {
            "method": method,
            "status": "running",
            "reason": None,
            "started": now(),
            "ended": None,
            "steps": 0,
            "checkpoint": None,
            "resume": None,
            "metrics": METRICS,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "versions": versions(),
        }

    def begin(self) -> None:
        """Say that the run is running; and of one before it that it did not end, where that is so."""
        before = read_run(self.folder / RUN)
        if before.get("status") == "running" and not self.has_begun:
            steps = [row["step"] for row in read_rows(self.folder / METRICS)]
            last = f"last logged step {max(steps)}" if steps else "nothing was logged"
            logger.warning("%s: the run before this one did not end (it was killed): %s.", self.folder, last)
        self.has_begun = True
        self.note()

    def note(self, **values: Any) -> None:
        """Write ``values`` into ``run.json``."""
        self.values.update(values)
        self.values["resume"] = TO_GO_ON if self.values["checkpoint"] else None
        with warned(self.folder / RUN):
            write_run(self.folder / RUN, self.values)

    def begin_rows(self, step: int, num_at_step: int, before: Sequence[dict[str, Any]]) -> None:
        """The file of rows, for a run that begins at ``step``.

        Args:
            step: 0 for a new run, which has a file of its own; else what was logged later than that is taken out.
            num_at_step: rows of that step that were logged when its checkpoint was saved.
            before: rows that were logged before a new run.
        """
        path = self.folder / METRICS
        if step:
            keep_rows(path, rows_until(step, num_at_step))
        elif self.has_rows:
            path.unlink(missing_ok=True)  # of an attempt that ran out of memory
        else:
            set_aside(path)
        self.has_rows = True
        for row in () if step else before:
            self.add(row)

    def add(self, row: dict[str, Any]) -> None:
        with warned(self.folder / METRICS):
            append_row(self.folder / METRICS, row)

    def end(self, status: str, steps: int, checkpoint: str | None, error: BaseException | None) -> None:
        """The last word, and the curves. Not in a folder that belongs to another run, also an earlier one that is left
        as it was, as where a resume is refused."""
        earlier = not self.has_begun and (self.folder / RUN).is_file()
        if earlier or isinstance(error, FolderInUseError):
            return
        why = None if error is None else {**reason(error), "step": steps}
        self.note(status=status, reason=why, ended=now(), steps=steps, checkpoint=checkpoint)
        if self.has_rows:
            self.draw_curves()

    def draw_curves(self) -> None:
        """Draw ``curves.png``; what goes wrong there is no failure of the run."""
        if os.environ.get(VARIABLE) == "off":
            return
        try:
            if rows := read_rows(self.folder / METRICS):
                title = f"{self.values['method'].upper()}, {self.values['status']}"
                replace_file(self.folder / CURVES, png(draw(rows, title)))
        except Exception as error:
            logger.warning("%s was not drawn: %r", self.folder / CURVES, error)


class RecordingTrainer(SearchingTrainer):
    """Keeps ``metrics.jsonl``, ``run.json`` and ``curves.png``; ends a run that was asked to stop."""

    method: ClassVar[str]

    def start_window(self) -> None:
        super().start_window()
        self.record: Record | None = None
        self.callback_handler.callbacks.insert(0, RecordRows(self))

    def train(self, resume_from_checkpoint: Any = None, trial: Any = None, *args: Any, **kwargs: Any) -> Any:
        """See ``transformers.Trainer.train``.

        Raises:
            InterruptedRun: SIGINT was received; there is a checkpoint of the last step.
            TerminatedRun: the same for SIGTERM.
        """
        with self.signals.handled(), self.recorded(trial):
            output = None
            try:
                output = super().train(resume_from_checkpoint, trial, *args, **kwargs)
                left = self.agreed() is Request.STOP
            except LeftEarly:
                left = True
            if left:  # raised here, where the loop is gone, and with it the workers of its loaders
                detail = "" if output is None else "All steps were done."
                stopped = interruption(self.signals.stop, self.steps_done, self.last_checkpoint, detail)
                logger.warning("%s", stopped)
                raise stopped
            return output

    @contextmanager
    def recorded(self, trial: Any) -> Iterator[None]:
        """Record the run that is made within, on the main process."""
        self.reset_boundary(None, trial, None)
        if not self.is_world_process_zero():
            yield
            return
        self.record = record = Record(Path(self._get_output_dir(trial)), self.method)
        try:
            yield
        except BaseException as error:
            status = "failed" if isinstance(error, Exception) else "interrupted"
            record.end(status, self.steps_done, self.last_checkpoint, error)
            raise
        record.end("finished", self.steps_done, self.last_checkpoint, None)

    @property
    def steps_done(self) -> int:
        """Optimizer steps of the run, those before a resume included."""
        return self.state.global_step if self.begun else 0

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        if self.record is not None:
            self.record.begin()
        return super()._inner_training_loop(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.record is not None:
            self.record.note(steps=self.steps_done, checkpoint=self.last_checkpoint)


class RecordRows(TrainerCallback):
    """Writes each row when it is logged; the first of the callbacks, so that no other can keep a row from the disk."""

    def __init__(self, trainer: RecordingTrainer) -> None:
        self.trainer = trainer
        self.before: list[dict[str, Any]] = []
        """Rows that were logged before the first run."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if self.trainer.record is not None:
            num_at_step = sum(row["step"] == step for row in state.log_history)
            self.trainer.record.begin_rows(step, num_at_step, self.before)
        self.before.clear()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        row = state.log_history[-1]
        if self.trainer.record is not None:
            self.trainer.record.add(row)
        elif self.trainer.is_world_process_zero():
            self.before.append(row)
