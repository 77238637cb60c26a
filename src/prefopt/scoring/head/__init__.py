"""The head: statistics of tokens from hidden states, with exact gradients, without [N, V] logits in memory."""

from __future__ import annotations

from prefopt.scoring.head.call import token_stats

__all__ = ["token_stats"]
