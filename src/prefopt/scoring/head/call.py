"""Statistics from a call of the head's own module, so that what a sharding engine hangs on that call happens.

FSDP2 and DeepSpeed bring a head's weight together in hooks around its forward, and again before the backward of what
that forward returned. So the weight is read within a call of the module: its ``forward`` is replaced on the instance,
and with our keyword argument it returns statistics in place of logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import Tensor, nn

from prefopt.scoring.head.factors import factors_of, is_bare, with_bias
from prefopt.scoring.head.function import factored_stats
from prefopt.scoring.tokens import Head, tiled_stats
from prefopt.scoring.transforms import LogitTransform
from prefopt.types import Statistic, TokenStats

__all__ = ["token_stats"]

LARGE_VOCABULARY = 1 << 17
"""Assumed of a head that does not say how many logits it makes; it sizes tiles and nothing else."""


@dataclass(frozen=True)
class TokenRequest:
    """What `token_stats` asks of the replaced forward."""

    targets: Tensor
    transform: LogitTransform
    statistics: frozenset[Statistic]
    bias: Tensor | None


def token_stats(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    transform: LogitTransform,
    statistics: frozenset[Statistic] = frozenset(),
    bias: Tensor | None = None,
) -> TokenStats:
    """Statistics of N tokens under a model's head, with gradients for the hidden states and the head's weights.

    Args:
        head: the module that makes logits, as the model calls it: with the adapter on it, if there is one.
        hidden: [N, H] outputs of the body at the positions that predict.
        targets: [N] token ids.
        transform: what the model does to its logits.
        statistics: what is wanted beyond the log-probs; without a gradient.
        bias: [V] what the model adds to the head's output, before the transform.
    """
    request = TokenRequest(targets, transform, statistics, bias)
    if not is_bare(head, forward):
        return from_logits(head, hidden, request, head)
    if getattr(vars(head).get("forward"), "__func__", None) is not forward:
        head.forward = MethodType(forward, head)  # bound: a copy of the module gets a method of its own
    return TokenStats(**head(hidden, token_request=request))


def forward(self: nn.Module, *args: Any, token_request: TokenRequest | None = None, **kwargs: Any) -> Any:
    """The forward of a head: that of its class, or with a request the statistics by name.

    They come in a dict, since the hooks of engines look for tensors in lists, tuples and dicts alone.
    """
    original = MethodType(type(self).forward, self)
    if token_request is None:
        return original(*args, **kwargs)
    (hidden,) = args
    factors = factors_of(self, hidden)
    if factors is None:
        stats = from_logits(original, hidden, token_request, self)
    else:
        if token_request.bias is not None:
            factors = with_bias(factors, token_request.bias)
        wanted = (token_request.targets, token_request.transform, token_request.statistics)
        stats = factored_stats(factors, *wanted)  # type: ignore[call-arg]
    return {name: value for name, value in vars(stats).items() if value is not None}


def from_logits(make_logits: Head, hidden: Tensor, request: TokenRequest, head: nn.Module) -> TokenStats:
    """The statistics from logits that the head's own code makes, tile by tile, by ordinary autograd."""
    vocab_size = int(getattr(head, "out_features", LARGE_VOCABULARY))

    def transformed(rows: Tensor) -> Tensor:
        logits = make_logits(rows)
        return request.transform(logits if request.bias is None else logits + request.bias)

    return tiled_stats(transformed, hidden, request.targets, vocab_size, request.statistics)
