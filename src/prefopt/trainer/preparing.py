"""The model between ``train()`` and the first step: activation checkpointing, unused parameters, compiled layers.

All of it is settled when the loop is about to wrap the model. Rows, layout, batch size and device are known by then,
whether they came from the config, from a trial of a search, or from a batch size that was found to be too large.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from torch import nn
from transformers.training_args import OptimizerNames

from prefopt.batching import lengths_of_set
from prefopt.batching.budget import group_tokens
from prefopt.batching.lengths import image_counts
from prefopt.data import tokenized_example
from prefopt.metrics import LOGGED_STATISTICS
from prefopt.reference.policy import SeparateModel
from prefopt.trainer.adapters import can_recompute
from prefopt.trainer.batches import trial_row
from prefopt.trainer.compile import compile_layers, compile_options
from prefopt.trainer.loading import PADDING_LAYOUTS, LoadingTrainer
from prefopt.trainer.memory import ActivationModel, BatchSize, MemoryEstimate, free_bytes, largest_batch, training_bytes
from prefopt.trainer.offloading import stream_copies
from prefopt.trainer.sharding import release
from prefopt.trainer.trials import Trials, run_trials
from prefopt.trainer.versions import (
    chosen_checkpointing,
    own_optimizer_and_scheduler,
    set_checkpointing,
    stop_checkpointing,
)

__all__ = ["PreparingTrainer"]

logger = logging.getLogger(__name__)

ADAM_STATES = 2
"""Numbers per weight that AdamW keeps."""
OTHER_STATES = 3
"""The most that another optimizer is taken to keep."""


class PreparingTrainer(LoadingTrainer):
    """Decides what the user left open about the model's passes, from what a trial on it shows."""

    compile_options: dict[str, Any] | None
    """Arguments of ``torch.compile``; None: nothing is compiled."""
    came_checkpointing: bool
    """Whether activation checkpointing was on in the model that the user gave."""
    open_checkpointing: bool = False
    """Whether the user left it open, so that it is decided when training begins."""

    # -- compiled layers -----------------------------------------------------------------------------------------

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Accelerate would compile the model as a whole; its options go to the layers instead."""
        built = super()._build_accelerator_args(**kwargs)
        self.compile_options = compile_options(built["dynamo_plugin"])
        built["dynamo_plugin"] = TorchDynamoPlugin(backend=DynamoBackend.NO.value)
        return built

    def compile_layers(self, model: nn.Module) -> None:
        if self.compile_options is not None:
            compile_layers(model, self.compile_options)

    def place_reference(self) -> None:
        if isinstance(reference := self.model_reference, SeparateModel):
            self.compile_layers(reference.model)
        super().place_reference()

    def model_for_evaluation(self) -> nn.Module:
        self.compile_layers(self.model)
        return super().model_for_evaluation()

    # -- before the first step -----------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See ``transformers.Trainer.train``, which turns checkpointing on where the config says so."""
        chosen = chosen_checkpointing(self.args)
        self.open_checkpointing = chosen is None
        # between the trials of a search there is no model: `model_init` makes one within
        possible = self.model is None or can_recompute(self.model)
        set_checkpointing(self.args, possible if chosen is None else chosen)
        return super().train(*args, **kwargs)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        trials = functools.cache(self.trials)
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if self.open_checkpointing and self.args.gradient_checkpointing:
            self.decide_checkpointing("the model is sharded" if sharded else self.why_no_estimate(), trials)
        if self.args.world_size > 1 and not sharded:
            self.decide_search(trials)
            self.decide_buffers()
            # DDP learns such a graph from the tensors in the model's output, and would exchange no gradient of ours
            self.accelerator.ddp_handler.static_graph = False
        self.compile_layers(self.model)
        release(self.model)
        with nullcontext() if sharded else own_optimizer_and_scheduler(self, max_steps):
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if resume_from_checkpoint is None:  # transformers 4 called it then too, and subclasses still build on that
            self._load_optimizer_and_scheduler(None)
        return prepared

    def decide_checkpointing(self, obstacle: str | None, trials: Callable[[], Trials]) -> None:
        """Activations are kept where the largest micro-batch has room for them, and recomputed otherwise.

        Args:
            obstacle: why that cannot be told; they are recomputed then.
            trials: of the model.
        """
        estimate = None if obstacle else self.memory_estimate(trials())
        if estimate is not None and estimate.fits:
            set_checkpointing(self.args, False)
            stop_checkpointing(self.model)
        if self.is_world_process_zero():
            logger.info(
                "activation checkpointing: %s (%s; set gradient_checkpointing to decide yourself)",
                "on" if self.args.gradient_checkpointing else "off",
                obstacle or estimate,
            )

    def why_no_estimate(self) -> str | None:
        """What stands in the way of an estimate of the memory; None: nothing."""
        if self.came_checkpointing:
            return "the model came with it"
        if self.args.activation_offloading and stream_copies(self.args.device) is not None:
            return "what is kept is moved to the host, and the inputs of layers are the least that can be"
        if self.is_model_parallel:
            return "the model lies on several devices"
        if free_bytes(self.args.device, 1) is None:
            return f"the free memory of {self.args.device.type} is not known"
        if self.collate_given is not None:
            return "the size of batches is the data collator's affair"
        if not isinstance(self.train_dataset, datasets.Dataset) and self.prepare_options.max_length is None:
            return "max_length=None leaves the length of streamed rows open"
        return None

    def memory_estimate(self, trials: Trials) -> MemoryEstimate:
        """What the largest step needs beside the weights, and the memory of the rank that has least of it."""
        args = self.args
        activations = ActivationModel.fit(trials.counts).bytes(self.largest_batch())
        training = training_bytes(self.model.parameters(), states=self.states_to_come(), buckets=args.world_size > 1)
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size))
        free = free_bytes(args.device, local_ranks)
        assert free is not None, "`why_no_estimate` asks first"
        return MemoryEstimate(activations, training, self.least(free))

    def largest_batch(self) -> BatchSize:
        """The largest micro-batch of the run; of a stream, one of pairs of the greatest length."""
        args, rows, branches = self.args, self.train_dataset, self.preference.branches
        geometry = self.geometry(self._train_batch_size, self.accumulation)
        num_pairs = geometry.pairs_per_step if geometry.budget else self._train_batch_size
        if isinstance(rows, datasets.Dataset):
            sizes = self.pair_sizes(rows)
        else:
            limit, apart = self.prepare_options.max_length, self.prepare_options.max_completion_length
            assert limit is not None, "`why_no_estimate` asks first"
            sizes = [len(branches) * limit if apart is None else limit + len(branches) * apart] * num_pairs
        padded = self.layout.layout in PADDING_LAYOUTS
        return largest_batch(sizes, num_pairs, padded=padded, budget=args.tokens_per_batch)

    def pair_sizes(self, rows: datasets.Dataset) -> list[int]:
        """Tokens of each pair in a micro-batch of its own."""
        lengths = lengths_of_set(rows, self.preference.branches)
        multiple: Any = self.args.pad_to_multiple_of
        return group_tokens(lengths, self.layout.layout, pad_to_multiple_of=multiple)

    def states_to_come(self) -> int:
        """Numbers per weight that the optimizer has not allocated yet."""
        if self.optimizer is None:
            return ADAM_STATES if "adamw" in OptimizerNames(self.args.optim).value else OTHER_STATES
        return 0 if self.optimizer.state else OTHER_STATES

    def decide_search(self, trials: Callable[[], Trials]) -> None:
        """DDP looks for weights without a gradient, in every step, only where there may be some.

        Transformers lets it look unless activations are recomputed. What encodes images has weights that a step
        without images does not use, and layers after the last one that is used.
        """
        may_miss = self.vision is not None or not self.args.gradient_checkpointing
        if self.args.ddp_find_unused_parameters is None and may_miss:
            always_used = trials().reaches_all and not routed_apart(self.model)
            self.accelerator.ddp_handler.find_unused_parameters = not self.least(always_used)

    def decide_buffers(self) -> None:
        """DDP sends all ranks the main one's buffers at the head of a step, only if training changes some.

        Tables that are computed once are not saved with a model. A rank that has no memory left may leave its attempt
        before that pass, and the others would wait for it.
        """
        if self.args.ddp_broadcast_buffers is None:
            buffers = {name for name, _ in self.model.named_buffers()}
            self.accelerator.ddp_handler.broadcast_buffers = not buffers.isdisjoint(self.model.state_dict())

    def trials(self) -> Trials:
        """The pair with the most tokens (of a stream an early one), of those with images if there are any; cut short
        and run."""
        rows, branches = self.train_dataset, self.preference.branches
        if isinstance(rows, datasets.Dataset):
            sizes, images = np.array(self.pair_sizes(rows)), image_counts(rows)
            row = rows[int(np.argmax(sizes * (images > 0) if images.any() else sizes))]
        else:
            row = trial_row(rows)
            assert row is not None, "a set without rows is refused before"
        return run_trials(
            self.model,
            tokenized_example(row, branches),
            branches,
            self.layout.layout,
            statistics=self.preference.statistics | LOGGED_STATISTICS,
            with_aux_loss=bool(self.aux_weight),
            precision=self.accelerator.autocast,
            vision=self.vision,
        )

    def least(self, value: float) -> float:
        """The least of the ranks' values, so that all decide alike."""
        if self.args.world_size == 1:
            return value
        return float(self.accelerator.gather(torch.tensor([value], device=self.args.device, dtype=torch.float32)).min())


def routed_apart(model: nn.Module) -> bool:
    """Whether a router chooses between modules, of which a step may leave some out."""
    return any(isinstance(module, nn.ModuleList) for name, module in model.named_modules() if name.endswith("experts"))
