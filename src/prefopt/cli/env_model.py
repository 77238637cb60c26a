"""What a model gets on this machine, and why: the second part of ``prefopt env MODEL``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prefopt.cli.env import rows_attention
from prefopt.cli.errors import UserError

__all__ = ["model_lines"]

GIB, MIB = 2**30, 2**20
ADAM_BYTES = 16
"""Of a float32 weight in full training: itself, its gradient, AdamW's two moments."""


def model_lines(name: str) -> Iterator[tuple[str, str]]:
    """What a model gets, decided from its config, on a model without weights."""
    from prefopt.scoring.capability import why_not_packed

    model = empty_model(name)
    config = model.config
    text = config.get_text_config()
    yield "model", f"{name}: {type(model).__name__}"
    yield "model layouts", layouts_of(model)
    packed = f"; packed rows: {attention_of(model)}" if why_not_packed(model) is None else ""
    yield "model attention", f"{config._attn_implementation}{packed}"
    yield "model context", f"{getattr(text, 'max_position_embeddings', None) or 'not said'} tokens"
    yield "model chat template", chat_template(name)
    yield "model head", "tied to the embeddings" if config.tie_word_embeddings else "a matrix of its own"
    yield "model size", size_of(sum(weight.numel() for weight in model.parameters()))


def empty_model(name: str) -> Any:
    """The model on the meta device.

    Raises:
        UserError: nothing of that name has a config, or its code is its own.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    from prefopt.scoring.encoder_decoder import is_encoder_decoder
    from prefopt.trainer.setup import decoder_class

    try:
        config = AutoConfig.from_pretrained(name)
        kind = AutoModelForSeq2SeqLM if is_encoder_decoder(config) else decoder_class(config)
        with torch.device("meta"):
            return kind.from_config(config)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: no model can be made of this name ({error})") from error


def layouts_of(model: Any) -> str:
    from prefopt.scoring.capability import candidates

    chain, reasons = candidates(model, "auto")
    if chain == ["encoder_decoder"]:
        return "encoder_decoder (the only one of a model with two bodies)"
    why = "; ".join(reasons) or f"layout=auto takes {chain[0]}, if it agrees with padded on the first pair of a run"
    return f"{', '.join(chain)} ({why})"


def attention_of(model: Any) -> str:
    """Which backends compute its packed rows, by what its config asks of the attention."""
    import torch

    text = model.config.get_text_config()
    heads = text.num_attention_heads
    sizes = {
        "heads": heads,
        "kv_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
    }
    windowed = "sliding_attention" in (getattr(text, "layer_types", None) or ())
    kinds = {
        "plain": True,
        "window": windowed,
        "soft cap": bool(getattr(text, "attn_logit_softcapping", None)),
        "sinks": any(name.endswith("sinks") for name, _ in model.named_parameters()),
    }
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return rows_attention(device or torch.device("cpu"), [kind for kind, has in kinds.items() if has], **sizes)


def chat_template(name: str) -> str:
    """Whether rows of messages can be rendered."""
    from prefopt.trainer.setup import load_tokenizer_or_processor

    try:
        loaded = load_tokenizer_or_processor(name)
    except (OSError, ValueError, ImportError) as error:
        return f"no tokenizer can be loaded ({type(error).__name__})"
    return "there is one" if getattr(loaded, "chat_template", None) else "none: rows of text alone, or give it one"


def size_of(num_parameters: int) -> str:
    """Number, and bytes in the ways in which a run may hold them.

    >>> size_of(2**30)
    '1,073.74 M parameters; 4.0 GiB in float32, 2.0 GiB in bfloat16; weights, gradients and AdamW in float32 16.0 GiB'
    """
    full, half, adam = (memory(num_parameters * size) for size in (4, 2, ADAM_BYTES))
    trained = f"weights, gradients and AdamW in float32 {adam}"
    return f"{num_parameters / 1e6:,.2f} M parameters; {full} in float32, {half} in bfloat16; {trained}"


def memory(num_bytes: int) -> str:
    """Bytes in the unit that suits them."""
    return f"{num_bytes / GIB:,.1f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:,.1f} MiB"
