"""Rows that say the same, by the keys of what they say."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from prefopt.inspection.statistics.facts import RowFacts
from prefopt.inspection.statistics.result import Duplicates
from prefopt.inspection.statistics.sketches import alike

__all__ = ["find_duplicates"]


def find_duplicates(facts: Sequence[RowFacts]) -> Duplicates:
    """The groups of rows with the same, nearly the same, or exchanged content."""
    same = groups((fact.pair, fact.row) for fact in facts)
    repeated = {row for group in same for row in group[1:]}
    different = [fact for fact in facts if fact.row not in repeated]
    near = alike(np.stack([fact.sketch for fact in different])) if different else []
    return Duplicates(
        pairs=tuple(same),
        near=tuple(tuple(different[place].row for place in group) for group in near),
        prompts=tuple(groups((fact.prompt, fact.row) for fact in facts)),
        contradictory=tuple(contradictions(facts)),
    )


def groups(keyed: Iterable[tuple[Hashable, int]]) -> list[tuple[int, ...]]:
    """The rows of each key that several have, in the order of the first ones.

    >>> groups([("a", 0), ("b", 1), ("a", 2)])
    [(0, 2)]
    """
    rows: dict[Hashable, list[int]] = {}
    for key, row in keyed:
        rows.setdefault(key, []).append(row)
    return [tuple(found) for found in rows.values() if len(found) > 1]


def contradictions(facts: Sequence[RowFacts]) -> list[tuple[int, ...]]:
    """The rows of each pair of completions that is preferred both ways; identical completions contradict nothing."""
    unequal = [fact for fact in facts if fact.pair != fact.exchanged]
    both_ways = {fact.pair for fact in unequal} & {fact.exchanged for fact in unequal}
    keyed = ((min(fact.pair, fact.exchanged), fact.row) for fact in unequal if fact.pair in both_ways)
    return groups(keyed)
