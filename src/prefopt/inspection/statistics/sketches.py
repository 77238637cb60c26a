"""Texts that are nearly the same, found without comparing all with all.

A text is the set of its pieces of 8 bytes. Two texts are alike by the share of their pieces that both have (Jaccard).
One-permutation MinHash (Broder 1997, https://doi.org/10.1109/SEQUEN.1997.666900; Li, Owen and Zhang 2012,
https://arxiv.org/abs/1208.1259) estimates it: the pieces are hashed, the hashes fall into bins, and of each bin the
smallest is kept; two texts have the same in as many bins as they are alike. A bin without a hash takes the next one's
(Shrivastava and Li 2014, https://arxiv.org/abs/1406.4784). Rows that agree in one of
several bands of bins are compared.

Written here, as libraries hash each word by itself, in Python: 1 ms and more for a row, instead of 0.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["ALIKE", "alike", "joined_rows", "sketch"]

ALIKE = 0.8
"""Share of common pieces from which two rows are near duplicates."""
NUM_BANDS, BAND = 20, 6
"""Bands, and bins of each: rows that share 0.8 of their pieces agree in one of them with probability 0.998, those that
share 0.4 with 0.08."""
NUM_BINS = NUM_BANDS * BAND
PIECE = 8
"""Bytes; English has few pieces of this length that unrelated texts share."""
EDGES = np.array([place * (2**64 // NUM_BINS) for place in range(NUM_BINS)], dtype=np.uint64)
FIRST, SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
"""Odd numbers whose bits look random; the high bits of a product depend on all bits of what was multiplied."""
HALF = np.uint64(32)


def sketch(text: str) -> NDArray[np.uint32]:
    """[120] the smallest hash of each bin; capitals and white space make no difference."""
    content = " ".join(text.lower().split()).encode(errors="replace").ljust(PIECE)
    pieces = np.ndarray((len(content) - PIECE + 1,), dtype="<u8", buffer=content, strides=(1,))
    hashes = pieces * FIRST
    hashes ^= hashes >> HALF
    hashes *= SECOND
    hashes.sort()
    smallest = hashes[np.searchsorted(hashes, EDGES) % len(hashes)]
    return (smallest >> np.uint64(16)).astype(np.uint32)  # the highest bits only say which bin it is


def alike(sketches: NDArray[np.uint32]) -> list[tuple[int, ...]]:
    """Groups of places in ``sketches`` [n, 120] whose texts are near duplicates, each with the lowest first."""
    links = [pair for band in bands(sketches) for pair in candidates(band)]
    if not links:
        return []
    left, right = np.array(sorted(set(links)), dtype=np.int64).T
    similar = (sketches[left] == sketches[right]).mean(axis=1) >= ALIKE
    return joined_rows(zip(left[similar].tolist(), right[similar].tolist(), strict=True))


def bands(sketches: NDArray[np.uint32]) -> Iterator[NDArray[np.uint64]]:
    """[n] for each band: one number of its bins."""
    for start in range(0, NUM_BINS, BAND):
        number = np.zeros(len(sketches), dtype=np.uint64)
        for place in range(start, start + BAND):
            number = (number ^ sketches[:, place]) * FIRST
            number ^= number >> HALF
        yield number


def candidates(band: NDArray[np.uint64]) -> Iterator[tuple[int, int]]:
    """Pairs of places with the same number: each with the first and with the one before it, which is enough to join
    those that are alike and keeps a thousand copies from being half a million pairs."""
    order = np.argsort(band, kind="stable")
    same = band[order][1:] == band[order][:-1]
    first = 0
    for place in np.flatnonzero(same).tolist():
        if place == 0 or not same[place - 1]:
            first = place
        one, before, lowest = int(order[place + 1]), int(order[place]), int(order[first])
        yield before, one
        if lowest != before:
            yield lowest, one


def joined_rows(links: Iterator[tuple[int, int]] | Sequence[tuple[int, int]]) -> list[tuple[int, ...]]:
    """The groups that links make, each sorted, by their first.

    >>> joined_rows([(4, 7), (1, 2), (7, 9)])
    [(1, 2), (4, 7, 9)]
    """
    above: dict[int, int] = {}

    def root(place: int) -> int:
        while above.setdefault(place, place) != place:
            above[place] = above[above[place]]
            place = above[place]
        return place

    for one, other in links:
        low, high = sorted((root(one), root(other)))
        above[high] = low
    groups: dict[int, list[int]] = {}
    for place in sorted(above):
        groups.setdefault(root(place), []).append(place)
    return [tuple(group) for group in groups.values()]
