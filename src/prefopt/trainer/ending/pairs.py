"""The pairs that a model tells apart worst and best: found while a set is evaluated, kept as ``pairs.jsonl``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefopt.files import replace_file
from prefopt.step import StepResult
from prefopt.trainer.guards.pair_values import PairValues
from prefopt.types import PAIR, Branch, OptimizerStep, PreferenceBatch

__all__ = ["PAIRS", "Extremes", "ScoredPairs", "described_pairs", "write_pairs"]

PAIRS = "pairs.jsonl"
NUM_KEPT = 5
"""Pairs at each end."""
LONGEST = 4000
"""Characters of a text that are kept."""
NUM_PENDING = 64
"""Micro-batches whose numbers are left on the device before the host asks for them."""

KEPT = ("row", "prompt_ids", *(f"{branch}_ids" for branch in PAIR))
"""Of a prepared row; its images are not held until the numbers are asked for."""

Row = Mapping[str, Any]


class ScoredPairs(NamedTuple):
    """What a model says to the pairs of a micro-batch."""

    values: Tensor
    """[P, 4] rewards of chosen and rejected; log-probs of chosen and rejected, nats."""
    rows: Sequence[Row]
    """`KEPT` of the P prepared rows."""

    @classmethod
    def of(cls, result: StepResult, batch: PreferenceBatch, rows: Sequence[Row]) -> ScoredPairs:
        """Args:
        result: of the micro-batch.
        batch: the micro-batch; one that holds dummies alone gives no pairs.
        rows: that it was made of.
        """
        logps: Any = {branch: stats.sum_logps for branch, stats in result.policy.items()}
        return cls.made(result.terms.rewards, logps, batch, rows)

    @classmethod
    def of_step(cls, step: OptimizerStep, values: Sequence[PairValues]) -> list[ScoredPairs]:
        """Of the micro-batches of a step that were computed, ``values`` of each."""
        batches = zip(values, step.micro_batches, step.sources, strict=False)  # where it failed, they are fewer
        return [cls.made(own.terms.rewards, own.policy, batch, rows) for own, batch, rows in batches]

    @classmethod
    def made(
        cls, rewards: Mapping[Branch, Tensor], logps: Mapping[Branch, Tensor], batch: PreferenceBatch, rows: Any
    ) -> ScoredPairs:
        rows = [{name: row[name] for name in KEPT if name in row} for row in rows]
        columns = [of_one[branch].detach().float() for of_one in (rewards, logps) for branch in PAIR]
        values = torch.stack(columns, dim=1)
        return cls(values, rows) if batch.num_model_tokens else cls(values[:0], ())


class Scored(NamedTuple):
    """One pair on the host."""

    margin: float
    values: tuple[float, ...]
    row: Row


class Extremes:
    """The pairs with the lowest and the highest margins among all that are added; few are held at any time."""

    def __init__(self) -> None:
        self.pending: list[ScoredPairs] = []
        self.kept: list[Scored] = []
        """By rising margin."""

    def add(self, pairs: Sequence[ScoredPairs]) -> None:
        """Take in micro-batches."""
        self.pending.extend(pairs)
        if len(self.pending) >= NUM_PENDING:
            self.settle()

    def settle(self) -> list[Scored]:
        """The pairs at both ends of all so far, by rising margin; those whose margin is not finite are left out."""
        if self.pending:
            values = torch.cat([pairs.values for pairs in self.pending]).tolist()
            rows = [row for pairs in self.pending for row in pairs.rows]
            found = [Scored(v[0] - v[1], tuple(v), row) for v, row in zip(values, rows, strict=True)]
            self.kept = ends(self.kept + [scored for scored in found if math.isfinite(scored.margin)])
            self.pending.clear()
        return self.kept


def ends(scored: list[Scored]) -> list[Scored]:
    """The few with the lowest and the highest margins, by rising margin."""
    ordered = sorted(scored, key=lambda one: one.margin)
    return ordered if len(ordered) <= 2 * NUM_KEPT else ordered[:NUM_KEPT] + ordered[-NUM_KEPT:]


def described_pairs(extremes: Extremes, decode: Callable[[Sequence[int]], str]) -> list[dict[str, Any]]:
    """The pairs at both ends, with their text, by rising margin.

    Args:
        extremes: of a set, on this rank.
        decode: token ids -> text.
    """
    return [described(scored, decode) for scored in extremes.settle()]


def described(scored: Scored, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    names = ("reward_chosen", "reward_rejected", "logps_chosen", "logps_rejected")
    # a log-prob of minus infinity with a finite margin is possible, and is no number of JSON's
    numbers = {name: value if math.isfinite(value) else None for name, value in zip(names, scored.values, strict=True)}
    row = scored.row
    return {
        "row": row.get("row", -1),
        "margin": scored.margin,
        **numbers,
        **{f"tokens_{branch}": len(row[f"{branch}_ids"]) for branch in PAIR},
        "prompt": shortened(decode(row["prompt_ids"]), from_end=True),
        **{branch: shortened(decode(row[f"{branch}_ids"])) for branch in PAIR},
    }


def shortened(text: str, *, from_end: bool = False) -> str:
    """At most `LONGEST` characters: the beginning, or with ``from_end`` the end, and how many are left out."""
    if len(text) <= LONGEST:
        return text
    note = f"[{len(text) - LONGEST} characters left out]"
    return f"{note} {text[-LONGEST:]}" if from_end else f"{text[:LONGEST]} {note}"


def write_pairs(folder: Path, step: int, sets: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write ``pairs.jsonl``: a line for each pair, of each set the worst first.

    Args:
        folder: of the run.
        step: optimizer steps that the model had taken.
        sets: name -> pairs of all ranks, as `described_pairs` gives them.
    """
    lines = []
    for name, pairs in sets.items():
        ordered = sorted(pairs, key=lambda pair: pair["margin"])
        num_worst, num_best = min(NUM_KEPT, (len(ordered) + 1) // 2), min(NUM_KEPT, len(ordered) // 2)
        for end, chosen in (("worst", ordered[:num_worst]), ("best", ordered[::-1][:num_best])):
            lines += [json.dumps({"set": name, "step": step, "end": end, **pair}) for pair in chosen]
    replace_file(folder / PAIRS, "".join(f"{line}\n" for line in lines))
