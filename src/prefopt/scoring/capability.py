"""Which batch layout a model can take: decided from its config, then tried on one real pair.

Packing puts other sequences into the same row. Attention can be told to keep them apart; a recurrent or convolutional
layer, an attention that counts rows (ALiBi) or chunks them cannot. The config says which layers there are, but not
whether the code does as it says: so the first use compares the layout with the padded one and the plain scorer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from prefopt.batching import encoder_decoder_batch, pack_batch, pad_batch, share_batch
from prefopt.batching.images import VisionInputs
from prefopt.scoring.comparison import fault_of, outcome, scores_of_places, trial_groups, windows_shortened
from prefopt.scoring.encoder_decoder import is_encoder_decoder
from prefopt.scoring.forward import innermost, use_full_logits
from prefopt.scoring.plain import plain_scores
from prefopt.scoring.unsloth import WHY_PADDED, is_unsloth
from prefopt.types import Branch, PreferenceBatch, TokenizedExample

__all__ = ["LayoutChoice", "choose_layout", "why_not_packed"]

LAYOUTS: dict[str, Callable[[Sequence[TokenizedExample], Sequence[Branch], VisionInputs | None], PreferenceBatch]] = {
    "shared_prompt": share_batch,
    "packed": pack_batch,
    "padded": pad_batch,
    "encoder_decoder": lambda examples, branches, vision=None: encoder_decoder_batch(examples, branches),
}
CHAIN = ("shared_prompt", "packed", "padded")
"""The layouts of models with one body, the best first. One with two bodies has a single layout."""
SEGMENT_LAYERS = {"full_attention", "sliding_attention"}
RECURRENT_OPTIONS = (
    "layers_block_type",
    "block_types",
    "mamba_d_state",
    "ssm_state_size",
    "conv_L_cache",
    "state_size",
)

PACKABLE_ANYWAY = frozenset({"stablelm"})
"""Model types that use transformers' attention registry without declaring it."""


@dataclass(frozen=True)
class LayoutChoice:
    """The layout, and why it is not the one before it in the chain ``shared_prompt -> packed -> padded``."""

    layout: str
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        why = "; ".join(self.reasons)
        return f"batch layout: {self.layout}" + (f" ({why})" if why else "")


def why_not_packed(model: nn.Module) -> str | None:
    """Why sequences of this model cannot share a row, as far as its config and class tell; None where they can."""
    inner = innermost(model)
    if is_unsloth(inner):
        return WHY_PADDED
    config = inner.config.get_text_config()
    name = type(inner).__name__
    if is_encoder_decoder(inner.config):
        return f"{name} reads prompts in its encoder and writes completions in its decoder"
    other_layers = set(getattr(config, "layer_types", None) or ()) - SEGMENT_LAYERS
    if other_layers:
        return f"{name} has layers that are no plain attention: {', '.join(sorted(other_layers))}"
    recurrent = [option for option in RECURRENT_OPTIONS if getattr(config, option, None)]
    if recurrent:
        return f"{name} has recurrent or convolutional layers ({recurrent[0]} in its config)"
    if getattr(config, "alibi", False) or getattr(config, "attention_chunk_size", None):
        return f"the attention of {name} counts rows (ALiBi or chunks), not places in a sequence"
    if not getattr(inner, "_supports_attention_backend", False) and config.model_type not in PACKABLE_ANYWAY:
        return f"{name} does not take its attention function from transformers' registry"
    adapters = dict(getattr(model, "peft_config", {})).values()
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters):
        return "prompt learning puts virtual tokens in front of every row"
    if any(getattr(adapter, "alora_invocation_tokens", None) for adapter in adapters):
        return "activated LoRA looks for its invocation tokens in rows, not in sequences"
    return None


def candidates(model: nn.Module, wanted: str) -> tuple[list[str], list[str]]:
    """The layouts to try, from ``wanted`` on, the plain one last; and why ones before them are left out."""
    obstacle = why_not_packed(model)
    if is_encoder_decoder(innermost(model).config):
        return ["encoder_decoder"], [str(obstacle)] if wanted in CHAIN else []
    chain: list[str] = [*CHAIN[0 if wanted == "auto" else CHAIN.index(wanted) :]]
    if obstacle and chain != ["padded"]:
        return ["padded"], [obstacle]
    return chain, []


def choose_layout(
    model: nn.Module,
    wanted: str,
    example: TokenizedExample | None,
    branches: Sequence[Branch],
    vision: VisionInputs | None = None,
) -> LayoutChoice:
    """The first layout from ``wanted`` on that the model computes rightly.

    Args:
        model: unwrapped, with `install` done.
        wanted: ``auto`` or the name of a layout.
        example: a real pair to try it on; None trusts the config.
        branches: the completions of a pair.
        vision: how the example's images reach the model.

    Returns:
        The choice. The plain scorer is taken for the model where its head does not do what its config says.
    """
    chain, reasons = candidates(model, wanted)
    last = chain[-1]
    if example is None:
        return LayoutChoice(chain[0], tuple(reasons))
    groups = trial_groups(example)
    few = vision is not None and any(example.images.values()) and "logits_to_keep" in vision.arguments
    plain = scores_of_places if few else plain_scores
    with windows_shortened(model, groups):
        expected = outcome(model, plain, groups, LAYOUTS[last](groups, branches, vision), recomputing=False)
        for layout in chain:
            fault = fault_of(model, layout, groups, LAYOUTS[layout](groups, branches, vision), expected)
            if fault is None:
                return LayoutChoice(layout, tuple(reasons))
            reasons.append(fault)
    use_full_logits(model)
    return LayoutChoice(last, (*reasons, "scoring with the model's full logits"))
