"""How well a model does what the requests say; independent of the engine that trains it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.quickstart.task import check

__all__ = ["Measured", "generate", "measure", "sum_logps"]

_BATCH_SIZE = 64
_Row = TypeVar("_Row")


@dataclass(frozen=True)
class Measured:
    """A model on a preference set.

    Attributes:
        accuracy: share of rows in which log p(chosen) > log p(rejected), sums over tokens, no reference; in [0, 1].
        pass_rate: share of rows in which the model's own answer is what was asked for; in [0, 1].
        chosen_logp, rejected_logp: means over rows of the two log-probs, nats.
        answers: the model's own answer to each row's prompt.
    """

    accuracy: float
    pass_rate: float
    chosen_logp: float
    rejected_logp: float
    answers: tuple[str, ...]


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> Measured:
    """The figures of a model on rows of `prompt`, `chosen`, `rejected`."""
    prompts = list(rows["prompt"])
    chosen = sum_logps(model, tokenizer, prompts, list(rows["chosen"]))
    rejected = sum_logps(model, tokenizer, prompts, list(rows["rejected"]))
    answers = generate(model, tokenizer, prompts)
    passed = [check(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    return Measured(
        accuracy=(chosen > rejected).float().mean().item(),
        pass_rate=sum(passed) / len(passed),
        chosen_logp=chosen.mean().item(),
        rejected_logp=rejected.mean().item(),
        answers=answers,
    )


@torch.no_grad()
def sum_logps(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], completions: Sequence[str]
) -> Tensor:
    """log p(completion and EOS | prompt) of each row, a sum over tokens in nats.

    Returns:
        [rows], on the CPU.
    """
    model.eval()
    encoded = [_encode(tokenizer, *row) for row in zip(prompts, completions, strict=True)]
    sums = []
    for batch in _batches(encoded):
        ids, is_completion = (_padded(rows).to(model.device) for rows in zip(*batch, strict=True))
        # Padding is on the right and 0: causal attention keeps it from every token that counts.
        logps = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
        token_logps = logps.gather(-1, ids[:, 1:, None]).squeeze(-1)
        sums.append((token_logps * is_completion[:, 1:]).sum(-1).cpu())
    return torch.cat(sums)


@torch.no_grad()
def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int = 32
) -> tuple[str, ...]:
    """The likeliest answer, token by token, to each prompt."""
    model.eval()
    answers: list[str] = []
    for batch in _batches(prompts):
        inputs = tokenizer(batch, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        inputs.pop("token_type_ids", None)
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)  # type: ignore[operator]
        answers += tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return tuple(answers)


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Token ids, and 1 on those of the completion."""
    prompt_ids = tokenizer(prompt)["input_ids"]
    completion_ids = [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return prompt_ids + completion_ids, [0] * len(prompt_ids) + [1] * len(completion_ids)


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])


def _batches(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    for start in range(0, len(rows), _BATCH_SIZE):
        yield list(rows[start : start + _BATCH_SIZE])
