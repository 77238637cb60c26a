"""What PEFT adapters do to a model. PEFT itself is not imported: its objects are known by what they have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.reference.weights import named_weights

__all__ = [
    "acts_at_the_start",
    "adapter_modules",
    "adapter_off",
    "adapter_parameters",
    "adapter_switched",
    "is_peft",
    "starting_parameters",
    "starts_as_identity",
]


def is_peft(model: nn.Module) -> bool:
    """Whether ``model`` is a ``PeftModel``."""
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def adapter_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that PEFT put in, by name: adapted layers and ``modules_to_save``."""
    for name, module in model.named_modules():
        if hasattr(module, "adapter_layer_names") and hasattr(module, "active_adapters"):
            yield name, module


def adapter_parameters(module: nn.Module, names: Sequence[str] | None = None) -> Iterator[nn.Parameter]:
    """The parameters of the adapters called ``names`` (default: of all) in one module of `adapter_modules`."""
    for path in module.adapter_layer_names:  # type: ignore[union-attr]
        for name, item in attrgetter(path)(module).items():
            if names is None or name in names:
                yield from item.parameters() if isinstance(item, nn.Module) else [item]


def starting_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What training may change in a PEFT model: all that is trainable, and the active adapters if they are not yet."""
    active = {
        id(parameter)
        for _, module in adapter_modules(model)
        for parameter in adapter_parameters(module, module.active_adapters)  # type: ignore[arg-type]
    }
    return {
        name: parameter
        for name, parameter in named_weights(model).items()
        if parameter.requires_grad or id(parameter) in active
    }


def starts_as_identity(model: nn.Module) -> bool:
    """Whether switching the adapters off provably leaves every output as it is, and always will recover it.

    It holds for LoRA (rsLoRA, QLoRA, AdaLoRA) with a zero factor, IA3 with ones and ``modules_to_save`` equal to their
    originals, if nothing outside the adapters is trainable (``bias="all"``). Of anything else nothing is known.
    """
    covered: set[int] = set()
    for _, module in adapter_modules(model):
        names = [str(name) for name in module.active_adapters]  # type: ignore[union-attr]
        if not all(module_is_identity(module, name) for name in names):
            return False
        covered |= {id(parameter) for parameter in adapter_parameters(module, names)}
    return all(id(parameter) in covered for parameter in model.parameters() if parameter.requires_grad)


def acts_at_the_start(model: nn.Module) -> bool:
    """Whether an adapter that is trained is known to be no identity now: LoRA, IA3, ``modules_to_save``, prompts.

    DoRA with a zero factor is one up to rounding.
    """
    if hasattr(model, "prompt_encoder"):
        return True
    for _, module in adapter_modules(model):
        for name in map(str, module.active_adapters):  # type: ignore[union-attr]
            if not any(parameter.requires_grad for parameter in adapter_parameters(module, [name])):
                continue
            known = any(hasattr(module, kind) for kind in ("modules_to_save", "lora_A", "ia3_l"))
            zero = hasattr(module, "lora_A") and has_zero_factor(module, name)
            if known and not zero and not module_is_identity(module, name):
                return True
    return False


def module_is_identity(module: Any, name: str) -> bool:
    """Whether adapter ``name`` changes nothing in ``module``."""
    if not any(True for _ in adapter_parameters(module, [name])):
        return True
    if hasattr(module, "modules_to_save"):
        return same_weights(module.modules_to_save[name], module.original_module)
    if hasattr(module, "lora_A"):
        return lora_is_identity(module, name)
    if hasattr(module, "ia3_l"):
        return bool((module.ia3_l[name] == 1).all())
    return False


def lora_is_identity(module: Any, name: str) -> bool:
    """Whether B A (AdaLoRA: B E A) = 0 because one factor is zero. Variants (DoRA and others) are something else."""
    return name not in module.lora_variant and has_zero_factor(module, name)


def has_zero_factor(module: Any, name: str) -> bool:
    """Whether the product of a LoRA module's factors is zero because one of them is, and none has a bias."""
    if name in module.lora_embedding_A:
        return is_zero(module.lora_embedding_A[name]) or is_zero(module.lora_embedding_B[name])
    factors = [getattr(module, side)[name] for side in ("lora_A", "lora_E", "lora_B") if hasattr(module, side)]
    no_bias = all(getattr(factor, "bias", None) is None or is_zero(factor.bias) for factor in factors)
    return no_bias and any(is_zero(getattr(factor, "weight", factor)) for factor in factors)


def is_zero(tensor: Tensor) -> bool:
    return not bool(torch.count_nonzero(tensor))


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether both have the same tensors under the same names, exactly."""
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """``model`` without its adapters, as by ``model.disable_adapter()``.

    That sets anew which parameters are trainable, and it reads the state of all of them: too slow for every
    micro-batch. Here the layers' own switch is used, and nothing else changes.
    """
    modules: list[Any] = [module for _, module in adapter_modules(model) if not module.disable_adapters]
    for module in modules:
        module._disable_adapters = True
    try:
        assert all(module.disable_adapters for module in modules), "PEFT's switch is another one in this version"
        yield
    finally:
        for module in modules:
            module._disable_adapters = False


@contextmanager
def adapter_switched(model: Any, name: str) -> Iterator[None]:
    """``model`` with adapter ``name`` instead of the active ones."""
    primary, several = model.active_adapter, list(model.active_adapters)
    with trainable_as_before(model):
        try:
            model.set_adapter(name)
            yield
        finally:
            model.set_adapter(primary)
            if len(several) > 1:
                model.base_model.set_adapter(several)


@contextmanager
def trainable_as_before(model: nn.Module) -> Iterator[None]:
    """Which parameters are trainable is restored at the end: PEFT sets it anew with every switch."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, trainable in before:
            if parameter.requires_grad != trainable:
                parameter.requires_grad_(trainable)
