"""Greedy completions of prepared rows, by a model that also scores."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.batching.images import VisionInputs
from prefopt.reference.weights import is_sharded, reshard
from prefopt.scoring.attention import without_segments
from prefopt.scoring.forward import evaluating, innermost
from prefopt.types import TokenizedExample

__all__ = ["generated", "generated_to_end"]


def generated(
    model: nn.Module,
    examples: Sequence[TokenizedExample],
    tokenizer: Any,
    max_new_tokens: int,
    vision: VisionInputs | None = None,
) -> list[list[int]]:
    """The token ids alone of `generated_to_end`."""
    return [ids for ids, _ in generated_to_end(model, examples, tokenizer, max_new_tokens, vision)]


@torch.no_grad()
def generated_to_end(
    model: nn.Module,
    examples: Sequence[TokenizedExample],
    tokenizer: Any,
    max_new_tokens: int,
    vision: VisionInputs | None = None,
) -> list[tuple[list[int], bool]]:
    """The greedy completions of the rows' prompts, in one batch, each up to its first end-of-sequence token; with each
    stands whether there was one.

    The model attends and is configured as transformers made it meanwhile, in evaluation mode and without compiled
    layers, and is left as it was. Of a model that is divided among the ranks every rank must call this, with the same
    rows.

    Args:
        model: on its device; a `PreTrainedModel` or a `PeftModel`, prepared or not.
        examples: R prepared rows, at least one.
        tokenizer: with a pad token.
        max_new_tokens: of each completion; fewer where the model's context ends before.
        vision: how the images of the prompts reach the model.
    """
    inner: Any = innermost(model)
    encodes = bool(inner.config.is_encoder_decoder)
    nothing = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    prompts = [list(example.prompt_ids) or nothing for example in examples]
    inputs = prompt_inputs(prompts, tokenizer.pad_token_id, pad_left=not encodes)
    if vision is not None:
        images = [image for example in examples for image in example.images.get("prompt", ())]
        inputs |= vision.token_kinds(inputs["input_ids"]) | vision.tensors(images)
    inputs = {name: on_device(value, inner.device) for name, value in inputs.items()}
    start = 1 if encodes else inputs["input_ids"].shape[1]  # a decoder's start token may be EOS
    ends = end_tokens(inner, tokenizer)
    config = greedy_config(inner, room(inner, start, max_new_tokens), ends, tokenizer.pad_token_id)
    with without_segments(model), evaluating(model), uncompiled(model):
        ids = model.generate(  # type: ignore[operator]
            **inputs, generation_config=config, synced_gpus=True if is_sharded(model) else None
        )
    reshard(model)  # an optimizer that is made while the head is whole would train a copy of it
    return [(before_end(row, ends), not set(ends).isdisjoint(row)) for row in ids[:, start:].tolist()]


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Layers that are compiled run as they are written: a sequence that grows would compile them again and again."""
    if all(module._compiled_call_impl is None for module in model.modules()):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def prompt_inputs(prompts: Sequence[Sequence[int]], pad_token_id: int, *, pad_left: bool) -> dict[str, Any]:
    """``input_ids`` and ``attention_mask`` [R, T] of the prompts; a decoder goes on at their right end."""
    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), width) if pad_left else slice(0, len(prompt))
        input_ids[row, place] = torch.tensor(prompt)
        attention_mask[row, place] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def on_device(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens at which the model stops by its own config, and the tokenizer's end-of-sequence token."""
    own = model.generation_config.eos_token_id
    ends = list(own) if isinstance(own, list | tuple) else [own]
    return sorted({int(end) for end in (*ends, tokenizer.eos_token_id) if end is not None})


def room(model: Any, prompt_length: int, wanted: int) -> int:
    """New tokens that fit into the model's context, at most ``wanted``, at least one."""
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return wanted if context is None else max(1, min(wanted, context - prompt_length))


def greedy_config(model: Any, max_new_tokens: int, ends: list[int], pad_token_id: int) -> Any:
    """The model's own generation config without its sampling."""
    config = copy.deepcopy(model.generation_config)
    config.update(do_sample=False, num_beams=1, temperature=1.0, top_p=1.0, top_k=50, num_return_sequences=1)
    config.update(max_length=None, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=pad_token_id)
    return config


def before_end(ids: list[int], ends: list[int]) -> list[int]:
    """``ids`` up to the first of ``ends``."""
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]
