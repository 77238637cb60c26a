"""Random groups of completions, and attention over them from the definition alone: one score at a time is masked."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from prefopt.scoring.attention.options import LayerOptions
from prefopt.types import Segment

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8

groups = st.lists(
    st.tuples(st.integers(0, 12), st.lists(st.integers(1, 12), min_size=1, max_size=4)), min_size=1, max_size=4
)
"""Groups of a prompt's length and those of its completions."""


def table_of_groups(groups: list[tuple[int, list[int]]]) -> tuple[Segment, ...]:
    """The segments of groups: the prompt with its first completion, then the others with the prompt as their prefix."""
    segments, start = [], 0
    for prompt, completions in groups:
        end = start + prompt + completions[0]
        segments.append((start, end, start, start))
        for length in completions[1:]:
            segments.append((end, end + length, start, start + prompt))
            end += length
        start = end
    return tuple(segments)


def paths_of_groups(groups: list[tuple[int, list[int]]]) -> list[list[int]]:
    """The row indices of every sequence, prompt and completion, in the order of a row of groups."""
    paths, start = [], 0
    for prompt, completions in groups:
        own = start + prompt
        for length in completions:
            paths.append([*range(start, start + prompt), *range(own, own + length)])
            own += length
        start = own
    return paths


def visible(groups: list[tuple[int, list[int]]], window: int | None = None) -> Tensor:
    """[S, S] whether the token of a row (line) sees another (column): both on one path, not later, not too far."""
    paths = paths_of_groups(groups)
    size = max(max(path) for path in paths) + 1
    seen = torch.zeros(size, size, dtype=torch.bool)
    for path in paths:
        for place, token in enumerate(path):
            first = 0 if window is None else max(0, place - window + 1)
            seen[token, path[first : place + 1]] = True
    return seen


def random_inputs(num_tokens: int, *, kv_heads: int = KV_HEADS, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Query, key, value [1, heads, S, D] in the memory order that layers of transformers give them."""
    return [
        torch.randn(1, num_tokens, heads, HEAD_DIM, dtype=dtype).transpose(1, 2).requires_grad_()
        for heads in (HEADS, kv_heads, kv_heads)
    ]


def dense_attention(inputs: list[Tensor], seen: Tensor, options: LayerOptions) -> Tensor:
    """[1, S, heads, D]; the window is in ``seen``."""
    query, key, value = inputs
    key, value = (tensor.repeat_interleave(HEADS // tensor.shape[1], dim=1) for tensor in (key, value))
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * (options.scale or HEAD_DIM**-0.5)
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    exponentials = torch.exp(scores) * seen
    total = exponentials.sum(-1, keepdim=True)
    if options.sinks is not None:
        total = total + torch.exp(options.sinks).view(1, -1, 1, 1)
    return torch.einsum("bhqk,bhkd->bqhd", exponentials / total, value)


def gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Of a weighted sum of the output, so that no two outputs count alike."""
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return list(torch.autograd.grad(output, inputs, weights))
