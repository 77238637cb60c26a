"""Runs that save on some engine, and runs that go on from there on another."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import torch
from engines import ENGINES, Results, engine_options, finished
from scale import LONG
from sharded import shard_on_cpu, whole
from short_runs import trainer
from tiny_models import tiny_model

GLOBAL_BATCH = 4
SAVED, LAST = 3, 5
"""The step of the checkpoint, at the end of the first epoch, and the last one."""
CASES: dict[str, dict[str, Any]] = {
    "full": {"tied": True, "fsdp_config": {"cpu_ram_efficient_loading": True}},
    "lora": {"lora": True},
    "experts": {
        **{"family": "qwen3_moe", "router_aux_loss_coef": 0.0},
        "fsdp_config": {"cpu_ram_efficient_loading": True},
    },
    "tr-dpo": {"sync_ref_model": True, "ref_model_sync_steps": 1},
    "sgd": {"optim": "sgd", "learning_rate": 0.05},
}
"""The experts' weights have other names on the disk than in the model; SGD's optimizer has no state."""


def ways(name: str) -> list[tuple[str, str]]:
    """The engine before and the one after, of a case: all nine pairs, or three that hold each engine on both sides."""
    number, engines = list(CASES).index(name), list(ENGINES)
    pairs = list(itertools.product(range(len(engines)), repeat=2))
    chosen = [(a, b) for a, b in pairs if LONG or (a + b) % len(engines) == number % len(engines)]
    return [(engines[before], engines[after]) for before, after in chosen]


def made(folder: Path, engine: str, **options: Any) -> Any:
    family, tied = options.pop("family", "llama"), options.pop("tied", False)
    if options.pop("lora", False):
        from peft import LoraConfig

        options["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    options |= engine_options(engine, **options.pop("fsdp_config", {}))
    torch.manual_seed(3)  # of a new adapter
    return trainer(
        folder,
        model=tiny_model(family, seed=1, tie_word_embeddings=tied),
        count=11,
        per_device_train_batch_size=GLOBAL_BATCH // ENGINES[engine],
        **{"max_steps": LAST, "learning_rate": 1e-4, "logging_steps": 2, **options},
    )


def saved(folder: Path, engine: str) -> Results:
    """Each case, with a checkpoint on the way."""
    saving = {"save_strategy": "steps", "save_steps": SAVED}
    return {
        f"{name}/{engine}": finished(made(folder / engine / name, engine, **options, **saving), engine)
        for name, options in CASES.items()
    }


def resumed(folder: Path, engine: str) -> Results:
    """Each case from the checkpoints of other engines, as `ways` says."""
    results = {}
    for name, options in CASES.items():
        for before in (before for before, after in ways(name) if after == engine):
            run = made(folder / f"{before}-{engine}" / name, engine, **options)
            checkpoint = folder / before / name / f"checkpoint-{SAVED}"
            results[f"{name}/{before}/{engine}"] = finished(run, engine, resume_from_checkpoint=str(checkpoint))
    return results


def on_two_nodes(folder: Path) -> None:
    """In each process, as if it were the only one of its machine: a disk of its own."""
    os.environ["LOCAL_RANK"] = "0"
    shard_on_cpu()
    own = folder / os.environ["RANK"]
    options = {"save_strategy": "steps", "save_steps": SAVED, "save_on_each_node": True}
    whole_run = made(own, "fsdp", **options)
    whole_run.train()
    resumed_run = made(own, "fsdp", **options)
    resumed_run.train(resume_from_checkpoint=str(own / f"checkpoint-{SAVED}"))
    assert whole(resumed_run.model.parameters()) == whole(whole_run.model.parameters())
