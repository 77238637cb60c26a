"""Log-probs of completions in float64 from one plain forward pass per sequence: neither library takes part in it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Completion:
    """The scored tokens of one completion, float64."""

    logps: Tensor
    """[n] log-probability of each token, nats."""
    log_sum_sq: Tensor
    """[n] log of the sum of squared probabilities."""
    mean_logits: Tensor
    """[n] mean of the logits over the vocabulary."""

    @property
    def log_weight(self) -> float:
        """Log of WPO's weight: the mean over tokens of log p - log sum p^2."""
        return float((self.logps - self.log_sum_sq).mean())


def score(model: PreTrainedModel, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> Completion:
    """Score ``completion_ids`` after ``prompt_ids`` with a float64 copy of the model."""
    double = copy.deepcopy(model).double().eval()
    ids = torch.tensor([[*prompt_ids, *completion_ids]])
    with torch.no_grad():
        logits = double(input_ids=ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1]
    logps = logits.log_softmax(-1)
    chosen = logps.gather(-1, torch.tensor(completion_ids)[:, None])[:, 0]
    return Completion(chosen, torch.logsumexp(2 * logps, -1), logits.mean(-1))


def score_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: Mapping[str, Sequence[str]],
    *,
    pairs: int | None = None,
) -> dict[str, list[Completion]]:
    """Score every completion column of plain-text rows: EOS once at the end, the prompt as the tokenizer renders it."""
    scores: dict[str, list[Completion]] = {}
    for column in set(rows) - {"prompt"}:
        scores[column] = []
        for prompt, completion in list(zip(rows["prompt"], rows[column], strict=True))[:pairs]:
            prompt_ids = tokenizer(prompt)["input_ids"]
            ids = tokenizer(prompt + completion + tokenizer.eos_token)["input_ids"]
            scores[column].append(score(model, prompt_ids, ids[len(prompt_ids) :]))
    return scores


def sums(completions: Sequence[Completion]) -> Tensor:
    """[P] log p(y), nats."""
    return torch.stack([completion.logps.sum() for completion in completions])


def lengths(completions: Sequence[Completion]) -> Tensor:
    """[P] scored tokens."""
    return torch.tensor([len(completion.logps) for completion in completions], dtype=torch.float64)


def token_mean(completions: Sequence[Completion]) -> float:
    """Mean of -log p over all tokens of all completions."""
    return -float(torch.cat([completion.logps for completion in completions]).mean())
