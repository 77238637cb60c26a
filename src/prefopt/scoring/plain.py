"""The oracle: scores from the model's own full logits. Slow and simple; every faster scorer is compared with it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from prefopt.scoring.tokens import stats_of_logits
from prefopt.types import PreferenceBatch, Scores, Statistic

__all__ = ["full_logits", "plain_scores"]


def full_logits(model: PreTrainedModel | Any, batch: PreferenceBatch) -> Tensor:
    """[R, T, V] logits of every position, with the model's own transforms."""
    return model(**batch.model_inputs, use_cache=False).logits


def plain_scores(
    model: PreTrainedModel | Any, batch: PreferenceBatch, statistics: frozenset[Statistic] = frozenset()
) -> Scores:
    """The scores of a batch, from [R, T, V] logits."""
    logits = full_logits(model, batch)
    rows = logits.reshape(-1, logits.shape[-1])[batch.predict_from]
    return Scores(stats_of_logits(rows, batch.targets, statistics))
