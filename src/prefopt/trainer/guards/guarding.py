"""A number that is none stops a step before it reaches the weights, the log or a checkpoint."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import TrainerCallback

from prefopt.scoring.forward import innermost
from prefopt.trainer.guards.divergence import divergence
from prefopt.trainer.guards.dump import write_dump
from prefopt.trainer.guards.nonfinite import Finding, NonFiniteStepError, all_finite, describe, not_finite
from prefopt.trainer.guards.out_of_memory import in_parts
from prefopt.trainer.guards.retrying import RetryingTrainer
from prefopt.trainer.sharding import gathered

__all__ = ["GuardedTrainer"]

logger = logging.getLogger(__name__)

MOST_SKIPS = 10
"""Steps in a row that may be left out; a run that leaves out all of them has not succeeded."""
MOST_OVERFLOWS = 30
"""Steps in a row that the scaler of float16 may leave out: its scale of 2^16 is below all that float16 needs then."""
CHOSEN_TOKENS = "token_logps/chosen"
"""A metric of the window that is not logged."""
REMEMBERED = 20
"""Steps before the one that is not finite whose figures are written down."""
REQUESTS = (1, 2)
"""What a process may be asked from outside, beside nothing: a checkpoint, to stop."""


class GuardedTrainer(RetryingTrainer):
    """Asks once a step, and before weights are saved, whether all numbers are finite."""

    stop_requested: Callable[[], int]
    """What was asked of this process from outside: 0 nothing, 1 a checkpoint, 2 to stop."""
    agreed_request: int
    """The most that any rank was asked, as of the last step."""

    def start_window(self) -> None:
        super().start_window()
        self.add_callback(LeaveOut(self))

    def begin_guarding(self) -> None:
        """A run begins: what was seen of the one before, of another trial, does not count."""
        self.recent: deque[tuple[int, Tensor, Any]] = deque(maxlen=REMEMBERED)
        self.skips_in_a_row = self.overflows_in_a_row = 0
        self.has_diverged = False

    # -- the check -----------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """See `StepTrainer.training_step`; what a step that is left out must not change is kept."""
        running_loss: Any = self._tr_loss
        self.left_out, self.loss_before = False, running_loss.detach().clone()
        return super().training_step(model, inputs, num_items_in_batch)

    def clips_late(self, model: nn.Module) -> bool:
        """Whether gradients are clipped after the check. Clipped by a norm of NaN they would all be NaN."""
        return not self.is_divided and not any(isinstance(p, DTensor) for p in model.parameters())

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return None if self.clips_late(model) else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm of the gradient before it is clipped; the step is refused where it, or the loss, is not finite."""
        late = self.clips_late(model)
        if late:
            self.accelerator.unscale_gradients()
            norm: Any = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        else:
            norm = gathered(super()._get_grad_norm(model, grad_norm))
        loss_is_finite, norm_is_finite = self.agreed_finite(norm)
        overflows = not norm_is_finite and getattr(self.accelerator, "scaler", None) is not None
        self.overflows_in_a_row = self.overflows_in_a_row + 1 if overflows else 0
        if loss_is_finite and (norm_is_finite or 0 < self.overflows_in_a_row <= MOST_OVERFLOWS):
            self.accept_step(norm)
            if late and self.args.max_grad_norm > 0:
                clip_grads_with_norm_(model.parameters(), self.args.max_grad_norm, norm)
        else:
            self.refuse_step(model, norm, loss_is_finite, see_gradients=late)
        return norm

    def agreed_finite(self, norm: Any) -> tuple[bool, bool]:
        """Whether the loss and the gradient norm are finite on every rank; `agreed_request` is the most any was asked.

        One transfer to the host, and on several ranks one small collective.
        """
        losses = torch.stack(self.last_losses)
        bad_loss = ~losses.isfinite().all()
        bad_norm = ~torch.as_tensor(norm, device=losses.device).isfinite()
        self.agreed_request = self.stop_requested()
        if self.args.world_size == 1:
            code = int(bad_loss + 2 * bad_norm)
            return code % 2 == 0, code < 2
        asked = torch.tensor([float(self.agreed_request >= level) for level in REQUESTS], device=losses.device)
        table = torch.cat([torch.stack([bad_loss, bad_norm]).float(), asked])
        loss_count, norm_count, *asked_counts = self.sum_over_ranks(table).tolist()
        self.agreed_request = sum(count > 0 for count in asked_counts)
        return loss_count == 0, norm_count == 0

    def accept_step(self, norm: Any) -> None:
        """Take the step's figures into the log, and into the memory of the last ones."""
        self.skips_in_a_row = 0
        self.recent.append((self.state.global_step + 1, torch.stack(self.last_losses).sum(), norm))
        for values, batch in zip(self.last_values, self.last_step.micro_batches, strict=True):
            weights = batch.pair_weights[batch.layout.pair_index("chosen")]
            self.step_metrics.add(CHOSEN_TOKENS, values.chosen_tokens, weights)
        self.window.add(self.step_metrics)

    # -- a step that is not finite -------------------------------------------------------------------------------

    def refuse_step(self, model: nn.Module, norm: Any, loss_is_finite: bool, *, see_gradients: bool) -> None:
        """Write the step down, and stop or leave it out, as ``on_nonfinite`` says; collective.

        Raises:
            NonFiniteStepError: it is to stop, or too many were left out in a row.
        """
        step = self.state.global_step + 1
        finding = self.finding(model, loss_is_finite, see_gradients)
        findings = gather_object([finding])
        saved = self.dump(finding, norm)
        self.accelerator.wait_for_everyone()  # a launcher may end the other ranks when the first has raised
        message = describe(step, findings, loss_is_finite, float(norm), saved)
        self.skips_in_a_row += 1
        rows, folder = [row for one in findings for row in one.guilty_rows], saved if isinstance(saved, Path) else None
        if self.args.on_nonfinite == "stop" or any(one.weights for one in findings):  # no step mends weights
            raise NonFiniteStepError(message, step, rows, folder)
        if self.skips_in_a_row >= MOST_SKIPS:
            reason = f"{MOST_SKIPS} steps in a row were not finite, so that nothing is learned any more."
            raise NonFiniteStepError(f"{reason} The last one: {message}", step, rows, folder)
        logger.warning("%s Left out.", message)
        self.leave_step_out()

    def leave_step_out(self) -> None:
        """No update, no momentum, no weight decay, no figure in the log; the learning rate goes on with the step."""
        self.optimizer.zero_grad(set_to_none=True)
        self._tr_loss.copy_(self.loss_before)  # type: ignore[union-attr]
        self.undo_shift()
        self.window.count(skipped=True)
        if getattr(self.accelerator, "scaler", None) is None:  # the scaler must see the step, and leaves it out itself
            self.accelerator.gradient_state._set_sync_gradients(False)  # accelerate's optimizer does nothing then
            self.left_out = True

    def finding(self, model: nn.Module, loss_is_finite: bool, see_gradients: bool) -> Finding:
        """What this rank can tell of its pairs, its weights and their gradients."""
        batches = self.last_step.micro_batches
        pieces = [values.columns(batch) for values, batch in zip(self.last_values, batches, strict=True)]
        real = torch.cat([batch.pair_weights.cpu() > 0 for batch in batches])
        columns = {name: torch.cat([piece[name] for piece in pieces])[real] for name in pieces[0]}
        guilty = ~torch.stack([values.isfinite() for values in columns.values()]).all(0)
        rows = torch.tensor([row for batch in batches for row in batch.rows])[real]
        parameters = list(self.model.named_parameters())
        finding = Finding(
            columns,
            tuple(rows.tolist()),
            tuple(guilty.tolist()),
            not_finite(parameters),
            not_finite((name, p.grad) for name, p in parameters) if see_gradients else {},
        )
        if loss_is_finite and not finding.weights and self.can_try_pairs:
            return replace(finding, guilty=self.guilty_by_gradient(model))
        return finding

    @property
    def can_try_pairs(self) -> bool:
        """Whether the pairs of a step can be computed one by one on this rank alone."""
        return self.args.world_size == 1 and not self.is_divided and not self.preference.needs_whole_step

    def guilty_by_gradient(self, model: nn.Module) -> tuple[bool, ...]:
        """Which pairs have a gradient that is not finite when they are computed by themselves."""
        kept = self.last_step, self.last_losses, self.last_values, self.step_metrics
        pairs = in_parts(self.last_step, max(self.last_step.most_pairs), self.new_collate())
        guilty = []
        for batch, places, sources in zip(pairs.micro_batches, pairs.places, pairs.sources, strict=True):
            self.undo_step()
            alone = replace(pairs, micro_batches=(batch,), places=(places,), sources=(sources,), most_pairs=(1,))
            self.attempt_step(model, alone)
            guilty.append(bool(not_finite((name, p.grad) for name, p in model.named_parameters())))
        self.undo_step()
        self.last_step, self.last_losses, self.last_values, self.step_metrics = kept
        return tuple(guilty)

    def dump(self, finding: Finding, norm: Any) -> Path | str:
        """The folder in which the step was written down, or why it could not be."""
        step = self.state.global_step + 1
        folder = Path(str(self.args.output_dir), f"_nonfinite-step-{step}")
        tokenizer: Any = getattr(self.processing_class, "tokenizer", self.processing_class)
        sources = zip(self.last_step.micro_batches, self.last_step.sources, strict=True)
        facts = {
            "step": step,
            "loss": [float(loss) for loss in self.last_losses],
            "grad_norm": float(norm),
            "learning_rate": self._get_learning_rate(),
            "seed": self.args.seed,
            "steps_before": [
                {"step": number, "loss": float(loss), "grad_norm": float(norm)} for number, loss, norm in self.recent
            ],
        }
        rows = [row for batch, rows in sources for row in rows if batch.num_model_tokens]
        try:
            decode = getattr(tokenizer, "decode", None)
            write_dump(folder, self.args.process_index, finding, rows, self.preference.branches, decode, **facts)
        except OSError as error:
            return f"It could not be written down in {folder}: {error}."
        return folder

    # -- log, evaluation, checkpoints ----------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A training row is of the steps that were not left out; of none, its loss is NaN."""
        skips = self.args.on_nonfinite == "skip"
        if "loss" in logs:
            logs["loss"] *= self.window.row.correction
        if skips and ("loss" in logs or "train_loss" in logs):
            logs["skipped_steps"] = (self.window.row if "loss" in logs else self.window.run).skipped
        super().log(logs, start_time)

    def flushed_window(self) -> dict[str, float]:
        """See `StepTrainer.flushed_window`; a model that is broken by now is told of, once."""
        row = super().flushed_window()
        mean_logp = row.pop(CHOSEN_TOKENS, None)
        if mean_logp is None:
            return row
        if self.window.first_logp is None:
            self.window.first_logp = mean_logp
        vocab_size = innermost(self.model).config.get_text_config().vocab_size
        found = divergence(mean_logp, self.window.first_logp, vocab_size)
        if found and not self.has_diverged:
            logger.warning(
                "Step %d: the run has diverged: %s (%.3g when the run began). What it learns now is lost. Lower "
                "`learning_rate` (%g), and start anew or resume from a checkpoint before.",
                self.state.global_step,
                found,
                self.window.first_logp,
                self.args.learning_rate,
            )
        self.has_diverged = found is not None
        return row

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self.refuse_nonfinite_weights("the end of training")
        self._tr_loss *= self.window.run.correction
        self._total_loss_scalar *= self.window.run.correction
        return super()._finalize_training(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.refuse_nonfinite_weights("the checkpoint")
        super()._save_checkpoint(model, trial)

    def refuse_nonfinite_weights(self, place: str) -> None:
        """A step can be finite and its update not; such weights are not saved. Collective.

        Raises:
            NonFiniteStepError: a trained weight is not finite.
        """
        finite = torch.tensor(float(not all_finite(self.model.parameters())), device=self.args.device)
        if self.sum_over_ranks(finite) > 0:
            step = self.state.global_step
            names = list(not_finite((n, p) for n, p in self.model.named_parameters() if p.requires_grad))
            raise NonFiniteStepError(
                f"The weights are not finite after step {step} ({len(names)} on this rank, the first "
                f"{names[0] if names else 'on another'}), although its loss and gradient were: its update went too "
                f"far. Nothing was saved for {place}; the checkpoints before are good. Lower `learning_rate`.",
                step,
            )

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether the model is the best yet; one whose metric is not finite never is."""
        name: Any = self.args.metric_for_best_model
        value = None if name is None else metrics.get(f"eval_{name.removeprefix('eval_')}")
        if isinstance(value, float) and not math.isfinite(value):
            logger.warning("Step %d: %s is %s and cannot be the best.", self.state.global_step, name, value)
            return False
        return super()._determine_best_metric(metrics, trial)


class LeaveOut(TrainerCallback):
    """After the optimizer of a step that is left out was passed by, the rest of the step goes on as always."""

    def __init__(self, trainer: GuardedTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.begin_guarding()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.left_out:
            self.trainer.accelerator.gradient_state._set_sync_gradients(True)
