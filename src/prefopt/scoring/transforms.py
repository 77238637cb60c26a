"""What a model does to its logits after the head: a factor, then a soft cap.

The names are those of transformers' configs. Whether the table holds for a model is not assumed:
`capability.choose_layout` compares with the model's own forward before training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["LogitTransform", "logit_transform"]

MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
DIVISORS = ("logits_scaling",)
MULTIPLIES_BY_LOGITS_SCALING = frozenset({"hyperclovax"})
SCALED_WHERE_TIED = frozenset({"umt5", "switch_transformers"})
"""Kinds of T5 that scale what the decoder gives where their embeddings are tied; the others say so in their config."""
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap")


@dataclass(frozen=True)
class LogitTransform:
    """``cap * tanh(factor * z / cap)``, or ``factor * z`` without a cap."""

    factor: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.factor != 1.0:
            logits = logits * self.factor
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits


def logit_transform(config: Any) -> LogitTransform:
    """The transform a text config describes."""
    config = config.get_text_config()
    factor = 1.0
    for name in MULTIPLIERS:
        factor *= getattr(config, name, None) or 1.0
    for name in DIVISORS:
        scaling = getattr(config, name, None) or 1.0
        factor = factor * scaling if config.model_type in MULTIPLIES_BY_LOGITS_SCALING else factor / scaling
    if scales_decoder(config):
        factor *= config.d_model**-0.5
    caps = [cap for name in SOFT_CAPS if (cap := getattr(config, name, None))]
    return LogitTransform(factor, caps[0] if caps else None)


def scales_decoder(config: Any) -> bool:
    """Whether the decoder's hidden states are divided by the root of their size in front of the head, as in T5."""
    tied = config.model_type in SCALED_WHERE_TIED and config.tie_word_embeddings
    return bool(getattr(config, "scale_decoder_outputs", tied))
