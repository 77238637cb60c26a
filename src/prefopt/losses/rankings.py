"""From the pairs of a ranking to one number per row: what several completions of a prompt are worth together.

The C = K (K - 1) / 2 pairs of K ranks stand in the order (1, 2), (1, 3), .., (2, 3), .., better rank first. A row may
have fewer completions than K: then its last ranks, and the pairs with them, are absent.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = ["mean_over_pairs", "plackett_luce"]

FAR_BELOW = -1e30
"""A logit that adds nothing to any other, and whose gradient is 0 and not NaN as that of -inf."""


def mean_over_pairs(values: Tensor, present: Tensor) -> Tensor:
    """The mean of a pair loss over the pairs of a row, so that a row weighs as one pair.

    ``mean over j < k of f(y_j, y_k)``

    Args:
        values: [C, P] loss of each pair of ranks.
        present: [C, P] whether the row has both.

    Returns:
        [P] loss of each row; 0 for one without a pair.

    Example:
        >>> import torch
        >>> mean_over_pairs(torch.tensor([[1.0], [2.0], [9.0]]), torch.tensor([[True], [True], [False]]))
        tensor([1.5000])

    References:
        The pairwise breakdown of rankings in InstructGPT, arXiv:2203.02155, eq. 1.
    """
    return torch.where(present, values, 0.0).sum(0) / present.sum(0).clamp(min=1)


def plackett_luce(logits: Tensor, present: Tensor) -> Tensor:
    """Negative log-likelihood of the ranking: the best is chosen from all, the second from the rest, and so on.

    ``sum over j < K of -log [e^(s_j) / sum over k >= j of e^(s_k)]``, as a function of ``z_jk = s_j - s_k``

    Args:
        logits: [C, P] z_jk of each pair of ranks; with gamma subtracted, where there is a target.
        present: [C, P] whether the row has both.

    Returns:
        [P] loss of each row; for two completions ``-log sigmoid(z_12)``.

    Example:
        >>> import torch
        >>> plackett_luce(torch.zeros(3, 1), torch.ones(3, 1, dtype=torch.bool)).exp()  # 3! orders, equally likely
        tensor([6.])

    References:
        DPO, arXiv:2305.18290, appendix A.3, eq. 20.
    """
    against = torch.where(present, -logits, FAR_BELOW)
    stages = list(range(ranks_of(len(logits)) - 1, 0, -1))  # K - 1 pairs of the best, K - 2 of the second, ..
    # of a stage that the row does not have it is log(1 + e^-1e30) = 0
    return torch.stack([-logsigmoid(-stage.logsumexp(0)) for stage in against.split(stages)]).sum(0)


def ranks_of(num_pairs: int) -> int:
    """K from C = K (K - 1) / 2: the root of K^2 - K lies between K - 1 and K."""
    return math.isqrt(2 * num_pairs) + 1
