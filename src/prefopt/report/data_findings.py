"""What is known of the data: rows that were skipped or cut, and samples that grew."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from prefopt.report.findings import Finding, Run

__all__ = ["data_findings", "sample_findings"]

IDENTICAL, IDENTICAL_BAD = 0.05, 0.5
"""Share of identical pairs: they teach nothing, and one in twenty is more than the ties of honest annotators' data
(UltraFeedback's sample has 0.4 %); with half of them something in the making of the pairs is wrong."""
SKIPPED, SKIPPED_BAD = 0.05, 0.5
"""The same of rows that were skipped for another reason."""
TRUNCATED, TRUNCATED_BAD = 0.1, 0.5
"""Share of rows that were cut or lost to ``max_length``. A few long rows are usual and harmless; from one in ten on the
model learns from answers that end in the middle."""
DRIFT = 1.5
"""Factor of the median length of samples. SimPO's authors count growth of this order as length exploitation."""
MIN_SAMPLES = 5

IDENTICAL_REASONS = ("chosen equal to rejected",)
CUT_REASONS = (
    "no completion token left within max_length",
    "chosen equal to rejected within max_length",
    "images that do not fit within max_length",
)


def data_findings(run: Run) -> list[Finding]:
    """About the training set; nothing where it came prepared, or is a stream that has not been read."""
    train = run.known("data").get("train")
    rows = train.get("rows") if isinstance(train, Mapping) else None
    if not rows or not isinstance(train, Mapping):
        return []
    skipped = {reason: found["num"] for reason, found in (train.get("skipped") or {}).items()}
    identical = sum(skipped.pop(reason, 0) for reason in IDENTICAL_REASONS)
    cut = train.get("truncated", 0) + sum(skipped.pop(reason, 0) for reason in CUT_REASONS)
    return [*of_identical(identical, rows), *of_skipped(skipped, rows), *of_truncated(cut, rows)]


def of_identical(identical: int, rows: int) -> Iterator[Finding]:
    if identical >= IDENTICAL * rows:
        yield Finding(
            "identical pairs",
            "bad" if identical >= IDENTICAL_BAD * rows else "warn",
            None,
            f"In {identical:,} of {rows:,} rows ({identical / rows:.0%}) chosen and rejected are the same; they were "
            "skipped.",
            "Look at how the pairs are made: the same answer taken twice, or a column copied.",
        )


def of_skipped(skipped: Mapping[str, int], rows: int) -> Iterator[Finding]:
    num = sum(skipped.values())
    if num and num >= SKIPPED * rows:
        reasons = "; ".join(f"{count:,} x {reason}" for reason, count in skipped.items())
        yield Finding(
            "skipped rows",
            "bad" if num >= SKIPPED_BAD * rows else "warn",
            None,
            f"{num:,} of {rows:,} rows ({num / rows:.0%}) have nothing to learn from: {reasons}.",
            "`prefopt stats` shows them; mend the set, or take another column.",
        )


def of_truncated(cut: int, rows: int) -> Iterator[Finding]:
    if cut >= TRUNCATED * rows:
        yield Finding(
            "truncation",
            "bad" if cut >= TRUNCATED_BAD * rows else "warn",
            None,
            f"{cut:,} of {rows:,} rows ({cut / rows:.0%}) are longer than `max_length` and were cut or left out.",
            "Raise `max_length`; `prefopt stats` shows the share that is cut at several limits.",
        )


def sample_findings(run: Run) -> list[Finding]:
    """Length drift: how long the model's answers to the same prompts are, before training and now."""
    samples = run.facts.get("samples") or ()
    samples = [row for row in samples if isinstance(row.get("prompt"), str) and isinstance(row.get("policy"), str)]
    steps = sorted({row["step"] for row in samples})
    if len(steps) < 2:
        return []
    before, now = (lengths(samples, step) for step in (steps[0], steps[-1]))
    pairs = [(before[key], now[key]) for key in before if key in now]
    if len(pairs) < MIN_SAMPLES:
        return []
    first, last = (statistics.median(column) for column in zip(*pairs, strict=True))
    factor = last / max(first, 1.0)
    if 1 / DRIFT < factor < DRIFT:
        return []
    return [
        Finding(
            "length drift",
            "warn",
            steps[-1],
            f"The model's answers to the same {len(pairs)} prompts became {'longer' if factor > 1 else 'shorter'}: "
            f"median {first:,.0f} characters at step {steps[0]}, {last:,.0f} at step {steps[-1]}.",
            "Read the samples. Where length alone is rewarded: losses that take means over tokens (simpo, "
            "sigmoid_norm), `ld_alpha`, or pairs of equal lengths.",
        )
    ]


def lengths(samples: Any, step: int) -> dict[tuple[str, str], int]:
    """Set and prompt -> characters of the policy's answer."""
    return {(row.get("set", ""), row["prompt"]): len(row["policy"]) for row in samples if row["step"] == step}
