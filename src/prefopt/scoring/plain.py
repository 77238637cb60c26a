"""The oracle: scores from the model's own full logits. Slow and simple; every faster scorer is compared with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefopt.scoring.encoder_decoder import predicting_ids, whole_inputs
from prefopt.scoring.forward import innermost
from prefopt.scoring.tokens import stats_of_logits
from prefopt.types import PreferenceBatch, Scores, Statistic

__all__ = ["full_logits", "plain_scores", "target_labels"]


def full_logits(model: PreTrainedModel | Any, batch: PreferenceBatch) -> Tensor:
    """[R, T, V] logits of every position, with the model's own transforms; those of an adapter's virtual tokens not."""
    inputs = batch.model_inputs
    logits = model(**whole_inputs(innermost(model), inputs), use_cache=False).logits
    return logits[:, -predicting_ids(inputs).shape[1] :]


def target_labels(batch: PreferenceBatch) -> Tensor:
    """[R, T] the scored tokens as transformers' labels, -100 elsewhere.

    Where prompt and completion are one row, a token stands one place after the logits that predict it; the labels of a
    decoder stand at the logits.
    """
    ids = predicting_ids(batch.model_inputs)
    labels = torch.full_like(ids, -100).flatten()
    labels[batch.predict_from + int("labels" not in batch.model_inputs)] = batch.targets
    return labels.view(ids.shape)


def plain_scores(
    model: PreTrainedModel | Any, batch: PreferenceBatch, statistics: frozenset[Statistic] = frozenset()
) -> Scores:
    """The scores of a batch, from [R, T, V] logits."""
    logits = full_logits(model, batch)
    rows = logits.reshape(-1, logits.shape[-1])[batch.predict_from]
    return Scores(stats_of_logits(rows, batch.targets, statistics))
