"""Losses of the two log-ratios: each completion is judged for itself, against the reference.

``d_w`` and ``d_l`` are log pi(y) - log pi_ref(y) of the chosen and the rejected completion, nats. beta d is the
completion's reward, no unit.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = ["apo_down", "apo_zero", "bco_pair", "nca_pair", "sppo_hard"]


def nca_pair(chosen_log_ratio: Tensor, rejected_log_ratio: Tensor, *, beta: float) -> Tensor:
    """NCA on pairs: noise-contrastive estimation that keeps the chosen completion's likelihood from falling.

    ``-log sigmoid(beta d_w) - log sigmoid(-beta d_w) / 2 - log sigmoid(-beta d_l) / 2``

    Args:
        chosen_log_ratio: [P] d_w, nats.
        rejected_log_ratio: [P] d_l, nats.
        beta: alpha of the paper.

    Returns:
        [P] loss of each pair; 2 ln 2 where policy and reference agree.

    Example:
        >>> import torch
        >>> nca_pair(torch.tensor([0.0, 10.0]), torch.tensor([0.0, -10.0]), beta=0.1)
        tensor([1.3863, 1.1265])

    References:
        NCA, arXiv:2402.05369.
    """
    chosen, rejected = beta * chosen_log_ratio, beta * rejected_log_ratio
    return -logsigmoid(chosen) - logsigmoid(-chosen) / 2 - logsigmoid(-rejected) / 2


def bco_pair(
    chosen_log_ratio: Tensor, rejected_log_ratio: Tensor, *, beta: float, shift: Tensor | float = 0.0
) -> Tensor:
    """BCO on pairs: a binary classifier of single completions, with the reward as its logit.

    ``-log sigmoid(beta d_w - shift) - log sigmoid(-(beta d_l - shift))``

    Args:
        chosen_log_ratio: [P] d_w, nats.
        rejected_log_ratio: [P] d_l, nats.
        beta: strength of the KL penalty.
        shift: [] the paper's reward shift delta, the mean reward of both sides (`RewardShift` keeps it); 0: none.

    Returns:
        [P] loss of each pair; 2 ln 2 where policy and reference agree.

    Example:
        >>> import torch
        >>> bco_pair(torch.tensor([0.0, 10.0]), torch.tensor([0.0, -10.0]), beta=0.1)
        tensor([1.3863, 0.6265])

    References:
        BCO, arXiv:2404.04656.
    """
    return -logsigmoid(beta * chosen_log_ratio - shift) - logsigmoid(shift - beta * rejected_log_ratio)


def sppo_hard(chosen_log_ratio: Tensor, rejected_log_ratio: Tensor, *, beta: float) -> Tensor:
    """SPPO with hard labels: regress the log-ratios to +- 1 / (2 beta).

    ``(d_w - 1 / (2 beta))^2 + (d_l + 1 / (2 beta))^2``

    Args:
        chosen_log_ratio: [P] d_w, nats.
        rejected_log_ratio: [P] d_l, nats.
        beta: 1 / eta of the paper.

    Returns:
        [P] loss of each pair, nats squared.

    Example:
        >>> import torch
        >>> sppo_hard(torch.tensor([0.0, 5.0]), torch.tensor([0.0, -5.0]), beta=0.1)
        tensor([50.,  0.])

    References:
        SPPO, arXiv:2405.00675, eq. 4.7, with the win rate set to 1 and 0.
    """
    target = 1 / (2 * beta)
    return (chosen_log_ratio - target).square() + (rejected_log_ratio + target).square()


def apo_zero(chosen_log_ratio: Tensor, rejected_log_ratio: Tensor, *, beta: float) -> Tensor:
    """APO-zero: raise the chosen completion's likelihood and lower the rejected one's.

    ``(1 - sigmoid(beta d_w)) + sigmoid(beta d_l)``

    Args:
        chosen_log_ratio: [P] d_w, nats.
        rejected_log_ratio: [P] d_l, nats.
        beta: strength of the KL penalty.

    Returns:
        [P] loss of each pair, in (0, 2); 1 where policy and reference agree.

    Example:
        >>> import torch
        >>> apo_zero(torch.tensor([0.0, 10.0]), torch.tensor([0.0, -10.0]), beta=0.1)
        tensor([1.0000, 0.5379])

    References:
        APO, arXiv:2408.06266, eq. 7.
    """
    # 1 - sigmoid(x) = sigmoid(-x), without the cancellation
    return torch.sigmoid(-beta * chosen_log_ratio) + torch.sigmoid(beta * rejected_log_ratio)


def apo_down(chosen_log_ratio: Tensor, rejected_log_ratio: Tensor, *, beta: float) -> Tensor:
    """APO-down: lower both likelihoods, the rejected one's more; for data worse than the policy.

    ``sigmoid(beta d_w) + (1 - sigmoid(beta (d_w - d_l)))``

    Args:
        chosen_log_ratio: [P] d_w, nats.
        rejected_log_ratio: [P] d_l, nats.
        beta: strength of the KL penalty.

    Returns:
        [P] loss of each pair, in (0, 2); 1 where policy and reference agree.

    Example:
        >>> import torch
        >>> apo_down(torch.tensor([0.0, 10.0]), torch.tensor([0.0, -10.0]), beta=0.1)
        tensor([1.0000, 0.8503])

    References:
        APO, arXiv:2408.06266, eq. 8.
    """
    return torch.sigmoid(beta * chosen_log_ratio) + torch.sigmoid(beta * (rejected_log_ratio - chosen_log_ratio))
