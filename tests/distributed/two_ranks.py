"""Run by every rank of a test: the cases of ``CASES``, whose results rank 0 writes to a file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "trainer"))

import torch
from accelerate.utils import gather_object
from encoder_decoders import tiny_encoder_decoder
from short_runs import UNSET, dataset, log_rows, trainer, weights
from test_vision import trainer as vision_trainer
from tiny_models import tiny_model
from transformers import TrainerCallback

from prefopt.reference import ModelReference
from prefopt.trainer import preparing

GLOBAL_BATCH = 4
SGD = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 5, "lr_scheduler_type": "constant", "use_cpu": True}
TWICE = {"gradient_accumulation_steps": 2, "loss_type": "sigmoid"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("dpo", {"count": 21, "loss_type": ["sigmoid", "sft"]}),
    "dpo-accumulating": ("dpo", {"count": 21, "gradient_accumulation_steps": 2}),
    "dpo-padded": ("dpo", {"count": 21, "layout": "padded"}),
    "dpo-checkpointing": ("dpo", {"count": 21, "gradient_checkpointing": True}),
    "dpo-lora": ("dpo", {"count": 21, "lora": True}),
    "dpo-precomputed": ("dpo", {"count": 21, "precompute_ref_log_probs": True}),
    "tr-dpo": ("dpo", {"count": 21, "sync_ref_model": True, "ref_model_sync_steps": 2}),
    "dpo-stream": ("dpo", {"stream": 21}),
    **{f"budget-{tokens}": ("dpo", {"count": 21, "tokens_per_batch": tokens, **TWICE}) for tokens in (1, 60, 10_000)},
    "budget-stream": ("tpo", {"stream": 21, "tokens_per_batch": 60, **TWICE}),
    "budget-precomputed": ("dpo", {"count": 21, "tokens_per_batch": 60, "precompute_ref_log_probs": True}),
    "aot": ("dpo", {"count": 21, **TWICE, "loss_type": ["aot", "aot_unpaired", "sft"]}),
    "budget-aot": ("dpo", {"count": 21, **TWICE, "tokens_per_batch": 60, "loss_type": "aot"}),
    "bco-shift": ("dpo", {"count": 21, **TWICE, "loss_type": "bco_pair", "bco_shift": True, "beta": 0.3}),
    "cpo": ("cpo", {"count": 21, "loss_type": "simpo", "cpo_alpha": 0.5}),
    "tpo": ("tpo", {"count": 21}),
    **{f"{method}-numbers": (method, {"numbers": 21, **TWICE}) for method in ("dpo", "tpo")},
    "dpo-rankings": ("dpo", {"rankings": 21, "num_completions": 3, **TWICE}),
    "compiled": ("dpo", {"count": 21, "torch_compile_backend": "eager"}),
    "room": ("dpo", {"count": 21, "free": (1e12, 1e12)}),
    "room on one rank": ("dpo", {"count": 21, "free": (1e12, 1e4)}),
    "experts": ("cpo", {"count": 21, "family": "qwen3_moe", "router_aux_loss_coef": 0.0}),
    "encoder-decoder": ("dpo", {"count": 21, "kind": "t5"}),
    "encoder-decoder-lora": ("cpo", {"count": 21, "kind": "bart", "lora": True}),
    "encoder-decoder-budget": ("tpo", {"count": 21, "kind": "bart", "tokens_per_batch": 90, **TWICE}),
    "an unused weight": ("dpo", {"count": 21, "unused": True}),
    "a static graph": ("dpo", {"count": 21, "ddp_static_graph": True}),
    "a search asked for": ("dpo", {"count": 21, "ddp_find_unused_parameters": True}),
    "images": ("dpo", {"images": True, "tokens_per_batch": 1}),
    "images-checkpointing": ("tpo", {"images": True, "gradient_checkpointing": True}),
}
EVALUATED = {
    **{str(count): {"count": count} for count in (1, 2, 3, 5, 9)},
    "5-numbers": {"count": 5, "numbers": True},
    "9-budget": {"count": 9, "per_device_eval_batch_size": 4, "tokens_per_batch": 60},
    "1-logits": {"count": 1, "full_logits_for_metrics": True},
    **{
        f"nine-{method}-{size}": {"count": 9, "method": method, "per_device_eval_batch_size": size}
        for method in ("dpo", "cpo", "tpo")
        for size in (1, 2, 4, 9)
    },
    "9-aot": {"count": 9, "loss_type": ["aot", "aot_unpaired"]},
}


def run_case(folder: Path, method: str, options: dict[str, Any]) -> dict[str, Any]:
    options = dict(options)
    if options.pop("lora", False):
        from peft import LoraConfig

        torch.manual_seed(3)
        options["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    if count := options.pop("stream", 0):
        options["rows"] = dataset(count).to_iterable_dataset()
    if count := options.pop("numbers", 0):
        options["rows"] = numbered(count)
    if count := options.pop("rankings", 0):
        options["rows"] = ranked(count)
    if free := options.pop("free", ()):
        options["gradient_checkpointing"] = UNSET
        preparing.free_bytes = lambda device, num_processes: free[int(os.environ.get("RANK", "0"))]
    if family := options.pop("family", None):
        options["model"] = tiny_model(family, seed=1)
    expected = options.get("layout", "shared_prompt")
    if kind := options.pop("kind", None):
        options["model"], expected = tiny_encoder_decoder(kind, seed=1), "encoder_decoder"
    if options.pop("unused", False):
        options["model"] = tiny_model(seed=1)
        options["model"].unused = torch.nn.Parameter(torch.ones(3))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    options = {"per_device_train_batch_size": GLOBAL_BATCH // world, **SGD, **options}
    make = vision_trainer if options.pop("images", False) else trainer
    run = make(folder, method, **options)
    assert run.layout.layout == expected
    run.train()
    decided = {"checkpointing": run.args.gradient_checkpointing}
    if world > 1:
        assert type(run.model_wrapped).__name__ == "DistributedDataParallel"
        decided["search"] = run.model_wrapped.find_unused_parameters
    return {"weights": weights(run.model).double().tolist(), "log": log_rows(run), "decided": decided}


def numbered(count: int, seed: int = 0) -> Any:
    """Rows with weights, some of them 0, and margins."""
    numbers = {"weight": [0.5 * (row % 4) for row in range(count)], "margin": [row / count for row in range(count)]}
    rows = dataset(count, seed=seed)
    for column, values in numbers.items():
        rows = rows.add_column(column, values)  # type: ignore[call-arg]
    return rows


def ranked(count: int) -> Any:
    """Rows of two and of three completions, best to worst."""
    sides = [[row["chosen"], row["rejected"], row["reference"]] for row in dataset(count)]
    completions = [side[: 2 + row % 2] for row, side in enumerate(sides)]
    return dataset(count).select_columns(["prompt"]).add_column("completions", completions)  # type: ignore[call-arg]


def evaluate(folder: Path, *, count: int, numbers: bool = False, **options: Any) -> dict[str, float]:
    """Metrics of ``count`` rows before any training, how many pairs ``compute_metrics`` saw, in which order, and the
    rows of the worst and best pairs, which are all rows where they are so few."""
    seen: list[Any] = []
    kept: list[Any] = []
    run = trainer(
        folder,
        eval_dataset=numbered(count, seed=5) if numbers else dataset(count, seed=5),
        use_cpu=True,
        compute_metrics=lambda prediction: seen.append(prediction) or {},
        **{"per_device_eval_batch_size": 2, **options},
    )
    if run.is_world_process_zero():
        run.record = SimpleNamespace(add=lambda row: None, add_pairs=lambda step, name, pairs: kept.extend(pairs))
    metrics = {k: v for k, v in run.evaluate().items() if "runtime" not in k and "per_second" not in k}
    rows = sorted(pair["row"] for pair in kept)
    return {**metrics, "order": seen[0].predictions.logps_chosen.tolist(), "rows": rows}  # type: ignore[dict-item]


def remembered(folder: Path) -> dict[str, Any]:
    """How many micro-batches the reference of each rank scores: in every epoch of a run, and in the runs after it.

    The nodes of a cluster may have a cache each: of what the first run wrote, in the last two only one rank knows.
    """
    count, options = 9, {"max_steps": -1, "num_train_epochs": 3}  # the last step of an epoch has a dummy
    asked: list[int] = [0]

    class Epochs(TrainerCallback):
        def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
            asked.append(0)

    def counted(self: ModelReference, batch: Any) -> Any:
        asked[-1] += 1
        return original(self, batch)

    original, ModelReference.__call__ = ModelReference.__call__, counted
    results: dict[str, Any] = {}
    first, rank = folder / "first", int(os.environ.get("RANK", "0"))
    for name, cache, more in (
        ("epochs", first, {}),
        ("second run", first, {"beta": 0.3}),
        ("rank 0 knows", first if rank == 0 else folder / "none", {"precompute_ref_log_probs": True}),
        ("rank 1 knows", first if rank == 1 else folder / "none", {"precompute_ref_log_probs": True}),
    ):
        os.environ["PREFOPT_CACHE"] = str(cache)
        asked[:] = [0]
        result = run_case(folder, "dpo", {"count": count, "callbacks": [Epochs()], **options, **more})
        results[name] = {**result, "asked": gather_object([asked[:3]])}
    ModelReference.__call__ = original
    os.environ["PREFOPT_CACHE"] = "off"
    return results


def main(folder: Path) -> None:
    results: dict[str, Any] = {name: run_case(folder, *case) for name, case in CASES.items()}
    results |= {f"evaluate-{name}": evaluate(folder, **options) for name, options in EVALUATED.items()}
    results |= remembered(folder / f"caches-{os.environ.get('WORLD_SIZE', '1')}")
    if int(os.environ.get("RANK", "0")) == 0:
        world = os.environ.get("WORLD_SIZE", "1")
        (folder / f"results-{world}.json").write_text(json.dumps(results))
