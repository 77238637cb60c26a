"""What a checkpoint keeps of a run: weights, optimizer, scheduler, random numbers. Nothing of it is pickled."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from prefopt import files
from prefopt.checkpoints.manifest import write_manifest
from prefopt.checkpoints.rng import rng_state, seed_rng, set_rng_state
from prefopt.checkpoints.tensors import has_state, read_state, write_state
from prefopt.reference.adapters import is_peft
from prefopt.trainer.saving.adapter_files import load_adapter_weights, save_ranks
from prefopt.trainer.saving.continuation import write_arguments
from prefopt.trainer.saving.new_settings import begin_schedule, has_new_schedule
from prefopt.trainer.saving.pushing import push_checkpoint, push_run
from prefopt.trainer.saving.sharded_states import (
    OPTIMIZER,
    load_sharded,
    save_sharded,
    taking_whole_weights,
    use_whole_weights,
    whole_state,
    without_copies,
)
from prefopt.trainer.saving.weight_files import load_weights
from prefopt.trainer.versions import saving_here

__all__ = ["StatesTrainer"]

logger = logging.getLogger(__name__)

SCHEDULER, SCALER, RNG = "scheduler", "scaler", "rng_{}"
"""Names of states in a checkpoint; random numbers by rank."""


class StatesTrainer(Trainer):
    """Writes and reads the states of a run as safetensors and JSON, exactly as they were.

    DeepSpeed writes its own files, by its own means.
    """

    args: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any
    accelerator: Any
    another_optimizer: bool = False
    """Whether the optimizer is of another kind than the checkpoint's, which was allowed."""
    changes: Mapping[str, tuple[Any, Any]] = {}
    """What differs from the run that this one continues, where that is allowed: as it was, as it is."""

    # -- weights -------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The model for ``from_pretrained``, whole wherever ranks divide it."""
        use_whole_weights(self.accelerator)
        if self.is_fsdp_enabled:  # transformers gives it to one rank alone, and with `save_on_each_node` several write
            state = whole_state(get_model_state_dict(self.model), keep=self.args.should_save)
            self._save(output_dir, state_dict=state)
        else:
            super().save_model(output_dir, _internal_call)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        use_whole_weights(self.accelerator)  # what cannot be saved so is refused before the first step
        return super()._prepare_for_training(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The model or its adapters, what prepares its inputs, and the options."""
        writes, folder = self.args.should_save, output_dir or self.args.output_dir
        if not writes and not getattr(self, "is_distributed_loading_by_transformers", False):
            return  # other ranks are needed where each has a part of the model
        if writes:
            Path(folder).mkdir(parents=True, exist_ok=True)
            logger.debug("Saving the model to %s", folder)
            files.announce("write", Path(folder, "model"))
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if state_dict is not None:
            state_dict = without_copies(model, state_dict)
        with saving_here(model):
            model.save_pretrained(folder, state_dict=state_dict, is_main_process=writes)
        if writes:
            save_ranks(model, state_dict, folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)  # type: ignore[union-attr]
            write_arguments(self.args, folder)

    def load_saved_weights(self, folder: str | Path) -> None:
        """Give the policy the weights of a checkpoint, or its adapters theirs.

        Raises:
            ValueError: they are pickled, or those of another model.
        """
        with taking_whole_weights(self.model) if self.is_fsdp_enabled else nullcontext():
            (load_adapter_weights if is_peft(self.model) else load_weights)(self.model, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.load_saved_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            logger.info("Loading the best model: %s", self.state.best_model_checkpoint)
            self.load_saved_weights(self.state.best_model_checkpoint)  # type: ignore[arg-type]

    # -- optimizer, scheduler, scaler ----------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.is_fsdp_enabled:
            save_sharded(self, output_dir)
        elif self.args.should_save:
            write_state(self.optimizer.state_dict(), output_dir, OPTIMIZER)
        if self.args.should_save:
            write_state(without_code(self.lr_scheduler.state_dict()), output_dir, SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if not (has_state(checkpoint, OPTIMIZER) and has_state(checkpoint, SCHEDULER)):
            raise ValueError(
                f"{checkpoint} has a model and no state of the optimizer and the learning rate, as with "
                "`save_only_model`: a run cannot be continued from it. Start a new run from its weights: give the "
                "folder as the model, and leave `resume_from_checkpoint` out."
            )
        if self.another_optimizer:
            logger.warning("The optimizer is another one than the checkpoint's: what that one had learnt is left out.")
        elif self.is_fsdp_enabled:
            load_sharded(self, checkpoint)
        else:
            load_exactly(self.optimizer, read_state(checkpoint, OPTIMIZER))
        schedule = read_state(checkpoint, SCHEDULER)
        if has_new_schedule(self.changes) and schedule.keys() != without_code(self.lr_scheduler.state_dict()).keys():
            begin_schedule(self.lr_scheduler, Path(checkpoint, TRAINER_STATE_NAME))
        else:
            self.lr_scheduler.load_state_dict(schedule)

    @property
    def scaler(self) -> Any:
        """What scales the loss of a float16 run; None for others."""
        return getattr(self.accelerator, "scaler", None)

    def _save_scaler(self, output_dir: str) -> None:
        if self.scaler is not None and self.args.should_save:
            write_state(self.scaler.state_dict(), output_dir, SCALER)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.scaler is not None and has_state(checkpoint, SCALER):
            self.scaler.load_state_dict(read_state(checkpoint, SCALER))

    # -- random numbers ------------------------------------------------------------------------------------------

    def _save_rng_state(self, output_dir: str) -> None:
        """Each rank its own, into a folder that the first one may not have made yet."""
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        state = rng_state(self.args.device, every_device=self.args.world_size == 1)
        write_state(state, output_dir, RNG.format(self.args.process_index))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        rank, step = self.args.process_index, self.state.global_step
        if has_state(checkpoint, RNG.format(rank)):
            set_rng_state(read_state(checkpoint, RNG.format(rank)), self.args.device)
            return
        seed_rng(self.args.seed, rank, step)
        logger.warning(
            "%s was written without rank %d: its random numbers (dropout) are seeded by seed %d, the rank and step %d.",
            *(checkpoint, rank, self.args.seed, step),
        )

    # -- elsewhere -----------------------------------------------------------------------------------------------

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        push_checkpoint(self, checkpoint_folder)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """See ``transformers.Trainer.push_to_hub``; what shows text of the data is not sent."""
        return push_run(self, commit_message or "End of training", blocking, token, revision, private, kwargs)

    def _tune_save_checkpoint(self, checkpoint_dir: str) -> None:
        """A trial's checkpoint for Ray."""
        folder = str(Path(checkpoint_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"))
        self.save_model(folder, _internal_call=True)
        self._save_optimizer_and_scheduler(folder)
        self._save_scaler(folder)
        self._save_rng_state(folder)
        if self.args.should_save:
            callbacks: Any = self.state.stateful_callbacks
            callbacks["TrainerControl"] = self.control.state()
            self.state.save_to_json(str(Path(folder, TRAINER_STATE_NAME)))
            write_manifest(folder, self.state.global_step)


def without_code(state: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's state without its functions, which the run that reads it brings along."""
    return {name: value for name, value in state.items() if not callable(value)}


def load_exactly(optimizer: Any, state: dict[str, Any]) -> None:
    """``optimizer.load_state_dict``, with every tensor in the type that it had.

    Torch turns the tensors of a state into the type of the weight, and some optimizers keep float32 of half weights.
    """
    optimizer.load_state_dict(state)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entries in state.get("state", {}).items():  # a user's optimizer may name its parts otherwise
        loaded = optimizer.state[parameters[index]]
        for name, value in entries.items():
            found = loaded.get(name)
            if isinstance(value, Tensor) and isinstance(found, Tensor) and found.dtype != value.dtype:
                loaded[name] = value.to(found.device)
