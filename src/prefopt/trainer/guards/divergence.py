"""A run whose numbers are finite and whose model is broken: it predicts worse than chance what it is to prefer.

A model that knows nothing gives each token -ln V nats, V tokens in its vocabulary. Training on preferences lowers the
log-probs of chosen completions, too, but by tenths of a nat per token; only a model that is broken is below chance.
The figures are in docs/design/failing-steps.md.
"""

from __future__ import annotations

import math

__all__ = ["LEAST_FALL", "divergence"]

LEAST_FALL = 1.0
"""Nats per token, since the run began: a model that has not been trained may be below chance from the start."""


def divergence(mean_logp: float, first: float, vocab_size: int) -> str | None:
    """What shows that the policy is broken; None: nothing.

    Args:
        mean_logp: mean log-prob of the chosen completions' tokens under the policy, nats.
        first: the same when the run began.
        vocab_size: tokens that the policy chooses among.

    Example:
        >>> divergence(-5.0, -3.9, 512)
        >>> divergence(-7.9, -3.9, 512)
        'the policy gives the chosen completions -7.9 nats per token, below -6.24: chance among 512 tokens'
    """
    chance = -math.log(vocab_size)
    if not (mean_logp < chance and mean_logp < first - LEAST_FALL):
        return None
    return (
        f"the policy gives the chosen completions {mean_logp:.3g} nats per token, below {chance:.3g}: chance among "
        f"{vocab_size} tokens"
    )
