"""Where in a whole sequence the tokens stand that truncation kept of it."""

from __future__ import annotations

from collections.abc import Sequence

from prefopt.data.truncate import TruncationMode

__all__ = ["kept_places"]


def kept_places(whole: Sequence[int], kept: Sequence[int], mode: TruncationMode) -> list[int]:
    """The places in ``whole`` of the tokens ``kept``.

    They are one stretch, at the side that ``mode`` names where several would do; or the two ends of ``whole``, as of an
    encoder's prompt, which keeps its special tokens.

    Args:
        whole: [n] token ids.
        kept: [m] those that truncation left, in order.
        mode: which side was kept.

    Raises:
        ValueError: ``kept`` is nothing of this kind.

    >>> kept_places([5, 5, 5, 6], [5, 5], "keep_start"), kept_places([6, 5, 5, 5], [5, 5], "keep_end")
    ([0, 1], [2, 3])
    >>> kept_places([5, 6, 7, 2], [5, 2], "keep_start")
    [0, 3]
    """
    whole, kept = [*whole], [*kept]
    surplus, length = len(whole) - len(kept), len(kept)
    from_the_start = mode == "keep_start"
    for begin in range(surplus + 1) if from_the_start else range(surplus, -1, -1):
        if whole[begin : begin + length] == kept:
            return [*range(begin, begin + length)]
    for head in range(length, -1, -1) if from_the_start else range(length + 1):
        if whole[:head] == kept[:head] and whole[head + surplus :] == kept[head:]:
            return [*range(head), *range(head + surplus, len(whole))]
    raise ValueError("These tokens are no stretch of the sequence, and not its two ends.")
