"""``train()`` as users call it: under signals, and with a record of how it went, also where it did not go well."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from accelerate.utils import gather_object
from transformers import TrainerCallback

from prefopt.checkpoints.folder import FolderInUseError
from prefopt.trainer.ending.describing import Clock, described, peak_memory
from prefopt.trainer.ending.interrupting import LeftEarly
from prefopt.trainer.ending.pairs import PAIRS, Extremes, ScoredPairs, described_pairs, write_pairs
from prefopt.trainer.ending.record import (
    METRICS,
    RUN,
    append_row,
    keep_rows,
    now,
    read_mapping,
    read_rows,
    reason,
    rows_until,
    set_aside,
    write_run,
)
from prefopt.trainer.ending.reporting import is_off, report, spared
from prefopt.trainer.ending.signals import TO_GO_ON, PausedRun, Request, interruption
from prefopt.trainer.installed import versions
from prefopt.trainer.search import SearchingTrainer
from prefopt.trainer.trackers import close_failed

__all__ = ["Record", "RecordingTrainer"]

logger = logging.getLogger(__name__)


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
        self.pairs: dict[str, list[dict[str, Any]]] = {}
        """Set -> the worst and best pairs of its last evaluation."""
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

    def begin(self, description: Mapping[str, Any]) -> None:
        """Say that the run is running; and of one before it that it did not end, where that is so.

        Args:
            description: what is known of the run before its first row.
        """
        before = read_mapping(self.folder / RUN)
        if before.get("status") == "running" and not self.has_begun:
            steps = [row["step"] for row in read_rows(self.folder / METRICS)]
            last = f"last logged step {max(steps)}" if steps else "nothing was logged"
            logger.warning("%s: the run before this one did not end (it was killed): %s.", self.folder, last)
        self.has_begun = True
        self.note(**description)

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
        keep_rows(self.folder / PAIRS, lambda pair: 0 < step >= pair["step"])
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
            report(self.folder, f"{self.values['method'].upper()}, {status}")

    def add_pairs(self, step: int, name: str, pairs: list[dict[str, Any]]) -> None:
        """Write the worst and best pairs of an evaluation set, or of the last step, into ``pairs.jsonl``."""
        self.pairs[name] = pairs
        if not is_off():
            with warned(self.folder / PAIRS):
                write_pairs(self.folder, step, self.pairs)


class RecordingTrainer(SearchingTrainer):
    """Keeps ``metrics.jsonl``, ``run.json`` and ``curves.png``; ends a run that was asked to stop."""

    method: ClassVar[str]

    def start_window(self) -> None:
        super().start_window()
        self.record: Record | None = None
        self.start_clock()
        self.callback_handler.callbacks.insert(0, RecordRows(self))

    def train(self, resume_from_checkpoint: Any = None, trial: Any = None, *args: Any, **kwargs: Any) -> Any:
        """See ``transformers.Trainer.train``.

        Raises:
            InterruptedRun: SIGINT was received; there is a checkpoint of the last step.
            TerminatedRun: the same for SIGTERM.
            PausedRun: ``pauses`` said so.
        """
        with self.signals.handled(), self.recorded(trial):
            output = None
            try:
                output = super().train(resume_from_checkpoint, trial, *args, **kwargs)
                left = self.agreed() is Request.STOP
            except LeftEarly:
                left = True
            if left and self.paused and self.signals.stop is None:
                raise PausedRun(self.steps_done, str(self.last_checkpoint), self.saved_to_pause)
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
        self.start_clock()
        try:
            yield
        except PausedRun as pause:  # the next part of the run says the last word
            record.note(status="paused", steps=pause.step, checkpoint=pause.checkpoint)
            raise
        except BaseException as error:
            status = "failed" if isinstance(error, Exception) else "interrupted"
            self.end_record(record, status, error)
            raise
        self.end_record(record, "finished", None)

    def end_record(self, record: Record, status: str, error: BaseException | None) -> None:
        """The last word of the run, with what is known at its end alone."""
        if self.begun:
            record.values["timing"] = self.timing()
        if not record.pairs and self.steps_done > self.first_step:
            with spared(record.folder / PAIRS):  # the device may be what failed
                last = Extremes()
                last.add(ScoredPairs.of_step(self.last_step, self.last_values))
                record.add_pairs(self.steps_done, "train", described_pairs(last, self.decoded))
        record.end(status, self.steps_done, self.last_checkpoint, error)
        if status == "failed":
            close_failed(self.callback_handler.callbacks)

    @property
    def steps_done(self) -> int:
        """Optimizer steps of the run, those before a resume included."""
        return self.state.global_step if self.begun else 0

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        if self.record is not None:
            self.record.begin(described(self))
        with self.clock.part("training"):
            return super()._inner_training_loop(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self.clock.part("saving"):
            super()._save_checkpoint(model, trial)
        if self.record is not None:
            self.record.note(steps=self.steps_done, checkpoint=self.last_checkpoint, timing=self.timing())

    # -- pairs -------------------------------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """See `EvaluatingTrainer.evaluation_loop`; the record keeps the worst and best pairs."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        own = described_pairs(self.extremes, self.decoded)
        pairs = gather_object(own) if self.args.world_size > 1 else own
        if self.record is not None:
            self.record.add_pairs(self.state.global_step, metric_key_prefix, pairs)
        return output

    def decoded(self, ids: Sequence[int]) -> str:
        processing_class: Any = self.processing_class
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        return tokenizer.decode(list(ids), skip_special_tokens=True)

    # -- time --------------------------------------------------------------------------------------------------------

    def start_clock(self) -> None:
        self.clock, self.first_step = Clock(), 0
        self.first_tokens: float | None = None

    def timing(self) -> dict[str, Any]:
        """Seconds by part, and what was done in them: of this call of ``train()``, not of the run that it went on."""
        steps = self.steps_done - self.first_step
        tokens = None if self.first_tokens is None else self.window.num_tokens - self.first_tokens
        done = {"steps": steps, "pairs": steps * self.get_total_train_batch_size(self.args), "tokens": tokens}
        return {"seconds": dict(self.clock.seconds), **done, "peak_memory": peak_memory(self.args.device)}

    def precomputed(self, rows: Any) -> Any:
        with self.clock.part("reference"):
            return super().precomputed(rows)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.clock.part("evaluation"):
            return super()._evaluate(*args, **kwargs)


class RecordRows(TrainerCallback):
    """Writes each row when it is logged; the first of the callbacks, so that no other can keep a row from the disk."""

    def __init__(self, trainer: RecordingTrainer) -> None:
        self.trainer = trainer
        self.before: list[dict[str, Any]] = []
        """Rows that were logged before the first run."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.first_step = step = state.global_step
        if self.trainer.record is not None:
            num_at_step = sum(row["step"] == step for row in state.log_history)
            self.trainer.record.begin_rows(step, num_at_step, self.before)
        self.before.clear()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """By now what a checkpoint kept of the log is there."""
        if self.trainer.first_tokens is None:
            self.trainer.first_tokens = self.trainer.window.num_tokens

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        row = state.log_history[-1]
        if self.trainer.record is not None:
            self.trainer.record.add(row)
        elif self.trainer.is_world_process_zero():
            self.before.append(row)
