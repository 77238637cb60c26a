"""Losses of more than two completions: a loss of a pair, taken of every pair of a row's ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from prefopt import losses
from prefopt.objective.inputs import Stats
from prefopt.types import Branch

__all__ = ["RANKINGS", "Ranking", "as_pair", "each_pair", "mean_of_others"]

Ranking: TypeAlias = Literal["all_pairs", "plackett_luce"]

RANKINGS: dict[Ranking, Callable[[Tensor, Tensor], Tensor]] = {
    "all_pairs": losses.mean_over_pairs,
    "plackett_luce": losses.plackett_luce,
}
"""ranking -> ([C, P] of each pair of ranks, [C, P] whether the row has both) -> [P] loss of each row."""


def each_pair(
    value: Callable[[Stats, Stats], Tensor], policy: Stats, reference: Stats, ranks: Sequence[Branch]
) -> tuple[Tensor, Tensor]:
    """What ``value`` gives for each two of ``ranks``, the better one as chosen; and whether a row has them.

    Args:
        value: (policy, reference) -> [P].
        policy: statistics of all ranks.
        reference: the same; empty where there is none.
        ranks: best to worst.

    Returns:
        [C, P] values and [C, P] booleans, in the order of `prefopt.losses.rankings`.
    """
    pairs = list(combinations(ranks, 2))
    values = [value(as_pair(policy, *pair), as_pair(reference, *pair)) for pair in pairs]
    return torch.stack(values), torch.stack([policy[worse].num_tokens > 0 for _, worse in pairs])


def as_pair(stats: Stats, better: Branch, worse: Branch) -> Stats:
    """The statistics of two ranks as those of a pair; nothing where there are none."""
    return {"chosen": stats[better], "rejected": stats[worse]} if stats else {}


def mean_of_others(values: Sequence[Tensor], policy: Stats, ranks: Sequence[Branch]) -> Tensor:
    """[P] the mean of ``values`` [P], one for each of ``ranks``, over those that the row has."""
    return losses.mean_over_pairs(torch.stack([*values]), torch.stack([policy[rank].num_tokens > 0 for rank in ranks]))
