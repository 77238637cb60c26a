"""How long until something happens: prefopt against TRL 1.16.

    python benchmarks/startup.py --data rows.jsonl

Three cases, each in processes of their own that take turns: importing the DPO trainer, the command's ``--help``, and a
script from its start to the end of the first optimizer step (300 rows, a small model and its tokenizer from a folder,
everything else as it is by default). On one thread; processor time and the clock.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from results import ratio, write_result
from workload import Shape, make_model, make_tokenizer, read_rows

SIDES = ("prefopt", "trl")
TINY = Shape(64, 2, 2, 1, 32, 128, 16_000)

Seconds = tuple[float, float]
"""Of the processor, and of the clock."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSONL of prompt, chosen, rejected")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5, help="processes of each side, after one that is not counted")
    parser.add_argument("--side", choices=SIDES, help="run one side up to its first step, and end there")
    parser.add_argument("--model", type=Path, help="for --side: the model's folder")
    args = parser.parse_args()
    if args.side:
        first_step(args.side, args.model, args.data, args.rows)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = make_folder(Path(folder) / "model", args.data)
        script = [sys.executable, __file__, "--data", str(args.data), "--rows", str(args.rows), "--model", model]
        cases = {
            "import": {side: [sys.executable, "-c", f"from {side} import DPOConfig, DPOTrainer"] for side in SIDES},
            "help": {side: [str(Path(sys.executable).parent / side), "--help"] for side in SIDES},
            "first step": {side: [*script, "--side", side] for side in SIDES},
        }
        measured = {case: measure(commands, args.repeats) for case, commands in cases.items()}
    for case, result in measured.items():
        print(line(case, result))
    write_result("startup", {"rows": args.rows, "shape": vars(TINY), "threads": 1, "cases": measured})


def make_folder(folder: Path, data: Path) -> str:
    """The small model and a tokenizer, saved as a user's would be."""
    make_model(TINY).save_pretrained(folder)
    return make_tokenizer(folder, (text for row in read_rows(data) for text in row.values()))


def measure(commands: dict[str, list[str]], repeats: int) -> dict[str, Any]:
    """Median seconds of each side, and how many times as long prefopt takes as TRL: the median, run by run."""
    runs: dict[str, list[Seconds]] = {side: [] for side in commands}
    for _ in range(repeats + 1):
        for side, command in commands.items():
            runs[side].append(timed(command))
    cpu, wall = ({side: [pair[i] for pair in of_side[1:]] for side, of_side in runs.items()} for i in (0, 1))
    return {
        "cpu_seconds": {side: statistics.median(of_side) for side, of_side in cpu.items()},
        "seconds": {side: statistics.median(of_side) for side, of_side in wall.items()},
        "ratio": {"cpu": ratio(cpu["prefopt"], cpu["trl"]), "wall": ratio(wall["prefopt"], wall["trl"])},
        "runs": {"cpu": cpu, "wall": wall},
    }


def timed(command: list[str]) -> Seconds:
    """The seconds that a process takes, in a folder of its own and with caches that are empty."""
    with tempfile.TemporaryDirectory() as folder:
        threads = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment = {**os.environ, **threads, "PREFOPT_CACHE": folder, "HF_DATASETS_CACHE": folder}
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{command} failed:\n{done.stderr[-4000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def first_step(side: str, model: Path, data: Path, count: int) -> None:
    """What a user's script does, up to the end of the first step, where the process ends."""
    from datasets import Dataset
    from side import classes
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            os._exit(0)

    config_class, trainer_class = classes(side, "dpo")
    config = config_class("run", use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=4)
    rows = Dataset.from_list(read_rows(data)[:count])
    trainer_class(str(model), args=config, train_dataset=rows, callbacks=[Stop()]).train()
    raise RuntimeError("the run ended without a step")


def line(case: str, result: dict[str, Any]) -> str:
    sides = "  ".join(
        f"{side} {result['cpu_seconds'][side]:6.2f} CPU s ({result['seconds'][side]:.2f} by the clock)"
        for side in result["seconds"]
    )
    return f"{case:12} {sides}  ratio {result['ratio']['cpu']:.2f} ({result['ratio']['wall']:.2f})"


if __name__ == "__main__":
    main()
