"""Pairs and samples of a run as a page shows them: few, and none longer than it may be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefopt.report.summary import count, figure_of, shown

__all__ = ["ShownPair", "ShownSample", "shown_pairs", "shown_samples"]

MOST_SETS = 4
MOST_PAIRS, MOST_SAMPLES = 5, 4
"""Of an evaluation set; pairs at each end."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class ShownPair:
    """A pair and what the model says to it."""

    heading: str
    prompt: str
    completions: Sequence[tuple[str, str, str]]
    """Of chosen and rejected: name, what the model says to it, text."""


@dataclass(frozen=True)
class ShownSample:
    """A prompt and what is said to it: name of who says it -> text."""

    heading: str
    prompt: str
    said: Mapping[str, str]


def sets_of(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(str(row.get("set")) for row in rows))[:MOST_SETS]


def shown_pairs(pairs: Sequence[Row], longest: int) -> list[tuple[str, list[ShownPair]]]:
    """A title and pairs, of each evaluation set the worst and the best.

    Args:
        pairs: of ``pairs.jsonl``.
        longest: characters of a text.
    """
    found = []
    for name in sets_of(pairs):
        for end, title in (("worst", "lowest margins"), ("best", "highest margins")):
            own = [pair for pair in pairs if pair.get("set") == name and pair.get("end") == end][:MOST_PAIRS]
            if own:
                of = "the last step" if name == "train" else f"{shown(name)} at step {own[0]['step']:,}"
                found.append((f"{title}, of {of}", [shown_pair(pair, longest) for pair in own]))
    return found


def shown_pair(pair: Row, longest: int) -> ShownPair:
    number = pair.get("row", -1)
    place = "row unknown" if number == -1 else f"row {shown(number)}"
    texts = {name: shown(pair.get(name) or "", longest) for name in ("prompt", "chosen", "rejected")}
    completions = [(side, facts_of(pair, side), texts[side]) for side in ("chosen", "rejected")]
    return ShownPair(f"margin {figure_of(pair.get('margin'))}, {place}", texts["prompt"], completions)


def facts_of(pair: Row, side: str) -> str:
    reward, logps = (figure_of(pair.get(f"{name}_{side}")) for name in ("reward", "logps"))
    return f"reward {reward}, log-prob {logps} nats, {count(pair.get(f'tokens_{side}'))} tokens"


def shown_samples(samples: Sequence[Row], longest: int) -> list[ShownSample]:
    """What the model said to the same prompts first and last.

    Args:
        samples: of ``samples.jsonl``.
        longest: characters of a text.
    """
    found = []
    for name in sets_of(samples):
        own = [sample for sample in samples if sample.get("set") == name]
        first, last = (end(sample["step"] for sample in own) for end in (min, max))
        before, after = ([sample for sample in own if sample["step"] == step][:MOST_SAMPLES] for step in (first, last))
        for number, (old, new) in enumerate(zip(before, after, strict=False), start=1):
            said = {} if first == last else {f"step {first:,}": old["policy"]}
            said |= {f"step {last:,}": new["policy"]}
            if new.get("reference") not in (None, old["policy"]):
                said |= {"reference": new["reference"]}
            said |= {"chosen, in the data": new["chosen"]}
            texts = {who: shown(text, longest) for who, text in said.items()}
            prompt = shown(new.get("prompt") or "", longest)
            found.append(ShownSample(f"{shown(name)}, prompt {number}", prompt, texts))
    return found
