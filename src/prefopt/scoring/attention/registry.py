"""The attention functions registered with transformers, which understand segments.

For each attention implementation one function is registered that looks at what it is given: segments go to the kernel
that `backend_for` names, anything else (``generate``, a padded batch) to the original, with its mask function.

The name has to stand in the config for as long as a backward may come: a checkpointed layer looks it up again when it
recomputes. `segment_attention` sets it, and takes it back when the outermost use ends.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prefopt.scoring.attention.backends import backend_for
from prefopt.scoring.attention.options import case_of, layer_options
from prefopt.scoring.attention.plan import is_segments, plan_of
from prefopt.scoring.attention.segments import attend_segments, masks_of, original_call, torch_call
from prefopt.scoring.unsloth import is_unsloth

__all__ = ["segment_attention", "without_segments"]

PREFIX = "prefopt_"


@contextmanager
def segment_attention(*models: nn.Module) -> Iterator[None]:
    """Within the context the models understand segments. Contexts may be nested."""
    changed = attention_configs(*(model for model in models if not is_unsloth(model)))  # which has attention of its own
    for config in changed:
        name = config._attn_implementation or "eager"
        register(name)
        config._attn_implementation_internal = PREFIX + name
    try:
        yield
    finally:
        for config in changed:
            config._attn_implementation_internal = config._attn_implementation.removeprefix(PREFIX)


@contextmanager
def without_segments(*models: nn.Module) -> Iterator[None]:
    """Within the context the models attend as before `segment_attention`. No backward pass may be pending."""
    changed = [c for c in configs_of(*models) if str(c._attn_implementation).startswith(PREFIX)]
    for config in changed:
        config._attn_implementation_internal = config._attn_implementation.removeprefix(PREFIX)
    try:
        yield
    finally:
        for config in changed:
            config._attn_implementation_internal = PREFIX + config._attn_implementation


def attention_configs(*models: nn.Module) -> list[Any]:
    """The distinct configs of the models' parts that do not yet name a segment implementation."""
    return [c for c in configs_of(*models) if not str(c._attn_implementation).startswith(PREFIX)]


def configs_of(*models: nn.Module) -> list[Any]:
    """The distinct configs of the models' parts."""
    parts = (part for model in models for part in model.modules() if isinstance(part, PreTrainedModel))
    return list({id(part.config): part.config for part in parts}.values())


def register(name: str) -> None:
    """Make ``prefopt_<name>`` known to transformers: the segment attention over ``name``."""
    if PREFIX + name in ALL_ATTENTION_FUNCTIONS.valid_keys():
        return

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        original = original_attention(module, name)
        if is_segments(attention_mask):
            return attend(name, original, module, query, key, value, attention_mask, kwargs), None  # type: ignore[call-arg]
        return original(module, query, key, value, attention_mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register(PREFIX + name, attention)
    if name in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys():
        ALL_MASK_ATTENTION_FUNCTIONS.register(PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])


def original_attention(module: Any, name: str) -> Callable[..., Any]:
    """What transformers would call: a registered function, or the eager one of the module's own modeling file."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    original = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)  # type: ignore[arg-type]
    if masks_of(name) != "never":
        return original

    def flash(module: Any, *args: Any, **kwargs: Any) -> Any:
        """It loads the kernel whose name it finds in the config."""
        set_name = module.config._attn_implementation_internal
        module.config._attn_implementation_internal = name
        try:
            return original(module, *args, **kwargs)
        finally:
            module.config._attn_implementation_internal = set_name

    return flash


@torch.compiler.disable
def attend(
    name: str,
    original: Callable[..., Any],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    carrier: Tensor,
    arguments: dict[str, Any],
) -> Tensor:
    """[1, S, heads, D] attention over the segments of ``carrier``.

    Not compiled: its shapes and its number of calls are those of the batch, and each would be a new graph.

    Args:
        name: of the implementation that the model has, ``original``.
        query: [1, heads, S, D]; ``key`` and ``value`` [1, kv_heads, S, D].
        arguments: what the layer gives its attention beside these.
    """
    plan = plan_of(carrier)
    options = layer_options(arguments, plan)
    case = case_of(query, key, value, options)
    backend = backend_for(name, case)
    if backend is not None:
        query, key, value = (tensor.to(case.dtype) for tensor in (query, key, value))
        return backend.attend(query, key, value, plan, options)
    if case.device.type == "cpu" and case.is_plain and name in ("sdpa", "flex_attention"):  # flex has no backward here
        call, masks = torch_call(options.scale, options.dropout), "unless causal"
    else:
        call, masks = original_call(original, module, arguments), masks_of(name)
    return attend_segments(call, query, key, value, plan, options.window, masks)
