"""Models that ranks divide among themselves (FSDP, DeepSpeed): what is done while they are whole, and what after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, broadcast_object_list
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.tensor import DTensor

from prefopt.scoring.capability import LayoutChoice
from prefopt.scoring.forward import innermost, use_full_logits, uses_full_logits
from prefopt.trainer.memory import free_bytes

__all__ = ["gathered", "prepared_for_scoring", "release", "tried_while_whole"]

ENGINES: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""DeepSpeed's engines of models that only score."""


def prepared_for_scoring(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """A model under the run's precision, without an optimizer, and divided where the run divides its models.

    Accelerate's own preparation for evaluation leaves it whole on every rank, under FSDP2 and ZeRO-3.
    """
    if accelerator.is_fsdp2:
        return fsdp2_prepare_model(accelerator, model)
    plugin: Any = accelerator.state.deepspeed_plugin
    if accelerator.distributed_type == DistributedType.DEEPSPEED and plugin.zero_stage == 3:
        return divided_for_scoring(accelerator, model)
    return accelerator.prepare_model(model, evaluation_mode=True)


def divided_for_scoring(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """A model that ZeRO-3 divides among the ranks, in an engine of its own that has no optimizer; once."""
    if model in ENGINES:
        return model
    import deepspeed  # type: ignore[import-not-found]

    plugin: Any = accelerator.state.deepspeed_plugin
    config = deepcopy(plugin.deepspeed_config)
    settings = {name: value for name, value in config.items() if name not in ("optimizer", "scheduler")}
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    ENGINES[model] = engine
    return model


def release(model: nn.Module) -> None:
    """End the engine that a model was scored with, before it is trained in another one."""
    if (engine := ENGINES.pop(model, None)) is not None:
        engine.destroy()


def gathered(value: Any) -> Any:
    """A number of the whole model, where FSDP2 hands it out in parts; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def tried_while_whole(
    models: Sequence[nn.Module], device: torch.device, tried: Callable[[bool], LayoutChoice]
) -> LayoutChoice:
    """The layout that the main process finds before the models are divided; the other ranks follow it.

    They may not have the weights yet. Where the main process does not have them either, or no room for them, the
    config alone decides.

    Args:
        models: that score.
        device: that they will be divided over.
        tried: gives the choice; its argument says whether to try it on a pair.
    """
    found: list[Any] = [None]
    if PartialState().is_main_process:
        with ExitStack() as stack:
            can_try = all(map(is_whole, models)) and has_room(models, device)
            for model in models if can_try else ():
                stack.enter_context(on_device(model, device))
            choice = tried(can_try)
        found = [(choice, [uses_full_logits(model) for model in models])]
    choice, full_logits = broadcast_object_list(found)[0]
    for model, needed in zip(models, full_logits, strict=True):
        if needed:
            use_full_logits(model)
    return choice


def is_whole(model: nn.Module) -> bool:
    """Whether every weight is here with its value: nothing is left out in loading, nothing divided yet."""
    return not any(p.is_meta or hasattr(p, "ds_id") or isinstance(p, DTensor) for p in model.parameters())


def has_room(models: Sequence[nn.Module], device: torch.device) -> bool:
    """Whether the models take no more than half of what is free on the device, or are on it already."""
    needed = sum(p.nbytes for model in models for p in model.parameters() if p.device.type != device.type)
    return not needed or needed <= (free_bytes(device, 1) or 0) / 2


@contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model on ``device``, and afterwards where it was."""
    home = innermost(model).device
    if home.type == device.type:
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(home)
