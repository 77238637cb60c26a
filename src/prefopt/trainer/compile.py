"""``torch_compile``, one decoder layer at a time.

Batches have ever new lengths. A model that is compiled as a whole is compiled again for them; a decoder layer with
dynamic shapes is compiled once, and all layers of a kind share the result. Attention stays outside: how many segments
a row has, and where they end, is read on the host.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from prefopt.scoring.forward import body_of, innermost

__all__ = ["compile_layers", "compile_options", "decoder_layers"]

logger = logging.getLogger(__name__)

VARIANTS = 64
"""Compiled variants that one function may have. All layers and their parts go through the same few functions of torch,
and each kind of module has a variant for training, for evaluation and for a recomputing backward; torch stops at 8."""


def compile_options(plugin: Any) -> dict[str, Any] | None:
    """Arguments of ``torch.compile`` from accelerate's ``TorchDynamoPlugin``; None where nothing is to be compiled."""
    backend = plugin.backend.value.lower()
    if backend == "no":
        return None
    return {
        "backend": backend,
        "mode": plugin.mode if plugin.options is None else None,  # torch takes one of the two
        "options": plugin.options,
        "dynamic": True if plugin.dynamic is None else plugin.dynamic,
    }


def compile_layers(model: nn.Module, options: Mapping[str, Any]) -> None:
    """Compile the decoder layers of ``model``, in place; those that are compiled stay as they are.

    Names of weights do not change, and a copy of the model is not compiled.
    """
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    for layer in decoder_layers(model) or [whole_body(model)]:
        if layer._compiled_call_impl is None:
            layer.compile(**options)
        checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
        if checkpoint is not None and not isinstance(checkpoint, CompiledCheckpoint):
            layer._gradient_checkpointing_func = CompiledCheckpoint(checkpoint, options)  # type: ignore[assignment]


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers does not split over devices, else the heaviest list of modules of one class."""
    names = getattr(innermost(model), "_no_split_modules", None) or ()
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if layers:
        return layers
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    alike = [list(modules) for modules in lists if len({type(module) for module in modules}) == 1]
    return max(alike, key=lambda modules: sum(p.numel() for module in modules for p in module.parameters()), default=[])


def whole_body(model: nn.Module) -> nn.Module:
    """The model without its head, with a warning the first time."""
    inner = innermost(model)
    body = body_of(inner)
    if body._compiled_call_impl is None:
        logger.warning(
            "torch_compile: no decoder layers were found in %s (no `_no_split_modules`, no list of like modules); its "
            "body is compiled as a whole, which takes longer.",
            type(inner).__name__,
        )
    return body


class CompiledCheckpoint:
    """A checkpoint function that recomputes compiled code.

    ``torch.utils.checkpoint`` turns the compiler off for all it calls, and some versions of transformers call it within
    a layer's forward. A compiled function inside turns it on again.

    Args:
        checkpoint: calls ``torch.utils.checkpoint.checkpoint``.
        options: of ``torch.compile``.
    """

    def __init__(self, checkpoint: Callable[..., Any], options: Mapping[str, Any]) -> None:
        self.checkpoint = checkpoint
        self.call = torch.compile(call, **options)

    @torch.compiler.disable
    def __call__(self, layer: Callable[..., Any], *args: Any) -> Any:
        return self.checkpoint(functools.partial(self.call, layer), *args)


def call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)
