"""Kinds of adapter, runs with them, and what they are held against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracle import PLAIN_RUN, SAME_LOSS, expected_losses, logged_losses, plain_stats
from short_runs import trainer
from tiny_models import tiny_model

from prefopt.batching import pad_batch
from prefopt.data import tokenized_example
from prefopt.reference.policy import AdapterOff, StartingWeights
from prefopt.types import PAIR

READ_BACK = 1e-5
"""Nats, float32: a weight that was saved is the same, a product of factors that was merged is rounded otherwise."""
HALF = 1e-2
"""Relative: losses of log-probs whose logits are rounded to 8 bits, in layouts that round otherwise."""
TARGETS = ["q_proj", "v_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def kind_of(name: str, **options: Any) -> Callable[[], Any]:
    """A maker of configs; PEFT changes the config that it is given."""
    return lambda: getattr(peft, name)(task_type="CAUSAL_LM", **options)


def lora(**options: Any) -> Callable[[], Any]:
    return kind_of("LoraConfig", **{"r": 4, "target_modules": TARGETS, **options})


def tuner(name: str, **options: Any) -> Callable[[], Any]:
    return kind_of(name, **{"target_modules": TARGETS, **options})


@dataclass(frozen=True)
class Kind:
    """An adapter, the model it is put on, and what it should get."""

    config: Callable[[], Any]
    reference: type = StartingWeights
    layout: str = "shared_prompt"
    family: str = "llama"
    model: dict[str, Any] = field(default_factory=dict)

    def made(self) -> Any:
        return tiny_model(self.family, seed=1, **self.model)


TIED = {"tie_word_embeddings": True}
KINDS: dict[str, Kind] = {
    "LoRA": Kind(lora(), AdapterOff),
    "rsLoRA": Kind(lora(use_rslora=True), AdapterOff),
    "DoRA": Kind(lora(use_dora=True)),
    "PiSSA": Kind(lora(init_lora_weights="pissa")),
    "OLoRA": Kind(lora(init_lora_weights="olora")),
    "EVA without data": Kind(lora(init_lora_weights="eva"), AdapterOff),
    "orthogonal": Kind(lora(init_lora_weights="orthogonal")),
    "LoRA with bias": Kind(lora(lora_bias=True), AdapterOff),
    "all biases": Kind(lora(bias="all"), model={"attention_bias": True}),
    "head": Kind(lora(target_modules=["q_proj", "lm_head"]), AdapterOff),
    "tied head": Kind(lora(target_modules=["q_proj", "lm_head"]), AdapterOff, model=TIED),
    "embeddings": Kind(lora(target_modules=["embed_tokens", "q_proj"]), AdapterOff),
    "saved head": Kind(lora(modules_to_save=["lm_head"]), AdapterOff),
    "saved tied head": Kind(lora(modules_to_save=["lm_head"]), AdapterOff, model=TIED),
    "saved head and embeddings": Kind(lora(modules_to_save=["lm_head", "embed_tokens"]), AdapterOff),
    "trainable tokens beside LoRA": Kind(lora(trainable_token_indices=[5, 9, 20])),
    "trainable tokens": Kind(kind_of("TrainableTokensConfig", target_modules=["embed_tokens"], token_indices=[5, 9])),
    "tied trainable tokens": Kind(lora(trainable_token_indices=[5, 9, 20]), model=TIED),
    "experts": Kind(lora(target_modules=[], target_parameters=EXPERTS), AdapterOff, family="qwen3_moe"),
    "experts and attention": Kind(lora(target_parameters=EXPERTS[:1]), AdapterOff, family="gpt_oss"),
    "LoHa": Kind(tuner("LoHaConfig", r=4)),
    "LoKr": Kind(tuner("LoKrConfig", r=4)),
    "AdaLoRA": Kind(
        tuner("AdaLoraConfig", total_step=100, tinit=10, tfinal=10, orth_reg_weight=1e-9, lora_alpha=1000), AdapterOff
    ),
    "IA3": Kind(tuner("IA3Config", feedforward_modules=["down_proj"]), AdapterOff),
    "VeRA": Kind(kind_of("VeraConfig", target_modules=["q_proj", "o_proj"], r=8)),
    "OFT": Kind(tuner("OFTConfig", oft_block_size=4)),
    "BOFT": Kind(tuner("BOFTConfig", boft_block_size=4)),
    "HRA": Kind(tuner("HRAConfig", r=4)),
    "MiSS": Kind(tuner("MissConfig", r=4)),
    "FourierFT": Kind(tuner("FourierFTConfig", n_frequency=20)),
    "RandLora": Kind(tuner("RandLoraConfig", r=4)),
    "SHiRA": Kind(tuner("ShiraConfig", r=4)),
    "layer norms": Kind(kind_of("LNTuningConfig", target_modules=["input_layernorm", "norm"])),
    "prompt tuning": Kind(kind_of("PromptTuningConfig", num_virtual_tokens=3), layout="padded"),
    "p-tuning": Kind(kind_of("PromptEncoderConfig", num_virtual_tokens=3, encoder_hidden_size=16), layout="padded"),
    "prefix tuning": Kind(kind_of("PrefixTuningConfig", num_virtual_tokens=3), layout="padded"),
    "projected prefix": Kind(
        kind_of("PrefixTuningConfig", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=16),
        layout="padded",
    ),
    "CPT": Kind(
        kind_of("CPTConfig", cpt_token_ids=[3, 4, 5], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3]),
        layout="padded",
    ),
    "VB-LoRA": Kind(tuner("VBLoRAConfig", num_vectors=8, vector_length=16, init_vector_bank_bound=2.0)),
    "activated LoRA": Kind(lora(alora_invocation_tokens=[9]), layout="padded"),
}
UNMERGED = (
    *("prompt tuning", "p-tuning", "prefix tuning", "projected prefix", "CPT"),  # no weights of layers
    *("activated LoRA", "LoRA with bias"),
    "tied head",  # the embeddings would get what is added to the head
)
"""Kinds that PEFT does not merge, or not rightly."""
LAYOUTS = ("packed", "padded")
IN_EVERY_LAYOUT = ("DoRA", "tied head", "saved head", "tied trainable tokens", "experts")
IN_EVERY_TRAINER = ("LoRA", "tied head", "experts", "prefix tuning", "p-tuning")


def run_of(folder: Path, kind: Kind, method: str = "dpo", **options: Any) -> Any:
    return trainer(folder, method, model=kind.made(), peft_config=kind.config(), **{**PLAIN_RUN, **options})


def assert_trains_as_defined(run: Any) -> None:
    expected = expected_losses(run)
    run.train()
    assert logged_losses(run) == pytest.approx(expected, rel=SAME_LOSS)
    assert abs(expected[1] - expected[0]) > 10 * SAME_LOSS * expected[0], "the first step did not show"


@cache
def prepared_rows() -> list[dict[str, Any]]:
    """The rows of a plain run, as token ids."""
    return list(trainer(Path("unused"), count=PLAIN_RUN["count"]).train_dataset)


@torch.no_grad()
def log_probs(model: Any, count: int = PLAIN_RUN["count"]) -> torch.Tensor:
    """[2, count] log p of chosen and rejected of the first rows, from full logits."""
    batch = pad_batch([tokenized_example(row, PAIR) for row in prepared_rows()[:count]], PAIR)
    stats, _ = plain_stats(model.eval(), batch)
    return torch.stack([stats[branch].sum_logps for branch in PAIR])


def with_adapter(name: str = "default", *, acts: bool = True, **options: Any) -> Any:
    """A PeftModel whose adapter was trained before."""
    model = peft.get_peft_model(tiny_model(seed=1), lora(**options)(), adapter_name=name)
    if acts:
        shake(model, name)
    return model


def shake(model: Any, adapter: str) -> None:
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))


def several() -> Any:
    """Three adapters; the third is active."""
    model = with_adapter("first")
    for name in ("second", "third"):
        model.add_adapter(name, lora(r=2)())
        shake(model, name)
    model.set_adapter("third")
    return model


def trained_names(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}
