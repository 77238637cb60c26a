"""Kernels of other packages: layer kernels (Liger), hub kernels, flash attention. Said early where one is not there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers.utils
from transformers.integrations.hub_kernels import is_kernel
from transformers.utils.import_utils import is_kernels_available, is_liger_kernel_available, is_torch_npu_available

__all__ = ["apply_layer_kernels", "check_kernels", "kernel_warnings", "settle_layer_kernels"]

OWN_HEAD = {"fused_linear_cross_entropy": False, "cross_entropy": False}
"""What Liger must leave alone: a forward and a loss in place of those that score."""


def kernel_warnings(config: Any) -> Iterator[str]:
    """Options of the config that have no effect."""
    if not config.use_liger_kernel:
        return
    if not runs_triton(config):
        yield "use_liger_kernel=True has no effect on a CPU: Liger's kernels are Triton programs, which run on GPUs"
    for name in OWN_HEAD:
        if (config.liger_kernel_config or {}).get(name):
            yield (
                f"liger_kernel_config={{{name!r}: True}} has no effect: it is a loss for next tokens; log-probs come "
                "from prefopt's head, which makes no whole logits either"
            )


def runs_triton(config: Any) -> bool:
    """Whether Triton programs run where the model will be: on an accelerator, or in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1" or (torch.accelerator.is_available() and not config.use_cpu)


def check_kernels(model: Any, args: Any) -> None:
    """Whether the packages are there that the options need; asked before any row is prepared.

    Args:
        model: a path or hub id, which is loaded with ``args.model_init_kwargs``, or a model.
        args: the config of the run.

    Raises:
        ImportError: with the option, the package, and what goes without it.
    """
    if args.use_liger_kernel and runs_triton(args) and not is_liger_kernel_available():
        raise ImportError(
            "use_liger_kernel=True: the package liger-kernel is not installed. pip install liger-kernel, or leave the "
            "option out: only the speed of the layers depends on it."
        )
    if not isinstance(model, str | os.PathLike):
        return
    kwargs = args.model_init_kwargs or {}
    if (kwargs.get("use_kernels") or kwargs.get("kernel_config")) and not is_kernels_available():
        raise ImportError(
            "model_init_kwargs={'use_kernels': True}: the package kernels is not installed, or its version does not "
            "fit this transformers. pip install kernels, or leave it out."
        )
    for name in attention_names(kwargs.get("attn_implementation")):
        check_attention(name)


def attention_names(given: Any) -> list[str]:
    """The names in ``attn_implementation``: one, or one for each part of a model."""
    names = given.values() if isinstance(given, Mapping) else [given]
    return [name for name in names if isinstance(name, str)]


def check_attention(name: str) -> None:
    if is_kernels_available() or is_torch_npu_available():
        return  # transformers fetches the kernel, or has another
    if is_kernel(name):
        raise ImportError(
            f"attn_implementation={name!r} in model_init_kwargs: kernels of the Hub need the package kernels, which is "
            "not installed, or whose version does not fit this transformers. pip install kernels, or leave "
            "attn_implementation out."
        )
    version = re.fullmatch(r"flash_attention_(\d)", name)
    if version and not getattr(transformers.utils, f"is_flash_attn_{version[1]}_available", bool)():
        raise ImportError(
            f"attn_implementation={name!r} in model_init_kwargs: flash-attn {version[1]} is not installed, or there is "
            "no GPU for it. Install it, or leave attn_implementation out: on a GPU, rows are then computed by torch's "
            "own flash attention for sequences of different lengths."
        )


def settle_layer_kernels(args: Any) -> None:
    """Liger's options as they can be: off where nothing runs them, and never with a loss of Liger's."""
    if args.use_liger_kernel:
        args.decide(
            use_liger_kernel=runs_triton(args),
            liger_kernel_config={**(args.liger_kernel_config or {}), **OWN_HEAD},
        )


def apply_layer_kernels(model: Any, args: Any) -> None:
    """Liger's kernels in the layers of a model, where they are wanted.

    Now, so that what is tried, and the reference, is computed as in training. Transformers applies them once more when
    training begins, which changes nothing.
    """
    if args.use_liger_kernel:
        from transformers.integrations.liger import apply_liger_kernel

        apply_liger_kernel(model, args.liger_kernel_config)
