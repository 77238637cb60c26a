"""The README's tables of measurements, made from the newest result files.

python benchmarks/table.py           # writes them into the README
python benchmarks/table.py --check   # fails where the README is not what the files say
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from results import RESULTS, latest, read

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- made by benchmarks/table.py -->\n", "<!-- end -->\n"
WORKLOAD_NAMES = {
    "dpo": "DPO",
    "simpo": "SimPO",
    "tpo": "TPO",
    "prompt_heavy": "DPO, long prompts",
    "equal_lengths": "DPO, equal lengths",
    "no_prompt": "DPO, no prompt",
    "batch_of_one": "DPO, one pair a step",
}

SIDES = {"prefopt": "", "prefopt cached": ", reference cached", "prefopt second epoch": ", second epoch"}


def main() -> None:
    text = README.read_text()
    made = f"{BEGIN}\n{tables()}\n{END}"
    new = re.sub(re.escape(BEGIN) + ".*?" + re.escape(END), lambda _: made, text, flags=re.DOTALL)
    if "--check" in sys.argv:
        sys.exit(0 if new == text else "README.md is not what the result files say: run python benchmarks/table.py")
    README.write_text(new)


def tables() -> str:
    """The tables of steps on each hardware, then memory, preparation and start, where they were measured."""
    parts = [steps_table(hardware, prefix) for prefix in ("steps", "gpu-steps") for hardware in hardwares(prefix)]
    for name, make in {"memory": memory_table, "prepare": prepare_table, "startup": startup_table}.items():
        parts += [make(result) for result in latest(name)]
    return "\n".join(parts)


def table(title: str, hardware: str, columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        [f"{title}, on {hardware.replace('-', ' ')}:", "", *(f"| {' | '.join(cells)} |" for cells in lines), ""]
    )


def memory_table(result: dict[str, Any]) -> str:
    rows = []
    for workload, measured in result["workloads"].items():
        peaks, ratios = measured["peak_mib"], measured["ratio_to_trl_plain"]
        own = [f"{peaks[side]:.0f} MiB ({ratios[side]:.2f}x)" for side in ("prefopt", "prefopt checkpointed")]
        rows.append([WORKLOAD_NAMES[workload], *own, f"{peaks['trl plain']:.0f} MiB"])
    columns = ["workload", "prefopt", "prefopt, checkpointed", "TRL plain"]
    return table("Peak memory of a step above weights and optimizer", result["hardware"], columns, rows)


def prepare_table(result: dict[str, Any]) -> str:
    rows = []
    for tokenizer, kinds in result["tokenizers"].items():
        for kind, measured in kinds.items():
            speeds = [f"{measured['rows_per_cpu_second'][side]:.0f}" for side in ("prefopt", "trl")]
            rows.append([tokenizer, kind, *speeds, times(measured["speedup"]["cpu"])])
    columns = ["tokenizer", "rows", "prefopt", "TRL", ""]
    return table("Rows prepared per second of one processor", result["hardware"], columns, rows)


def startup_table(result: dict[str, Any]) -> str:
    rows = []
    for case, measured in result["cases"].items():
        seconds = [f"{measured['cpu_seconds'][side]:.1f}" for side in ("prefopt", "trl")]
        rows.append([case, *seconds, times(measured["ratio"]["cpu"], 2)])
    return table("Seconds of the processor to start", result["hardware"], ["until", "prefopt", "TRL", ""], rows)


def hardwares(prefix: str) -> list[str]:
    names = {
        result["hardware"] for path in RESULTS.glob(f"*-{prefix}-*.json") if is_steps(result := read(path), prefix)
    }
    return sorted(names)


def is_steps(result: dict[str, Any], prefix: str) -> bool:
    return result["name"].removeprefix(f"{prefix}-") in WORKLOAD_NAMES


def steps_table(hardware: str, prefix: str) -> str:
    """One line a workload: pairs per second, and how many times TRL's."""
    rows = []
    for workload, label in WORKLOAD_NAMES.items():
        for result in (r for r in latest(f"{prefix}-{workload}") if r["hardware"] == hardware):
            rows += [
                [label + suffix, *steps_cells(side, result)]
                for side, suffix in SIDES.items()
                if side in result["pairs_per_second"]
            ]
    columns = ["workload", "median tokens: prompt, completions", "pairs/s", "TRL plain", "TRL tuned"]
    return table("Training steps", hardware, [*columns, "memory, of TRL plain"], rows)


def steps_cells(side: str, result: dict[str, Any]) -> list[str]:
    speedup, memory = result["speedup"], result["memory_ratio"]
    tuned = "trl tuned, cached" if side == "prefopt cached" else "trl tuned"
    return [
        ", ".join(f"{part['median']:.0f}" for part in result["lengths"].values()),
        f"{result['pairs_per_second'][side]:.2f}",
        times(speedup.get(f"{side} / trl plain")),
        times(speedup.get(f"{side} / {tuned}")),
        times(memory.get(f"{side} / trl plain"), 2),
    ]


def times(ratio: float | None, digits: int = 1) -> str:
    return "" if ratio is None else f"{ratio:.{digits}f}x"


if __name__ == "__main__":
    main()
