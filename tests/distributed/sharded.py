"""Run by every rank of a test: the cases of ``CASES`` under FSDP2, or alone; rank 0 writes their results to a file."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, gather_object
from encoder_decoders import tiny_encoder_decoder
from short_runs import dataset, log_rows, trainer
from tiny_models import tiny_model
from torch import nn
from torch.distributed.tensor import DTensor

from prefopt import BEMACallback
from prefopt.reference.weights import reshard
from prefopt.scoring import capability

GLOBAL_BATCH = 4
COMMON = {
    "optim": "sgd",
    "learning_rate": 0.05,
    "max_steps": 3,
    "lr_scheduler_type": "constant",
    "use_cpu": True,
    "count": 11,
}


def positions(prediction: Any) -> dict[str, float]:
    """Of the rows whose logits are there."""
    return {"positions": float(sum(logits.shape[1] for logits in prediction.predictions.logits))}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("dpo", {}),
    "dpo-tied-checkpointing": ("dpo", {"tied": True, "gradient_checkpointing": True}),
    "dpo-accumulating": ("dpo", {"gradient_accumulation_steps": 2, "loss_type": ["sigmoid", "sft"]}),
    "dpo-lora": ("dpo", {"lora": True, "gradient_checkpointing": True}),
    "dpo-precomputed": ("dpo", {"precompute_ref_log_probs": True}),
    "dpo-experts": (
        "dpo",
        {  # the load-balancing loss is a function of a micro-batch
            "family": "qwen3_moe",
            "router_aux_loss_coef": 0.1,
            "micro_batches_of_a_rank": True,
            "per_device_eval_batch_size": 1,
        },
    ),
    "dpo-evaluated-before": ("dpo", {"eval_on_start": True}),
    "dpo-evaluated-alone": ("dpo", {"evaluate_first": True}),
    "dpo-rank-0-loads": ("dpo", {"tied": True, "fsdp_config": {"cpu_ram_efficient_loading": True}}),
    "tr-dpo": ("dpo", {"sync_ref_model": True, "ref_model_sync_steps": 2}),
    "tr-dpo-resumed": (
        "dpo",
        {  # an optimizer without a state cannot be loaded under FSDP2
            "optim": "adamw_torch",
            "learning_rate": 1e-4,
            "sync_ref_model": True,
            "ref_model_sync_steps": 1,
            "resume_from": 2,
        },
    ),
    "dpo-aot": ("dpo", {"loss_type": ["aot", "sft"], "gradient_accumulation_steps": 2}),
    "tr-dpo-lora": ("dpo", {"lora": True, "sync_ref_model": True, "ref_model_sync_steps": 1}),
    "tr-dpo-lora-given": (
        "dpo",
        {"lora": True, "given": True, "sync_ref_model": True, "ref_model_sync_steps": 1},
    ),
    "bema": ("dpo", {"bema": True}),
    "bema-lora-resumed": (
        "dpo",
        {"bema": True, "lora": True, "optim": "adamw_torch", "learning_rate": 1e-4, "resume_from": 2},
    ),
    "dpo-logits-of-one-row": ("dpo", {"eval_rows": 1, "full_logits_for_metrics": True, "compute_metrics": positions}),
    "encoder-decoder": ("dpo", {"kind": "t5"}),
    "encoder-decoder-lora": ("tpo", {"kind": "bart", "lora": True, "gradient_checkpointing": True}),
    "dpo-best": (
        "dpo",
        {  # the greatest loss of the evaluation is that after the first step
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": True,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            "tied": True,
        },
    ),
    "dpo-given": ("dpo", {"given": True}),
    "simpo": ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.0}),
    "tpo": ("tpo", {"tied": True}),
}


def shard_on_cpu() -> None:
    """Accelerate knows FSDP on accelerators only: without this, ``fsdp=True`` on gloo ranks is DDP, without a word."""
    original = AcceleratorState.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init  # type: ignore[method-assign]


def whole(weights: Iterable[torch.Tensor]) -> list[float]:
    """Weights that may be sharded, in one list."""
    tensors = [p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for p in weights]
    return torch.cat([tensor.flatten() for tensor in tensors]).double().tolist() if tensors else []


def is_sharded(model: nn.Module) -> bool:
    """Whether every weight is divided: FSDP2 keeps the head's whole after a forward pass, until it is told."""
    reshard(model)
    return all(isinstance(parameter, DTensor) for parameter in model.parameters())


def run_case(folder: Path, method: str, options: dict[str, Any]) -> dict[str, Any]:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    options = {"per_device_train_batch_size": GLOBAL_BATCH // world, **COMMON, **options}
    if options.pop("micro_batches_of_a_rank", False):
        options |= {"per_device_train_batch_size": GLOBAL_BATCH // 2, "gradient_accumulation_steps": 2 // world}
    family, tied = options.pop("family", "llama"), options.pop("tied", False)
    options["model"], layout = tiny_model(family, seed=1, tie_word_embeddings=tied), "shared_prompt"
    if kind := options.pop("kind", None):
        options["model"], layout = tiny_encoder_decoder(kind, seed=1), "encoder_decoder"
    if options.pop("lora", False):
        from peft import LoraConfig

        options["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    if options.pop("given", False):
        options["ref_model"] = tiny_model(family, seed=1)
    eval_rows, bema = options.pop("eval_rows", 5), []
    if options.pop("bema", False):
        bema = [BEMACallback(1, update_ref_model=True, ref_model_update_freq=1)]
        options["callbacks"] = bema
    evaluate_first = options.pop("evaluate_first", False)
    resume_from = options.pop("resume_from", 0)
    if resume_from:
        options |= {"save_strategy": "steps", "save_steps": resume_from}
    fsdp_config = options.pop("fsdp_config", {})
    if world > 1:
        options |= {"fsdp": True, "fsdp_config": fsdp_config}
    make = functools.partial(trainer, folder / str(world), method, eval_dataset=dataset(eval_rows, seed=5), **options)
    torch.manual_seed(3)  # of a new adapter
    run = make()
    assert run.layout.layout == layout
    assert not run.layout.reasons
    if evaluate_first:
        run.evaluate()
    run.train()
    if resume_from:
        again = tiny_model(family, seed=1, tie_word_embeddings=tied)
        torch.manual_seed(3)
        run = make(model=again)
        run.train(resume_from_checkpoint=str(folder / str(world) / f"checkpoint-{resume_from}"))
    reference = getattr(run, "ref_model", None)
    if world > 1:
        for model in (run.model, *([] if reference is None else [reference])):
            assert is_sharded(model)
    metrics = {k: v for k, v in run.evaluate().items() if "runtime" not in k and "per_second" not in k}
    return {
        "weights": whole(run.model.parameters()),
        "reference": [] if reference is None else whole(reference.parameters()),
        "moving": whole(run.moving_reference.weights().values()) if run.moving_reference else [],
        "average": [number for callback in bema for number in whole(callback.state_dict().values())],
        "log": log_rows(run)[: COMMON["max_steps"]],
        "metrics": metrics,
    }


def layouts_after_a_fault(folder: Path) -> list[str]:
    """Each rank's layout, where the trial of the main process alone finds something wrong with the shared one."""
    original, rank = capability.LAYOUTS["shared_prompt"], int(os.environ.get("RANK", "0"))

    def counted_on(*args: Any) -> Any:
        batch = original(*args)
        places = torch.arange(batch.model_inputs["input_ids"].shape[1])[None]
        return replace(batch, model_inputs={**batch.model_inputs, "position_ids": places})

    capability.LAYOUTS["shared_prompt"] = counted_on if rank == 0 else original
    sharded = {"fsdp": True} if int(os.environ.get("WORLD_SIZE", "1")) > 1 else {}
    run = trainer(folder, "dpo", **COMMON, **sharded)
    capability.LAYOUTS["shared_prompt"] = original
    return gather_object([run.layout.layout])


def main(folder: Path) -> None:
    shard_on_cpu()
    results: dict[str, Any] = {name: run_case(folder, *case) for name, case in CASES.items()}
    results["layouts"] = layouts_after_a_fault(folder)
    if int(os.environ.get("RANK", "0")) == 0:
        world = os.environ.get("WORLD_SIZE", "1")
        (folder / f"results-{world}.json").write_text(json.dumps(results))
