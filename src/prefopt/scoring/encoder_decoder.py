"""Encoder-decoder models: the encoder reads each prompt once, and what it gives is read by all completions of the pair.

Such a model has two bodies and is called with two sets of ids. `encoded` runs the first body on the prompts
[P, T_prompt] of a batch, `decode` the second on its completions [B * P, T_completion]; the head is the same as
everywhere. Both run within the patched forward of the whole model, so that wrappers around it stay in force.

The decoder's layers make keys and values of what the encoder gave. The decoder is handed a row of it for each
completion, as its code expects; the rows know the prompts that they repeat, and `share_projections` lets the linear
layers that are given them compute with these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

__all__ = [
    "decode",
    "decoder_input_ids",
    "encoded",
    "is_encoder_decoder",
    "num_positions",
    "predicting_ids",
    "share_projections",
    "unite_embeddings",
    "whole_inputs",
]


def is_encoder_decoder(config: Any) -> bool:
    """Whether a transformers config is that of an encoder-decoder model."""
    return bool(getattr(config, "is_encoder_decoder", False))


def predicting_ids(inputs: Mapping[str, Tensor]) -> Tensor:
    """[R, T] the ids whose rows ``predict_from`` counts in: the decoder's, or those of the only body."""
    return inputs["labels"] if "labels" in inputs else inputs["input_ids"]


def num_positions(inputs: Mapping[str, Tensor]) -> int:
    """Positions that the model computes for a batch, padding included."""
    return sum(inputs[name].numel() for name in ("input_ids", "labels") if name in inputs)


def start_token_id(model: PreTrainedModel | Any) -> int:
    """The token that every decoder row begins with, as generation finds it.

    Raises:
        ValueError: the model has none.
    """
    for config in (model.config, getattr(model, "generation_config", None)):
        if (start := getattr(config, "decoder_start_token_id", None)) is not None:
            return start
    start = getattr(model.config.get_text_config(decoder=True), "bos_token_id", None)
    if start is None:
        raise ValueError(
            f"This {type(model).__name__} has no `decoder_start_token_id` (and no `bos_token_id`), so there is nothing "
            "for its decoder to begin with. Set `model.config.decoder_start_token_id`; for T5 it is the pad token."
        )
    return start


def decoder_input_ids(model: PreTrainedModel | Any, labels: Tensor) -> Tensor:
    """[R, T] the labels one place later, after the start token. What stands at padding is seen by padding alone."""
    start = labels.new_full((len(labels), 1), start_token_id(model))
    return torch.cat([start, labels[:, :-1]], dim=1).clamp(min=0)


def encoded(model: PreTrainedModel | Any, labels: Tensor, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the model in which its prompts are encoded, and repeated for the completions of each pair.

    Args:
        model: bare.
        labels: [B * P, T_completion] completions, by branch, then by pair.
        inputs: ``input_ids`` [P, T_prompt] (or ``inputs_embeds``, where an adapter put virtual tokens in front),
            ``attention_mask``, what else the encoder takes, and ``past_key_values`` of an adapter for the decoder
            (prefix tuning), a row for each prompt.
    """
    of_encoder = {name: value for name, value in inputs.items() if name not in ("use_cache", "past_key_values")}
    hidden = model.get_encoder()(**of_encoder).last_hidden_state
    times = len(labels) // len(hidden)
    prefix = inputs.get("past_key_values")
    if prefix is not None:
        prefix.batch_select_indices(torch.arange(len(labels), device=hidden.device) % len(hidden))
    repeated = hidden.repeat(times, 1, 1)
    repeated._prefopt_prompts, hidden._prefopt_times = hidden, times
    return {
        **({} if prefix is None else {"past_key_values": prefix}),
        "encoder_outputs": BaseModelOutput(last_hidden_state=repeated),
        "attention_mask": inputs["attention_mask"].repeat(times, 1),
        "decoder_input_ids": decoder_input_ids(model, labels),
        "use_cache": False,
    }


def decode(
    model: PreTrainedModel | Any,
    *,
    encoder_outputs: BaseModelOutput,
    attention_mask: Tensor,
    decoder_input_ids: Tensor,
    **of_decoder: Any,
) -> Any:
    """The decoder's outputs, without the head, from what `encoded` gives."""
    return model.get_decoder()(
        input_ids=decoder_input_ids,
        encoder_hidden_states=encoder_outputs.last_hidden_state,
        encoder_attention_mask=attention_mask,
        **of_decoder,
    )


def share_projections(model: PreTrainedModel | Any) -> None:
    """Let the decoder's linear layers compute each encoded prompt once, and repeat the result for its completions.

    The hooks act on the very tensor that `encoded` marks, and on no other. Where something made another one of it
    (a layer that recomputes from detached inputs, a cast by FSDP), the layers compute with the repeated rows.
    """
    shared: list[str] = []
    for name, module in model.get_decoder().named_modules():
        inner = any(name.startswith(f"{outer}.") for outer in shared)  # of an adapter's layer
        if hasattr(module, "in_features") and not inner:
            shared.append(name)
            module.register_forward_pre_hook(take_prompts)
            module.register_forward_hook(repeat_result)


def unite_embeddings(model: PreTrainedModel | Any) -> None:
    """Make one module of the embeddings that encoder and decoder have of one weight, which transformers 5 keeps apart.

    It computes and saves the same. FSDP2 divides weights by module and refuses one that is in two groups, and
    accelerate puts into one group no more than an input and an output embedding.
    """
    shared = model.get_input_embeddings()
    for embedding in (shared, *(body.get_input_embeddings() for body in (model.get_encoder(), model.get_decoder()))):
        has_own_code = type(embedding) is not type(shared) or not isinstance(embedding, nn.Embedding)
        if has_own_code or "forward" in vars(embedding) or embedding.weight is not shared.weight:
            return
    model.set_input_embeddings(shared)


def take_prompts(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The prompts in place of rows that repeat them."""
    if torch.compiler.is_compiling() or not args:  # a compiled layer would be compiled anew for every mark
        return None
    prompts = getattr(args[0], "_prefopt_prompts", None)
    return None if prompts is None else (prompts, *args[1:])


def repeat_result(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
    """What was computed of the prompts, for each of their completions."""
    times = getattr(args[0], "_prefopt_times", None) if args else None
    return None if times is None else output.repeat(times, 1, 1)


def whole_inputs(model: PreTrainedModel | Any, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Keyword arguments of the unpatched model: every completion with a prompt of its own, and nothing shared.

    Those of a model with one body are what they were.
    """
    if "labels" not in inputs:
        return inputs
    labels = inputs["labels"]
    times = len(labels) // len(inputs["input_ids"])
    prompts = {name: inputs[name].repeat(times, 1) for name in ("input_ids", "attention_mask")}
    return prompts | {"decoder_input_ids": decoder_input_ids(model, labels)}
