"""A pass for which memory runs out is done again in smaller micro-batches: steps, evaluation, the reference's pass."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from prefopt.checkpoints.rng import rng_state, set_rng_state
from prefopt.files import write_file
from prefopt.reference.adapters import is_peft
from prefopt.reference.policy import SeparateModel
from prefopt.trainer.guards.out_of_memory import (
    FailedElsewhereError,
    MicroBatchCut,
    MicroBatchMemoryError,
    first_line,
    is_out_of_memory,
    until_it_fits,
)
from prefopt.trainer.loader import Collate
from prefopt.trainer.steps import StepTrainer
from prefopt.types import OptimizerStep

__all__ = ["RetryingTrainer"]

Result = TypeVar("Result")

FILE = "micro_batches.json"
"""In a checkpoint: how fine the micro-batches were cut, and of what size they had been."""


class RetryingTrainer(StepTrainer):
    """Undoes a step that failed for want of memory, on all ranks alike, and does it again in smaller micro-batches.

    How fine the micro-batches are cut stays for the rest of the run, and is kept in checkpoints.
    """

    new_collate: Callable[..., Collate]
    """What makes batches of rows, with ``padded=True`` in the layout that has logits."""

    def start_window(self) -> None:
        super().start_window()
        self.train_cut, self.eval_cut = MicroBatchCut(self.memory_advice), MicroBatchCut(self.memory_advice)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See ``transformers.Trainer.train``; a run begins with micro-batches as its options say."""
        self.train_cut.parts = self.eval_cut.parts = 1
        return super().train(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The step, as often as it takes until it fits; see `StepTrainer.training_step`."""
        self.begin_step()
        attempt = functools.partial(self.attempt_step, model)
        if self.is_divided and self.args.auto_find_batch_size:
            return super().training_step(model, inputs)  # transformers starts the run anew with a smaller step
        what = f"step {self.state.global_step + 1}"
        return until_it_fits(attempt, what, inputs, self.train_cut, self.new_collate, self.undo_step)

    def in_fitting_batches(
        self,
        attempt: Callable[[OptimizerStep], Result],
        what: str,
        step: OptimizerStep,
        collate: Callable[[], Collate],
    ) -> Result:
        """What ``attempt`` gives of a step without gradients, for which no rank waits meanwhile.

        Args:
            attempt: computes the step.
            what: is computed, as a message says it.
            step: as the loader made it.
            collate: gives what makes batches of rows, as the loader's.
        """
        if self.is_divided:
            return attempt(step)
        return until_it_fits(attempt, what, step, self.eval_cut, collate)

    def begin_step(self) -> None:
        """Keep what a failed attempt at the step, or one that is left out, must not change."""
        shift = self.preference.reward_shift
        self.shift_before = None if shift is None else dict(vars(shift))
        self.random_before = rng_state(self.args.device, every_device=False)

    def undo_step(self) -> None:
        """The state before the step: generators, reward shift, no gradients."""
        set_rng_state(self.random_before, self.args.device)
        self.undo_shift()
        self.model.zero_grad(set_to_none=True)

    def undo_shift(self) -> None:
        if self.shift_before is not None:
            vars(self.preference.reward_shift).update(self.shift_before)

    def attempt_step(self, model: nn.Module, step: OptimizerStep) -> Tensor:
        """The passes of a step; where memory runs out on one rank, all ranks leave their attempts."""
        try:
            return super().training_step(model, step)
        except Exception as error:
            if is_out_of_memory(error) and not isinstance(error, FailedElsewhereError):
                self.leave_attempt(error)
            raise

    def leave_attempt(self, error: Exception) -> None:
        """Tell the other ranks that this one cannot go on.

        Raises:
            MicroBatchMemoryError: they wait for this rank's part of something, and cannot be told.
        """
        if self.is_divided or (self.exchanging and self.args.world_size > 1):
            reason = "the ranks divide the model" if self.is_divided else "the ranks were exchanging gradients"
            raise MicroBatchMemoryError(
                f"Memory ran out in step {self.state.global_step + 1} ({first_line(error)}) while {reason}, so that "
                f"this rank cannot do it again in smaller micro-batches by itself. {self.smaller_batches()} "
                f"{self.memory_advice()}"
            ) from None
        self.agree_to_go_on(failed=True)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    @property
    def batch_options(self) -> dict[str, Any]:
        """What decides the size of a micro-batch that is not cut."""
        names = ("per_device_train_batch_size", "tokens_per_batch", "max_length")
        return {name: getattr(self.args, name) for name in names}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            content = {"parts": self.train_cut.parts, **self.batch_options}
            write_file(Path(output_dir, FILE), json.dumps(content))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """A resumed run cuts as finely, unless it asks for other micro-batches."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (path := Path(checkpoint, FILE)).is_file():
            kept = json.loads(path.read_text())
            parts = kept.pop("parts")
            self.train_cut.parts = parts if kept == self.batch_options else 1

    # -- messages ------------------------------------------------------------------------------------------------

    def smaller_batches(self) -> str:
        """How to ask for smaller micro-batches, with the same pairs per step."""
        args = self.args
        if args.tokens_per_batch is not None:
            return f"Set tokens_per_batch={max(1, args.tokens_per_batch // 2)}."
        if (size := self._train_batch_size) > 1:
            smaller = max(part for part in range(1, size) if size % part == 0)
            return (
                f"Set per_device_train_batch_size={smaller}, gradient_accumulation_steps="
                f"{size // smaller * self.accumulation}."
            )
        return "A micro-batch has one pair already."

    def memory_advice(self) -> str:
        """What would need less memory and is not on yet."""
        args: Any = self.args
        reference = self.model_reference
        options = [
            ("gradient_checkpointing=True", not args.gradient_checkpointing),
            ("a LoRA adapter (`peft_config`)", not is_peft(self.model)),
            ("precompute_ref_log_probs=True", isinstance(reference, SeparateModel) and not self.reference_updates),
            (f"a `max_length` below {args.max_length}", args.max_length is not None),
            ("`max_length`", args.max_length is None),
            ("layout='shared_prompt'", args.batch_layout not in ("auto", "shared_prompt")),
            ("activation_offloading=True", not args.activation_offloading and args.device.type != "cpu"),
            ("optim='adamw_8bit'", args.device.type == "cuda" and "8bit" not in args.optim),
        ]
        return f"What needs less memory: {', '.join(name for name, is_open in options if is_open)}."
