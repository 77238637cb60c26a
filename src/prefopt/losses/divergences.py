"""f-DPO's scores: what stands in the place of the log-ratio when the KL penalty is another f-divergence.

A divergence enters DPO through ``s(d) = f'(e^d)``, ``d = log pi(y) - log pi_ref(y)``. Constants are kept: they cancel
in a difference of scores, not where each score is divided by its own length. Scores are functions
``log_ratio [...] -> score [...]``, increasing, no unit.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import logsigmoid

from prefopt.losses.transforms import alpha_shape

__all__ = ["alpha_divergence", "forward_kl", "js_divergence", "reverse_kl"]


def reverse_kl(log_ratio: Tensor) -> Tensor:
    """Score of the reverse KL divergence, which is DPO's own.

    ``s(d) = d`` (``f(u) = u log u``, its derivative's constant 1 left out as in DPO)

    Args:
        log_ratio: [...] d, nats.

    Returns:
        [...] d itself.

    Example:
        >>> import torch
        >>> reverse_kl(torch.tensor([-1.0, 2.0]))
        tensor([-1.,  2.])

    References:
        DPO, arXiv:2305.18290; f-DPO, arXiv:2309.16240, table 1.
    """
    return log_ratio


def forward_kl(log_ratio: Tensor) -> Tensor:
    """Score of the forward KL divergence.

    ``s(d) = 1 - e^-d`` (``f(u) = -log u``, shifted by 1 to be 0 at d = 0)

    Args:
        log_ratio: [...] d, nats; ``-d`` is clamped at 40.

    Returns:
        [...] the score, below 1.

    Example:
        >>> import torch
        >>> forward_kl(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-1.7183,  0.0000,  0.6321])

    References:
        f-DPO, arXiv:2309.16240, table 1.
    """
    return alpha_shape(log_ratio, alpha=1.0)


def js_divergence(log_ratio: Tensor) -> Tensor:
    """Score of the Jensen-Shannon divergence.

    ``s(d) = log(2 u / (1 + u)) = log 2 + log sigmoid(d)``, ``u = e^d``

    Args:
        log_ratio: [...] d, nats.

    Returns:
        [...] the score, below log 2.

    Example:
        >>> import torch
        >>> js_divergence(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-0.6201,  0.0000,  0.3799])

    References:
        f-DPO, arXiv:2309.16240, table 1.
    """
    return math.log(2) + logsigmoid(log_ratio)


def alpha_divergence(log_ratio: Tensor, *, coef: float) -> Tensor:
    """Score of the alpha-divergence, between reverse KL (alpha = 0) and forward KL (alpha = 1).

    ``s(d) = (1 - e^(-alpha d)) / alpha``

    Args:
        log_ratio: [...] d, nats; ``-alpha d`` is clamped at 40.
        coef: alpha.

    Returns:
        [...] the score.

    Example:
        >>> import torch
        >>> alpha_divergence(torch.tensor([-1.0, 0.0, 1.0]), coef=0.5)
        tensor([-1.2974,  0.0000,  0.7869])

    References:
        f-DPO, arXiv:2309.16240, table 1. TRL's parameter is 1 - alpha.
    """
    return alpha_shape(log_ratio, alpha=coef)
