"""Eight LoRA configurations at the same time, and one after another.

    python benchmarks/sweep.py --data rows.jsonl --shape small

Three ways to the same eight models: ``prefopt sweep``; ``prefopt train`` eight times, a process each; and the same
eight trainings in one process. Within each way they share the caches of prepared rows and of reference log-probs.
Measured are the processor's time and the clock, the clock until each trial's first evaluation is on the disk, and
whether all three ways give the same weights and rows. On one thread.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from results import write_result
from workload import Shape, make_model, make_tokenizer, read_rows

SHAPES = {"tiny": Shape(64, 4, 4, 2, 16, 128, 2_000), "small": Shape(512, 8, 8, 4, 64, 1408, 16_000)}
PARAMETERS = {"beta": [0.05, 0.1, 0.3, 1.0], "lora_r": [4, 16]}
TIMED = ("time", "flos", "per_second", "runtime")
WAYS = ("sweep", "processes", "one process")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSONL of prompt, chosen, rejected")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--trainings", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trainings:
        from prefopt.cli.main import main as prefopt

        for number in range(0, len(args.trainings), 2):
            prefopt(["train", args.trainings[number], "--output_dir", args.trainings[number + 1]])
        return
    with tempfile.TemporaryDirectory() as folder:
        file = make_files(Path(folder), args)
        names = [f"{n:02}-beta{b:g}-lora_r{r}" for n, (b, r) in enumerate(itertools.product(*PARAMETERS.values()), 1)]
        measured = {}
        for way in WAYS:
            measured[way] = measure(way, Path(folder), file, names)
            print(line(way, measured[way]), flush=True)
        same = all(same_runs(Path(folder), way, names) for way in WAYS[1:])
    print(f"the same weights and rows: {same}")
    settings = {"shape": vars(SHAPES[args.shape]), "steps": args.steps, "parameters": PARAMETERS, "threads": 1}
    write_result(f"sweep-{args.shape}", {**settings, "same_result": same, "ways": measured})


def make_files(folder: Path, args: argparse.Namespace) -> Path:
    """Model, data and the file of the sweep."""
    rows = read_rows(args.data)[: args.rows]
    model = make_model(SHAPES[args.shape])
    model.save_pretrained(folder / "model")
    make_tokenizer(folder / "model", (text for row in rows for text in row.values()), SHAPES[args.shape].vocab_size)
    (folder / "data").mkdir()
    for split, part in {"train": rows[16:], "test": rows[:16]}.items():
        (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    run = {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "data"),
        "max_length": args.max_length,
        "max_steps": args.steps,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "eval_strategy": "steps",
        "eval_steps": args.steps // 8,
        "logging_steps": args.steps // 8,
        "save_strategy": "no",
        "use_peft": True,
        "lora_dropout": 0.0,
        "report_to": "none",
        "bf16": False,
    }
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump({"run": run, "output_dir": str(folder / "sweep"), "parameters": PARAMETERS}))
    return file


def measure(way: str, folder: Path, file: Path, names: list[str]) -> dict[str, Any]:
    """Seconds of one way, and until the first evaluation of each trial."""
    before, start, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), time.time()
    for command in commands(way, folder, file, names):
        drawn = {"PREFOPT_REPORT": "off"}  # reports cost the same in each way
        threads = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        caches = {name: str(folder / f"cache {way}") for name in ("PREFOPT_CACHE", "HF_DATASETS_CACHE")}
        subprocess.run(command, check=True, env={**os.environ, **threads, **caches, **drawn}, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "seconds": time.perf_counter() - start,
        "first_seen": [first_seen(run_folder(folder, way, name)) - began for name in names],
    }


def commands(way: str, folder: Path, file: Path, names: list[str]) -> Iterator[list[str]]:
    runs = [(str(run_folder(folder, "sweep", name) / "run.yaml"), str(run_folder(folder, way, name))) for name in names]
    prefopt = str(Path(sys.executable).parent / "prefopt")
    if way == "sweep":
        yield [prefopt, "sweep", str(file)]
    elif way == "processes":
        yield from ([prefopt, "train", run, "--output_dir", out] for run, out in runs)
    else:
        yield [sys.executable, __file__, "--data", "-", "--trainings", *(text for pair in runs for text in pair)]


def run_folder(folder: Path, way: str, name: str) -> Path:
    return folder / "sweep" / "trials" / name if way == "sweep" else folder / way / name


def first_seen(run: Path) -> float:
    """When the first row of an evaluation was written, as `time.time` has it."""
    return next(datetime.fromisoformat(row["time"]).timestamp() for row in logged(run) if "eval_loss" in row)


def logged(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_runs(folder: Path, way: str, names: list[str]) -> bool:
    """Whether another way's weights and rows are those of the sweep, bit for bit."""
    for name in names:
        ours, theirs = run_folder(folder, "sweep", name), run_folder(folder, way, name)
        weights = [(run / "adapter_model.safetensors").read_bytes() for run in (ours, theirs)]
        if weights[0] != weights[1] or untimed(ours) != untimed(theirs):
            return False
    return True


def untimed(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not any(word in k for word in TIMED)} for row in logged(run)]


def line(way: str, result: dict[str, Any]) -> str:
    first = result["first_seen"]
    return (
        f"{way:12} {result['cpu_seconds']:7.1f} CPU s, {result['seconds']:7.1f} s by the clock; first evaluation after "
        f"{min(first):.0f} to {max(first):.0f} s, median {statistics.median(first):.0f} s"
    )


if __name__ == "__main__":
    main()
