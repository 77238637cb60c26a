"""The model between ``train()`` and the first step: activation checkpointing, unused parameters, compiled layers.

All of it is settled when the loop is about to wrap the model. Rows, layout, batch size and device are known by then,
whether they came from the config, from a trial of a search, or from a batch size that was found to be too large.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from torch import nn
from transformers.training_args import OptimizerNames

from prefopt.batching import lengths_of_set
from prefopt.batching.budget import group_tokens
from prefopt.data import tokenized_example
from prefopt.metrics import LOGGED_STATISTICS
from prefopt.reference.policy import SeparateModel
from prefopt.scoring.forward import innermost
from prefopt.trainer.compile import compile_layers, compile_options
from prefopt.trainer.loading import LoadingTrainer
from prefopt.trainer.memory import ActivationModel, BatchSize, MemoryEstimate, free_bytes, largest_batch, training_bytes
from prefopt.trainer.trials import Trials, run_trials
from prefopt.trainer.versions import chosen_checkpointing, set_checkpointing, stop_checkpointing

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
        possible = self.model is None or innermost(self.model).supports_gradient_checkpointing
        set_checkpointing(self.args, possible if chosen is None else chosen)
        return super().train(*args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        trials = functools.cache(self.trials)
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if self.open_checkpointing and self.args.gradient_checkpointing:
            self.decide_checkpointing("the model is sharded" if sharded else self.why_no_estimate(), trials)
        if self.args.world_size > 1 and not sharded:
            self.decide_search(trials)
        self.compile_layers(self.model)
        return super()._prepare_for_training(*args, **kwargs)

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
            assert self.prepare_options.max_length is not None, "`why_no_estimate` asks first"
            sizes = [len(branches) * self.prepare_options.max_length] * num_pairs
        padded = self.layout.layout == "padded"
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

        Transformers lets it look unless activations are recomputed.
        """
        if self.args.ddp_find_unused_parameters is None and not self.args.gradient_checkpointing:
            always_used = trials().reaches_all and not routed_apart(self.model)
            self.accelerator.ddp_handler.find_unused_parameters = not self.least(always_used)

    def trials(self) -> Trials:
        """The pair with the most tokens (of a stream the first), cut short and run."""
        rows, branches = self.train_dataset, self.preference.branches
        if isinstance(rows, datasets.Dataset):
            row = rows[int(np.argmax(self.pair_sizes(rows)))]
        else:
            row = next(iter(rows))
        return run_trials(
            self.model,
            tokenized_example(row, branches),
            branches,
            self.layout.layout,
            statistics=self.preference.statistics | LOGGED_STATISTICS,
            with_aux_loss=bool(self.aux_weight),
            precision=self.accelerator.autocast,
        )

    def least(self, value: float) -> float:
        """The least of the ranks' values, so that all decide alike."""
        if self.args.world_size == 1:
            return value
        return float(self.accelerator.gather(torch.tensor([value], device=self.args.device, dtype=torch.float32)).min())


def routed_apart(model: nn.Module) -> bool:
    """Whether a router chooses between modules, of which a step may leave some out."""
    return any(isinstance(module, nn.ModuleList) for name, module in model.named_modules() if name.endswith("experts"))
