"""What a run must log, by the definition: padded batches, full logits, plain SGD, a copy of the start as reference."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from prefopt.batching import pad_batch
from prefopt.data import tokenized_example
from prefopt.normalise import local_counts, total
from prefopt.scoring.encoder_decoder import predicting_ids, whole_inputs
from prefopt.scoring.forward import innermost
from prefopt.scoring.sequences import sequence_stats
from prefopt.scoring.tokens import stats_of_logits
from prefopt.types import Branch, PreferenceBatch, TokenizedExample

MakeBatch = Callable[[Any, list[TokenizedExample], tuple[Branch, ...]], PreferenceBatch]
"""(model, rows, completions to compute) -> the batch that the definition is computed on."""

STEPS, PAIRS = 2, 2
LEARNING_RATE = 0.3
"""Far enough for the loss of the second step to tell what the gradient of the first one was."""
PLAIN_RUN: dict[str, Any] = {
    "optim": "sgd",
    "learning_rate": LEARNING_RATE,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "max_steps": STEPS,
    "per_device_train_batch_size": PAIRS,
    "train_sampling_strategy": "sequential",
    "count": STEPS * PAIRS,
}
"""Options of a run that `expected_losses` follows."""
SAME_LOSS = 2e-6
"""Relative, float32, after one step: roundings of two forward passes and of the gradient between them."""


def padded(model: Any, examples: list[TokenizedExample], branches: tuple[Branch, ...]) -> PreferenceBatch:
    return pad_batch(examples, branches)


def expected_losses(
    run: Any, start: Any = None, make_batch: MakeBatch = padded, learning_rate: float = LEARNING_RATE
) -> list[float]:
    """The losses of the steps of a trainer that has not trained yet; it is not touched.

    Args:
        run: the trainer.
        start: the model that it starts from, where its own cannot be copied.
        make_batch: for models that take no padded rows of text.
        learning_rate: of the definition; 0 gives the losses that the steps would have without an update.
    """
    start = run.model if start is None else start
    policy, reference = deepcopy(start).train(), deepcopy(start).eval()
    objective = run.args.objective()
    examples = [tokenized_example(row, objective.branches) for row in run.train_dataset]
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], learning_rate)
    losses = []
    for step in range(STEPS):
        batch = make_batch(policy, examples[step * PAIRS : (step + 1) * PAIRS], objective.branches)
        ours, aux_loss = plain_stats(policy, batch, with_aux_loss=bool(run.aux_weight))
        with torch.no_grad():
            theirs = plain_stats(reference, batch)[0] if objective.needs_reference else None
        value = total(objective(ours, theirs), batch, local_counts([batch])) + run.aux_weight * aux_loss
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def plain_stats(model: Any, batch: PreferenceBatch, *, with_aux_loss: bool = False) -> tuple[Any, Tensor | float]:
    """The statistics of each branch from all logits, and the load-balancing loss as the model itself computes it."""
    wanted = {"output_router_logits": True} if with_aux_loss else {}
    outputs = model(**{**whole_inputs(innermost(model), batch.model_inputs), "use_cache": False}, **wanted)
    logits = outputs.logits[:, -predicting_ids(batch.model_inputs).shape[1] :]  # virtual tokens stand in front
    tokens = stats_of_logits(logits.flatten(0, 1)[batch.predict_from], batch.targets, frozenset())
    return sequence_stats(tokens, batch.layout, keep_tokens=True), outputs.aux_loss if with_aux_loss else 0.0


def logged_losses(run: Any) -> list[float]:
    """The loss of each step that was logged."""
    return [row["loss"] for row in run.state.log_history if "loss" in row]
