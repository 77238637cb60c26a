"""What a model that Unsloth has loaded asks of a run: precision, activation checkpointing, and its two modes.

Its source is not touched, and Unsloth's patches of other trainers are not needed. How it is scored:
`prefopt.scoring.unsloth`.
"""

from __future__ import annotations

import logging
import os
from typing import Any, Literal

import torch
from transformers import TrainerCallback

from prefopt.scoring.unsloth import VARIABLE, is_unsloth
from prefopt.trainer.precision import has_bf16_hardware

__all__ = ["UnslothMode", "tags_of", "unsloth_precision", "unsloth_run"]

logger = logging.getLogger(__name__)

Precision = Literal["bf16", "fp16", "no"]
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class UnslothMode(TrainerCallback):
    """Training mode before the first step, with the checkpointing that the model was loaded with; inference mode after
    the last, if the model was in it.

    Args:
        checkpointing: False, True, or Unsloth's own kind, ``"unsloth"``.
        was_training: the mode that the model came in.
    """

    def __init__(self, checkpointing: bool | str, was_training: bool) -> None:
        self.checkpointing, self.was_training = checkpointing, was_training

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.for_training(use_gradient_checkpointing=self.checkpointing)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.was_training:
            model.for_inference()


def unsloth_run(model: Any, args: Any) -> UnslothMode | None:
    """Fits the options of a run to the model; returns the callback that the run needs, None for any other model.

    Raises:
        ValueError: ``bf16`` or ``fp16`` was set, and the model has the other type.
    """
    if not is_unsloth(model):
        return None
    checkpointing = getattr(model, "_unsloth_gradient_checkpointing", args.gradient_checkpointing)
    if bool(checkpointing) != bool(args.gradient_checkpointing) and args.was_set("gradient_checkpointing"):
        logger.warning(
            "gradient_checkpointing=%s has no effect on a model of Unsloth, which was loaded with "
            "use_gradient_checkpointing=%r; set it there.",
            args.gradient_checkpointing,
            checkpointing,
        )
    args.gradient_checkpointing = False  # transformers would put its own in place of Unsloth's
    settle_precision(model, args)
    os.environ[VARIABLE] = "0"  # a run of another kind may have left it
    return UnslothMode(checkpointing, bool(model.training))


def settle_precision(model: Any, args: Any) -> None:
    """Gives ``bf16`` and ``fp16`` the values that the model needs; what the user set stays where it can be."""
    wanted = unsloth_precision(model, has_bf16=has_bf16_hardware(args.use_cpu))
    if wanted != "no":
        given = [name for name in HALF if args.was_set(name) and getattr(args, name)]
        other = HALF["fp16" if given == ["bf16"] else "bf16"]
        if given and dtype_of(model) == other:
            raise ValueError(
                f"{given[0]}=True: Unsloth loaded the model in {other}, and its kernels compute in the type of the "
                f"weights. Leave {given[0]} out, or load the model with dtype={HALF[given[0]]}."
            )
        if given or model.device.type == "cpu":
            return
    args.decide(bf16=wanted == "bf16", fp16=wanted == "fp16")
    args.mixed_precision = wanted


def unsloth_precision(model: Any, *, has_bf16: bool) -> Precision:
    """The mixed precision that Unsloth means for a model.

    Args:
        model: as Unsloth loaded it. What it notes on the model goes before its environment variables, which are those
            of the model that was loaded last.
        has_bf16: whether the device computes in bfloat16.
    """
    full = noted(model, "_unsloth_full_finetuning", "UNSLOTH_ENABLE_FULL_FINETUNING")
    if noted(model, "_unsloth_forced_float32", "UNSLOTH_FORCE_FLOAT32") and not (full and has_bf16):
        return "no"
    if os.environ.get("UNSLOTH_MIXED_PRECISION") == "bfloat16":  # weights in bfloat16, trained in it
        return "no"
    dtype = dtype_of(model)
    if dtype == torch.float32 and getattr(model, "_unsloth_user_float32", False) and not has_bf16:
        return "no"
    return "bf16" if has_bf16 and dtype != torch.float16 else "fp16"


def noted(model: Any, name: str, variable: str) -> bool:
    note = getattr(model, name, None)
    return os.environ.get(variable) == "1" if note is None else bool(note)


def dtype_of(model: Any) -> torch.dtype:
    """The type that the model was loaded in; quantised weights are of none that is meant."""
    dtype = getattr(model.config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else model.get_input_embeddings().weight.dtype


def tags_of(model: Any, method: str) -> list[str]:
    """The tags of a trained model."""
    return ["prefopt", method, *(["unsloth"] if getattr(model.config, "unsloth_version", None) else [])]
