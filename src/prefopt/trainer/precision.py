"""Which floating-point precision a run gets when its user did not say."""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

import torch
from transformers.utils.import_utils import is_torch_bf16_gpu_available, is_torch_xla_available

__all__ = ["has_bf16_hardware", "resolve_precision"]

logger = logging.getLogger(__name__)


def resolve_precision(config: Any) -> None:
    """Decides ``bf16`` where it is None, and lets an explicit ``bf16=True`` run on a CPU.

    None means bfloat16 where the hardware has it and float16 was not asked for, else float32 with one line in the
    log. What ``accelerate launch --mixed_precision`` says counts as asked for.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if config.bf16 is None:
        wants_fp16 = config.fp16 or launched == "fp16"
        config.bf16 = not wants_fp16 and (launched == "bf16" or has_bf16_hardware(config.use_cpu))
        if not config.bf16 and not wants_fp16 and os.environ.get("LOCAL_RANK", "0") == "0":
            _say_float32()
    if (config.bf16 or config.bf16_full_eval) and not _has_accelerator():
        config.use_cpu = True  # transformers takes bf16 on a CPU only together with use_cpu


def has_bf16_hardware(use_cpu: bool = False) -> bool:
    """Whether the machine computes in bfloat16 natively, on something other than its CPU."""
    if use_cpu or os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes"):
        return False
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return is_torch_bf16_gpu_available() or is_torch_xla_available()


def _has_accelerator() -> bool:
    return torch.accelerator.is_available() or is_torch_xla_available()


@functools.cache
def _say_float32() -> None:
    logger.warning("No bfloat16 hardware found: training in float32. Set bf16=True to use bfloat16 on the CPU.")
