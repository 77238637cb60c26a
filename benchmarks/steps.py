"""Training steps: prefopt against TRL 1.16, plain (its defaults) and tuned (no checkpointing; reference precomputed).

    python benchmarks/steps.py --data rows.jsonl                     # all workloads, medians of three runs a side
    python benchmarks/steps.py --data rows.jsonl --workloads dpo tpo --repeats 5

Both sides train the same model from the same weights on the same rows in the same order, each in a process of its own;
the processes alternate. What is timed are optimizer steps, after a warm-up; what is compared are pairs per second.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from results import alternate, ratio, write_result
from workload import (
    SHAPES,
    WORKLOADS,
    Shape,
    Workload,
    describe_lengths,
    make_rows,
    make_tokenizer,
    read_rows,
    useful_flops,
)

NO_CHECKPOINTING = {"gradient_checkpointing": False}
PRECOMPUTED = {**NO_CHECKPOINTING, "precompute_ref_log_probs": True}
"""TRL's fastest setting; the pass before training is not timed on either side."""


def main() -> None:
    args = arguments()
    settings = {"data": str(args.data), "steps": args.steps, "threads": args.threads}
    with tempfile.TemporaryDirectory() as folder:
        settings["tokenizer"] = make_tokenizer(Path(folder), texts(args.data))
        for name in args.workloads:
            result = measure({"workload": name, **settings}, sides(name), args.repeats)
            result["matrix_flops_per_second"] = matrix_rate(args.threads)
            print(table(result), flush=True)
            write_result(f"steps-{name}", result)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSONL of prompt, chosen, rejected")
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=WORKLOADS)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a run")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def texts(path: Path) -> Iterator[str]:
    return (text for row in read_rows(path) for text in row.values())


def sides(name: str) -> dict[str, dict[str, Any]]:
    """What is compared on a workload: library and options."""
    both = {"prefopt": {"library": "prefopt"}, "trl plain": {"library": "trl"}}
    if name != "dpo":
        return {**both, "trl tuned": {"library": "trl", "options": NO_CHECKPOINTING}}
    return {
        **both,
        "prefopt cached": {"library": "prefopt", "options": {"precompute_ref_log_probs": True}},
        "trl tuned": {"library": "trl", "options": NO_CHECKPOINTING},
        "trl tuned, cached": {"library": "trl", "options": PRECOMPUTED},
        "prefopt second epoch": {"library": "prefopt", "epochs": 2},
    }


def measure(settings: dict[str, Any], sides: dict[str, dict[str, Any]], repeats: int) -> dict[str, Any]:
    """Runs, medians and ratios of one workload.

    Args:
        settings: of `side.run`, common to all sides.
        sides: name -> settings of its own.
        repeats: runs of each.
    """
    from transformers import AutoTokenizer

    runs = alternate({side: {**settings, **own} for side, own in sides.items()}, repeats)
    speeds = {side: [run["pairs_per_second"] for run in of_side] for side, of_side in runs.items()}
    peaks = {side: [run["peak_bytes"] for run in of_side] for side, of_side in runs.items()}
    workload, tokenizer = WORKLOADS[settings["workload"]], AutoTokenizer.from_pretrained(settings["tokenizer"])
    rows = make_rows(workload, Path(settings["data"]), tokenizer, (settings["steps"] + 1) * workload.pairs_per_step)
    shape = SHAPES[settings.get("shape", "small")]
    flops = mean_flops(shape, rows, tokenizer, workload)
    return {
        "workload": workload.name,
        "shape": vars(shape),
        "rows": len(rows),
        "pairs_per_step": workload.pairs_per_step,
        "max_length": workload.max_length,
        "lengths": describe_lengths(rows, tokenizer, workload.max_length),
        "threads": settings.get("threads"),
        "pairs_per_second": {side: statistics.median(of_side) for side, of_side in speeds.items()},
        "peak_mib": {side: statistics.median(of_side) / 2**20 for side, of_side in peaks.items()},
        "speedup": comparisons(speeds),
        "memory_ratio": comparisons(peaks),
        "useful_flops_per_second": flops * statistics.median(speeds["prefopt"]),
        "runs": runs,
    }


def comparisons(values: dict[str, list[float]]) -> dict[str, float]:
    """Each side of prefopt against each of TRL: the median of the ratios of runs taken in turn."""
    ours = [side for side in values if side.startswith("prefopt")]
    theirs = [side for side in values if side.startswith("trl")]
    return {f"{a} / {b}": ratio(values[a], values[b]) for a in ours for b in theirs}


def mean_flops(shape: Shape, rows: list[dict[str, str]], tokenizer: Any, workload: Workload) -> float:
    """FLOPs that a pair needs on average (see `useful_flops`)."""
    total = 0.0
    for row in rows:
        prompt, *completions = (len(tokenizer(text)["input_ids"]) for text in row.values())
        kept = [min(length + 1, workload.max_length - prompt) for length in completions]
        total += useful_flops(shape, prompt, kept, reference=workload.method == "dpo")
    return total / len(rows)


def matrix_rate(threads: int) -> float:
    """FLOP/s of a large float32 matrix product, the machine's practical peak."""
    torch.set_num_threads(threads)
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(seconds)


def table(result: dict[str, Any]) -> str:
    lines = [f"{result['workload']}: {result['rows']} rows, {result['lengths']}"]
    lines += [
        f"  {side:22} {speed:8.2f} pairs/s  {result['peak_mib'][side]:8.0f} MiB"
        for side, speed in result["pairs_per_second"].items()
    ]
    lines += [
        f"  {pair:40} {speed:6.2f}x  memory {result['memory_ratio'][pair]:.2f}x"
        for pair, speed in result["speedup"].items()
    ]
    share = result["useful_flops_per_second"] / result["matrix_flops_per_second"]
    return "\n".join([*lines, f"  useful work: {share:.2f} of the machine's matrix rate"])


if __name__ == "__main__":
    main()
