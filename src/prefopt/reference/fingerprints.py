"""A short name for what a model computes: two models with the same fingerprint give the same log-probs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import transformers
import xxhash
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import prefopt
from prefopt.reference.adapters import adapter_modules, adapter_parameters
from prefopt.reference.weights import bare, put_together
from prefopt.scoring.forward import innermost

__all__ = ["fingerprint", "probe", "used_tensors", "weights_fingerprint"]

IRRELEVANT = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
"""Entries of a model config that say where a model is from; its precision is that of its tensors."""

IRRELEVANT_OF_ADAPTER = {"base_model_name_or_path", "inference_mode", "lora_dropout", "revision", "task_type"}

CHUNK = 1 << 26
"""Bytes of a tensor that are brought to the host at a time."""


def fingerprint(model: nn.Module, **settings: object) -> str:
    """32 hexadecimal digits of what decides a model's log-probs.

    That is: class, config, attention implementation, versions of this package and of the libraries, every weight and
    persistent buffer with its type, and of the adapters those that are active with their scaling. Adapters that are
    off, optimizer and run do not enter: a base model under a switched-off adapter has the fingerprint of the base
    model alone.

    The weights are hashed one after another where they are; no copy of the model is made.

    Args:
        model: the model in the state in which it scores.
        settings: what else decides the numbers, such as the autocast type.

    Raises:
        ValueError: a weight is not there (on the meta device).
    """
    inner = innermost(model)
    digest = xxhash.xxh3_128()
    digest.update(
        canonical(
            {
                "class": type(inner).__qualname__,
                "config": {key: value for key, value in inner.config.to_dict().items() if key not in IRRELEVANT},
                "attention": inner.config._attn_implementation,
                "versions": [prefopt.__version__, torch.__version__, transformers.__version__],
                "adapters": adapter_settings(model),
                "settings": settings,
            }
        )
    )
    take_in(digest, used_tensors(model))
    return digest.hexdigest()


def weights_fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """32 hexadecimal digits of weights and nothing else, the same under every version of the libraries.

    Args:
        tensors: names and weights; the order of the names does not count.

    Returns:
        None where a weight is not there as a whole on this rank.
    """
    ordered = sorted(tensors, key=lambda item: item[0])
    if any(isinstance(tensor, DTensor) or tensor.is_meta or hasattr(tensor, "ds_id") for _, tensor in ordered):
        return None
    digest = xxhash.xxh3_128()
    take_in(digest, ordered)
    return digest.hexdigest()


def take_in(digest: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Update ``digest`` with names, types, shapes and bytes.

    Raises:
        ValueError: a weight is not there.
    """
    for name, tensor in tensors:
        if tensor.is_meta:
            raise ValueError(f"The weight {name!r} is not loaded: take the fingerprint where it is.")
        with put_together([tensor]):
            digest.update(canonical([name, str(tensor.dtype), list(tensor.shape)]))
            for block in blocks(tensor):
                digest.update(block)


def probe(model: nn.Module) -> bytes:
    """The first number of every tensor that `fingerprint` reads: cheap, and no longer the same once weights move."""
    local = (own_part(tensor) for _, tensor in used_tensors(model))
    first = (tensor.detach()[(0,) * tensor.ndim] for tensor in local if tensor.numel())
    return b"".join(block.tobytes() for number in first for block in blocks(number))


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a weight, where FSDP2 or ZeRO-3 divides it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else getattr(tensor, "ds_tensor", tensor)


def used_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights and persistent buffers by name in the base model; a tied one once, adapters that are off never."""
    unused = {id(parameter) for _, module in adapter_modules(model) for parameter in adapter_parameters(module)} - {
        id(parameter)
        for _, module in adapter_modules(model)
        for parameter in adapter_parameters(module, active_names(module))
    }
    seen: set[int] = set()
    state = model.state_dict(keep_vars=True)
    tensors = [(base_name(name), tensor) for name, tensor in state.items() if isinstance(tensor, Tensor)]
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        if id(tensor) not in unused and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def base_name(name: str) -> str:
    """A weight's name without what PEFT and wrappers put into it."""
    name = bare(name).removeprefix("base_model.model.")
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def active_names(module: Any) -> list[str]:
    """The adapters in force in a module of `adapter_modules`."""
    return [] if module.disable_adapters else [str(name) for name in module.active_adapters]


def adapter_settings(model: Any) -> dict[str, Any]:
    """Of every active adapter its config, and its scaling per layer (which may have been set by hand)."""
    scaling = {
        f"{name}.{adapter}": factor
        for name, module in adapter_modules(model)
        if hasattr(module, "lora_A")
        for adapter, factor in module.scaling.items()  # type: ignore[union-attr]
        if adapter in active_names(module)
    }
    used = sorted({adapter for _, module in adapter_modules(model) for adapter in active_names(module)})
    configs = {
        adapter: {k: v for k, v in model.peft_config[adapter].to_dict().items() if k not in IRRELEVANT_OF_ADAPTER}
        for adapter in used
    }
    return {"scaling": scaling, "configs": configs}


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and sets."""

    def plain(item: Any) -> Any:
        return sorted(item, key=str) if isinstance(item, (set, frozenset)) else str(item)

    return json.dumps(value, sort_keys=True, default=plain).encode()


def blocks(tensor: Tensor) -> Iterator[Any]:
    """The bytes of a tensor, piece by piece on the host; each is valid until the next."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    # A GPU writes to pinned memory several times faster than to memory that it cannot reach by itself.
    pinned = torch.empty(min(CHUNK, flat.numel()), dtype=torch.uint8, pin_memory=True) if flat.is_cuda else None
    for start in range(0, flat.numel(), CHUNK):
        piece = flat[start : start + CHUNK]
        yield (piece.cpu() if pinned is None else pinned[: piece.numel()].copy_(piece)).numpy()
