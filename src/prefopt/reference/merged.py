"""A model's weights with its adapters merged in: what a model without adapters would have, weight by weight."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.reference.weights import bare

__all__ = ["merged_weights"]


@torch.no_grad()
def merged_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Each weight that ``model`` would have without adapters, by the name it has in the base model.

    One adapted layer at a time is copied and merged, so that the model itself stays as it is to the last bit and at
    most one layer is held twice.

    Args:
        model: a ``PeftModel``, unwrapped.

    Yields:
        Name and value; a tied weight once, under its first name.

    Raises:
        ValueError: what the adapter learns is no weight (a prompt, a prefix).
    """
    if not hasattr(model.base_model, "merge_and_unload"):
        raise ValueError(
            f"What {model.peft_config[model.active_adapter].peft_type.value} learns is put before the tokens and is no "
            "change of a weight, so a reference without it cannot follow. Leave `ref_model` out: the reference then "
            "is the model with a copy of the adapter."
        )
    yield from weights_under(model.get_base_model(), "", set())


def weights_under(module: Any, path: str, seen: set[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The weights of ``module``, merged, with ``path`` before their names, except those that were seen."""
    if hasattr(module, "modules_to_save"):
        module = module.modules_to_save[module.active_adapters[0]] if module.active_adapters else module.original_module
    module = getattr(module, "token_adapter", module)  # of embeddings that are trained token by token
    if is_adapted(module):
        yield from ((bare(path + name), weight) for name, weight in merged_copy(module).named_parameters())
        return
    for name, weight in module.named_parameters(recurse=False):
        if weight not in seen:
            seen.add(weight)
            yield bare(path + name), weight
    for name, child in module.named_children():
        yield from weights_under(child, f"{path}{name}.", seen)


def is_adapted(module: nn.Module) -> bool:
    """Whether adapters stand around a layer of the base model."""
    return hasattr(module, "base_layer") and hasattr(module, "merge")


def merged_copy(module: Any) -> nn.Module:
    """A copy of the layer that adapters stand around, several of them one around the other, with all active ones."""
    copy = deepcopy(module)
    for part in list(copy.modules()):
        if is_adapted(part):
            part.merge()
    while is_adapted(copy):
        copy = copy.base_layer
    return copy
