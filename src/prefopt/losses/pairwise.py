"""Losses of the margin: functions of one number per pair, the score of chosen minus the score of rejected.

The margin is what the method makes it: a difference of log-ratios (DPO), of f-divergence scores (f-DPO), of
log-probs (CPO, TPO) or of means per token. No unit but nats; beta turns it into log-odds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefopt.losses.logistic import smoothed_logistic
from prefopt.losses.transforms import MAX_EXPONENT

__all__ = ["discopop", "exo_pair", "hinge", "ipo", "robust", "sigmoid", "sigmoid_norm"]


def sigmoid(margin: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO's loss, with cDPO's smoothed labels; CPO's and TPO's too, on a margin of log-probs.

    ``-(1 - eps) log sigmoid(beta delta) - eps log sigmoid(-beta delta)``

    Args:
        margin: [P] delta, nats.
        beta: strength of the KL penalty.
        label_smoothing: eps in [0, 0.5], the share of labels that are wrong.

    Returns:
        [P] loss of each pair; ln 2 where policy and reference agree.

    Example:
        >>> import torch
        >>> sigmoid(torch.tensor([0.0, 10.0]), beta=0.1)
        tensor([0.6931, 0.3133])

    References:
        DPO, arXiv:2305.18290, eq. 7; cDPO (eps > 0), E. Mitchell's note of 2023; CPO, arXiv:2401.08417, eq. 3.
    """
    return smoothed_logistic(beta * margin, label_smoothing=label_smoothing)


def sigmoid_norm(mean_margin: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Length-normalised DPO: the sigmoid loss of the difference of scores per token.

    ``l(beta (s(d_w) / |y_w| - s(d_l) / |y_l|))`` with the smoothed logistic loss ``l`` of `sigmoid`

    Args:
        mean_margin: [P] difference of the scores per token, nats.
        beta: strength of the KL penalty; larger than for `sigmoid`, as the margin is a mean.
        label_smoothing: eps in [0, 0.5].

    Returns:
        [P] loss of each pair.

    Example:
        >>> import torch
        >>> sigmoid_norm(torch.tensor([0.0, 0.2]), beta=5.0)
        tensor([0.6931, 0.3133])

    References:
        Tulu 3, arXiv:2411.15124 (length-normalised DPO).
    """
    return smoothed_logistic(beta * mean_margin, label_smoothing=label_smoothing)


def hinge(margin: Tensor, *, beta: float) -> Tensor:
    """SLiC's loss on the normalised log-ratio, as in RSO: no gradient once a pair is apart by 1 / beta.

    ``max(0, 1 - beta delta)``

    Args:
        margin: [P] delta, nats.
        beta: the inverse of the margin that is asked for.

    Returns:
        [P] loss of each pair; 1 where policy and reference agree.

    Example:
        >>> import torch
        >>> hinge(torch.tensor([0.0, 5.0, 20.0]), beta=0.1)
        tensor([1.0000, 0.5000, 0.0000])

    References:
        SLiC-HF, arXiv:2305.10425; RSO, arXiv:2309.06657 (hinge-norm).
    """
    return torch.relu(1 - beta * margin)


def ipo(mean_margin: Tensor, *, beta: float) -> Tensor:
    """IPO: pull the margin to 1 / (2 beta) and no further, so that a certain preference does not blow it up.

    ``(s(d_w) / |y_w| - s(d_l) / |y_l| - 1 / (2 beta))^2``

    Args:
        mean_margin: [P] difference of the scores per token, nats (the authors' own advice; the paper writes sums).
        beta: tau of the paper.

    Returns:
        [P] loss of each pair, nats squared; 0 at a margin of 1 / (2 beta).

    Example:
        >>> import torch
        >>> ipo(torch.tensor([0.0, 5.0, 7.0]), beta=0.1)
        tensor([25.,  0.,  4.])

    References:
        IPO, arXiv:2310.12036, eq. 17.
    """
    return (mean_margin - 1 / (2 * beta)).square()


def exo_pair(margin: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """EXO on pairs: the reverse KL divergence from the policy's preference to the (smoothed) label.

    ``sigmoid(z) [log sigmoid(z) - log(1 - eps)] + sigmoid(-z) [log sigmoid(-z) - log eps]``, ``z = beta delta``

    Args:
        margin: [P] delta, nats.
        beta: beta_pi of the paper.
        label_smoothing: eps in (0, 0.5): with eps = 0 the divergence is infinite.

    Returns:
        [P] loss of each pair, nats; 0 where ``sigmoid(z) = 1 - eps``.

    Example:
        >>> import torch
        >>> exo_pair(torch.tensor([0.0, 10.0]), beta=0.1, label_smoothing=0.1)
        tensor([0.5108, 0.1141])

    References:
        EXO, arXiv:2402.00856, eq. 16.
    """
    z = beta * margin
    right = torch.sigmoid(z) * (logsigmoid(z) - math.log1p(-label_smoothing))
    wrong = torch.sigmoid(-z) * (logsigmoid(-z) - math.log(label_smoothing))
    return right + wrong


def robust(margin: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO: an unbiased estimate of the loss on clean labels, from labels flipped with probability eps.

    ``[-(1 - eps) log sigmoid(z) + eps log sigmoid(-z)] / (1 - 2 eps)``, ``z = beta delta``

    Args:
        margin: [P] delta, nats.
        beta: strength of the KL penalty.
        label_smoothing: eps in [0, 0.5), the rate of flipped labels; 0 is `sigmoid`.

    Returns:
        [P] loss of each pair; it may be negative.

    Example:
        >>> import torch
        >>> robust(torch.tensor([0.0, 10.0]), beta=0.1, label_smoothing=0.1)
        tensor([0.6931, 0.1883])

    References:
        Robust DPO, arXiv:2403.00409.
    """
    z = beta * margin
    clean = -(1 - label_smoothing) * logsigmoid(z) + label_smoothing * logsigmoid(-z)
    return clean / (1 - 2 * label_smoothing)


def discopop(margin: Tensor, *, beta: float, tau: float) -> Tensor:
    """DiscoPOP, the log-ratio modulated loss: logistic where the pair is wrong, exponential where it is right.

    ``(1 - m) (-log sigmoid(z)) + m e^-z``, ``m = sigmoid(z / tau)``, ``z = beta delta``

    Args:
        margin: [P] delta, nats.
        beta: strength of the KL penalty.
        tau: temperature of the switch between the two.

    Returns:
        [P] loss of each pair; (ln 2 + 1) / 2 at a margin of 0.

    Example:
        >>> import torch
        >>> discopop(torch.tensor([0.0, 10.0]), beta=0.1, tau=0.05)
        tensor([0.8466, 0.3679])

    References:
        DiscoPOP, arXiv:2406.08414, eq. 5.
    """
    z = beta * margin
    logistic = torch.sigmoid(-z / tau) * -logsigmoid(z)
    # m e^-z as one exponential: for z << 0 the factors are 0 and inf
    exponential = torch.exp((logsigmoid(z / tau) - z).clamp(max=MAX_EXPONENT))
    return logistic + exponential
