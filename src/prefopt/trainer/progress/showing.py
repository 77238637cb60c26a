"""A trainer that shows what it does, and says what its numbers mean."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import datasets
from datasets import are_progress_bars_disabled as bars_are_off
from transformers import ProgressCallback
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils.import_utils import is_in_notebook

from prefopt.data.columns import prepared_columns
from prefopt.trainer.ending.recording import RecordingTrainer
from prefopt.trainer.evaluation import EvaluatedStep
from prefopt.trainer.loader import StepSampler
from prefopt.trainer.progress.diagnosing import SayFindings
from prefopt.trainer.progress.display import SILENT, Display, display_for
from prefopt.trainer.progress.parts import Part, counts
from prefopt.trainer.progress.rows import figures, row_line
from prefopt.trainer.progress.tokenising import tokenising
from prefopt.types import OptimizerStep

__all__ = ["ProgressDisplay", "ShowingTrainer"]


class ShowingTrainer(RecordingTrainer):
    """Shows tokenising, the reference's pass, training, evaluations and samples on one display.

    All counts are the host's own: of the batches that it made, and of rows that were logged.
    """

    def start_window(self) -> None:
        super().start_window()
        self.parts_of_run = ExitStack()
        replace_progress_callback(self)
        self.add_callback(SayFindings(self))

    @functools.cached_property
    def own_display(self) -> Display:
        return display_for(self.args)

    @property
    def display(self) -> Display:
        """The display, unless its callback was taken out, or another one shows the progress of the run."""
        shown = [callback for callback in self.callback_handler.callbacks if shows_progress(callback)]
        return self.own_display if [type(callback) for callback in shown] == [ProgressDisplay] else SILENT

    def part(self, *args: Any, **kwargs: Any) -> AbstractContextManager[Part]:
        """See `Display.part`."""
        return self.display.part(*args, **kwargs)

    # -- the parts ---------------------------------------------------------------------------------------------------

    def prepared(self, dataset: Any, name: str) -> Any:
        shown = isinstance(dataset, datasets.Dataset) and not is_in_notebook() and not bars_are_off()
        if not shown or set(prepared_columns(self.preference.branches)) <= set(dataset.column_names):
            return super().prepared(dataset, name)
        with tokenising(self.own_display, name, len(dataset)) as counted:
            return super().prepared(dataset, name, counted)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See `RecordingTrainer.train`."""
        with self.parts_of_run:
            return super().train(*args, **kwargs)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.counts_of_step = counts(inputs, self.args.world_size)
        return loss

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        sampler = getattr(dataloader, "batch_sampler", None)
        total = sampler.num_rows if isinstance(sampler, StepSampler) else None
        name = kwargs.get("metric_key_prefix", "eval").removeprefix("eval").lstrip("_")
        with self.part(f"evaluation{' of ' if name else ''}{name}", total, "pairs") as self.evaluation:
            return super().evaluation_loop(dataloader, *args, **kwargs)

    def evaluated_step(self, model: Any, number: int, wants_pairs: bool, step: OptimizerStep) -> EvaluatedStep:
        found = super().evaluated_step(model, number, wants_pairs, step)
        self.evaluation.advance_by(step, self.args.world_size)
        return found


def replace_progress_callback(trainer: ShowingTrainer) -> None:
    """Put the display in the place of transformers' bar, where that is what it has chosen by itself."""
    callbacks = trainer.callback_handler.callbacks
    places = [place for place, callback in enumerate(callbacks) if type(callback) is ProgressCallback]
    if places:
        callbacks[places[-1]] = ProgressDisplay(trainer)


def shows_progress(callback: Any) -> bool:
    """Whether a callback draws bars; TRL's and others' are known by their names."""
    return isinstance(callback, ProgressCallback) or type(callback).__name__.endswith("ProgressCallback")


class ProgressDisplay(ProgressCallback):
    """Tells the display of training how far it is; a `ProgressCallback`, so that who takes that out takes this out."""

    def __init__(self, trainer: ShowingTrainer) -> None:
        super().__init__()
        self.trainer = trainer
        self.training: Part | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer.parts_of_run.close()  # of an attempt that ran out of memory
        part = trainer.part("training", state.max_steps, "steps", done=state.global_step)
        self.training = trainer.parts_of_run.enter_context(part)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training is not None:
            self.training.advance(state.global_step - self.training.done, *self.trainer.counts_of_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        logs = logs or {}
        line = row_line(logs, state.global_step, state.max_steps)
        if line is not None:
            self.trainer.display.line(line)
        if self.training is not None and "loss" in logs:
            self.training.figures = figures(logs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.training = None
        self.trainer.parts_of_run.close()

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kw: Any) -> None:
        """Nothing: the trainer counts the pairs itself, as it does for all that follow."""

    on_evaluate = on_predict = on_prediction_step
