"""The log of a run: the metrics of its steps, over all ranks, and over a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from prefopt.files import write_file
from prefopt.objective import Objective
from prefopt.trainer.saving.checkpointing import CheckpointingTrainer
from prefopt.trainer.window import LogWindow

__all__ = ["LoggingTrainer"]

STATE_FILE = "prefopt_state.json"


class LoggingTrainer(CheckpointingTrainer):
    """Adds the metrics of a `LogWindow` to the rows, and keeps the running sums in checkpoints."""

    accelerator: Any
    preference: Objective

    def start_window(self) -> None:
        """Set up what is kept between steps; called once, after the constructor of transformers' trainer."""
        self.window = LogWindow()
        self.resumed_log: dict[str, Any] | None = None
        self.add_callback(ContinueLog(self))

    def sum_over_ranks(self, table: Tensor) -> Tensor:
        return self.accelerator.reduce(table, reduction="sum") if self.args.world_size > 1 else table  # type: ignore[return-value]

    def flushed_window(self) -> dict[str, float]:
        """The metrics since the last row, over all ranks; they begin anew."""
        return self.window.flush(self.sum_over_ranks)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Training rows, and the summary at the end, get the metrics since the row before."""
        if "loss" in logs or "train_loss" in logs:
            logs.update(self.flushed_window())
        super().log(logs, start_time)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state = {
            "window": self.window.state(self.sum_over_ranks),
            "loss_since_log": self.sum_over_ranks(self._tr_loss.detach().clone()).item() / self.args.world_size,
            "total_loss": self._total_loss_scalar,
            "last_logged_step": self._globalstep_last_logged,
            "reward_shift": shift.state_dict() if (shift := self.preference.reward_shift) else None,
        }
        if self.args.should_save:
            write_file(Path(output_dir, STATE_FILE), json.dumps(state, indent=1))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (path := Path(checkpoint, STATE_FILE)).is_file():
            self.resumed_log = json.loads(path.read_text())

    def continue_log(self) -> None:
        """The running sums of the loss and the metrics, as they were when the checkpoint was made; none without one."""
        state, self.resumed_log = self.resumed_log, None
        if state is None:
            self.window = LogWindow()  # not what a run before it had gathered when it failed
            return
        self.window = LogWindow.restored(state["window"], self.args.device, keep_sums=self.args.process_index == 0)
        self._tr_loss.fill_(state["loss_since_log"])
        self._total_loss_scalar = state["total_loss"]
        self._globalstep_last_logged = state["last_logged_step"]
        self._initial_global_step = 0  # the total covers the run from its start, and so must the number of steps
        if self.preference.reward_shift is not None:
            self.preference.reward_shift.load_state_dict(state["reward_shift"])


class ContinueLog(TrainerCallback):
    """Transformers sets its running loss to zero when training begins; what a checkpoint kept goes in after that."""

    def __init__(self, trainer: LoggingTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.continue_log()
