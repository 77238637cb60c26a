"""The first use of a kernel on a kind of call: a small row, compared with the definition of attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from prefopt.scoring.attention.options import Case, LayerOptions
from prefopt.scoring.attention.plan import Plan
from prefopt.scoring.attention.segments import attend_segments

__all__ = ["definition", "fault_of"]

SEGMENTS = ((0, 160, 0, 0), (160, 300, 0, 90), (300, 420, 0, 90), (420, 560, 420, 420))
"""A group of three completions and a sequence: five blocks of 128, a number that no model has of heads (the compiler
would take the two for the same), and none ends where a segment does."""
WINDOW = 8
"""One place more or less of so few shows."""

HALF_TOLERANCE = 2e-2
"""Relative norm: probabilities and gradients in 16 bits are rounded by 4e-3, in another order in each kernel."""
FLOAT32_TOLERANCE = 5e-3
"""Relative norm: matrix products may be in TF32, rounded by 1e-3. A key too many or too few moves a row by 1e-1."""


Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, Plan, LayerOptions], Tensor]


def fault_of(attend: Attend, case: Case) -> str | None:
    """What is wrong with a kernel on this machine: an error, or a difference in output or gradients; None: nothing."""
    with apart(case.device):
        plan = Plan(SEGMENTS, case.device)
        inputs, options = random_call(case, plan)
        expected = output_and_gradients(definition, [tensor.float() for tensor in inputs], plan, options)
        try:
            found = output_and_gradients(attend, inputs, plan, options)
        except Exception as error:
            return f"{type(error).__name__} in a trial with {case}: {error}"
    tolerance = FLOAT32_TOLERANCE if case.dtype == torch.float32 else HALF_TOLERANCE
    names = ("output", "gradient of the queries", "gradient of the keys", "gradient of the values")
    for name, ours, right in zip(names, found, expected, strict=True):
        difference = ((ours.float() - right).norm() / right.norm()).item()
        if not difference < tolerance:
            return f"its {name} is wrong by {difference:.1e} in a trial with {case}"
    return None


@contextmanager
def apart(device: torch.device) -> Iterator[None]:
    """With gradients whatever surrounds the trial, in the types it names, and unseen by activation checkpointing, which
    would miss the tensors that the trial saves when it recomputes."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # with gradients, also within torch.no_grad
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor))
        yield


def random_call(case: Case, plan: Plan) -> tuple[list[Tensor], LayerOptions]:
    """Query, key and value as layers make them, and the options; no draw from the run's own random numbers."""
    generator = torch.Generator(case.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=case.device)

    sizes = ((case.heads, case.head_dim), (case.kv_heads, case.head_dim), (case.kv_heads, case.value_dim))
    tensors = [normal(1, plan.num_tokens, *size).to(case.dtype).transpose(1, 2) for size in sizes]
    options = LayerOptions(
        scale=case.scale,
        window=WINDOW if case.windowed else None,
        softcap=case.softcap,
        sinks=normal(case.heads) if case.sinks else None,
    )
    return tensors, options


def output_and_gradients(attend: Attend, inputs: list[Tensor], plan: Plan, options: LayerOptions) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = attend(leaves[0], leaves[1], leaves[2], plan, options)
    weights = torch.linspace(-1, 1, output.numel(), device=output.device, dtype=output.dtype).view_as(output)
    return [output.detach(), *torch.autograd.grad(output, leaves, weights)]


def definition(query: Tensor, key: Tensor, value: Tensor, plan: Plan, options: LayerOptions) -> Tensor:
    """[1, S, heads, D] attention as it is written down, with all its scores."""
    scale = query.shape[-1] ** -0.5 if options.scale is None else options.scale

    def call(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        groups, count = query.shape[1] // key.shape[1], key.shape[2]
        scores = scale * query @ key.repeat_interleave(groups, dim=1).transpose(2, 3)
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        assert mask is not None
        scores = scores + mask
        if options.sinks is not None:
            sinks = options.sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sinks], dim=3)
        weights = scores.softmax(dim=3)[..., :count]
        return (weights @ value.repeat_interleave(groups, dim=1)).transpose(1, 2)

    return attend_segments(call, query, key, value, plan, options.window, "always")
