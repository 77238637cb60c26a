"""A tiny llama, batches for it, and PEFT models of every kind that a user may bring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from prefopt.batching.padded import pad_batch
from prefopt.scoring.forward import install, score
from prefopt.scoring.sequences import sequence_stats
from prefopt.types import PAIR, Branch, PreferenceBatch, SequenceStats, TokenizedExample

VOCABULARY = 64
TARGETS = ["q_proj", "v_proj", "down_proj"]


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).to(dtype).eval()


def rows(count: int = 4, seed: int = 1) -> list[dict[str, Any]]:
    """Prepared rows with completions of different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def ids(shortest: int, longest: int) -> list[int]:
        length = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    made = []
    for number in range(count):
        chosen, rejected = ids(3, 9), ids(3, 9)
        made.append(
            {
                "row": number,
                "prompt_ids": ids(2, 6),
                "chosen_ids": chosen,
                "chosen_mask": [True] * len(chosen),
                "rejected_ids": rejected,
                "rejected_mask": [True] * len(rejected),
            }
        )
    return made


def example(row: dict[str, Any], ref_sum_logps: dict[Branch, float] | None = None) -> TokenizedExample:
    return TokenizedExample(
        row=row["row"],
        prompt_ids=row["prompt_ids"],
        completion_ids={branch: row[f"{branch}_ids"] for branch in PAIR},
        loss_masks={branch: row[f"{branch}_mask"] for branch in PAIR},
        ref_sum_logps=ref_sum_logps,
    )


def batch_of(some_rows: list[dict[str, Any]] | None = None, weight: float = 1.0) -> PreferenceBatch:
    return pad_batch([example(row) for row in some_rows or rows()], PAIR, weight=weight)


@torch.no_grad()
def policy_stats(model: Any, batch: PreferenceBatch, ld_alpha: float | None = None) -> dict[Branch, SequenceStats]:
    install(model)
    return sequence_stats(score(model, batch).tokens, batch.layout, ld_alpha=ld_alpha)


def log_probs(stats: Any) -> torch.Tensor:
    """[2, P] log p of chosen and rejected."""
    return torch.stack([stats[branch].sum_logps for branch in PAIR])


def train(model: Any, steps: int = 3) -> None:
    """Change everything trainable by a few steps of Adam on the log-probs of a batch."""
    install(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        (-score(model, batch_of()).tokens.logps.mean()).backward()
        optimizer.step()


def shake(model: Any) -> None:
    """Move every trainable weight, as training before this run would have."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **changes})


def adapted(config: PeftConfig, *, trained: bool = False, name: str = "default", **model: Any) -> PeftModel:
    peft_model = get_peft_model(tiny_llama(**model), config, adapter_name=name)
    if trained:
        shake(peft_model)
    return peft_model


def two_adapters(*, both: bool = False) -> PeftModel:
    """Two trained adapters, the second one active, or both."""
    model = adapted(lora(), trained=True, name="first")
    model.add_adapter("second", lora(r=2))
    model.set_adapter("second")
    shake(model)
    if both:
        model.base_model.set_adapter(["first", "second"])
    return model


def partly_frozen() -> PeftModel:
    model = adapted(lora(), trained=True)
    for name, parameter in model.named_parameters():
        if "layers.0" in name:
            parameter.requires_grad_(False)
    return model


IDENTITIES: dict[str, Callable[[], PeftModel]] = {
    "new LoRA": lambda: adapted(lora()),
    "new rsLoRA": lambda: adapted(lora(use_rslora=True)),
    "gaussian LoRA": lambda: adapted(lora(init_lora_weights="gaussian")),
    "embedding LoRA": lambda: adapted(lora(target_modules=["embed_tokens", "lm_head"])),
    "modules_to_save": lambda: adapted(lora(modules_to_save=["lm_head"])),
    "IA3": lambda: adapted(IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"], task_type="CAUSAL_LM")),
    "other name": lambda: adapted(lora(), name="model"),
    "LoRA bias": lambda: adapted(lora(lora_bias=True)),
    "bfloat16": lambda: adapted(lora(), dtype=torch.bfloat16),
}
"""Adapters that change nothing before they are trained."""

OTHERS: dict[str, Callable[[], PeftModel]] = {
    "trained LoRA": lambda: adapted(lora(), trained=True),
    "trained rsLoRA": lambda: adapted(lora(use_rslora=True), trained=True),
    "new DoRA": lambda: adapted(lora(use_dora=True)),
    "trained DoRA": lambda: adapted(lora(use_dora=True), trained=True),
    "PiSSA": lambda: adapted(lora(init_lora_weights="pissa")),
    "OLoRA": lambda: adapted(lora(init_lora_weights="olora")),
    "random LoRA": lambda: adapted(lora(init_lora_weights=False)),
    "bias all": lambda: adapted(lora(bias="all"), attention_bias=True),
    "trained bias": lambda: adapted(lora(bias="lora_only"), trained=True, attention_bias=True),
    "trained modules_to_save": lambda: adapted(lora(modules_to_save=["lm_head"]), trained=True),
    "tied modules_to_save": lambda: adapted(lora(modules_to_save=["lm_head"]), trained=True, tie_word_embeddings=True),
    "trainable tokens": lambda: adapted(lora(trainable_token_indices=[5, 6, 7]), trained=True),
    "trained IA3": lambda: adapted(
        IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"], task_type="CAUSAL_LM"), trained=True
    ),
    "LoHa": lambda: adapted(LoHaConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")),
    "prompt tuning": lambda: adapted(PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "prefix tuning": lambda: adapted(PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), trained=True),
    "trained, other name": lambda: adapted(lora(), trained=True, name="lora_A"),
    "two adapters": two_adapters,
    "two active adapters": lambda: two_adapters(both=True),
    "partly frozen": partly_frozen,
    "trained bfloat16": lambda: adapted(lora(), trained=True, dtype=torch.bfloat16),
}
"""Adapters that act from the start, or of which that is not known."""


def one_weight(model: Any) -> Any:
    """The smallest change there is: the last bit of one number."""
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.view(torch.int32)[3, 3] ^= 1
    return model
