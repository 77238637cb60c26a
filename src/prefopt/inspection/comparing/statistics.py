"""What the log-probs of two models on the same pairs say: plain arithmetic on arrays.

Every number has its standard error over the pairs; that of a change is of the differences pair by pair, in which what
both models find hard or easy about a pair drops out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prefopt.data.report import named

__all__ = ["Figure", "Line", "PairScores", "check_finite", "lines", "worst_and_best"]


@dataclass(frozen=True)
class PairScores:
    """Log-probs that two models give the completions of P pairs; arrays of [P]."""

    rows: np.ndarray
    """Row number of each pair in the data set, from 0."""
    base_chosen: np.ndarray
    """log p of the completion, nats."""
    base_rejected: np.ndarray
    tuned_chosen: np.ndarray
    tuned_rejected: np.ndarray
    tokens_chosen: np.ndarray
    """Tokens that are scored."""
    tokens_rejected: np.ndarray

    @property
    def shift(self) -> np.ndarray:
        """[P] how far the tuned model moved the pair apart, nats: the difference of the two log-ratios (DPO's margin
        at beta = 1, Rafailov et al. 2023, arXiv:2305.18290, section 4)."""
        return (self.tuned_chosen - self.base_chosen) - (self.tuned_rejected - self.base_rejected)


@dataclass(frozen=True)
class Figure:
    """A mean over pairs and its standard error, which one pair does not have."""

    value: float
    error: float | None

    @classmethod
    def mean(cls, values: np.ndarray) -> Figure:
        """
        >>> Figure.mean(np.array([1.0, 3.0]))
        Figure(value=2.0, error=1.0)
        """
        values = np.asarray(values, dtype=np.float64)
        error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
        return cls(float(values.mean()), error)


@dataclass(frozen=True)
class Line:
    """A statistic of both models; those of the tuned model beside its base have no column of the base."""

    name: str
    unit: str
    base: Figure | None
    tuned: Figure
    change: Figure | None


def lines(scores: PairScores) -> list[Line]:
    """The statistics of P pairs, P at least 1."""
    base = per_pair(scores.base_chosen, scores.base_rejected, scores)
    tuned = per_pair(scores.tuned_chosen, scores.tuned_rejected, scores)
    found = [
        Line(name, unit, Figure.mean(base[name]), Figure.mean(tuned[name]), Figure.mean(tuned[name] - base[name]))
        for name, unit in UNITS.items()
    ]
    moved = Figure.mean((scores.shift > 0).astype(float))
    return [*found, Line("moved the right way", "share", None, moved, None)]


UNITS = {
    "accuracy": "share",
    "accuracy per token": "share",
    "margin": "nats",
    "log p(chosen)": "nats",
    "log p(rejected)": "nats",
    "log p(chosen) per token": "nats/token",
    "log p(rejected) per token": "nats/token",
    "longer one preferred": "share",
}


def per_pair(chosen: np.ndarray, rejected: np.ndarray, scores: PairScores) -> dict[str, np.ndarray]:
    """[P] of each statistic of one model, from its log-probs of both completions.

    ``accuracy`` compares sums of log-probs, as DPO's and CPO's scores do; ``per token`` means, as SimPO's (Meng et al.
    2024, arXiv:2405.14734, equation 4), which a longer completion does not lose by its length. A tie is no preference.
    The longer one is preferred by means; a pair of equal lengths counts half.
    """
    mean_chosen = chosen / np.maximum(scores.tokens_chosen, 1)
    mean_rejected = rejected / np.maximum(scores.tokens_rejected, 1)
    longer = np.sign(scores.tokens_chosen - scores.tokens_rejected)
    values = (
        chosen > rejected,
        mean_chosen > mean_rejected,
        chosen - rejected,
        chosen,
        rejected,
        mean_chosen,
        mean_rejected,
        0.5 * (1 + longer * np.sign(mean_chosen - mean_rejected)),
    )
    return {name: np.asarray(value, dtype=np.float64) for name, value in zip(UNITS, values, strict=True)}


def check_finite(base: str, tuned: str, scores: PairScores) -> None:
    """Hold the log-probs of both models against having a mean at all.

    Args:
        base, tuned: names of the two models.
        scores: of P pairs.

    Raises:
        ValueError: a log-prob is not finite; with the model and the first rows.
    """
    for model, sides in (  # the tuned one first: the base's are computed from its
        (tuned, (scores.tuned_chosen, scores.tuned_rejected)),
        (base, (scores.base_chosen, scores.base_rejected)),
    ):
        broken = scores.rows[~np.isfinite(sides).all(0)].tolist()
        if broken:
            raise ValueError(
                f"{model}: its log-probs of {len(broken)} of {len(scores.rows)} pairs are not finite "
                f"({named(broken)}). There is nothing to compare: look at the run that made it, or take an earlier "
                "checkpoint."
            )


def worst_and_best(scores: PairScores, number: int) -> tuple[list[int], list[int]]:
    """Places of the pairs that the tuned model moved furthest the wrong way, and the right way; none in both.

    Args:
        scores: of P pairs.
        number: of each, at most.
    """
    order = np.argsort(scores.shift, kind="stable")
    number = min(number, len(order) // 2)
    return order[:number].tolist(), order[::-1][:number].tolist()
