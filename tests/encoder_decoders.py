"""Tiny encoder-decoder models with random weights, their tokenizer, and what they say of a completion that is alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import transformers
from packaging.version import Version
from peft import LoraConfig
from tiny_models import VOCABULARY, word_tokenizer
from tokenizers import processors
from torch import Tensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerFast

from prefopt.types import Branch, TokenizedExample

EOS = 2
T5: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "decoder_start_token_id": 0,
}
BART: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 256,
    "init_std": 0.2,
    "bos_token_id": 1,
    "decoder_start_token_id": EOS,
    "forced_eos_token_id": None,
}
GEMMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 4,
    "initializer_range": 0.2,
    "final_logit_softcapping": 5.0,
    "bos_token_id": 1,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", T5),
    "t5 untied": ("t5", {**T5, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}),
    "umt5": ("umt5", {**T5, "tie_word_embeddings": True}),
    "mt5": ("mt5", T5),
    "bart": ("bart", BART),
    "bart untied": ("bart", {**BART, "tie_word_embeddings": False}),
    "mbart": ("mbart", BART),
    "pegasus": ("pegasus", BART),
    "marian": ("marian", BART),
    "m2m_100": ("m2m_100", BART),
    "t5gemma": ("t5gemma", {"encoder": GEMMA, "decoder": {**GEMMA, "cross_attention_hidden_size": 32}}),
}
if Version(transformers.__version__) < Version("5.18"):
    del KINDS["umt5"]  # its decoder looks ahead there, in transformers' own forward too
LORA = partial(LoraConfig, r=4, target_modules="all-linear", lora_dropout=0.0)


def tiny_encoder_decoder(kind: str = "t5", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of the kind in evaluation mode; where it adds a bias to its logits, that is not 0."""
    family, options = KINDS[kind]
    common = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": EOS}
    torch.manual_seed(seed)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(family, **{**common, **options, **changes}))
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    return model.eval()


def ended_tokenizer(*, with_bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per word, and EOS at the end of every text, as T5's; with BOS in front of it, as BART's."""
    tokenizer = word_tokenizer(with_bos=with_bos)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if with_bos else "$A </s>", special_tokens=[("<s>", 1), ("</s>", EOS)]
    )
    return tokenizer


def token_examples(
    seed: int, branches: Sequence[Branch], count: int = 4, *, longest: int = 12
) -> list[TokenizedExample]:
    """Pairs of unequal lengths, one of them with completion tokens that are not scored."""
    rng = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(low, high))]

    examples = []
    for row in range(count):
        completions: dict[Branch, list[int]] = {branch: ids(1, longest) for branch in branches}
        masks = {branch: [True] * len(tokens) for branch, tokens in completions.items()}
        if row == 1:
            completions[branches[-1]] = ids(4, longest)
            masks[branches[-1]] = [place % 3 != 1 for place in range(len(completions[branches[-1]]))]
        examples.append(TokenizedExample(row, ids(2, 18), completions, masks))
    return examples


def token_logps_alone(model: Any, examples: Sequence[TokenizedExample], branches: Sequence[Branch]) -> list[Tensor]:
    """[n] log-probs of the scored tokens of every completion, in sequence order: each in a call of its own."""
    found = []
    for branch in branches:
        for example in examples:
            labels = torch.tensor([[*example.completion_ids[branch]]])
            logits = model(**own_arguments(model, torch.tensor([[*example.prompt_ids]]), labels)).logits[0]
            logps = logits.float().log_softmax(-1).gather(-1, labels[0, :, None])[:, 0]
            found.append(logps[torch.tensor([*example.loss_masks[branch]])])
    return found


def own_arguments(model: Any, prompts: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What the model is called with; mBART's own shift of labels takes their last token for the language code."""
    if model.config.model_type != "mbart":
        return {"input_ids": prompts, "labels": labels}
    start = torch.full((1, 1), model.config.decoder_start_token_id)
    return {"input_ids": prompts, "decoder_input_ids": torch.cat([start, labels[:, :-1]], 1)}
