"""Run by every rank of a test: memory runs out, or a number is none, on one of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from short_runs import dataset, log_rows, trainer, weights
from transformers import TrainerCallback

from prefopt.trainer.guards.nonfinite import NonFiniteStepError

GLOBAL_BATCH = 8
SGD = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 3, "lr_scheduler_type": "constant", "use_cpu": True}
MEMORY: dict[str, tuple[int, dict[str, Any]]] = {
    "first forward pass": (0, {}),
    "second forward pass": (1, {}),
    "a loss of the whole step": (1, {"loss_type": "aot"}),
    "a budget": (0, {"tokens_per_batch": 60}),
}
"""Case -> forward pass of the policy, from 0, with which memory runs out in step 2; options."""


class FailAtStep(TrainerCallback):
    """``act`` before the second step, on the second rank; in a world of one process nothing fails."""

    def __init__(self, act: Any) -> None:
        self.act = act

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1 and args.process_index == 1:
            self.act()


def made(folder: Path, callback: Any, **options: Any) -> Any:
    world = int(os.environ.get("WORLD_SIZE", 1))
    per_device = {"per_device_train_batch_size": GLOBAL_BATCH // world // 2, "gradient_accumulation_steps": 2}
    return trainer(folder, rows=dataset(21), callbacks=[callback], **{**SGD, **per_device, **options})


def without_memory(folder: Path, at_pass: int, options: dict[str, Any]) -> dict[str, Any]:
    passes = [-1]

    def fail() -> None:
        original, passes[0] = run.model.forward, 0

        def forward(*args: Any, **kwargs: Any) -> Any:
            passes[0] += 1
            if passes[0] == at_pass + 1:
                run.model.forward = original
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return original(*args, **kwargs)

        run.model.forward = forward

    run = made(folder, FailAtStep(fail), **options)
    run.train()
    return {"weights": weights(run.model).tolist(), "log": log_rows(run), "parts": gather_object([run.train_cut.parts])}


def poisoned(folder: Path) -> dict[str, Any]:
    def act() -> None:
        run.model.lm_head.weight.register_hook(lambda gradient: gradient * float("nan"))

    def weight() -> None:
        with torch.no_grad():
            run.model.lm_head.weight[5] = float("nan")

    ends = []
    for poison in (weight, act):
        run = made(folder / poison.__name__, FailAtStep(poison))
        try:
            run.train()
            ends.append(None)
        except NonFiniteStepError as error:
            dumps = sorted(path.name for path in Path(str(error.folder)).iterdir())
            mine = [row for batch in run.last_step.micro_batches for row in batch.rows]
            ends.append({"message": str(error), "step": error.step, "rows": error.rows, "files": dumps, "own": mine})
    return {"ends": gather_object([ends])}


def main(folder: Path) -> None:
    results = {name: without_memory(folder / "out", *case) for name, case in MEMORY.items()}
    world = int(os.environ.get("WORLD_SIZE", 1))
    results["poisoned"] = poisoned(folder / f"poisoned-{world}")
    if int(os.environ.get("RANK", 0)) == 0:
        (folder / f"results-{world}.json").write_text(json.dumps(results))
