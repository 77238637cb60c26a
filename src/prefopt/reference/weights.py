"""A model's weights by name, and other weights in their place for as long as a pass lasts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["copied", "is_sharded", "named_weights", "placed", "put_together", "reshard", "swapped"]

WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""What compilation and activation checkpointing put into a parameter's name."""


def named_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter by the name it has in the bare model, a tied one once."""
    return {bare(name): parameter for name, parameter in model.named_parameters()}


def bare(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


@contextmanager
def put_together(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Each of the weights is whole meanwhile, also where DeepSpeed ZeRO-3 holds it in pieces; collective."""
    pieces = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    if not pieces:
        yield
        return
    import deepspeed  # type: ignore[import-not-found]

    with deepspeed.zero.GatheredParameters(pieces):
        yield


def copied(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A frozen copy of each tensor."""
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


@contextmanager
def swapped(model: nn.Module, weights: MutableMapping[str, Tensor]) -> Iterator[nn.Module]:
    """``model`` with ``weights`` in the place of its own of the same names; afterwards its own are back, untouched.

    The parameters stay the same objects, so optimizer, DDP and a graph built before do not notice: their data is
    exchanged. A sharded parameter (FSDP2) keeps its storage, and its values are exchanged.

    Args:
        model: the unwrapped model.
        weights: by the names of `named_weights`. A tensor is moved, once and in place, to where its parameter is.

    Raises:
        ValueError: where the model has no such parameter, or ZeRO-3 holds it in pieces.
    """
    parameters = named_weights(model)
    own: dict[str, Tensor] = {}
    for name in weights:
        weights[name] = placed(name, weights[name], parameters.get(name))
    try:
        for name, tensor in weights.items():
            own[name] = exchange(parameters[name], tensor)
        reshard(model)
        yield model
    finally:
        for name, tensor in own.items():
            exchange(parameters[name], tensor)
        reshard(model)


def placed(name: str, tensor: Tensor, parameter: Tensor | None) -> Tensor:
    """``tensor`` with the device, precision and sharding of ``parameter``."""
    if parameter is None:
        raise ValueError(f"The model has no parameter {name!r} any more, so its starting value cannot be put in place.")
    if hasattr(parameter, "ds_id"):
        raise ValueError(
            "DeepSpeed ZeRO-3 holds the adapter in pieces, so its starting weights cannot take its place. Load the "
            "adapter a second time under another name and set `ref_adapter_name` to it, or use ZeRO-2."
        )
    if isinstance(parameter, DTensor) and not isinstance(tensor, DTensor):
        local = tensor.to(parameter.device, parameter.dtype)
        return distribute_tensor(local, parameter.device_mesh, parameter.placements)
    return tensor.to(parameter.device, parameter.dtype)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has divided the model among the ranks."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Drop what FSDP2 gathered: it keeps the head's and the root's weights after a forward, and goes on with those."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def exchange(parameter: nn.Parameter, tensor: Tensor) -> Tensor:
    """Put ``tensor`` into ``parameter`` and return what was in it."""
    if isinstance(parameter, DTensor):
        # FSDP2 gathers from the local storage it made, whatever `.data` says.
        local, before = parameter.to_local(), parameter.detach().clone()
        local.copy_(tensor.to_local())  # type: ignore[attr-defined]
        return before
    before = parameter.data
    parameter.data = tensor
    return before
