"""How an optimizer step is cut into micro-batches, alike on every rank.

A step has ``per_device * accumulation * world`` pairs, always; the last one of an epoch has what is left. It is cut
into rounds, in which each rank runs one micro-batch: of ``per_device`` pairs, or within a budget of tokens. Every rank
cuts the whole step from the same numbers and takes its share. So no communication is needed and no rank runs more
micro-batches than another (collectives would hang); a rank for which nothing is left computes a dummy of weight 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from prefopt.batching import GroupLengths, TokenBudget

__all__ = ["Geometry", "Share"]


class Share(NamedTuple):
    """A micro-batch of one rank: places of its pairs in the step, and their weight (0: a dummy)."""

    places: Sequence[int]
    weight: float
    most_pairs: int
    """Of the micro-batches that the ranks run at the same time."""


@dataclass(frozen=True)
class Geometry:
    """How a step is divided."""

    per_device: int
    accumulation: int
    world_size: int
    rank: int
    budget: TokenBudget | None = None
    """Of each micro-batch; None: it has ``per_device`` pairs."""

    @property
    def pairs_per_step(self) -> int:
        return self.per_device * self.accumulation * self.world_size

    @property
    def block_size(self) -> int:
        """Pairs that are cut together: into one micro-batch per rank, or with a budget all of a step into several."""
        return self.pairs_per_step if self.budget else self.per_device * self.world_size

    def shares(self, num_pairs: int, lengths: GroupLengths | None) -> Iterator[Share]:
        """This rank's micro-batches of a step.

        Args:
            num_pairs: of the step, on all ranks.
            lengths: of these pairs; None where there is no budget.
        """
        if self.budget is None:
            rounds = self.rounds_by_count(num_pairs)
        else:
            assert lengths is not None, "a budget is of tokens: the lengths of the pairs are needed"
            rounds = self.dealt(self.budget.micro_batches(lengths, self.world_size))
        for micro_batches in rounds:
            own, most = micro_batches[self.rank], max(map(len, micro_batches))
            yield Share(own, 1.0, most) if own else Share(next(filter(None, micro_batches))[:1], 0.0, most)

    def rounds_by_count(self, num_pairs: int) -> Iterator[list[Sequence[int]]]:
        """Of each block one micro-batch per rank, whose numbers of pairs differ by at most 1."""
        for start in range(0, num_pairs, self.block_size):
            block = range(start, min(start + self.block_size, num_pairs))
            share, extra = divmod(len(block), self.world_size)
            firsts = [rank * share + min(rank, extra) for rank in range(self.world_size + 1)]
            yield [block[first:end] for first, end in pairwise(firsts)]

    def dealt(self, micro_batches: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
        """Of micro-batches from the largest to the smallest one per rank, so that those of a round are about equal.

        Every other round is dealt backwards: who had the largest of one gets the smallest of the next.
        """
        for number, start in enumerate(range(0, len(micro_batches), self.world_size)):
            own = [*micro_batches[start : start + self.world_size]]
            own += [()] * (self.world_size - len(own))
            yield own if number % 2 == 0 else own[::-1]
