"""How a step is run: transformers' loop over items that are whole optimizer steps."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from prefopt.metrics import MetricSums
from prefopt.normalise import local_counts, total
from prefopt.objective import Objective
from prefopt.reference import ModelReference, ReferencePolicy, check_identity
from prefopt.step import StepResult, preference_step
from prefopt.trainer.adapters import regularised
from prefopt.trainer.config import PreferenceConfig
from prefopt.trainer.guards.out_of_memory import FailedElsewhereError, any_rank
from prefopt.trainer.guards.pair_values import PairValues
from prefopt.trainer.model_card import write_model_card
from prefopt.trainer.saving.adapter_files import save_encoders
from prefopt.trainer.step_log import LoggingTrainer
from prefopt.trainer.whole_step import ScoredBatch, scored_step
from prefopt.types import OptimizerStep, PreferenceBatch, StepCounts

__all__ = ["StepTrainer"]

logger = logging.getLogger(__name__)

HALF_EPSILON = 1e-4
"""Adam's epsilon for float16 weights: gradients below it are noise in a type with 10 bits."""
AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class StepTrainer(LoggingTrainer):
    """Runs `OptimizerStep` items: micro-batches, gradient synchronisation, denominators, metrics.

    The loop of transformers sees one item per optimizer step and an accumulation of 1; how many micro-batches a step
    has is the loader's affair. Loss of a micro-batch: world size times the sum over its units divided by the units of
    the whole step on all ranks, because DDP averages gradients over ranks.
    """

    args: PreferenceConfig
    model: Any
    optimizer: Any
    accelerator: Any
    preference: Objective
    """The objective; ``objective`` itself is a name that transformers' hyperparameter search sets."""
    reference: ReferencePolicy | None
    aux_weight: float
    """Weight of the mixture-of-experts load-balancing loss; 0 where it is off."""
    reference_updates: bool
    """Whether the reference moves, so that a checkpoint must hold it."""
    unchecked_identity: bool
    """Whether the reference has yet to be held against the policy it was taken from."""

    @property
    def model_reference(self) -> ModelReference | None:
        """The part of the reference that a model computes."""
        return None if self.reference is None else self.reference.find(ModelReference)

    def start_window(self) -> None:
        """Set up what the steps keep; called once, after the constructor of transformers' trainer."""
        super().start_window()
        self.accumulation = self.args.gradient_accumulation_steps

    def create_optimizer(self, model: Any = None) -> Any:
        """Transformers' optimizer, with an epsilon that a float16 model can hold.

        Adam divides by sqrt(v) + eps in the weights' type, and 1e-8 is 0 in float16: a weight without a gradient would
        become 0 / 0.
        """
        args = self.args
        half = any(p.dtype == torch.float16 and p.requires_grad for p in self.model.parameters())
        if half and self.optimizer is None and not args.was_set("adam_epsilon") and args.adam_epsilon < HALF_EPSILON:
            logger.warning("Training float16 weights: adam_epsilon is %g, as 1e-8 is 0 in float16.", HALF_EPSILON)
            args.adam_epsilon = HALF_EPSILON
        return super().create_optimizer(model)

    # -- the loop ------------------------------------------------------------------------------------------------

    @contextmanager
    def accumulation_shown_as(self, value: int) -> Iterator[None]:
        """``args.gradient_accumulation_steps`` as the loop (1) or the user (as given) should see it."""
        before = self.args.gradient_accumulation_steps
        self.args.gradient_accumulation_steps = value
        try:
            yield
        finally:
            self.args.gradient_accumulation_steps = before

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.accumulation = self.args.gradient_accumulation_steps
        return super()._inner_training_loop(*args, **kwargs)

    # The three methods that count items of the loader. Around them trackers and callbacks see the user's value.

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        with self.accumulation_shown_as(1):
            return super().set_initial_training_values(*args, **kwargs)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        with self.accumulation_shown_as(1):
            return super()._init_training_state(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        with self.accumulation_shown_as(1):
            return super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """The loss since the last row is this rank's alone, which the loss of the whole run would be made with."""
        self._tr_loss = self.sum_over_ranks(self._tr_loss.detach().clone()) / self.args.world_size
        return super()._finalize_training(*args, **kwargs)

    def get_total_train_batch_size(self, args: Any) -> int:
        accumulation = self.accumulation if self.is_in_train else args.gradient_accumulation_steps
        return self._train_batch_size * accumulation * args.world_size

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> None:
        """Nothing: the denominators are counted in `training_step`."""

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One optimizer step's forward and backward passes; returns its loss (times world size over this rank)."""
        self.exchanging = bool(getattr(model, "broadcast_buffers", False) and model.modules_buffers)
        model.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free optimizers
            self.optimizer.train()
        counts = self.step_counts(inputs)
        step: OptimizerStep = inputs.to(self.args.device, non_blocking=True)
        self.last_step, self.last_losses, self.last_values = step, [], []
        self.step_metrics = MetricSums()
        scored = self.scored_step(model, step)
        for index, batch in enumerate(step.micro_batches):
            last = index == len(step.micro_batches) - 1
            with self.synchronised(model, last):
                with self.compute_loss_context_manager():
                    reference = scored[index].reference if scored else self.reference
                    options = {"aux_weight": self.aux_weight, "learn": not scored}
                    result = preference_step(model, reference, batch, self.preference, **options)
                    terms = scored[index].applied(result.terms, result.policy) if scored else result.terms
                    terms = regularised(terms, self.model)
                    loss = self.args.world_size * total(terms, batch, counts)
                self.check_identity_once(result, batch.rows)
                if last:
                    self.agree_to_go_on()
                    self.begin_exchange(model, loss)
                self.accelerator.backward(loss, **self.backward_options())
            self.last_losses.append(loss.detach())
            self.last_values.append(PairValues.of(result, terms))
            self.step_metrics.merge(result.metrics)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        return torch.stack(self.last_losses).sum()

    def agree_to_go_on(self, failed: bool = False) -> None:
        """All ranks come here at the same points of a step, or in place of the next one when memory has run out.

        Raises:
            FailedElsewhereError: another rank has come because of that.
        """
        if self.args.world_size > 1 and not self.is_divided and any_rank(failed) and not failed:
            raise FailedElsewhereError("on another rank")

    @property
    def is_divided(self) -> bool:
        """Whether ranks divide the weights, so that every layer waits for all of them."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def scored_step(self, model: nn.Module, step: OptimizerStep) -> list[ScoredBatch]:
        """The micro-batches, scored, for losses of the whole step; empty where there is none, or it is one batch."""
        if not self.preference.needs_whole_step or (len(step.micro_batches) == 1 and self.args.world_size == 1):
            return []

        def run(batch: PreferenceBatch) -> StepResult:
            with self.compute_loss_context_manager():
                return preference_step(model, self.reference, batch, self.preference)

        def all_reduce(table: Tensor) -> Tensor:
            self.agree_to_go_on()
            return self.sum_over_ranks(table)

        num_pairs = self.get_total_train_batch_size(self.args)
        devices = [] if self.args.device.type == "cpu" else [self.args.device]
        # the second run of a micro-batch has the dropout of the first
        with torch.random.fork_rng(devices, device_type=self.args.device.type if devices else "cuda"):
            return scored_step(step, run, self.preference, num_pairs, all_reduce)

    @contextmanager
    def synchronised(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Gradients are exchanged between ranks with the last micro-batch of a step only.

        DDP would prepare for it in the forward pass, after which that can no longer be left: see `begin_exchange`.
        """
        self.accelerator.gradient_state._set_sync_gradients(last)
        if last and not isinstance(model, DistributedDataParallel):
            yield
        else:
            with self.accelerator.no_sync(model):
                yield

    def begin_exchange(self, model: nn.Module, loss: Tensor) -> None:
        """All ranks have come through the forward pass: the backward pass exchanges gradients."""
        self.exchanging = True
        if isinstance(model, DistributedDataParallel):
            model.require_forward_param_sync = True
            model.reducer.prepare_for_backward([loss])

    def backward_options(self) -> dict[str, Any]:
        """DeepSpeed must not divide by its own accumulation steps: the loss has its denominator."""
        return {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}

    def step_counts(self, step: OptimizerStep) -> StepCounts:
        """The denominators of the step, summed over ranks in one small collective.

        Args:
            step: on the host: where its copy to the device fails, the ranks have met here before.
        """
        counts = local_counts(step.micro_batches)
        flat: list[Any] = []
        move_numbers(counts, flat.append)
        table = torch.stack([torch.as_tensor(x, dtype=torch.float32) for x in flat]).to(self.args.device)
        summed = iter(self.sum_over_ranks(table))
        return move_numbers(counts, lambda _: next(summed))

    def check_identity_once(self, result: StepResult, rows: tuple[int, ...]) -> None:
        """On the first micro-batch of a fresh run: does the reference agree with the policy it was taken from?

        Numbers that are not finite are left to the check of the step, which knows more about them.
        """
        if not self.unchecked_identity:
            return
        self.unchecked_identity = False
        derives = self.reference is not None and self.reference.derives_from_policy
        given = (result.policy, result.reference or {})
        sums = torch.cat([stats.sum_logps.detach() for of_one in given for stats in of_one.values()])
        if derives and self.state.global_step == 0 and result.reference is not None and sums.isfinite().all():
            dtype: Any = AUTOCAST_DTYPES.get(self.accelerator.mixed_precision, self.model.dtype)
            check_identity(result.policy, result.reference, rows=rows, dtype=dtype)

    def floating_point_ops(self, inputs: Any) -> int:
        """6 FLOPs per token and parameter outside the embeddings, transformers' own estimate."""
        if not hasattr(self.model, "num_parameters"):
            return 0
        return 6 * tokens_of(inputs) * self.model.num_parameters(exclude_embeddings=True)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        if self.args.include_num_input_tokens_seen != "no":
            tokens = torch.tensor(tokens_of(inputs), device=self.args.device)
            self.state.num_input_tokens_seen += int(self.accelerator.reduce(tokens, reduction="sum").item())

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The model as transformers saves it, with the user's arguments and a card (peft writes one of its own)."""
        with self.accumulation_shown_as(
            self.accumulation if self.is_in_train else self.args.gradient_accumulation_steps
        ):
            super()._save(output_dir, state_dict)
            if self.args.should_save:
                save_encoders(self.model, output_dir or self.args.output_dir)  # type: ignore[arg-type]
                write_model_card(self, output_dir or self.args.output_dir)  # type: ignore[arg-type]


def tokens_of(inputs: Any) -> int:
    """Tokens of this rank's part of a step, the prompt once per completion."""
    return sum(batch.num_model_tokens for batch in inputs.micro_batches) if isinstance(inputs, OptimizerStep) else 0


def move_numbers(counts: StepCounts, function: Any) -> StepCounts:
    """``counts`` with ``function`` applied to each number, in a fixed order."""
    return StepCounts(
        num_pairs=function(counts.num_pairs),
        num_tokens={branch: function(value) for branch, value in sorted(counts.num_tokens.items())},
        num_micro_batches=function(counts.num_micro_batches),
    )
