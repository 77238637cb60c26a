"""Which parameters a training run moved, and data sets in every container that users pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDatasetDict
from tiny_models import standard_rows
from torch import Tensor

ROWS = 17
"""Two whole batches of eight and one of a single pair in every epoch."""


def snapshot(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def unmoved(model: torch.nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names whose values are what they were; every name must still be there."""
    return {name for name, values in before.items() if torch.equal(model.get_parameter(name), values)}


def train_and_compare(trainer: Any) -> set[str]:
    """Train; the names of the parameters that did not move. The run ends with its summary in the log."""
    before = snapshot(trainer.model)
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] is not None
    return unmoved(trainer.model, before)


def pairs(count: int = ROWS, *, seed: int = 0, gold: bool = False) -> Dataset:
    return Dataset.from_dict(standard_rows(count, seed=seed, gold=gold))


CONTAINERS: dict[str, Callable[[Dataset], Any]] = {
    "Dataset": lambda data: data,
    "IterableDataset": lambda data: data.to_iterable_dataset(),
    "DatasetDict": lambda data: DatasetDict({"one": data, "two": data}),
    "IterableDatasetDict": lambda data: IterableDatasetDict(
        {"one": data.to_iterable_dataset(), "two": data.to_iterable_dataset()}
    ),
    "dict of Dataset": lambda data: {"one": data, "two": data},
    "dict of IterableDataset": lambda data: {"one": data.to_iterable_dataset(), "two": data.to_iterable_dataset()},
}


def check_prepared(eval_dataset: Any) -> None:
    """The trainer keeps the container: a set, or a mapping with the user's names, each set tokenised."""
    if isinstance(eval_dataset, dict):
        assert set(eval_dataset) == {"one", "two"}
        sets = list(eval_dataset.values())
    else:
        sets = [eval_dataset]
    for data in sets:
        assert "prompt_ids" in next(iter(data))


def check_losses(metrics: dict[str, float], container: str) -> None:
    """One loss, or one for each set under its name."""
    names = ["eval_loss"] if "ict" not in container else ["eval_one_loss", "eval_two_loss"]
    for name in names:
        assert metrics[name] > 0
