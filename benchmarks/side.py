"""One side of a comparison, in a process of its own: trains some steps and prints a line of JSON.

python benchmarks/side.py '{"library": "prefopt", "workload": "dpo", ...}'
"""

from __future__ import annotations

import copy
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

from workload import SHAPES, WORKLOADS, make_model, make_rows


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
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback

    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # saturated sigmoids make denormals, which slow a CPU tenfold
    kind = WORKLOADS[workload]
    processing_class = AutoTokenizer.from_pretrained(tokenizer)
    rows = make_rows(kind, Path(data), processing_class, (steps + warmup) * kind.pairs_per_step)
    model = make_model(SHAPES[shape], dtype=dtype, device=device)
    config_class, trainer_class = classes(library, kind.method)
    config = config_class(
        output_dir="/tmp/prefopt-benchmark",
        per_device_train_batch_size=kind.pairs_per_step,
        num_train_epochs=epochs,
        max_length=kind.max_length,
        logging_steps=10,
        save_strategy="no",
        train_sampling_strategy="sequential",  # every epoch the same steps
        report_to="none",
        disable_tqdm=True,
        use_cpu=device == "cpu",
        bf16=dtype == "bfloat16",
        **{**dict(kind.options), **(options or {})},
    )
    clock = Clock.callback(TrainerCallback, device)
    # TRL loads the reference anew from the model's path, and this model has none
    own_reference = {"ref_model": copy.deepcopy(model)} if library == "trl" and kind.method == "dpo" else {}
    trainer = trainer_class(
        model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=processing_class,
        callbacks=[clock],
        **own_reference,
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


def classes(library: str, method: str) -> tuple[Any, Any]:
    if library == "prefopt":
        import prefopt

        return getattr(prefopt, f"{method.upper()}Config"), getattr(prefopt, f"{method.upper()}Trainer")
    if method == "dpo":
        from trl import DPOConfig, DPOTrainer

        return DPOConfig, DPOTrainer
    import importlib

    module = importlib.import_module(f"trl.experimental.{method}")
    return getattr(module, f"{method.upper()}Config"), getattr(module, f"{method.upper()}Trainer")


class Clock:
    """Times optimizer steps, and takes the peak of memory within each above what is held between two."""

    @staticmethod
    def callback(base: type, device: str) -> Any:
        class Timer(base):  # type: ignore[misc, valid-type]
            def __init__(self) -> None:
                self.seconds: list[float] = []
                self.cpu_seconds: list[float] = []
                self.peaks: list[int] = []

            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                self.held = reset_peak(device)
                self.start, self.cpu_start = time.perf_counter(), time.process_time()

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                peak = peak_memory(device)
                self.seconds.append(time.perf_counter() - self.start)
                self.cpu_seconds.append(time.process_time() - self.cpu_start)
                self.peaks.append(peak - self.held)

        return Timer()


def reset_peak(device: str) -> int:
    """Start a new peak; the bytes held now."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak_memory(device: str) -> int:
    if device != "cpu":
        import torch

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
