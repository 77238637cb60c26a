"""A head as matrices: what its module computes, so that the products can be made as memory and gradients allow."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Factors", "factors_of", "is_bare", "with_bias"]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHARDING_HOOKS = ("torch.distributed.fsdp.", "deepspeed.")
"""Modules whose hooks bring a sharded weight together before the head's forward, and look at nothing else."""


@dataclass(frozen=True)
class Factors:
    """``logits = sum_i inputs[i] @ weights[i]^T``: a bias is a weight [V, 1] with ones as its input."""

    inputs: tuple[Tensor, ...]
    """[N, H_i] each."""
    weights: tuple[Tensor, ...]
    """[V, H_i] each."""

    def __add__(self, other: Factors) -> Factors:
        return Factors(self.inputs + other.inputs, self.weights + other.weights)


def factors_of(head: nn.Module, hidden: Tensor) -> Factors | None:
    """The head on ``hidden`` [N, H] as factors; None where it is something else, or its weights are not whole here.

    To be called within a call of ``head``, when hooks of a sharding engine have brought its weights together.

    What is not known for certain is refused, not guessed: DoRA divides by the norm of a sum, dropout makes other logits
    at each call, quantised weights have no matrix to read, and the forward of an unknown module may do anything.
    """
    forward = type(head).forward
    if forward is nn.Linear.forward:
        return factors_of_linear(head, hidden)
    lora, wrappers = sys.modules.get("peft.tuners.lora.layer"), sys.modules.get("peft.utils.other")
    if lora is not None and forward is lora.Linear.forward:
        return factors_of_lora(head, hidden)
    if wrappers is not None and type(head) is wrappers.ModulesToSaveWrapper:
        return factors_of(trained_copy(head), hidden)
    return None


def factors_of_linear(layer: Any, hidden: Tensor) -> Factors | None:
    weight, bias = layer.weight, layer.bias
    if not (is_matrix(weight) and weight.shape[1] == hidden.shape[1] and weight.device == hidden.device):
        return None
    factors = Factors((hidden,), (weight,))
    return factors if bias is None else with_bias(factors, bias)


def with_bias(factors: Factors, bias: Tensor) -> Factors:
    """``factors`` with a bias [V] added to the logits."""
    ones = torch.ones_like(factors.inputs[0][:, :1], requires_grad=False)
    return factors + Factors((ones,), (bias[:, None],))


def is_matrix(weight: Any) -> bool:
    """False for what a sharding engine has spread (a DTensor, or empty), and for quantised weights."""
    return type(weight) in (Tensor, nn.Parameter) and weight.dim() == 2 and weight.dtype in DTYPES


def factors_of_lora(layer: Any, hidden: Tensor) -> Factors | None:
    """``h W^T + sum_a s_a (h A_a^T) B_a^T``; the inputs ``s h A^T`` by ordinary autograd."""
    if layer.merged and layer.disable_adapters:
        return None  # PEFT's own forward takes the adapters out of the weight
    factors = factors_of(layer.base_layer, hidden)
    if factors is None or layer.merged or layer.disable_adapters:
        return factors
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        if name in layer.lora_variant or drops(layer.lora_dropout[name]):
            return None
        down, up = layer.lora_A[name], layer.lora_B[name]
        adapter = factors_of(up, down(hidden.to(down.weight.dtype)))
        if adapter is None:
            return None
        scaled = tuple(layer.scaling[name] * x for x in adapter.inputs)
        factors += Factors(scaled, adapter.weights)
    return factors


def drops(dropout: nn.Module) -> bool:
    if isinstance(dropout, nn.Dropout):
        return dropout.training and dropout.p > 0
    return not isinstance(dropout, nn.Identity)


def trained_copy(wrapper: Any) -> nn.Module:
    """The module that a head in PEFT's ``modules_to_save`` hands its input to."""
    names = wrapper.active_adapters
    if wrapper.disable_adapters or not names or any(name not in wrapper.modules_to_save for name in names):
        return wrapper.original_module
    return wrapper.modules_to_save[names[0]]


def is_bare(head: nn.Module, own_forward: Callable[..., Any]) -> bool:
    """Whether nothing of others stands between a call of the head, or of a module in it, and its class's forward.

    A hook of a user's expects logits; accelerate's hooks, which move weights between devices, replace ``forward``.

    Args:
        head: the head's module.
        own_forward: the replacement that is ours.
    """
    return all(is_own_forward(module, own_forward) and not has_foreign_hooks(module) for module in head.modules())


def is_own_forward(module: nn.Module, own_forward: Callable[..., Any]) -> bool:
    replaced = vars(module).get("forward")  # the class's own, where the module was pickled with ours
    return replaced is None or getattr(replaced, "__func__", None) in (own_forward, type(module).forward)


def has_foreign_hooks(module: nn.Module) -> bool:
    tables = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    hooks = (hook for table in tables for hook in table.values())
    return not all(getattr(hook, "__module__", "").startswith(SHARDING_HOOKS) for hook in hooks)
