"""What a layer asks of its attention, and by what a kernel is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefopt.scoring.attention.plan import Plan

__all__ = ["Case", "LayerOptions", "case_of", "layer_options"]

KNOWN_TENSORS = frozenset({"s_aux", "position_ids", "cache_position"})
"""Tensors among a layer's arguments that are read here, or mean nothing where segments say who sees whom."""


@dataclass(frozen=True)
class LayerOptions:
    """A layer's arguments, by their meaning."""

    scale: float | None = None
    """Factor on the scores; None: head_dim ** -0.5."""
    window: int | None = None
    """Places on the path that a token sees, itself included; None also where no path is longer."""
    softcap: float | None = None
    """Scores become ``softcap * tanh(score / softcap)``."""
    sinks: Tensor | None = None
    """[heads] a score per head that takes part in the softmax and has no value."""
    dropout: float = 0.0
    blocks: bool = False
    """Whether tokens of the row see each other in both directions."""
    unknown: tuple[str, ...] = ()
    """Names of tensors that only the model's own attention knows what to do with."""


def layer_options(arguments: Mapping[str, Any], plan: Plan) -> LayerOptions:
    """The keyword arguments that a layer of transformers gives its attention function."""
    window = arguments.get("sliding_window")
    return LayerOptions(
        scale=arguments.get("scaling"),
        window=window if window is not None and window < plan.longest_path else None,
        softcap=arguments.get("softcap"),
        sinks=arguments.get("s_aux"),
        dropout=arguments.get("dropout") or 0.0,
        blocks=bool(plan.blocks),
        unknown=tuple(
            name for name, value in arguments.items() if isinstance(value, Tensor) and name not in KNOWN_TENSORS
        ),
    )


@dataclass(frozen=True)
class Case:
    """All that decides which kernel can compute a call; equal for all layers of a kind."""

    device: torch.device
    dtype: torch.dtype | None
    """In which it is computed; None: query, key and value have different types, which the original has to sort out."""
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float | None
    windowed: bool
    softcap: float | None
    sinks: bool
    dropout: float
    unknown: tuple[str, ...]
    blocks: bool = False

    @property
    def is_plain(self) -> bool:
        """Softmax of scaled scores and nothing else."""
        return not (self.softcap or self.sinks or self.unknown or self.head_dim != self.value_dim)


def case_of(query: Tensor, key: Tensor, value: Tensor, options: LayerOptions) -> Case:
    return Case(
        device=query.device,
        dtype=computing_dtype(query, key, value),
        heads=query.shape[1],
        kv_heads=key.shape[1],
        head_dim=query.shape[-1],
        value_dim=value.shape[-1],
        scale=options.scale,
        windowed=options.window is not None,
        softcap=options.softcap,
        sinks=options.sinks is not None,
        dropout=options.dropout,
        unknown=options.unknown,
        blocks=options.blocks,
    )


def computing_dtype(*tensors: Tensor) -> torch.dtype | None:
    """What torch's own attention would compute in: under autocast norms may have left queries in float32."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    dtypes = {tensor.dtype for tensor in tensors}
    return dtypes.pop() if len(dtypes) == 1 else None
