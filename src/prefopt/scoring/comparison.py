"""A layout beside the plain forward, on two small groups: the log-probs of all tokens, and their gradients.

A forward pass is not enough: layers that recompute their activations run a second time in the backward pass, and what
they are given then decides the gradient alone. And sliding windows are longer than anything that is small, so they are
shortened meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.scoring.attention import segment_attention
from prefopt.scoring.encoder_decoder import is_encoder_decoder
from prefopt.scoring.forward import evaluating, innermost, score
from prefopt.scoring.tokens import stats_of_logits
from prefopt.types import PreferenceBatch, Scores, TokenizedExample

__all__ = ["Outcome", "fault_of", "outcome", "scores_of_places", "trial_groups", "windows_shortened"]

PROBE_TOKENS = 32
"""Tokens of the prompt and of each completion: enough to tell, small enough to cost nothing."""

LOGP_TOLERANCES = {torch.float32: 1e-4}
"""Nats per token, mean over the groups: summation in another order moves float32 log-probs by about 1e-6."""
HALF_LOGP_TOLERANCE = 5e-2
"""The same for bfloat16 and float16, whose forward passes differ by about 1e-2 between two equal layouts."""
GRADIENT_TOLERANCES = {torch.float32: 1e-3}
"""Relative norm. Rounding moves float32 gradients by about 1e-6."""
HALF_GRADIENT_TOLERANCE = 0.15
"""The same for bfloat16 and float16, where two equal layouts differ by 0.01 to 0.03."""


@dataclass(frozen=True)
class Outcome:
    """What a scorer makes of a batch."""

    logps: Tensor
    """[N] nats, float32."""
    gradient: Tensor
    """[U, H] of a weighted sum of the log-probs, by the embedding of each of the U tokens that occur; float32."""


def trial_groups(example: TokenizedExample) -> list[TokenizedExample]:
    """The pair cut short, all of it scored, and a second group of the same tokens backwards: groups may not meet."""
    first = cut(example, slice(None))
    return [first, cut(first, slice(None, None, -1))]


def cut(example: TokenizedExample, order: slice) -> TokenizedExample:
    """At most `PROBE_TOKENS` of the prompt (its end) and of each completion, in the order that a slice makes.

    A part with images is not cut, as their tokens are one with them.
    """
    images = {part: tuple(pictures)[order] for part, pictures in example.images.items()}
    completions = {
        branch: tuple(ids if images.get(branch) else islice(ids, PROBE_TOKENS))[order]
        for branch, ids in example.completion_ids.items()
    }
    prompt = tuple(example.prompt_ids)
    return replace(
        example,
        prompt_ids=(prompt if images.get("prompt") else prompt[-PROBE_TOKENS:])[order],
        completion_ids=completions,
        loss_masks={branch: (True,) * len(ids) for branch, ids in completions.items()},
        prompt_starts={},
        images=images,
    )


def scores_of_places(model: Any, batch: PreferenceBatch) -> Scores:
    """`prefopt.scoring.plain.plain_scores` of a padded batch, with logits of no other places than those that predict.

    A pair with images is not cut short, and the logits of all its places would need more memory than a step.

    Args:
        model: its forward takes ``logits_to_keep``.
        batch: padded.
    """
    width = batch.model_inputs["input_ids"].shape[1]
    columns, column = (batch.predict_from % width).unique(return_inverse=True)
    logits = model(**batch.model_inputs, use_cache=False, logits_to_keep=columns).logits
    return Scores(stats_of_logits(logits[batch.predict_from // width, column], batch.targets, frozenset()))


def outcome(
    model: nn.Module,
    scorer: Callable[[Any, PreferenceBatch], Scores],
    groups: Sequence[TokenizedExample],
    batch: PreferenceBatch,
    *,
    recomputing: bool,
) -> Outcome:
    """Score and differentiate, without dropout; weights, their gradients and all modes are as before afterwards.

    Args:
        model: not sharded, with `install` done.
        scorer: as `score`.
        groups: what ``batch`` was made of.
        batch: on any device.
        recomputing: layers with activation checkpointing recompute; else they keep what they need.
    """
    device = innermost(model).device
    batch = batch.to(device)
    with ExitStack() as stack:
        for context in (evaluating(model), frozen(model), torch.enable_grad(), segment_attention(model)):
            stack.enter_context(context)
        if recomputing:
            stack.enter_context(layers_recompute(model))
        embedded = stack.enter_context(embeddings_followed(model))
        logps = scorer(model, batch).tokens.logps.float()
        (logps * torch.linspace(-1, 1, len(logps), device=device)).sum().backward()
    return Outcome(logps.detach(), by_token(groups, embedded).to(device))


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No weight takes a gradient: that of the embedded tokens says as much, and is small."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def layers_recompute(model: nn.Module) -> Iterator[None]:
    """Layers with activation checkpointing are in training mode, in which alone they recompute.

    One with dropout of its own stays in evaluation mode: it would compute something else each time.
    """
    layers: list[Any] = [part for part in model.modules() if getattr(part, "gradient_checkpointing", False)]
    layers = [layer for layer in layers if not any("drop" in name and value for name, value in numbers(layer))]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def numbers(holder: Any) -> list[tuple[str, float]]:
    """The plain numbers that an object keeps, by name."""
    return [(name, value) for name, value in vars(holder).items() if type(value) in (int, float)]


@contextmanager
def embeddings_followed(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collects (token ids, their embeddings), which take a gradient."""
    found: list[tuple[Tensor, Tensor]] = []

    def follow(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        found.append((inputs[0], leaf))
        return leaf.clone()  # some models write into it

    hooks = [embedding.register_forward_hook(follow) for embedding in token_embeddings(innermost(model))]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def token_embeddings(model: Any) -> list[nn.Module]:
    """The modules that embed tokens: an encoder-decoder model has one for each body, whose weights may be one."""
    bodies = [model, model.get_encoder(), model.get_decoder()] if is_encoder_decoder(model.config) else [model]
    return list(dict.fromkeys(body.get_input_embeddings() for body in bodies))


def by_token(groups: Sequence[TokenizedExample], embedded: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """[U, H] the gradients summed over all places of a token: places differ between layouts, tokens do not."""
    known = {token for group in groups for ids in (group.prompt_ids, *group.completion_ids.values()) for token in ids}
    tokens = torch.tensor(sorted(known))
    total = torch.zeros(())
    for ids, embeddings in embedded:
        if embeddings.grad is not None:
            occurs = (tokens[:, None] == ids.flatten().cpu()).float()
            total = total + occurs @ embeddings.grad.flatten(0, -2).float().cpu()
    return total


def fault_of(
    model: nn.Module, layout: str, groups: Sequence[TokenizedExample], batch: PreferenceBatch, expected: Outcome
) -> str | None:
    """What is wrong with a layout, in a line with a figure; None where it is the plain forward to rounding.

    Args:
        model: not sharded, with `install` done.
        layout: the name of the layout.
        groups: what was scored.
        batch: ``groups`` in the layout.
        expected: of the plain forward.
    """
    try:
        found = outcome(model, score, groups, batch, recomputing=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model's own code does with a mask that it does not expect
        return f"{layout} fails on a trial pair: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    in_8_bits = getattr(innermost(model), "is_loaded_in_8bit", False)  # its layers round what they are given
    dtype = torch.float16 if in_8_bits else innermost(model).dtype
    difference = (found.logps - expected.logps).abs().mean().item()
    if not difference <= LOGP_TOLERANCES.get(dtype, HALF_LOGP_TOLERANCE):
        return f"{layout} differs from the plain forward by {difference:.1e} nats a token on a trial pair"
    difference = ((found.gradient - expected.gradient).norm() / expected.gradient.norm()).item()
    if layout != "padded" and not difference <= GRADIENT_TOLERANCES.get(dtype, HALF_GRADIENT_TOLERANCE):
        return f"the gradients of {layout} differ from the plain forward's by {difference:.1%} on a trial pair"
    return None


@contextmanager
def windows_shortened(model: nn.Module, groups: Sequence[TokenizedExample]) -> Iterator[None]:
    """Sliding windows of a quarter of the longest path, where they are longer; afterwards as they were."""
    longest = max(len(g.prompt_ids) + max(map(len, g.completion_ids.values())) for g in groups)
    window = max(2, longest // 4)
    inner = innermost(model)
    holders: list[Any] = [inner.config.get_text_config(), *inner.modules()]
    windowed = [(holder, before) for holder in holders for name, before in numbers(holder) if name == "sliding_window"]
    for holder, before in windowed:
        holder.sliding_window = min(before, window)
    try:
        yield
    finally:
        for holder, before in windowed:
            holder.sliding_window = before
