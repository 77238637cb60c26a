"""One side of a comparison, in a process of its own: trains some steps and prints a line of JSON.

python benchmarks/side.py '{"library": "prefopt", "workload": "dpo", ...}'
"""

from __future__ import annotations

import copy
import gc
import json
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from workload import SHAPES, WORKLOADS, Workload, make_model, make_rows


def main() -> None:
    settings = json.loads(sys.argv[1])
    print("RESULT " + json.dumps(run(**settings)), flush=True)


def run(
    *,
    library: str,
    workload: str,
    data: str,
    tokenizer: str,
    steps: int,
    warmup: int = 1,
    epochs: int = 1,
    threads: int = 2,
    device: str = "cpu",
    shape: str = "small",
    dtype: str = "float32",
    options: dict[str, Any] | None = None,
    profile: str | None = None,
) -> dict[str, Any]:
    """Seconds of each timed step, pairs a step, and the peak memory of a step above what lies between steps.

    Args:
        library: ``prefopt`` or ``trl``.
        workload: a name of `WORKLOADS`.
        data: JSONL file of rows.
        tokenizer: folder.
        steps: timed steps, after ``warmup``; of each epoch.
        epochs: passes over the same rows; only the last is timed.
        threads: of torch on the CPU.
        shape: a name of `SHAPES`.
        dtype: of the weights; bfloat16 also turns autocast on.
        options: of the library's config.
        profile: write a table of operators to this file instead of timing.
    """
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # saturated sigmoids make denormals, which slow a CPU tenfold
    kind, clock = WORKLOADS[workload], Clock(device)
    processing_class = AutoTokenizer.from_pretrained(tokenizer)
    rows = make_rows(kind, Path(data), processing_class, (steps + warmup) * kind.pairs_per_step)
    config = {
        **{"num_train_epochs": epochs, "use_cpu": device == "cpu", "bf16": dtype == "bfloat16"},
        **{**dict(kind.options), **(options or {})},
    }
    trainer = make_trainer(
        library,
        kind,
        make_model(SHAPES[shape], dtype=dtype, device=device),
        config,
        train_dataset=Dataset.from_list(rows),
        processing_class=processing_class,
        callbacks=[clock],
    )
    if profile is not None:
        return profiled(trainer, profile)
    gc.collect()
    trainer.train()
    counted = clock.seconds[-steps:]
    return {
        "seconds": counted,
        "pairs": kind.pairs_per_step,
        "cpu_seconds": clock.cpu_seconds[-steps:],
        "pairs_per_second": len(counted) * kind.pairs_per_step / sum(counted),
        "peak_bytes": max(clock.peaks[-steps:]),
        "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def make_trainer(library: str, kind: Workload, model: Any, config: dict[str, Any], **options: Any) -> Any:
    config_class, trainer_class = classes(library, kind.method)
    args = config_class(
        output_dir="/tmp/prefopt-benchmark",
        per_device_train_batch_size=kind.pairs_per_step,
        max_length=kind.max_length,
        logging_steps=10,
        save_strategy="no",
        train_sampling_strategy="sequential",  # every epoch the same steps
        report_to="none",
        disable_tqdm=True,
        **config,
    )
    if library == "trl" and kind.method == "dpo":
        options["ref_model"] = copy.deepcopy(model)  # TRL would load it from the model's path, and this one has none
    return trainer_class(model, args=args, **options)


def classes(library: str, method: str) -> tuple[Any, Any]:
    modules = {"prefopt": "prefopt", "trl": "trl" if method == "dpo" else f"trl.experimental.{method}"}
    module = import_module(modules[library])
    return getattr(module, f"{method.upper()}Config"), getattr(module, f"{method.upper()}Trainer")


class Clock(TrainerCallback):
    """Times optimizer steps, and takes the peak of memory within each above what is held between two."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.peaks: list[int] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.held = reset_peak(self.device)
        self.start, self.cpu_start = time.perf_counter(), time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        peak = peak_memory(self.device)
        self.seconds.append(time.perf_counter() - self.start)
        self.cpu_seconds.append(time.process_time() - self.cpu_start)
        self.peaks.append(peak - self.held)


def reset_peak(device: str) -> int:
    """Start a new peak; the bytes held now."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak_memory(device: str) -> int:
    if device != "cpu":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return status("VmHWM")


def status(name: str) -> int:
    """A field of the process's status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def profiled(trainer: Any, path: str) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as record:
        trainer.train()
    Path(path).write_text(record.key_averages().table(sort_by="self_cpu_time_total", row_limit=40))
    return {}


if __name__ == "__main__":
    main()
