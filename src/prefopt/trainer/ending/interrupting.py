"""Runs that can be asked to save or to stop, and that go on as if nobody had asked.

A step is done when its row is logged, its evaluation made and its checkpoint saved, and where it ends an epoch, when
that has been ended. A checkpoint says how much of this is yet to be done, and a resumed run does it first.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from prefopt.checkpoints.rng import rng_state, set_rng_state
from prefopt.files import write_file
from prefopt.reference.weights import reshard
from prefopt.trainer.ending.signals import Request, Signals, drop_own_handler
from prefopt.trainer.guards.guarding import GuardedTrainer
from prefopt.trainer.guards.out_of_memory import any_rank

__all__ = ["InterruptibleTrainer", "LeftEarly"]

FILE = "unfinished.json"
"""In a checkpoint: `Unfinished`."""


class LeftEarly(BaseException):
    """The run was asked to stop, and leaves what it is doing. No ``except Exception`` of anyone's may hold it."""


@dataclass(frozen=True)
class Unfinished:
    """What had been done of the last step when its checkpoint was saved."""

    evaluate: bool = False
    """Its evaluation is due, as it was left."""
    save: bool = False
    """With the evaluation, a checkpoint is due."""
    epoch_ended: bool = True
    """Whether the callbacks know that the epoch has ended, where this step ends one."""
    grad_norm: float | Tensor | None = None
    """Of the step, for the row of an epoch; read from the device where it is saved."""
    learning_rate: float | None = None
    is_extra: bool = False
    """The checkpoint was asked for, and would not be there otherwise: it is never the best one."""


class InterruptibleTrainer(GuardedTrainer):
    """Looks for requests at step boundaries and evaluation batches; saves, stops, and takes up what was left."""

    signals: Signals
    pauses: Callable[[int], bool] | None = None
    """Asked after each step that is done, with its number: whether ``train()`` is to save and end there, with
    `PausedRun`. Of a run of one process. The evaluation and the checkpoint that are due at that step are made first."""

    def start_window(self) -> None:
        super().start_window()
        self.signals = Signals()
        self.may_leave = False
        self.reset_boundary(None, None, None)
        drop_own_handler(self.callback_handler)

    def reset_boundary(self, resumed_from: str | None, trial: Any, ignored: Any) -> None:
        """A run begins: nothing is asked, saved, left or done yet."""
        self.agreed_request = int(Request.NOTHING)
        self.resumed_from, self.trial_of_run, self.ignored_keys = resumed_from, trial, ignored
        self.saved_step: int | None = None
        self.begun = False
        self.last_checkpoint = resumed_from
        self.step_state = Unfinished()
        self.resumed_state: Unfinished | None = None
        self.rng_after_resume: Any = None
        self.stopped_at_resume = False
        self.paused, self.saved_to_pause, self.saves_extra = False, False, False

    # -- what is asked -------------------------------------------------------------------------------------------

    def stop_requested(self) -> int:
        """What this process was asked, a `Request`; for a step's reduction over ranks."""
        return int(self.signals.request)

    def agreed(self) -> Request:
        """What any rank was asked; collective."""
        if self.args.world_size == 1:
            return self.signals.request
        asked = [float(self.signals.request >= level) for level in (Request.SAVE, Request.STOP)]
        save, stop = self.sum_over_ranks(torch.tensor(asked, device=self.args.device)).tolist()
        return Request.STOP if stop else Request.SAVE if save else Request.NOTHING

    def is_left(self) -> bool:
        """Whether the run is to stop, where it does what it may leave; collective, and no device is waited for."""
        wanted = self.signals.request is Request.STOP
        return self.may_leave and (wanted if self.args.world_size == 1 else any_rank(wanted))

    def request_of_step(self) -> Request:
        """The same at a step boundary, where the step's own reduction has brought it."""
        return self.signals.request if self.args.world_size == 1 else Request(self.agreed_request)

    def leave_if_asked(self, *models: Any) -> None:
        """Leave an evaluation between two batches, or a pass before training, if the run is to stop; collective.

        Args:
            models: that have been put together for the evaluation, and are divided again where it is left.

        Raises:
            LeftEarly: it is.
        """
        if self.is_left():
            for model in models:
                reshard(model)
            raise LeftEarly

    # -- step boundaries -----------------------------------------------------------------------------------------

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.reset_boundary(*(kwargs.get(name) for name in ("resume_from_checkpoint", "trial", "ignore_keys_for_eval")))
        callback = StepBoundaries(self)
        self.add_callback(callback)  # the last one, so that all others have begun when it takes up what was left
        self.may_leave = True
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            self.may_leave = False
            self.remove_callback(callback)

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Also where the run was asked to save or to stop.

        Raises:
            LeftEarly: it was asked to stop, and there is a checkpoint of this step.
        """
        ended = self.step_state.epoch_ended
        self.step_state = Unfinished(epoch_ended=ended, grad_norm=grad_norm, learning_rate=kwargs.get("learning_rate"))
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except LeftEarly:
            state = asdict(self.step_state) | {"evaluate": True, "save": bool(self.control.should_save)}
            self.step_state = Unfinished(**state)
            self.save_once(model, trial)
            raise
        request = self.request_of_step()
        if request is not Request.NOTHING:
            self.signals.wants_checkpoint, self.agreed_request = False, int(Request.NOTHING)
            self.save_once(model, trial)
        if request is Request.STOP:
            raise LeftEarly
        self.pause_if_due(model, trial)

    def pause_if_due(self, model: Any, trial: Any) -> None:
        """Leave where ``pauses`` says so. At the last step of an epoch that is when the epoch has ended, too, with the
        evaluation that belongs to it; at the last step of all the run ends instead.

        Raises:
            LeftEarly: it does, and there is a checkpoint of this step.
        """
        step, epoch = self.state.global_step, float(self.state.epoch or 0)
        within = not (epoch.is_integer() and not self.step_state.epoch_ended)
        if self.pauses is not None and within and step < self.state.max_steps and self.pauses(step):
            self.paused, self.saved_to_pause = True, self.saved_step != step
            self.save_once(model, trial)
            raise LeftEarly

    def save_once(self, model: Any, trial: Any) -> None:
        """A checkpoint of this step, unless there is one."""
        if self.saved_step != self.state.global_step:
            self.saves_extra = True
            self._save_checkpoint(model, trial)
            self.saves_extra = False
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def may_be_best(self, checkpoint: Path) -> bool:
        """Not one that was asked for: the run would not have it if nobody had asked."""
        path, is_this = checkpoint / FILE, checkpoint.name == f"checkpoint-{self.state.global_step}"
        is_extra = path.is_file() and json.loads(path.read_text()).get("is_extra", False)
        return not (self.saves_extra if is_this else is_extra)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.saved_step = self.state.global_step
        self.last_checkpoint = str(Path(self._get_output_dir(trial), f"checkpoint-{self.saved_step}"))

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        if self.agreed() is Request.STOP:
            self.save_once(self.model_wrapped, trial)
            raise LeftEarly
        return super()._finalize_training(trial, *args, **kwargs)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """The evaluation of a step, which is as if it had not begun where it is left."""
        if skip_scheduler and self.resumed_from is not None:
            return {}  # `eval_on_start`: the run started long ago
        with self.undone_if_left():
            if not skip_scheduler and self.request_of_step() is Request.STOP:
                raise LeftEarly
            return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    @contextmanager
    def undone_if_left(self) -> Iterator[None]:
        """May be left meanwhile; then rows, callbacks and random numbers are what they were before."""
        num_rows, random = len(self.state.log_history), rng_state(self.args.device, every_device=True)
        callbacks: list[Any] = [c for c in self.callback_handler.callbacks if isinstance(c, ExportableState)]
        attributes = [deepcopy(callback.state().get("attributes", {})) for callback in callbacks]
        self.may_leave = True
        try:
            yield
        except LeftEarly:
            del self.state.log_history[num_rows:]
            set_rng_state(random, self.args.device)
            for callback, values in zip(callbacks, attributes, strict=True):
                vars(callback).update(values)
            raise
        finally:
            self.may_leave = False

    # -- resuming ------------------------------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            state = asdict(self.step_state) | {"is_extra": self.saves_extra}
            write_file(Path(output_dir, FILE), json.dumps(state, default=float))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (path := Path(checkpoint, FILE)).is_file():
            self.resumed_state = Unfinished(**json.loads(path.read_text()))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """After what was taken up at the resume, the random numbers go on from there."""
        if self.rng_after_resume is None:
            super()._load_rng_state(checkpoint)
        else:
            set_rng_state(self.rng_after_resume, self.args.device)
            self.rng_after_resume = None

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        """Nothing where the run had come to its end before it was resumed."""
        if self.stopped_at_resume:
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)

    @property
    def evaluates_again(self) -> bool:
        """Whether the run goes on from a step whose evaluation was left."""
        return self.resumed_state is not None and self.resumed_state.evaluate

    def take_up(self) -> None:
        """What the step of the checkpoint had yet to do."""
        state, step, epoch = self.resumed_state, self.state.global_step, float(self.state.epoch or 0)
        self.begun, self.may_leave = True, False
        if self.resumed_from is None or step == 0:
            return
        self.saved_step = step
        at_end = step >= self.state.max_steps
        if state is not None and (state.evaluate or (not state.epoch_ended and (at_end or epoch.is_integer()))):
            self._load_rng_state(self.resumed_from)
            self.finish_step(state, int(epoch))
            self.rng_after_resume = rng_state(self.args.device, every_device=True)
        self.stopped_at_resume = at_end or self.control.should_training_stop

    def finish_step(self, state: Unfinished, epoch: int) -> None:
        """Evaluation, checkpoint and the epoch's end, in the order of a run that was not interrupted."""
        self.step_state = Unfinished(epoch_ended=state.epoch_ended)
        rest: tuple[Any, ...] = (self.model_wrapped, self.trial_of_run, epoch, self.ignored_keys, time.time())
        norm, rate = state.grad_norm, state.learning_rate
        self.control.should_log, self.control.should_evaluate = False, state.evaluate
        self.control.should_save = state.evaluate and state.save
        self._maybe_log_save_evaluate(self._tr_loss, norm, *rest, learning_rate=rate)
        if not state.epoch_ended:
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            self._maybe_log_save_evaluate(self._tr_loss, norm, *rest, learning_rate=rate)


class StepBoundaries(TrainerCallback):
    """Tells the trainer where the loop is; the last of its callbacks."""

    def __init__(self, trainer: InterruptibleTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.take_up()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.step_state = Unfinished(epoch_ended=False)

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.step_state = Unfinished(epoch_ended=True)
