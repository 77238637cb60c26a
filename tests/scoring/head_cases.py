"""Heads as matrices with random numbers in them, and their statistics by definition."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prefopt.scoring.head.factors import Factors
from prefopt.scoring.tokens import stats_of_logits
from prefopt.scoring.transforms import LogitTransform
from prefopt.types import Statistic, TokenStats

STATISTICS: frozenset[Statistic] = frozenset({"entropy", "mean_logit", "is_top1", "log_sum_sq_prob"})
TRANSFORMS = {
    "plain": LogitTransform(),
    "factor": LogitTransform(0.25),
    "cap": LogitTransform(1.0, 2.0),
    "both": LogitTransform(-3.0, 5.0),
}
MODES = ("frozen", "cached", "recompute")
NUM_TOKENS, HIDDEN_SIZE, VOCAB_SIZE, RANK = 11, 6, 37, 2


@dataclass(frozen=True)
class Case:
    """Leaves of a head, its factors made of them, targets [N], and a gradient [N] from above."""

    leaves: tuple[Tensor, ...]
    """hidden [N, H], weight [V, H], and what the kind of head adds."""
    factors: Factors
    targets: Tensor
    upstream: Tensor

    @property
    def trained(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if leaf.requires_grad]

    def logits(self, transform: LogitTransform) -> Tensor:
        """In float64, by the same leaves."""
        pairs = zip(self.factors.inputs, self.factors.weights, strict=True)
        return transform(sum(x.double() @ weight.double().T for x, weight in pairs))  # type: ignore[arg-type]

    def expected(self, transform: LogitTransform) -> tuple[TokenStats, tuple[Tensor, ...]]:
        """Statistics, and gradients of the trained leaves, by autograd through all logits in float64."""
        stats = stats_of_logits(self.logits(transform), self.targets, STATISTICS)
        return stats, self.gradients(stats)

    def gradients(self, stats: TokenStats) -> tuple[Tensor, ...]:
        total = (stats.logps * self.upstream.to(stats.logps.dtype)).sum()
        return torch.autograd.grad(total, self.trained, retain_graph=True)


def make_case(
    kind: str,
    *,
    dtype: torch.dtype = torch.float64,
    frozen: bool = False,
    seed: int = 0,
    num_tokens: int = NUM_TOKENS,
    vocab_size: int = VOCAB_SIZE,
) -> Case:
    """A head of a kind: ``plain``, ``bias``, ``lora`` (the base weight trained too), ``adapter`` (only the adapter).

    Args:
        kind: of head.
        dtype: of everything.
        frozen: only the hidden states need a gradient.
        seed: of the numbers.
        num_tokens: N, with the first and the last token of the vocabulary among the targets.
        vocab_size: V.
    """
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int, trained: bool = not frozen) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(trained)

    hidden = leaf(num_tokens, HIDDEN_SIZE, trained=True)
    weight = leaf(vocab_size, HIDDEN_SIZE, trained=not frozen and kind != "adapter")
    leaves, factors = (hidden, weight), Factors((hidden,), (weight,))
    if kind == "bias":
        bias = leaf(vocab_size)
        leaves, factors = (*leaves, bias), factors + Factors((torch.ones_like(hidden[:, :1]),), (bias[:, None],))
    if kind in ("lora", "adapter"):
        down, up = leaf(RANK, HIDDEN_SIZE), leaf(vocab_size, RANK)
        leaves, factors = (*leaves, down, up), factors + Factors((0.5 * (hidden @ down.T),), (up,))
    targets = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    targets[:2] = torch.tensor([0, vocab_size - 1])[:num_tokens]
    upstream = torch.randn(num_tokens, generator=generator, dtype=torch.float64)
    return Case(leaves, factors, targets, upstream if dtype == torch.float64 else upstream.float())
