"""Tiny models of every family that may share prompts, random groups for them, and a preference loss by each layout."""

from __future__ import annotations

import random
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from prefopt.batching import pack_batch, pad_batch, share_batch
from prefopt.normalise import local_counts, total
from prefopt.objective import Objective, build_objective
from prefopt.reference.policy import AdapterOff, ModelReference, SeparateModel
from prefopt.scoring.attention import segment_attention
from prefopt.scoring.forward import evaluating, install
from prefopt.scoring.plain import plain_scores
from prefopt.scoring.sequences import sequence_stats
from prefopt.step import preference_step
from prefopt.trainer.setup import disable_dropout
from prefopt.types import Branch, PreferenceBatch, SequenceStats, TokenizedExample

LAYOUTS = {"padded": pad_batch, "packed": pack_batch, "shared_prompt": share_batch}
VOCABULARY = 64
WINDOW = 5
"""Tokens a sliding layer sees: far fewer than the sequences have, so that a window in the wrong place shows."""
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LAYERS = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED_EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
OLD_NAMES = {"n_embd": 32, "n_layer": 2, "n_head": 4}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, **LAYERS},
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "mixtral": {**LOCAL_EXPERTS, "sliding_window": WINDOW},
    "mistral": {"sliding_window": WINDOW},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 8, **LAYERS},
    "gemma3_text": {"query_pre_attn_scalar": 8, **LAYERS},
    "granite": {"logits_scaling": 3.0},
    "olmo2": {},
    "olmo3": LAYERS,
    "phi3": {"sliding_window": WINDOW},
    "glm4": {},
    "smollm3": {"use_sliding_window": True, **LAYERS},
    "starcoder2": {"sliding_window": WINDOW},
    "gpt_neox": {},
    "gpt2": OLD_NAMES,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "cohere2": {"logit_scale": 0.5, **LAYERS},
    "gpt_oss": {**LOCAL_EXPERTS, **LAYERS},
    "stablelm": {},
    # beyond those the design names
    "apertus": {},
    "arcee": {},
    "bitnet": {},
    "cohere": {"logit_scale": 0.5},
    "cwm": LAYERS,
    "deepseek_v3": {**ROUTED_EXPERTS, **LATENT},
    "diffllama": {},
    "ernie4_5": {},
    "exaone4": LAYERS,
    "flex_olmo": EXPERTS,
    "gemma3n_text": {
        "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": VOCABULARY,
        "num_kv_shared_layers": 0,
        **LAYERS,
    },
    "glm": {},
    "glm4_moe": ROUTED_EXPERTS,
    "gpt_bigcode": OLD_NAMES,
    "granitemoe": LOCAL_EXPERTS,
    "helium": {},
    "hunyuan_v1_dense": {},
    "hyperclovax": {"logits_scaling": 3.0},
    "jais2": {},
    "minimax_m2": LOCAL_EXPERTS,
    "ministral": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmoe": EXPERTS,
    "persimmon": {},
    "phi": {},
    "seed_oss": {},
    "vaultgemma": {"query_pre_attn_scalar": 8, **LAYERS},
}
"""What a family's config needs beyond ``BASE``; windows that bite where the family has windows."""
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_d_ssm": 64,
}
UNSHARED: dict[str, dict[str, Any]] = {
    # recurrent or convolutional layers
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8},
    "falcon_mamba": {"state_size": 8},
    "falcon_h1": MAMBA,
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_dt_rank": 4,
        "mamba_d_state": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "use_mamba_kernels": False,
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
    },
    "qwen3_next": {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 16},
    "olmo_hybrid": LINEAR,
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "block_size": 8, **LOCAL_EXPERTS},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": WINDOW},
    "rwkv": {"attention_hidden_size": 32},
    # attention that counts rows: chunks, distances (ALiBi), chosen keys
    "llama4_text": {"num_local_experts": 2, "attention_chunk_size": 16, "intermediate_size_mlp": 32},
    "deepseek_v32": {**ROUTED_EXPERTS, **LATENT, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 4},
    "bloom": OLD_NAMES,
    "mpt": {"n_heads": 4, "n_layers": 2, "d_model": 32, "max_seq_len": 128},
    "falcon": {"alibi": True, "head_dim": None},
    # attention of the model's own
    "gptj": {**OLD_NAMES, "rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW, "num_layers": 2, "num_heads": 4},
    "biogpt": {},
    # found by the trial: a mask of its own, and layers that do not name their window
    "doge": {},
    "phimoe": {**LOCAL_EXPERTS, "sliding_window": 4096},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16, "use_sliding_window": True, **LAYERS},
}
"""The same for families that are computed padded."""


def tiny(family: str) -> PreTrainedModel:
    """A random model without dropout, able to score; skips where the installed transformers lacks the family."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers has no {family}")
    torch.manual_seed(0)
    options = {**BASE, **{**UNSHARED, **FAMILIES}[family]}
    config = AutoConfig.for_model(family, **{name: value for name, value in options.items() if value is not None})
    model = AutoModelForCausalLM.from_config(config).float()
    randomise(model)
    install(model)
    disable_dropout(model)  # some families have it by default, and checkpointing needs training mode
    return model.eval()


def checkpointed(model: Any, use_reentrant: bool) -> None:
    """Switch activation checkpointing on, as the trainer does."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    model.train()  # else nothing is recomputed


def groups(seed: int, count: int = 4) -> list[TokenizedExample]:
    """Groups of three completions, random in every length; one has a prompt and a completion of one token."""
    rng = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(low, high))]

    made = []
    for row in range(count):
        completions = {"chosen": ids(1, 12), "rejected": ids(1, 20), "gold": ids(2, 9)}
        if row == 0:
            completions["chosen"] = ids(1, 1)
        masks = {branch: [True] * len(tokens) for branch, tokens in completions.items()}
        made.append(TokenizedExample(row, ids(1, 1) if row == 0 else ids(3, 18), completions, masks))
    return made


@torch.no_grad()
def randomise(model: nn.Module, scale: float = 0.05) -> None:
    """Move every weight, also those that start as 0 or 1 and would hide a bias, a norm or a sink that is left out."""
    for parameter in model.parameters():
        parameter.add_(scale * torch.randn_like(parameter))


def objective(method: str) -> Objective:
    """DPO's sigmoid (two branches, with a reference), or TPO (three branches, with an NLL)."""
    if method == "dpo":
        return build_objective("dpo", loss_type="sigmoid", beta=0.1)
    return build_objective("tpo", loss_type="sigmoid", beta=0.1, nll_weight=1.0)


def reference_of(model: nn.Module) -> ModelReference:
    """The adapter switched off; for a model without one, a copy with other weights."""
    if hasattr(model, "peft_config"):
        return AdapterOff(model)
    copy = deepcopy(model)
    randomise(copy)
    return SeparateModel(copy, derives_from_policy=False)


def plain_loss(model: nn.Module, reference: ModelReference, batch: PreferenceBatch, wanted: Objective) -> Tensor:
    """The loss by the definition: full logits of a padded batch."""

    def stats(scored: nn.Module) -> dict[Branch, SequenceStats]:
        return sequence_stats(plain_scores(scored, batch).tokens, batch.layout, keep_tokens=True)

    theirs = None
    if wanted.needs_reference:
        with torch.no_grad(), reference.active() as other, evaluating(other):
            theirs = stats(other)
    return total(wanted(stats(model), theirs), batch, local_counts([batch]))


def layout_loss(model: nn.Module, reference: ModelReference, batch: PreferenceBatch, wanted: Objective) -> Tensor:
    """The loss as the trainer computes it."""
    result = preference_step(model, reference, batch, wanted)
    return total(result.terms, batch, local_counts([batch]))


def loss_and_gradient(loss_of: Any, model: nn.Module, *args: Any) -> tuple[Tensor, Tensor]:
    """[] and [all trainable weights], in float64."""
    model.zero_grad()
    with segment_attention(*{model, args[0].model}):
        loss = loss_of(model, *args)
        loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    flat = [(p.grad if p.grad is not None else torch.zeros_like(p)).flatten().double() for p in trained]
    return loss.detach().double(), torch.cat(flat)
