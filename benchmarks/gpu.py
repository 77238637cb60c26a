"""Everything that only a GPU can show, in one command of at most eight minutes.

    python benchmarks/gpu.py --data rows.jsonl

1. parity: the Triton kernels of the head against float64, the attention backends against one another;
2. which attention backend wins at which lengths, and the head's modes;
3. training steps in bfloat16 of a model of Qwen3-0.6B's shape against TRL 1.16, plain and tuned, with the share of the
   GPU's peak that is useful work.

Each part writes its own result file when it is done; what does not fit into the time is named and left out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from results import write_result
from steps import NO_CHECKPOINTING, PRECOMPUTED, measure, table, texts
from workload import make_tokenizer

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense bfloat16 FLOP/s by the makers' data sheets."""
SECONDS = 8 * 60
SIDES: dict[str, dict[str, dict[str, Any]]] = {
    "dpo": {
        "prefopt": {"library": "prefopt"},
        "trl plain": {"library": "trl"},
        "trl tuned": {"library": "trl", "options": NO_CHECKPOINTING},
        "prefopt cached": {"library": "prefopt", "options": {"precompute_ref_log_probs": True}},
        "trl tuned, cached": {"library": "trl", "options": PRECOMPUTED},
    },
    "simpo": {"prefopt": {"library": "prefopt"}, "trl plain": {"library": "trl"}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSONL of prompt, chosen, rejected")
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu.py needs a CUDA device; steps.py, head.py and attention.py also run on a CPU.")
    end = time.monotonic() + SECONDS
    here = Path(__file__).parent
    for name, command in {
        "parity": ["-m", "pytest", "-q", str(here.parent / "tests/scoring"), "-k", "cuda"],
        "head": [str(here / "head.py")],
        "attention": [str(here / "attention.py")],
    }.items():
        print(f"== {name}", flush=True)
        run_within(end, name, lambda left, c=command: subprocess.run([sys.executable, *c], timeout=left, check=False))
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "data": str(args.data),
            "tokenizer": make_tokenizer(Path(folder), texts(args.data)),
            "steps": args.steps,
            "warmup": 2,
            "device": "cuda",
            "shape": "qwen3-0.6b",
            "dtype": "bfloat16",
        }
        for workload, sides in SIDES.items():
            print(f"== steps: {workload}", flush=True)
            run_within(end, workload, lambda left, w=workload, s=sides: steps({"workload": w, **settings}, s))


def run_within(end: float, name: str, part: Any) -> None:
    """Run a part with the seconds that are left; a failure is shown, and the next part runs."""
    left = end - time.monotonic()
    if left <= 0:
        print(f"{name}: left out, the {SECONDS // 60} minutes are over")
        return
    try:
        part(left)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        print(f"{name}: {error}")


def steps(settings: dict[str, Any], sides: dict[str, dict[str, Any]]) -> None:
    result = measure(settings, sides, repeats=1)
    name = torch.cuda.get_device_name(0)
    peak = next((flops for gpu, flops in PEAK_FLOPS.items() if gpu in name), float("nan"))
    result["matrix_flops_per_second"] = peak
    print(table(result), flush=True)
    write_result(f"gpu-steps-{settings['workload']}", result)


if __name__ == "__main__":
    main()
