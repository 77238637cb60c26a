"""Checkpoints that are whole or not there: written beside, vouched for, put in place; the newest good one is found."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch import Tensor
from transformers.trainer_callback import ExportableState

from prefopt.checkpoints.folder import (
    FolderInUseError,
    NoLocksError,
    checkpoints_of,
    final_folder,
    held,
    origin,
    put_in_order,
    put_in_place,
    rotate,
    staging_folder,
)
from prefopt.checkpoints.manifest import faults
from prefopt.checkpoints.publish import install, staged_model
from prefopt.checkpoints.space import checkpoint_bytes, free_bytes, in_words
from prefopt.files import remove_tree
from prefopt.reference.adapters import is_peft
from prefopt.trainer.config import PreferenceConfig
from prefopt.trainer.saving.continuation import (
    Beginning,
    begun,
    check_continuation,
    foreign_checkpoint,
    load_foreign_weights,
    write_continuation,
)
from prefopt.trainer.saving.new_settings import new_settings_acting
from prefopt.trainer.saving.resuming import STATE_FILE, chosen_checkpoint, from_main, raise_together
from prefopt.trainer.saving.states import StatesTrainer

__all__ = ["CheckpointNotWrittenError", "CheckpointingTrainer"]

logger = logging.getLogger(__name__)


class CheckpointNotWrittenError(RuntimeError):
    """A checkpoint could not be written; what there was of it is removed, and the last good one is as it was."""


class CheckpointingTrainer(StatesTrainer):
    """Saves and finds checkpoints: at every moment, once one was written, a good one is on the disk.

    What is in a checkpoint is `StatesTrainer`'s affair; here is the folder. All ranks write into one beside. The main
    process (of each node, with ``save_on_each_node``) makes it last, vouches for its files in a manifest, renames it.
    """

    args: PreferenceConfig
    staging: Path | None = None
    """The folder that a checkpoint is being written to."""
    run_id: str = ""
    """By which its checkpoints are known among those of other runs in one folder; a run that goes on keeps it."""
    beginning: Beginning | None = None
    """What the run began with, while it goes on."""
    changes: Mapping[str, tuple[Any, Any]] = {}
    """What differs from the run that this one continues, where that is allowed: as it was, as it is."""
    starts_from: str | None = None
    """The checkpoint of another library whose weights the next run begins with."""

    # -- going on ------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, trial: Any = None, *args: Any, **kwargs: Any) -> Any:
        """See ``transformers.Trainer.train``.

        Args:
            resume_from_checkpoint: True goes on from the newest good checkpoint of the run, and begins where there is
                none at all; a folder goes on from that one, or from the newest good one in it.
            trial: of a hyperparameter search.
            args, kwargs: transformers' others.

        Raises:
            ValueError: the checkpoint is damaged, or all are; or it is one of another run.
            FolderInUseError: another process writes its checkpoints to the same folder.
        """
        run, self.beginning = Path(self._get_output_dir(trial)), None
        with self.holding(run):
            folder = chosen_checkpoint(self.args, resume_from_checkpoint, run)
            if folder is not None and foreign_checkpoint(folder):
                load_foreign_weights(self, folder)
                folder = None
            elif folder is not None:
                check_continuation(self, folder)
                if self.is_world_process_zero():
                    logger.info("The run goes on from %s.", folder)
            came = None if folder is None else origin(Path(folder))
            self.run_id = from_main((came and came[1]) or uuid4().hex)
            return super().train(folder, trial, *args, **kwargs)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        with begun(self):
            return super()._inner_training_loop(*args, **kwargs)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        found = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)  # a checkpoint brings the intervals that it was written with
        return found

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with new_settings_acting(self.optimizer, self.lr_scheduler, {} if checkpoint is None else self.changes):
            super()._load_optimizer_and_scheduler(checkpoint)

    @contextmanager
    def holding(self, run: Path) -> Iterator[None]:
        """No other process writes checkpoints to ``run``, and what a killed one has left there is put in order."""
        if self.args.save_strategy == "no":
            yield
            return
        with ExitStack() as stack:
            problem = self.taken(run, stack) if self.args.should_save else None
            raise_together(problem, FolderInUseError)
            yield

    def taken(self, run: Path, stack: ExitStack) -> str | None:
        """Lock ``run`` until ``stack`` ends; returns what forbids it."""
        try:
            stack.enter_context(held(run))
        except FolderInUseError as error:
            return str(error)
        except NoLocksError as error:
            logger.warning("%s: start no second run that writes there, nothing would refuse it.", error)
            return None
        put_in_order(run)
        return None

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        problem = self.lack_of_space() if self.args.should_save and self.args.save_strategy != "no" else None
        raise_together(problem, OSError)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def lack_of_space(self) -> str | None:
        """Why checkpoints will not go on the disk: the next one beside the one that must stay; None where they will."""
        args, state, run = self.args, self.state, Path(str(self.args.output_dir))
        beside = [] if args.save_only_model else list(self.weights_beside())
        names, adapter = self.optimizer_names(), is_peft(self.model)
        one = min(checkpoint_bytes(self.model, name, beside, adapter=adapter) for name in names)
        steps = max(1, state.max_steps - state.global_step)
        times = (
            -(-steps // state.save_steps) if args.save_strategy == "steps" and state.save_steps else 2
        )  # last step too
        num_needed = max(1, min(2, times) - len(checkpoints_of(run, self.run_id)))
        free = free_bytes(run)
        if num_needed * one <= free:
            return None
        return (
            f"{run} has {in_words(free)} free, and a checkpoint takes at least {in_words(one)}"
            + (f"; {num_needed} of them must fit, as one stays until the next is whole" if num_needed > 1 else "")
            + ". Nothing was trained. Make room, choose an `output_dir` on another disk, or write smaller ones "
            "(`save_only_model`, adapters)."
        )

    def optimizer_names(self) -> list[str | None]:
        """What the optimizer may be called: as an option, and by its class where the user gave it."""
        given = getattr(self.optimizer, "optimizer", self.optimizer)
        if self.args.save_only_model:
            return [None]
        return [str(self.args.optim), *([] if given is None else [type(given).__name__])]

    def weights_beside(self) -> Iterable[Tensor]:
        """What a checkpoint holds beside the model's own weights and the optimizer's."""
        return ()

    # -- saving --------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run, step = Path(self._get_output_dir(trial)), self.state.global_step
        final, best = final_folder(run, step), final_folder(run, self.state.best_global_step or -1)
        if (best == final or best in checkpoints_of(run, self.run_id)) and self.may_be_best(best):
            self.state.best_model_checkpoint = str(best)
        with self.whole_or_not_at_all(run, step):
            self.write_checkpoint(staging_folder(run, step))
            if self.args.should_save:
                put_in_place(staging_folder(run, step), final, step, self.run_id)
                rotate(run, self.run_id, self.args.save_total_limit, self.kept(final))
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def may_be_best(self, checkpoint: Path) -> bool:
        """Whether the checkpoint of the best evaluation, there already or about to be, counts as the best."""
        return True

    def write_checkpoint(self, folder: Path) -> None:
        """All ranks write what a checkpoint holds, to a folder that nobody looks at yet."""
        if self.args.should_save:
            remove_tree(folder)
            folder.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.staging = folder
        self.save_model(str(folder), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
        write_continuation(self, str(folder))
        if self.args.should_save:
            self.state.stateful_callbacks = self.callback_states()  # type: ignore[assignment]
            self.state.save_to_json(os.path.join(folder, STATE_FILE))
        self.accelerator.wait_for_everyone()

    def callback_states(self) -> dict[str, Any]:
        """The states of callbacks by class, of several of one class a list."""
        states: dict[str, list[Any]] = {}
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, []).append(callback.state())
        return {name: found if len(found) > 1 else found[0] for name, found in states.items()}

    @contextmanager
    def whole_or_not_at_all(self, run: Path, step: int) -> Iterator[None]:
        """What fails while a checkpoint is written leaves nothing of it, and stops the run with what there is to do."""
        try:
            yield
        except BaseException as error:
            with suppress(OSError):  # what failed once may fail again, and the next start puts the folder in order too
                if self.args.should_save:  # other ranks know nothing of where a save is
                    remove_tree(staging_folder(run, step))
                    put_in_order(run)
            if is_of_the_disk(error):
                raise CheckpointNotWrittenError(self.not_written(run, step, error)) from error
            raise
        finally:
            self.staging = None

    def not_written(self, run: Path, step: int, error: BaseException) -> str:
        good = next((path for path in checkpoints_of(run, self.run_id) if not faults(path)), None)
        return (
            f"Step {step}: the checkpoint could not be written to {final_folder(run, step)}: "
            f"{error}. {in_words(free_bytes(run))} are free there. What was written of it is "
            f"removed; {f'the last good checkpoint is {good}' if good else 'there is no checkpoint yet'}. The run "
            "stops here. Make room (`save_total_limit` keeps fewer checkpoints), then go on with "
            "`resume_from_checkpoint=True`."
        )

    def kept(self, *folders: Path) -> list[Path]:
        """``folders`` and the best checkpoint."""
        return [*folders, *([Path(best)] if (best := self.state.best_model_checkpoint) else [])]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """See ``transformers.Trainer.save_model``; a model that is there is replaced by a whole one."""
        folder = Path(output_dir or str(self.args.output_dir))
        if folder == self.staging:
            super().save_model(str(folder), _internal_call=True)
            return
        staged = staged_model(folder)
        if self.args.should_save:
            remove_tree(staged)
        super().save_model(str(staged), _internal_call=True)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # all ranks write; under DDP one may be called alone
            self.accelerator.wait_for_everyone()
        if self.args.should_save and staged.is_dir():
            install(staged, folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    # -- the end -------------------------------------------------------------------------------------------------

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        """The best checkpoint is looked at before it is loaded, and before the others go in its favour."""
        best = self.state.best_model_checkpoint
        found = faults(best) if best is not None and self.args.should_save else []
        if self.args.load_best_model_at_end:
            raise_together(
                f"The best checkpoint, {best}, is damaged: {'; '.join(found)}. It is not loaded. The model as training "
                "left it is in the last checkpoint; with `load_best_model_at_end=False` and "
                "`resume_from_checkpoint=True` the run ends with that one."
                if found
                else None,
                ValueError,
            )
        limit = self.args.save_total_limit
        self.args.save_total_limit = None  # 1 would delete by name, whatever is whole
        try:
            output = super()._finalize_training(trial, *args, **kwargs)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save and self.args.save_strategy != "no" and not found:
            rotate(Path(self._get_output_dir(trial)), self.run_id, limit, self.kept())
        return output


def is_of_the_disk(error: BaseException) -> bool:
    """Whether the system could not write; libraries in Rust have errors of their own, which quote the system's."""
    return isinstance(error, OSError) or "(os error " in str(error)
