"""Lengths of rows as distributions, the bias to longer completions, and what each batch layout computes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prefopt.batching import GroupLengths
from prefopt.batching.budget import group_tokens
from prefopt.inspection.statistics.result import Distribution, LayoutTokens, LengthBias

__all__ = ["distribution", "layout_tokens", "length_bias"]

NUM_STEPS = 16
"""Of a histogram."""
ORDER = 0
"""Seed of the order in which rows are drawn for padded batches; a run's own order gives nearly the same."""


def distribution(lengths: Sequence[int] | NDArray[np.int64]) -> Distribution:
    """The distribution of some lengths; all zero for none.

    >>> distribution([1, 2, 3, 4]).median
    2.5
    """
    values = np.asarray(lengths, dtype=np.int64)
    if not len(values):
        return Distribution(0, 0.0, 0.0, 0.0, 0.0, 0, (0,) * NUM_STEPS)
    median, p90, p99 = (float(np.quantile(values, share)) for share in (0.5, 0.9, 0.99))
    counts, _ = np.histogram(np.minimum(values, p99), bins=NUM_STEPS, range=(0.0, max(p99, 1.0)))
    return Distribution(len(values), float(values.mean()), median, p90, p99, int(values.max()), tuple(map(int, counts)))


def length_bias(chosen: Sequence[int], rejected: Sequence[int], unit: str) -> LengthBias | None:
    """How often the longer completion is the chosen one; None for no pairs.

    Args:
        chosen, rejected: [n] lengths of the two completions of each pair.
        unit: of the lengths.
    """
    differences = np.asarray(chosen, dtype=np.int64) - np.asarray(rejected, dtype=np.int64)
    if not len(differences):
        return None
    reach = max(float(np.quantile(np.abs(differences), 0.99)), 1.0)
    counts, edges = np.histogram(np.clip(differences, -reach, reach), bins=NUM_STEPS + 1, range=(-reach, reach))
    return LengthBias(
        unit=unit,
        share_longer=float((differences > 0).mean()),
        share_equal=float((differences == 0).mean()),
        median_difference=float(np.median(differences)),
        counts=tuple(map(int, counts)),
        edges=tuple(map(float, edges)),
    )


def layout_tokens(lengths: GroupLengths, pairs_per_batch: int) -> LayoutTokens | None:
    """The tokens that one pass over all pairs computes in each layout; None for no pairs.

    Args:
        lengths: of the pairs, after truncation.
        pairs_per_batch: pairs that are padded to the longest of them.
    """
    if not len(lengths):
        return None
    alone = np.array(group_tokens(lengths, "padded"))[np.random.default_rng(ORDER).permutation(len(lengths))]
    batches = [alone[start : start + pairs_per_batch] for start in range(0, len(alone), pairs_per_batch)]
    return LayoutTokens(
        pairs_per_batch=pairs_per_batch,
        padded=sum(int(batch.max()) * len(batch) for batch in batches),
        packed=sum(group_tokens(lengths, "packed")),
        shared_prompt=sum(group_tokens(lengths, "shared_prompt")),
    )
