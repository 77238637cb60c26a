"""Plain torch in place of kernels for CUDA: the same arguments, the same meaning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from prefopt.scoring.attention import flex, varlen
from prefopt.scoring.attention.options import Case

CUDA = Case(
    device=torch.device("cuda"),
    dtype=torch.bfloat16,
    heads=4,
    kv_heads=2,
    head_dim=64,
    value_dim=64,
    scale=None,
    windowed=False,
    softcap=None,
    sinks=False,
    dropout=0.0,
    unknown=(),
)
"""A plain call on an accelerator."""


def lower_right(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[Tensor, Tensor, int, int],
    *,
    left: int,
    scale: float | None,
    softcap: float = 0.0,
) -> Tensor:
    """What flash attention kernels compute: sequence by sequence, causal from the lower right, ``left`` keys back."""
    cu_seqlens_q, cu_seqlens_k, max_q, max_k = lengths
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    outputs = []
    bounds = zip(cu_seqlens_q, cu_seqlens_q[1:], cu_seqlens_k, cu_seqlens_k[1:], strict=False)
    for start, end, first, last in bounds:
        q, k, v = query[start:end], key[first:last], value[first:last]
        assert len(q) <= max_q
        assert len(k) <= max_k
        k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[-1] ** -0.5)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
        hidden = (distance < 0) | ((distance > left) if left >= 0 else torch.zeros(()).bool())
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


def varlen_of_today(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """The arguments of torch 2.13."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert window_size[1] == 0
    return lower_right(query, key, value, (cu_seq_q, cu_seq_k, max_q, max_k), left=window_size[0], scale=scale)


def varlen_of_old(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> Tensor:
    """Without windows, and without fewer key heads than query heads."""
    assert is_causal
    assert query.shape[1] == key.shape[1]
    return lower_right(query, key, value, (cu_seq_q, cu_seq_k, max_q, max_k), left=-1, scale=scale)


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """The arguments of flash-attn 2.8."""
    assert causal
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return lower_right(q, k, v, lengths, left=window_size[0], scale=softmax_scale, softcap=softcap)


KERNELS: dict[str, tuple[str, Callable[..., Any]]] = {
    "varlen": ("varlen_kernel", varlen_of_today),
    "old varlen": ("varlen_kernel", varlen_of_old),
    "flash": ("flash_kernel", flash),
}


def stand_in(monkeypatch: pytest.MonkeyPatch, kernel: str) -> Callable[..., Tensor]:
    """The backend of that name over plain torch in place of its kernel; ``flex`` has no backward then."""
    if kernel == "flex":
        monkeypatch.setattr(flex, "flex_kernel", lambda: flex_attention)
        return flex.attend_flex
    target, function = KERNELS[kernel]
    monkeypatch.setattr(varlen, target, lambda: function)
    return varlen.attend_flash if kernel == "flash" else varlen.attend_varlen
