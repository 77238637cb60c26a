"""Statistics of scored tokens from logits, and from any function that makes logits, without ever holding all of them.

`prefopt.scoring.head` does the same faster for heads that are matrices.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prefopt.types import Statistic, TokenStats

__all__ = ["stats_of_logits", "tiled_stats"]

TILE_ELEMENTS = 1 << 23
"""Logits of one tile: 32 MiB in float32, small beside the hidden states and large enough for full matrix speed."""

Head = Callable[[Tensor], Tensor]
"""Hidden states [n, H] -> logits [n, V], with the model's own transforms."""


def stats_of_logits(logits: Tensor, targets: Tensor, statistics: frozenset[Statistic] = frozenset()) -> TokenStats:
    """Statistics of ``targets`` [n] under ``logits`` [n, V].

    With ``lse = log sum_v e^(z_v)``: log-prob ``z_t - lse``; entropy ``lse - sum_v p_v z_v``;
    log sum of squared probabilities ``log sum_v e^(2 z_v) - 2 lse``. In float32, or float64 where the logits are.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    lse = logits.logsumexp(-1)
    chosen = logits.gather(-1, targets[:, None])[:, 0]
    extra: dict[Statistic, Tensor] = {}
    with torch.no_grad():
        if "entropy" in statistics:
            extra["entropy"] = lse - ((logits - lse[:, None]).exp_() * logits).sum(-1)
        if "mean_logit" in statistics:
            extra["mean_logit"] = logits.mean(-1)
        if "is_top1" in statistics:
            extra["is_top1"] = logits.argmax(-1) == targets
        if "log_sum_sq_prob" in statistics:
            extra["log_sum_sq_prob"] = (2 * logits).logsumexp(-1) - 2 * lse
    return TokenStats(logps=chosen - lse, **{name: value.detach() for name, value in extra.items()})


def tiled_stats(
    head: Head, hidden: Tensor, targets: Tensor, vocab_size: int, statistics: frozenset[Statistic] = frozenset()
) -> TokenStats:
    """Statistics of N tokens, a tile of them at a time; the backward makes each tile's logits again.

    Args:
        head: makes the logits; called once per tile, and once more per tile in the backward.
        hidden: [N, H] outputs of the body at the positions that predict.
        targets: [N] token ids.
        vocab_size: V, to size the tiles.
        statistics: what is wanted beyond the log-probs.
    """
    tile = max(1, TILE_ELEMENTS // max(1, vocab_size))

    def stats(hidden: Tensor, targets: Tensor) -> TokenStats:
        return stats_of_logits(head(hidden), targets, statistics)

    if hidden.shape[0] <= tile:
        return run_tile(stats, hidden, targets)
    pairs = zip(hidden.split(tile), targets.split(tile), strict=True)
    return concatenate([run_tile(stats, h, t) for h, t in pairs])


def run_tile(stats: Callable[[Tensor, Tensor], TokenStats], hidden: Tensor, targets: Tensor) -> TokenStats:
    if not torch.is_grad_enabled():
        return stats(hidden, targets)
    # preserve_rng_state: the head has no dropout, and saving the state costs a synchronisation on an accelerator
    return checkpoint(stats, hidden, targets, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]


def concatenate(parts: list[TokenStats]) -> TokenStats:
    def joined(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    logps = joined("logps")
    assert logps is not None
    return TokenStats(
        logps=logps,
        entropy=joined("entropy"),
        mean_logit=joined("mean_logit"),
        is_top1=joined("is_top1"),
        log_sum_sq_prob=joined("log_sum_sq_prob"),
    )
