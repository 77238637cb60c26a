"""Run by every rank of a test: samples during a run, of whole models (DDP) and of divided ones (FSDP2), or alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from sharded import shard_on_cpu
from short_runs import dataset, trainer

CASES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp-lora": {"lora": True},
    "ddp-one-prompt": {"num_eval_samples": 1},
    "fsdp": {"fsdp": True},
    "fsdp-lora": {"fsdp": True, "lora": True},
}
"""Three prompts are shared by two ranks unevenly; one prompt leaves a rank without any."""


def samples(folder: Path, *, fsdp: bool = False, lora: bool = False, **options: Any) -> list[dict[str, Any]]:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if lora:
        from peft import LoraConfig

        torch.manual_seed(3)
        options["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    if fsdp and world > 1:
        options["fsdp"] = True
    run = trainer(
        folder,
        count=9,
        eval_dataset=dataset(5, seed=5),
        per_device_train_batch_size=4 // world,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=2,
        use_cpu=True,
        optim="sgd",
        learning_rate=0.3,
        generate_during_eval=True,
        eval_sample_tokens=5,
        **{"num_eval_samples": 3, **options},
    )
    run.train()
    run.evaluate(dataset(2, seed=6), metric_key_prefix="new")
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def main(folder: Path) -> None:
    shard_on_cpu()
    world = os.environ.get("WORLD_SIZE", "1")
    results = {name: samples(folder / world / name, **options) for name, options in CASES.items()}
    if int(os.environ.get("RANK", "0")) == 0:
        (folder / f"results-{world}.json").write_text(json.dumps(results))
