"""Which batch layout a model can take: decided from its config, then tried on one real pair.

Packing puts other sequences into the same row. Attention can be told to keep them apart; a recurrent or convolutional
layer, an attention that counts rows (ALiBi) or chunks them cannot. The config says which layers there are, but not
whether the code does as it says: so the first use compares the layout with the padded one and the plain scorer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from prefopt.batching import pack_batch, pad_batch, share_batch
from prefopt.scoring.comparison import fault_of, outcome, trial_groups, windows_shortened
from prefopt.scoring.forward import innermost, use_full_logits
from prefopt.scoring.plain import plain_scores
from prefopt.types import Branch, PreferenceBatch, TokenizedExample

__all__ = ["LayoutChoice", "choose_layout", "why_not_packed"]

LAYOUTS: dict[str, Callable[[Sequence[TokenizedExample], Sequence[Branch]], PreferenceBatch]] = {
    "shared_prompt": share_batch,
    "packed": pack_batch,
    "padded": pad_batch,
}
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
    config = inner.config.get_text_config()
    name = type(inner).__name__
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
    peft_config = getattr(model, "peft_config", {})
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in dict(peft_config).values()):
        return "prompt learning puts virtual tokens in front of every row"
    return None


def choose_layout(
    model: nn.Module, wanted: str, example: TokenizedExample | None, branches: Sequence[Branch]
) -> LayoutChoice:
    """The first layout from ``wanted`` on that the model computes rightly.

    Args:
        model: unwrapped, with `install` done.
        wanted: ``auto`` or the name of a layout.
        example: a real pair to try it on; None trusts the config.
        branches: the completions of a pair.

    Returns:
        The choice. The plain scorer is taken for the model where its head does not do what its config says.
    """
    chain = list(LAYOUTS)
    chain = chain[0 if wanted == "auto" else chain.index(wanted) :]
    reasons: list[str] = []
    obstacle = why_not_packed(model)
    if obstacle and chain[0] != "padded":
        chain, reasons = ["padded"], [obstacle]
    if example is None:
        return LayoutChoice(chain[0], tuple(reasons))
    groups = trial_groups(example)
    with windows_shortened(model, groups):
        expected = outcome(model, plain_scores, groups, pad_batch(groups, branches), recomputing=False)
        for layout in chain:
            fault = fault_of(model, layout, groups, LAYOUTS[layout](groups, branches), expected)
            if fault is None:
                return LayoutChoice(layout, tuple(reasons))
            reasons.append(fault)
    use_full_logits(model)
    return LayoutChoice("padded", (*reasons, "scoring with the model's full logits"))
