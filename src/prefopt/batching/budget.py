"""Micro-batches by a budget of tokens: the pairs of an optimizer step, packed best-fit decreasing.

The tokens of a micro-batch are the positions that the model computes, so they depend on the batch layout:

=================== ========================================================================================
``shared_prompt``   each pair's prompt and completions; of a pair whose completions keep different parts of the
                    prompt, the sequences apart
``packed``          the complete sequences, the prompt once per completion
``padded``          rows times the longest sequence, rounded up to a multiple
``encoder_decoder`` the same, for the rows of prompts and the rows of completions
=================== ========================================================================================
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefopt.batching.lengths import GroupLengths
from prefopt.types import Branch

__all__ = ["TokenBudget", "group_tokens", "micro_batch_tokens", "pack_by_budget"]


@dataclass(frozen=True)
class TokenBudget:
    """At most this many tokens in a micro-batch, as a layout counts them."""

    tokens: int
    layout: str
    branches: tuple[Branch, ...]
    """Completions of a pair that are computed."""
    pad_to_multiple_of: int | None = None

    def micro_batches(self, lengths: GroupLengths, num_ranks: int = 1) -> list[list[int]]:
        """The pairs of a step, on all ranks, in as few rounds of one micro-batch per rank as the budget allows.

        Among plans with that many rounds it takes one whose largest micro-batch is small, which spreads the work
        evenly over rounds and ranks and needs the least memory. The largest come first: memory that runs out does so
        at once, and what the first one allocated is enough for the others.

        Args:
            lengths: of the n pairs of the step.
            num_ranks: that work side by side.

        Returns:
            micro-batches of pair numbers 0..n-1, each ascending; every pair once.
        """
        padded, multiple = self.layout == "padded", self.pad_to_multiple_of
        sizes = group_tokens(lengths, self.layout, pad_to_multiple_of=multiple)
        widths = encoder_decoder_widths(lengths, multiple) if self.layout == "encoder_decoder" else None

        def pack(budget: int) -> list[list[int]]:
            if widths is None:
                return pack_by_budget(sizes, budget, padded=padded)
            return cut_padded(from_the_longest(sizes), widths, budget)

        def from_the_largest(pairs: list[int]) -> tuple[int, list[int]]:
            if widths is None:
                return -micro_batch_tokens([sizes[pair] for pair in pairs], padded=padded), pairs
            return -padded_rows_tokens([widths[pair] for pair in pairs]), pairs

        return sorted(map(sorted, pack_evenly(pack, self.tokens, num_ranks)), key=from_the_largest)


def group_tokens(lengths: GroupLengths, layout: str, *, pad_to_multiple_of: int | None = None) -> list[int]:
    """[n] the tokens of each pair when it is alone in a micro-batch."""
    if layout == "shared_prompt":
        return shared_tokens(lengths).tolist()
    if layout == "packed":
        return packed_tokens(lengths).tolist()
    if layout == "encoder_decoder":
        return [sum(widths) for widths in encoder_decoder_widths(lengths, pad_to_multiple_of)]
    return padded_tokens(lengths, pad_to_multiple_of).tolist()


def shared_tokens(lengths: GroupLengths) -> NDArray[np.int64]:
    """[n] of groups; of a pair whose completions keep different parts of the prompt, of its sequences."""
    share = (lengths.starts == lengths.starts[:, :1]).all(1)
    return np.where(share, lengths.totals - lengths.starts[:, 0], packed_tokens(lengths))


def packed_tokens(lengths: GroupLengths) -> NDArray[np.int64]:
    """[n] of complete sequences."""
    return lengths.sequences.sum(1)


def padded_tokens(lengths: GroupLengths, multiple: int | None) -> NDArray[np.int64]:
    """[n] of rows as wide as the pair's longest sequence, rounded up to a multiple."""
    multiple = multiple or 1
    width = -(-lengths.sequences.max(1) // multiple) * multiple
    return lengths.completions.shape[1] * width


def encoder_decoder_widths(lengths: GroupLengths, multiple: int | None) -> list[tuple[int, int]]:
    """[n] of each pair the width of its prompt's row, and of its completions' rows together."""
    multiple = multiple or 1
    prompts = -(-np.maximum(lengths.prompts, 1) // multiple) * multiple
    completions = -(-np.maximum(lengths.completions.max(1), 1) // multiple) * multiple
    return list(zip(prompts.tolist(), (lengths.completions.shape[1] * completions).tolist(), strict=True))


def padded_rows_tokens(widths: Sequence[tuple[int, ...]]) -> int:
    """The tokens of a micro-batch of pairs whose parts, each padded to its widest, have these widths."""
    return len(widths) * sum(map(max, zip(*widths, strict=True)))


def micro_batch_tokens(sizes: Sequence[int], *, padded: bool) -> int:
    """The tokens of a micro-batch of pairs with these sizes; padding makes each as large as the largest."""
    return len(sizes) * max(sizes) if padded else sum(sizes)


def pack_evenly(pack: Callable[[int], list[list[int]]], budget: int, num_ranks: int) -> list[list[int]]:
    """Pair numbers, packed within the budget into a number of rounds that best-fit decreasing finds.

    A smaller budget is looked for, by bisection, that does not take more rounds: with it the micro-batches are about
    equally large, and there is one for every rank where there are pairs enough.
    """
    packed = pack(budget)
    slots = -(-len(packed) // num_ranks) * num_ranks
    too_small, enough = 0, budget
    while enough - too_small > 1:
        middle = (too_small + enough) // 2
        tried = pack(middle)
        if len(tried) <= slots:
            packed, enough = tried, middle
        else:
            too_small = middle
    return packed


def pack_by_budget(sizes: Sequence[int], budget: int, *, padded: bool) -> list[list[int]]:
    """Pair numbers in micro-batches of at most ``budget`` tokens; a pair above it is a micro-batch of its own.

    >>> pack_by_budget([6, 5, 4, 3, 2], 10, padded=False)
    [[0, 2], [1, 3, 4]]
    >>> pack_by_budget([6, 5, 4, 3, 2], 10, padded=True)
    [[0], [1, 2], [3, 4]]
    """
    decreasing = from_the_longest(sizes)
    return cut_padded(decreasing, [(n,) for n in sizes], budget) if padded else best_fit(decreasing, sizes, budget)


def from_the_longest(sizes: Sequence[int]) -> list[int]:
    """Pair numbers by size, decreasing."""
    return sorted(range(len(sizes)), key=lambda pair: (-sizes[pair], pair))


def best_fit(order: Sequence[int], sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Each pair in turn goes where the least room is left over, or into a new micro-batch."""
    packed: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens that are free, micro-batch), ascending
    for pair in order:
        place = bisect_left(rooms, (sizes[pair], -1))
        if place < len(rooms):
            room, micro_batch = rooms.pop(place)
        else:
            room, micro_batch = budget, len(packed)
            packed.append([])
        packed[micro_batch].append(pair)
        insort(rooms, (room - sizes[pair], micro_batch))
    return packed


def cut_padded(decreasing: Sequence[int], widths: Sequence[tuple[int, ...]], budget: int) -> list[list[int]]:
    """As many neighbours in order of length as fit; no other cut of rows of one kind has fewer micro-batches.

    Args:
        decreasing: pair numbers by length.
        widths: of the parts of each pair, which are padded apart.
        budget: tokens of a micro-batch.
    """
    packed: list[list[int]] = []
    widest: tuple[int, ...] = ()
    for pair in decreasing:
        wider = tuple(map(max, widest, widths[pair]))
        if packed and (len(packed[-1]) + 1) * sum(wider) <= budget:
            packed[-1].append(pair)
            widest = wider
        else:
            packed.append([pair])
            widest = widths[pair]
    return packed
