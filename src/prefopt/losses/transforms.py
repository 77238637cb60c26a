"""Transformations of log-probabilities that go with a loss: alpha shape, LD-DPO, WPO."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["MAX_EXPONENT", "alpha_shape", "ld_token_weights", "wpo_token_log_weights"]

MAX_EXPONENT = 40.0
"""Exponents are clamped here: e^40 = 2.4e17 can still be squared in float32. Beyond, the gradient is 0."""

SMALL_ALPHA = 1e-12
"""Below this the curvature ``alpha x / 2`` is under float32's rounding for every |x| up to 1e5."""


def alpha_shape(x: Tensor, *, alpha: float) -> Tensor:
    """The logarithm bent by alpha, as a function of log p: AlphaPO's reward and f-DPO's alpha-divergence score.

    ``(1 - e^(-alpha x)) / alpha``, which tends to ``x`` as alpha tends to 0

    With ``x = log p`` this is AlphaPO's ``(1 - p^-alpha) / alpha``; with a log-ratio ``x = log u`` it is
    ``f'(u) = (1 - u^-alpha) / alpha`` of the alpha-divergence. It is increasing, and 0 at 0, for every alpha.

    Args:
        x: [...] a log-probability or log-ratio, nats.
        alpha: the shape; 0 is the identity, 1 gives ``1 - e^-x``.

    Returns:
        [...] the shaped value; the exponent is clamped at 40.

    Example:
        >>> import torch
        >>> alpha_shape(torch.tensor([-1.0, 0.0, 1.0]), alpha=0.5)
        tensor([-1.2974,  0.0000,  0.7869])

    References:
        AlphaPO, arXiv:2501.03884; f-DPO, arXiv:2309.16240, table 1.
    """
    if abs(alpha) < SMALL_ALPHA:
        return x
    # expm1, as 1 - exp loses all digits where alpha x is small
    return -torch.expm1((-alpha * x).clamp(max=MAX_EXPONENT)) / alpha


def ld_token_weights(position: Tensor, public_length: Tensor, *, ld_alpha: float) -> Tensor:
    """LD-DPO's weight of each token: 1 in the length both completions share, alpha in the excess.

    ``log p(y) = sum_(t <= m) log pi(y_t) + alpha sum_(t > m) log pi(y_t)``, ``m = min(|y_w|, |y_l|)``

    Args:
        position: [N] place of each token within its completion, from 0.
        public_length: [N] m of the pair the token belongs to, tokens.
        ld_alpha: alpha in [0, 1]; 1 leaves the loss as it is, 0 ignores the excess of the longer completion.

    Returns:
        [N] weights, float32.

    Example:
        >>> import torch
        >>> ld_token_weights(torch.tensor([0, 1, 2]), torch.tensor([2, 2, 2]), ld_alpha=0.25)
        tensor([1.0000, 1.0000, 0.2500])

    References:
        LD-DPO, arXiv:2409.06411.
    """
    return torch.where(position < public_length, 1.0, ld_alpha)


def wpo_token_log_weights(token_logps: Tensor, log_sum_sq_prob: Tensor) -> Tensor:
    """The log of WPO's per-token weight: how likely a token is next to what the policy itself would sample.

    ``log pi(y_t) - log sum_v pi(v)^2``; a completion's weight is ``w(y) = exp(mean_t of it)``, a pair's is
    ``w(y_w) w(y_l)``

    Args:
        token_logps: [N] log pi(y_t | x, y_<t), nats.
        log_sum_sq_prob: [N] log sum_v pi(v | x, y_<t)^2, nats.

    Returns:
        [N] log weights, detached: the weight is a constant of the loss.

    Example:
        >>> import torch
        >>> probs = torch.tensor([0.5, 0.25, 0.25])
        >>> wpo_token_log_weights(probs[:1].log(), probs.square().sum()[None].log()).exp()
        tensor([1.3333])

    References:
        WPO, arXiv:2406.11827, eq. 2, with sampled alignment.
    """
    return (token_logps - log_sum_sq_prob).detach()
