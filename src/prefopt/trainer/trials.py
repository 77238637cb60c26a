"""A pair, cut short and run forward once: what autograd keeps of it, and which weights it gives a gradient."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.batching.images import VisionInputs
from prefopt.scoring.attention import segment_attention
from prefopt.scoring.capability import LAYOUTS
from prefopt.scoring.encoder_decoder import num_positions
from prefopt.scoring.forward import body_of, innermost, score
from prefopt.scoring.head.plan import uncached
from prefopt.types import Branch, PreferenceBatch, Statistic, TokenizedExample

__all__ = ["Trials", "kept_bytes", "run_trials", "trial_examples"]

SCALES = (1, 2, 4)
"""Lengths of the trials, relative to the first."""
LONGEST_TRIAL = 192
"""Tokens of the last trial: enough that rounding a pair's parts to whole tokens hardly matters, and so few that all
trials together cost less than a step."""


@dataclass(frozen=True)
class Trials:
    """What the trials showed."""

    counts: tuple[tuple[int, int], ...]
    """(tokens, bytes that autograd keeps) of each."""
    reaches_all: bool
    """Whether every weight that is trained gets a gradient."""


def run_trials(
    model: nn.Module,
    example: TokenizedExample,
    branches: Sequence[Branch],
    layout: str,
    *,
    statistics: frozenset[Statistic] = frozenset(),
    with_aux_loss: bool = False,
    precision: Callable[[], AbstractContextManager[Any]],
    vision: VisionInputs | None = None,
) -> Trials:
    """Run a pair at three lengths as training would, without activation checkpointing and without a backward pass.

    An image cannot be cut: the lengths are those of the tokens alone, without images, and what encoding the images
    keeps is added in proportion. So the weights that encode them get no gradient here, as in a step without images.

    Args:
        model: not sharded, with `install` done. It is left in training mode.
        example: a real pair.
        branches: the completions of a pair.
        layout: of the batches.
        statistics, with_aux_loss: of `score`, as in training.
        precision: the context that training computes in.
        vision: how images reach the model.
    """
    device = innermost(model).device
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    weights = [*model.parameters(), *model.buffers()]
    counts, reached = [], set()

    def forward(batch: PreferenceBatch) -> Tensor:
        scores = score(model, batch, statistics, with_aux_loss=with_aux_loss)
        return scores.tokens.logps.sum() + (0 if scores.aux_loss is None else scores.aux_loss)

    model.train()
    devices = [] if device.type == "cpu" else [device]
    random_state = torch.random.fork_rng(devices, device_type=device.type if devices else "cuda")
    # the gradients of logits that the head keeps are no need: it takes only room that is there
    with random_state, segment_attention(model), not_checkpointing(model), uncached(), precision():
        per_token = 0.0
        if vision is not None and any(example.images.values()):
            per_token = vision_bytes_per_token(model, LAYOUTS[layout]([example], branches, vision).to(device))
        for trial in trial_examples(example, branches):
            batch = LAYOUTS[layout]([trial], branches, vision).to(device)
            inputs = [*batch.model_inputs.values(), batch.predict_from, batch.targets]
            kept, result = kept_bytes(lambda batch=batch: forward(batch), [*weights, *inputs])
            tokens = num_positions(batch.model_inputs)
            counts.append((tokens, kept + round(per_token * tokens)))
            reached |= reached_parameters(result)
    return Trials(tuple(counts), trained <= reached)


def trial_examples(example: TokenizedExample, branches: Sequence[Branch]) -> Iterator[TokenizedExample]:
    """A pair at the lengths of `SCALES`, each part exactly in proportion; every completion token is scored, no image
    is there."""
    lengths = [len(example.prompt_ids), *(len(example.completion_ids[branch]) for branch in branches)]
    share = min(1.0, LONGEST_TRIAL / sum(lengths)) / SCALES[-1]

    def part(ids: Sequence[int], scale: int) -> tuple[int, ...]:
        unit = max(int(share * len(ids)), min(1, len(ids)))
        return tuple(islice(cycle(ids), unit * scale))

    for scale in SCALES:
        completions = {branch: part(example.completion_ids[branch], scale) for branch in branches}
        yield replace(
            example,
            prompt_ids=part(example.prompt_ids, scale),
            completion_ids=completions,
            loss_masks={branch: (True,) * len(ids) for branch, ids in completions.items()},
            prompt_starts={},
            images={},
        )


def vision_bytes_per_token(model: nn.Module, batch: PreferenceBatch) -> float:
    """Bytes that autograd keeps of encoding the images of a batch, for each of all its tokens."""
    encode: Any = body_of(innermost(model)).get_image_features
    known = inspect.signature(encode).parameters
    inputs = {name: value for name, value in batch.model_inputs.items() if name in known}

    def features() -> Tensor:
        encoded: Any = encode(**inputs)
        encoded = getattr(encoded, "pooler_output", encoded)
        return torch.stack([part.sum() for part in encoded]).sum()

    kept, _ = kept_bytes(features, [*model.parameters(), *model.buffers(), *inputs.values()])
    return kept / batch.model_inputs["input_ids"].numel()


@contextmanager
def not_checkpointing(model: nn.Module) -> Iterator[None]:
    """Layers keep what they would recompute; afterwards they are as they were."""
    layers: list[Any] = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True


def kept_bytes(forward: Callable[[], Tensor], known: Iterable[Tensor]) -> tuple[int, Tensor]:
    """Bytes that autograd keeps for the backward of ``forward()``, and its result.

    Args:
        forward: computes something that has a gradient.
        known: what is there anyway: parameters, buffers, inputs. A storage counts once.
    """
    there = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    return sum(kept.values()), result


def reached_parameters(result: Tensor) -> set[Any]:
    """The parameters to which a backward from ``result`` leads, found without running it."""
    reached, seen = set(), set()
    nodes: list[Any] = [result.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            reached.add(node.variable)
        nodes += [following for following, _ in node.next_functions]
    return reached
