"""Peak memory of a training step above what lies between two steps (weights, optimizer): prefopt against TRL 1.16.

    python benchmarks/memory.py --data rows.jsonl

``prefopt`` decides about activation checkpointing itself, by what is free; ``prefopt checkpointed`` has it on, as TRL's
defaults do. On a CPU it is the peak of resident memory, on a GPU that of the allocator.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from results import alternate, ratio, write_result
from steps import texts
from workload import SMALL, WORKLOADS, describe_lengths, make_rows, make_tokenizer

SIDES: dict[str, dict[str, Any]] = {
    "prefopt": {"library": "prefopt"},
    "prefopt checkpointed": {"library": "prefopt", "options": {"gradient_checkpointing": True}},
    "trl plain": {"library": "trl"},
    "trl not checkpointed": {"library": "trl", "options": {"gradient_checkpointing": False}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSONL of prompt, chosen, rejected")
    parser.add_argument("--workloads", nargs="+", default=["dpo", "simpo", "tpo"], choices=WORKLOADS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="steps after the first, whose highest peak counts")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer(Path(folder), texts(args.data))
        measured = {name: measure(name, args, tokenizer) for name in args.workloads}
    write_result("memory", {"shape": vars(SMALL), "workloads": measured})


def measure(name: str, args: argparse.Namespace, tokenizer: str) -> dict[str, Any]:
    from transformers import AutoTokenizer

    common = {"workload": name, "data": str(args.data), "tokenizer": tokenizer, "steps": args.steps}
    runs = alternate({side: {**common, **settings} for side, settings in SIDES.items()}, args.repeats)
    peaks = {side: [run["peak_bytes"] for run in of_side] for side, of_side in runs.items()}
    workload, reader = WORKLOADS[name], AutoTokenizer.from_pretrained(tokenizer)
    rows = make_rows(workload, args.data, reader, (args.steps + 1) * workload.pairs_per_step)
    result = {
        "rows": len(rows),
        "pairs_per_step": workload.pairs_per_step,
        "lengths": describe_lengths(rows, reader, workload.max_length),
        "peak_mib": {side: statistics.median(of_side) / 2**20 for side, of_side in peaks.items()},
        "ratio_to_trl_plain": {side: ratio(of_side, peaks["trl plain"]) for side, of_side in peaks.items()},
    }
    print(name, result["lengths"])
    for side, peak in result["peak_mib"].items():
        print(f"  {side:22} {peak:8.0f} MiB  {result['ratio_to_trl_plain'][side]:.2f}x of TRL plain", flush=True)
    return result


if __name__ == "__main__":
    main()
