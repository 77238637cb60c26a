"""Run by the ranks of a test: the cases of ``CASES`` under DeepSpeed ZeRO on the CPU, or alone without it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from short_runs import dataset, log_rows, trainer
from tiny_models import save_tiny, tiny_model

GLOBAL_BATCH = 4
COMMON = {
    "optim": "sgd",
    "learning_rate": 0.05,
    "max_steps": 3,
    "lr_scheduler_type": "constant",
    "count": 11,
}
STAGES = (1, 2, 3)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("dpo", {"loss_type": ["sigmoid", "sft"]}),
    "accumulating": ("dpo", {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}),
    "simpo": ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.5}),
    "tpo": ("tpo", {}),
    "whole-step": ("dpo", {"loss_type": ["aot", "sft"], "gradient_accumulation_steps": 2}),
    "lora": ("dpo", {"lora": True}),
    "given": ("dpo", {"given": True}),
    "by-name": ("dpo", {"by_name": True}),
    "precomputed": ("dpo", {"precompute_ref_log_probs": True}),
    "evaluated-before": ("dpo", {"eval_on_start": True}),
    "evaluated-alone": ("dpo", {"evaluate_first": True}),
    "tr-dpo": ("dpo", {"sync_ref_model": True, "ref_model_sync_steps": 2}),
    "resumed": ("dpo", {"optim": "adamw_torch", "learning_rate": 1e-4, "resume_from": 2}),
}


def refused(name: str, stage: int) -> bool:
    """No reference can follow weights that are in pieces without names."""
    return name == "tr-dpo" and stage == 3


def zero_on_cpu() -> None:
    """Accelerate knows DeepSpeed on accelerators only: without this each rank is a process that is alone."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
    PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_CPU)  # type: ignore[method-assign]


def whole_weights(model: Any) -> list[float]:
    import deepspeed

    parameters = list(model.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=hasattr(parameters[0], "ds_id")):
        return torch.cat([parameter.detach().flatten() for parameter in parameters]).double().tolist()


def run_case(folder: Path, stage: int, models: Iterator[Any], method: str, options: dict[str, Any]) -> dict[str, Any]:
    """One case.

    Args:
        folder: for files, with a saved model in ``model``.
        stage: of ZeRO; 0 is one process without DeepSpeed.
        models: to be trained, all alike, or to be the reference.
        method, options: of the trainer.
    """
    world = 2 if stage else 1
    options = {"per_device_train_batch_size": GLOBAL_BATCH // world, **COMMON, **options}
    evaluate_first, resume_from = options.pop("evaluate_first", False), options.pop("resume_from", 0)
    lora, given, by_name = (options.pop(name, False) for name in ("lora", "given", "by_name"))
    if lora:
        from peft import LoraConfig

        options["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    if stage:
        options["deepspeed"] = {
            "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
            "zero_allow_untested_optimizer": True,
            **dict.fromkeys(
                ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"
            ),
        }
    else:
        options["use_cpu"] = True
    if resume_from:
        options |= {"save_strategy": "steps", "save_steps": resume_from}

    def made() -> Any:
        torch.manual_seed(3)  # of a new adapter
        model = str(folder / "model") if by_name else next(models)
        own = {"ref_model": next(models)} if given else {}
        return trainer(folder / str(stage), method, model=model, eval_dataset=dataset(5, seed=5), **options, **own)

    run = made()
    if evaluate_first:
        run.evaluate()
    run.train()
    if resume_from:
        run = made()
        run.train(resume_from_checkpoint=str(folder / str(stage) / f"checkpoint-{resume_from}"))
    if stage:
        assert type(run.model_wrapped).__name__ == "DeepSpeedEngine"
        assert run.model_wrapped.zero_optimization_stage() == stage
    metrics = {k: v for k, v in run.evaluate().items() if "runtime" not in k and "per_second" not in k}
    return {"weights": whole_weights(run.model), "log": log_rows(run)[: COMMON["max_steps"]], "metrics": metrics}


def main(folder: Path, stage: int) -> None:
    if stage:
        zero_on_cpu()
    models = iter([tiny_model(seed=1) for _ in range(2 * len(CASES))])  # before ZeRO-3 makes all that are made empty
    results = {
        name: run_case(folder / name, stage, models, *case) for name, case in CASES.items() if not refused(name, stage)
    }
    if os.environ.get("RANK", "0") == "0":
        (folder / f"results-{stage}.json").write_text(json.dumps(results))


def prepare(folder: Path) -> None:
    for name in CASES:
        save_tiny(folder / name / "model", seed=1)
