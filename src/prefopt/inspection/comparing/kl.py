"""How far two models are apart at each token: the divergence of whole distributions, not an estimate from samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prefopt.scoring.attention import without_segments
from prefopt.scoring.forward import evaluating
from prefopt.scoring.plain import full_logits
from prefopt.types import PreferenceBatch

__all__ = ["kl_of_logits", "token_kl"]

TILE = 256
"""Tokens whose distributions are compared at once: [TILE, V] float32 for each model and for the result."""


def kl_of_logits(policy: Tensor, reference: Tensor) -> Tensor:
    """[N] ``sum_v p(v) (log p(v) - log q(v))``, nats, from [N, V] logits of policy p and reference q.

    >>> kl_of_logits(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]])).tolist()
    [0.0]
    """
    logps, reference_logps = (logits.float().log_softmax(-1) for logits in (policy, reference))
    return (logps.exp() * (logps - reference_logps)).sum(-1)


@torch.no_grad()
def token_kl(policy: nn.Module, reference: nn.Module, batch: PreferenceBatch) -> Tensor:
    """[N] KL(policy || reference) at the positions that predict the completions' tokens, nats, on the host.

    Args:
        policy: on its device, as transformers calls it.
        reference: the same kind of model with the same vocabulary.
        batch: a padded batch, in the order of whose layout the values stand.
    """
    rows = [completion_logits(model, batch) for model in (policy, reference)]
    tiles = zip(*(logits.split(TILE) for logits in rows), strict=True)
    return torch.cat([kl_of_logits(*(logits.to(rows[0].device) for logits in tile)).cpu() for tile in tiles])


def completion_logits(model: Any, batch: PreferenceBatch) -> Tensor:
    """[N, V] logits at the positions that predict the completions' tokens."""
    with without_segments(model), evaluating(model):
        batch = batch.to(next(model.parameters()).device)
        logits = full_logits(model, batch)
    return logits.reshape(-1, logits.shape[-1])[batch.predict_from]
