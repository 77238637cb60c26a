"""Run by every rank of a test: the cases of ``CASES``, whose results rank 0 writes to a file.

python -m torch.distributed.run --nproc_per_node 2 tests/distributed/two_ranks.py FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "trainer")]

import torch  # noqa: E402
from runs import dataset, log_rows, trainer, weights  # noqa: E402

GLOBAL_BATCH = 4
SGD = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 5, "lr_scheduler_type": "constant", "use_cpu": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("dpo", {"count": 21, "loss_type": ["sigmoid", "sft"]}),
    "dpo-accumulating": ("dpo", {"count": 21, "gradient_accumulation_steps": 2}),
    "dpo-padded": ("dpo", {"count": 21, "layout": "padded"}),
    "dpo-checkpointing": ("dpo", {"count": 21, "gradient_checkpointing": True}),
    "dpo-lora": ("dpo", {"count": 21, "lora": True}),
    "dpo-precomputed": ("dpo", {"count": 21, "precompute_ref_log_probs": True}),
    "tr-dpo": ("dpo", {"count": 21, "sync_ref_model": True, "ref_model_sync_steps": 2}),
    "dpo-stream": ("dpo", {"stream": 21}),
    "cpo": ("cpo", {"count": 21, "loss_type": "simpo", "cpo_alpha": 0.5}),
    "tpo": ("tpo", {"count": 21}),
    **{f"rows-{count}": ("dpo", {"count": count, "max_steps": 2}) for count in (1, 2, 3, 5, 6, 7)},
}
EVALUATED = (1, 2, 3, 5, 9)


def run_case(folder: Path, method: str, options: dict[str, Any]) -> dict[str, Any]:
    options = dict(options)
    if options.pop("lora", False):
        from peft import LoraConfig

        torch.manual_seed(3)
        options["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    if count := options.pop("stream", 0):
        options["rows"] = dataset(count).to_iterable_dataset()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    options = {"per_device_train_batch_size": GLOBAL_BATCH // world, **SGD, **options}
    run = trainer(folder, method, **options)
    run.train()
    if world > 1:
        assert type(run.model_wrapped).__name__ == "DistributedDataParallel"
    return {"weights": weights(run.model).double().tolist(), "log": log_rows(run)}


def evaluate(folder: Path, count: int) -> dict[str, float]:
    """Metrics of ``count`` rows before any training, and how many pairs ``compute_metrics`` saw, in which order."""
    seen: list[Any] = []
    run = trainer(
        folder,
        eval_dataset=dataset(count, seed=5),
        per_device_eval_batch_size=2,
        use_cpu=True,
        compute_metrics=lambda prediction: seen.append(prediction) or {},
    )
    metrics = {k: v for k, v in run.evaluate().items() if "runtime" not in k and "per_second" not in k}
    return {**metrics, "order": seen[0].predictions.logps_chosen.tolist()}  # type: ignore[dict-item]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {name: run_case(folder, *case) for name, case in CASES.items()}
    results |= {f"evaluate-{count}": evaluate(folder, count) for count in EVALUATED}
    if int(os.environ.get("RANK", "0")) == 0:
        world = os.environ.get("WORLD_SIZE", "1")
        (folder / f"results-{world}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
