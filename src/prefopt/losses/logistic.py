"""The logistic loss with smoothed labels, which many published losses share."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = ["smoothed_logistic"]


def smoothed_logistic(logits: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of a Bernoulli with log-odds ``z`` against a label that is right with probability 1 - eps.

    ``l(z) = -(1 - eps) log sigmoid(z) - eps log sigmoid(-z)``

    Args:
        logits: [...] z, the log-odds that the chosen completion is the better one.
        label_smoothing: eps, the probability that the label is wrong.

    Returns:
        [...] the loss; ln 2 at z = 0 for every eps.

    Example:
        >>> import torch
        >>> smoothed_logistic(torch.tensor([0.0, 1.0]), label_smoothing=0.1)
        tensor([0.6931, 0.4133])

    References:
        E. Mitchell, "A note on DPO with noisy preferences and relationship to IPO" (2023), for eps > 0.
    """
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)
