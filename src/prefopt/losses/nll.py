"""The negative log-likelihood: DPO's ``sft``, and the term that CPO and TPO add."""

from __future__ import annotations

from torch import Tensor

__all__ = ["nll"]


def nll(token_logps: Tensor) -> Tensor:
    """Negative log-likelihood of each token; its mean is taken over the tokens of one optimizer step.

    ``-log pi(y_t | x, y_<t)``

    Args:
        token_logps: [n] of one branch's completions, nats, without LD-DPO's weights.

    Returns:
        [n] loss of each token, nats.

    Example:
        >>> import torch
        >>> nll(torch.tensor([-0.5, -1.0]))
        tensor([0.5000, 1.0000])

    References:
        CPO's behaviour cloning term, arXiv:2401.08417; MPO's generation loss, arXiv:2411.10442.
    """
    return -token_logps
