"""What follows the policy, before a run and in its checkpoints: TR-DPO's or BEMA's reference, and BEMA's average."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from prefopt.checkpoints.tensors import read_tensors, write_tensors
from prefopt.reference import ModelReference, Precomputed
from prefopt.reference.policy import AdapterOff, StartingWeights
from prefopt.trainer.callbacks import BEMACallback, SyncReferenceCallback, updates_reference
from prefopt.trainer.evaluation import EvaluatingTrainer
from prefopt.trainer.saving.sharded_states import whole_state

__all__ = ["MovingTrainer", "has_reference_logps"]

logger = logging.getLogger(__name__)

REFERENCE_FILE = "reference.safetensors"
"""The reference's weights, where only a checkpoint has them."""
AVERAGE_FILE = "bema_{}.safetensors"
"""The average of each `BEMACallback`, by its number."""


class MovingTrainer(EvaluatingTrainer):
    """Hands the reference to the callbacks that move it, and keeps what they have made of it in checkpoints."""

    @property
    def moving_reference(self) -> ModelReference | None:
        """The reference, where it moves."""
        return self.model_reference if self.reference_updates else None

    @property
    def kept_reference(self) -> ModelReference | None:
        """The reference, where only a checkpoint has it: it moves, or began with an adapter's random numbers."""
        own = self.model_reference
        return own if self.reference_updates or isinstance(own, StartingWeights) else None

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.begin_moving()
        return super()._inner_training_loop(*args, **kwargs)

    def begin_moving(self) -> None:
        """The callbacks get the reference of this run.

        Raises:
            ValueError: it moves, but was not made for it.
        """
        options, callbacks = self.args, self.callback_handler.callbacks
        own: Any = self.model_reference
        if getattr(options, "sync_ref_model", False) and not any(
            isinstance(c, SyncReferenceCallback) for c in callbacks
        ):
            self.add_callback(SyncReferenceCallback(own, options))
        self.reference_updates = updates_reference(options, callbacks)
        sets = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        self.refuse_given_logps(self.train_dataset, *sets)
        if self.reference_updates and isinstance(own, AdapterOff):
            raise ValueError(
                "The reference is the policy with its adapter off, which has no weights of its own to move. Give "
                "`BEMACallback(update_ref_model=True)` to the trainer's constructor, in `callbacks`: it then makes a "
                "copy of the adapter."
            )
        for callback in callbacks:
            if isinstance(callback, SyncReferenceCallback | BEMACallback):
                callback.reference = own

    def refuse_given_logps(self, *sets: Any) -> None:
        """Log-probs that were computed beforehand do not go with a reference that moves.

        Raises:
            ValueError: one of ``sets`` brings them, or ``precompute_ref_log_probs`` asks for them, and it moves.
        """
        given = isinstance(self.reference, Precomputed) or any(map(has_reference_logps, sets))
        if self.reference_updates and given:
            raise ValueError(
                "The reference moves during training (`sync_ref_model`, or BEMA's `update_ref_model`), so log-probs "
                "that were computed beforehand are those of a reference that is left behind. Leave "
                "`precompute_ref_log_probs` and the columns `ref_chosen_logps` and `ref_rejected_logps` out."
            )

    def averages(self) -> Iterator[tuple[str, BEMACallback]]:
        """Each `BEMACallback`, and the name of its file in a checkpoint."""
        found = (callback for callback in self.callback_handler.callbacks if isinstance(callback, BEMACallback))
        for number, callback in enumerate(found):
            yield AVERAGE_FILE.format(number), callback

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.kept_reference is not None:
            self.save_weights(self.kept_reference.weights(), Path(output_dir, REFERENCE_FILE))
        for name, callback in self.averages():
            self.save_weights(callback.state_dict(), Path(output_dir, name))

    def weights_beside(self) -> Iterable[Tensor]:
        """The reference, where only a checkpoint has it."""
        return [] if self.kept_reference is None else self.kept_reference.weights().values()

    def save_weights(self, weights: Mapping[str, Tensor], path: Path) -> None:
        """Write weights that may be divided among ranks; collective."""
        whole = whole_state(dict(weights), keep=self.args.should_save)
        if self.args.should_save:
            write_tensors(whole, path)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self.load_reference(self.kept_reference, checkpoint)
        for name, callback in self.averages():
            if (path := Path(checkpoint, name)).is_file():
                callback.load_state_dict(read_tensors(path))
            else:
                logger.warning("%s has no %s: BEMA's average begins with this run.", checkpoint, name)

    def _load_best_model(self) -> None:
        """With the best policy comes the reference that it was compared with."""
        super()._load_best_model()
        self.load_reference(self.moving_reference, self.state.best_model_checkpoint)  # type: ignore[arg-type]

    def load_reference(self, reference: ModelReference | None, folder: str) -> None:
        """Give a reference the weights that a checkpoint has of it; one that did not move there stays as given."""
        if reference is None:
            return
        if (path := Path(folder, REFERENCE_FILE)).is_file() or not self.changes:
            reference.load_weights(read_tensors(path))
        else:
            logger.warning("%s is of a run whose reference did not move: it begins as it was given.", folder)


def has_reference_logps(rows: Any) -> bool:
    """Whether a prepared set brings reference log-probs."""
    return "ref_chosen_logps" in (getattr(rows, "column_names", None) or ())
