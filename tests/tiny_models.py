"""Tokenizers, models and rows that are built in a second, for tests that train end to end."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 64
"""Small, so that a random model predicts some tokens and the token accuracy of a test is not always 0."""

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "system", "user", "assistant", "tool"]
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou"]
WORDS = [syllable * 2 for syllable in SYLLABLES][: VOCABULARY - len(SPECIAL)]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} {{ message['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
WINDOWED: dict[str, Any] = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "cohere2": WINDOWED,
    "olmo3": WINDOWED,
    "qwen3_moe": {**EXPERTS, "num_experts": 4},
    "glm4_moe": {**EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1},
    "gpt_oss": {**EXPERTS, **WINDOWED, "num_local_experts": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "moe"],
        "num_hidden_layers": 3,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "n_routed_experts": 4,
        **EXPERTS,
        "moe_shared_expert_intermediate_size": 16,
    },
}
"""What a family's config needs beyond ``SMALL``."""


def word_tokenizer(*, eos_token: str = "</s>", with_bos: bool = True) -> PreTrainedTokenizerFast:
    """One token per word: texts that end and begin at words never merge across the prompt's end. No pad token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    ids = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if with_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>" if with_bos else None,
        eos_token=eos_token,
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT_TEMPLATE,
    )


def tiny_model(family: str = "llama", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of the family with random weights that depend on the seed alone."""
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES.get(family, {}), **changes})
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def save_tiny(folder: Path, family: str = "llama", *, seed: int = 0, **changes: Any) -> str:
    """Write model and tokenizer to ``folder`` as a hub repository would hold them; its path."""
    tiny_model(family, seed=seed, **changes).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


FIRST_WORD = {"chosen": "baba", "rejected": "dada", "reference": "fafa"}
"""Completions part at their first letter, so that an implicit prompt is the same by characters and by words."""


def text(rng: random.Random, shortest: int, longest: int) -> str:
    """Words, some of them said twice."""
    words = rng.choices(WORDS, k=rng.randint(shortest, longest))
    return " ".join(words[index - 1] if index and rng.random() < 0.3 else word for index, word in enumerate(words))


def standard_rows(count: int = 12, *, seed: int = 0, gold: bool = False) -> dict[str, list[str]]:
    """Columns of a preference set of plain texts: prompt, chosen, rejected (and reference)."""
    rng = random.Random(seed)
    rows: dict[str, list[str]] = {"prompt": [text(rng, 2, 9) for _ in range(count)]}
    for column, first in FIRST_WORD.items():
        if gold or column != "reference":
            rows[column] = [f" {first} {text(rng, 1, 11)}" for _ in range(count)]
    return rows


def save_rows(folder: Path) -> str:
    """A new folder with a train and a test file of rows that have a gold completion."""
    folder.mkdir()
    for split, seed in (("train", 0), ("test", 1)):
        rows = standard_rows(8, seed=seed, gold=True)
        lines = [json.dumps(dict(zip(rows, values, strict=True))) for values in zip(*rows.values(), strict=True)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return str(folder)


def conversational_rows(count: int = 12, *, seed: int = 0, gold: bool = False) -> dict[str, list[Any]]:
    """The same rows as lists of messages, with an explicit prompt."""
    rows = standard_rows(count, seed=seed, gold=gold)

    def message(column: str, content: str) -> list[dict[str, str]]:
        return [{"role": "user" if column == "prompt" else "assistant", "content": content.strip()}]

    return {column: [message(column, content) for content in values] for column, values in rows.items()}


def implicit(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The same rows with the prompt at the head of every completion instead of in a column of its own."""
    prompts = rows["prompt"]
    return {
        column: [prompt + value for prompt, value in zip(prompts, values, strict=True)]
        for column, values in rows.items()
        if column != "prompt"
    }
