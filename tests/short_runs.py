"""Short runs of the trainers, for tests that compare two of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tiny_models import standard_rows, tiny_model, word_tokenizer

from prefopt import CPOConfig, CPOTrainer, DPOConfig, DPOTrainer, TPOConfig, TPOTrainer

TRAINERS: dict[str, tuple[Any, Any]] = {
    "dpo": (DPOTrainer, DPOConfig),
    "cpo": (CPOTrainer, CPOConfig),
    "tpo": (TPOTrainer, TPOConfig),
}
UNSET = object()
"""Leaves an option of `trainer` to the config's own default."""
OF_THE_TRAINER = (
    "eval_dataset",
    "compute_metrics",
    "preprocess_logits_for_metrics",
    "callbacks",
    "data_collator",
    "ref_model",
    "model_init",
)
"""Options of `trainer` that are arguments of the trainers; all others are the config's."""
TIMED = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"}


def trainer(
    folder: Path, method: str = "dpo", *, count: int = 40, rows: Any = None, peft_config: Any = None, **options: Any
) -> Any:
    """A trainer of a tiny model on ``count`` rows; every option of the config may be given."""
    make, config = TRAINERS[method]
    options = {
        "learning_rate": 1e-2,
        "max_steps": 6,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        **options,
    }
    options = {name: value for name, value in options.items() if value is not UNSET}
    arguments = {name: options.pop(name) for name in OF_THE_TRAINER if name in options}
    model = options.pop("model", None)
    if model is None and "model_init" not in arguments:
        model = tiny_model(seed=1)
    if peft_config is not None:
        arguments["peft_config"] = peft_config
    return make(
        model,
        args=config(str(folder), **options),
        train_dataset=dataset(count) if rows is None else rows,
        processing_class=word_tokenizer(),
        **arguments,
    )


def dataset(count: int = 40, seed: int = 0) -> Dataset:
    return Dataset.from_dict(standard_rows(count, seed=seed, gold=True))


def weights(model: Any) -> torch.Tensor:
    """All weights in one vector."""
    return torch.cat([parameter.detach().flatten().cpu() for parameter in model.parameters()])


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def log_rows(run: Any) -> list[dict[str, float]]:
    """What was logged, without times."""
    return [
        {k: v for k, v in row.items() if k not in TIMED and "runtime" not in k and "per_second" not in k}
        for row in run.state.log_history
    ]
