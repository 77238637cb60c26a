"""A hundred steps on real preference data: prefopt, with its default layout, follows TRL's loss step by step.

With every change it is a quarter of them; all with ``make reliability``.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from datasets import Dataset
from parity_harness import Library, build
from scale import scaled
from transformers import AutoTokenizer, PreTrainedTokenizerBase

STEPS = scaled(25, 100)
BATCH = 2
MOVED = scaled(0.05, 0.3)
"""By the loss, nats: hundreds of tolerances, or thousands."""
TOLERANCE = 1e-4
"""Nats, float32, at every step. The two sum in other orders, and AdamW, which divides by the size of a gradient, makes
more of it. Measured: 3e-5 (DPO), 5e-6 (SimPO)."""

SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": BATCH,
    "optim": "adamw_torch",
    "learning_rate": 5e-5,
    "train_sampling_strategy": "random",
    "max_length": 512,
}
"""AdamW, its linear schedule and clipping at 1 as by default; a learning rate at which so small a model learns."""
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("dpo", {"beta": 0.1}),
    "simpo": ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0}),
}


@pytest.fixture(scope="module")
def model_path(shared: Path) -> str:
    return str(shared / "models" / "stories260K")


@pytest.fixture(scope="module")
def tokenizer(model_path: str) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture(scope="module")
def rows(shared: Path, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Pairs that both libraries take as they are: nothing empty, nothing equal, nothing to cut."""
    lines = (shared / "data" / "ultrafeedback" / "train_clean.jsonl").read_text().splitlines()
    pairs = [{side: json.loads(line)[side] for side in ("prompt", "chosen", "rejected")} for line in lines]
    pairs = [pair for pair in pairs if sum(map(len, pair.values())) < 1500 and pair["chosen"] != pair["rejected"]]
    usable = [pair for pair in pairs if is_plain(pair, tokenizer)]
    assert len(usable) > 90  # about two epochs
    return Dataset.from_list(usable)


def is_plain(pair: Mapping[str, str], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Short, and without tokens that merge across the end of the prompt: TRL's CPO cuts those elsewhere."""
    prompt = tokenizer(pair["prompt"]).input_ids
    sequences = [tokenizer(pair["prompt"] + pair[side]).input_ids for side in ("chosen", "rejected")]
    return all(len(prompt) + 2 < len(ids) < 400 and ids[: len(prompt)] == prompt for ids in sequences)


def losses(library: Library, method: str, options: Mapping[str, Any], **arguments: Any) -> list[float]:
    """The loss of each step."""
    trainer = build(library, method, {**SETTINGS, **options}, **arguments)
    if library == "prefopt":
        assert trainer.layout.layout == "shared_prompt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.trl
@pytest.mark.parametrize("name", METHODS)
def test_the_loss_curve_is_trls(
    name: str, model_path: str, tokenizer: PreTrainedTokenizerBase, rows: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    method, options = METHODS[name]
    given = {"model": model_path, "processing_class": tokenizer, "train_dataset": rows}
    theirs = losses("trl", method, options, **given)
    ours = losses("prefopt", method, options, **given)
    assert len(ours) == len(theirs) == STEPS
    largest = max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
    first, last = mean(ours[:10]), mean(ours[-10:])
    with capsys.disabled():
        print(f"\n{name}: mean loss of ten steps {first:.3f} -> {last:.3f}, largest difference {largest:.1e}")
    assert largest < TOLERANCE
    assert abs(last - first) > MOVED
    if method == "dpo":
        assert ours[0] == pytest.approx(math.log(2), abs=1e-6)
