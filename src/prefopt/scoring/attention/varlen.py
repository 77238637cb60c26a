"""All segments in one call of a flash attention kernel for sequences of different lengths.

Queries stay in place; the keys and values of each path, prefix and segment, are gathered one path after another. Both
kernels align a causal mask at the lower right, where a segment's queries stand.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from prefopt.scoring.attention.options import Case, LayerOptions
from prefopt.scoring.attention.plan import Plan

__all__ = ["attend_flash", "attend_varlen", "flash_obstacle", "path_index", "varlen_obstacle"]

MAX_HEAD_DIM = 256
"""Of the flash attention kernels, which also want a multiple of 8."""


@dataclass(frozen=True)
class PathIndex:
    """Where the paths of a row of S tokens stand among the queries, and among T gathered keys; K segments."""

    cu_seqlens_q: Tensor
    """[K + 1] first query of each segment, and S; int32."""
    cu_seqlens_k: Tensor
    """[K + 1] first gathered key of each path, and T; int32."""
    keys: Tensor | None
    """[T] the token each gathered key is of, int64; None: the keys as they stand."""
    max_q: int
    max_k: int


def path_index(plan: Plan) -> PathIndex:
    """The index of a plan, on its device."""
    starts, paths = [0], [0]
    pieces: list[Tensor] = []
    for start, end, prefix_start, prefix_end in plan.segments:
        pieces += [torch.arange(prefix_start, prefix_end), torch.arange(start, end)]
        starts.append(end)
        paths.append(paths[-1] + prefix_end - prefix_start + end - start)
    return PathIndex(
        cu_seqlens_q=plan.on_device(torch.tensor(starts, dtype=torch.int32)),
        cu_seqlens_k=plan.on_device(torch.tensor(paths, dtype=torch.int32)),
        keys=None if paths[-1] == plan.num_tokens else plan.on_device(torch.cat(pieces)),
        max_q=plan.longest,
        max_k=plan.longest_path,
    )


def gathered(key: Tensor, value: Tensor, plan: Plan) -> tuple[Tensor, Tensor, PathIndex]:
    """[T, kv_heads, D] keys and values of all paths."""
    index = plan.once("paths", lambda: path_index(plan))
    keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)
    if index.keys is not None:
        keys, values = keys.index_select(0, index.keys), values.index_select(0, index.keys)
    return keys, values, index


# -- torch.nn.attention.varlen -----------------------------------------------------------------------------------------


@lru_cache
def varlen_kernel() -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def varlen_obstacle(case: Case) -> str | None:
    """Why torch's kernel cannot compute this; None where it can.

    Raises:
        ImportError: this torch does not have it.
    """
    if reason := common_obstacle(case):
        return reason
    if case.softcap:
        return "it has no soft cap"
    if case.dropout:
        return "it has no dropout"
    known = parameters_of(varlen_kernel())
    if case.windowed and "window_size" not in known:
        return f"it has no window in torch {torch.__version__}"
    return None


def attend_varlen(query: Tensor, key: Tensor, value: Tensor, plan: Plan, options: LayerOptions) -> Tensor:
    """[1, S, heads, D] by torch's kernel, whose arguments differ between versions."""
    keys, values, index = gathered(key, value, plan)
    kernel, groups = varlen_kernel(), query.shape[1] // key.shape[1]
    known = parameters_of(kernel)
    chosen: dict[str, Any] = {"scale": options.scale}
    if "window_size" in known:
        chosen["window_size"] = (-1 if options.window is None else options.window - 1, 0)
    else:
        chosen["is_causal"] = True
    if groups > 1 and "enable_gqa" in known:
        chosen["enable_gqa"] = True
    elif groups > 1:
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    queries = query[0].transpose(0, 1)
    lengths = (index.cu_seqlens_q, index.cu_seqlens_k, index.max_q, index.max_k)
    return kernel(queries, keys, values, *lengths, **chosen)[None]


# -- the package flash-attn --------------------------------------------------------------------------------------------


@lru_cache
def flash_kernel() -> Callable[..., Any]:
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    return flash_attn_varlen_func


def flash_obstacle(case: Case) -> str | None:
    """Why the package's kernel cannot compute this; None where it can.

    Raises:
        ImportError: the package is not there.
    """
    if reason := common_obstacle(case):
        return reason
    known = parameters_of(flash_kernel())
    return "this version of flash-attn has no soft cap" if case.softcap and "softcap" not in known else None


def attend_flash(query: Tensor, key: Tensor, value: Tensor, plan: Plan, options: LayerOptions) -> Tensor:
    """[1, S, heads, D] by the package's kernel."""
    keys, values, index = gathered(key, value, plan)
    chosen: dict[str, Any] = {"dropout_p": options.dropout, "softmax_scale": options.scale, "causal": True}
    if options.window is not None:
        chosen["window_size"] = (options.window - 1, 0)
    if options.softcap:
        chosen["softcap"] = options.softcap
    if torch.are_deterministic_algorithms_enabled():
        chosen["deterministic"] = True
    queries = query[0].transpose(0, 1)
    lengths = (index.cu_seqlens_q, index.cu_seqlens_k, index.max_q, index.max_k)
    return flash_kernel()(queries, keys, values, *lengths, **chosen)[None]


# -- what both have in common ------------------------------------------------------------------------------------------


def common_obstacle(case: Case) -> str | None:
    if case.device.type != "cuda":
        return "it computes on CUDA devices"
    if case.dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 and bfloat16, not {case.dtype}"
    if case.head_dim != case.value_dim:
        return f"its keys and values have one size, here they have {case.head_dim} and {case.value_dim}"
    if case.head_dim % 8 or case.head_dim > MAX_HEAD_DIM:
        return f"its heads have at most {MAX_HEAD_DIM} dimensions, a multiple of 8, not {case.head_dim}"
    if case.sinks:
        return "it has no sinks"
    return None


@lru_cache
def parameters_of(kernel: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(kernel).parameters
