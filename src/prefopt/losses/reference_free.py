"""Losses of SimPO and TPO-L: a target for the margin of log-probs per token.

CPO and TPO need no reference. Their `sigmoid`, `hinge` and `ipo` are those of `prefopt.losses.pairwise`, on a margin
``u = r(y_w) - r(y_l)`` of log-probs instead of log-ratios; AlphaPO is `simpo` on scores of `alpha_shape`.
"""

from __future__ import annotations

from torch import Tensor

from prefopt.losses.logistic import smoothed_logistic

__all__ = ["simpo", "tpo_l"]


def simpo(mean_margin: Tensor, *, beta: float, gamma: float, label_smoothing: float = 0.0) -> Tensor:
    """SimPO: the chosen completion's mean log-prob must lead by gamma / beta.

    ``l(beta u - gamma)``, ``u = r(y_w) - r(y_l)``, ``r(y) = log p(y) / |y|``, with the smoothed logistic loss ``l``

    Args:
        mean_margin: [P] u, nats per token.
        beta: scale of the reward.
        gamma: target reward margin, no unit.
        label_smoothing: eps in [0, 0.5].

    Returns:
        [P] loss of each pair; ln 2 where ``u = gamma / beta``.

    Example:
        >>> import torch
        >>> simpo(torch.tensor([0.0, 0.25, 0.65]), beta=2.0, gamma=0.5)
        tensor([0.9741, 0.6931, 0.3711])

    References:
        SimPO, arXiv:2405.14734, eq. 6.
    """
    return smoothed_logistic(beta * mean_margin - gamma, label_smoothing=label_smoothing)


def tpo_l(mean_margin: Tensor, *, beta: float, gamma: float, label_smoothing: float = 0.0) -> Tensor:
    """TPO-L: TPO's preference term on mean log-probs with a target margin, which is `simpo`'s.

    ``l(beta u - gamma)``, ``u = log p(y_w) / |y_w| - log p(y_l) / |y_l|``, with the smoothed logistic loss ``l``

    Args:
        mean_margin: [P] u, nats per token.
        beta: scale of the reward.
        gamma: target reward margin, no unit.
        label_smoothing: eps in [0, 0.5].

    Returns:
        [P] loss of each pair, to which TPO adds the NLL of the gold completion.

    Example:
        >>> import torch
        >>> tpo_l(torch.tensor([0.0, 0.25, 0.65]), beta=2.0, gamma=0.5)
        tensor([0.9741, 0.6931, 0.3711])

    References:
        TPO, arXiv:2405.16681.
    """
    return simpo(mean_margin, beta=beta, gamma=gamma, label_smoothing=label_smoothing)
