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


def memory_table(result: dict[str, Any]) -> str:
    lines = [
        f"Peak memory of a step above weights and optimizer, on {spaced(result['hardware'])}:",
        "",
        "| workload | prefopt | prefopt, checkpointed | TRL plain |",
        "|---|---|---|---|",
    ]
    for workload, measured in result["workloads"].items():
        peaks, ratios = measured["peak_mib"], measured["ratio_to_trl_plain"]
        own = [f"{peaks[side]:.0f} MiB ({ratios[side]:.2f}x)" for side in ("prefopt", "prefopt checkpointed")]
        lines.append(f"| {WORKLOAD_NAMES[workload]} | {own[0]} | {own[1]} | {peaks['trl plain']:.0f} MiB |")
    return "\n".join(lines) + "\n"


def prepare_table(result: dict[str, Any]) -> str:
    lines = [
        f"Rows prepared per second of one processor, on {spaced(result['hardware'])}:",
        "",
        "| tokenizer | rows | prefopt | TRL | |",
        "|---|---|---|---|---|",
    ]
    for tokenizer, kinds in result["tokenizers"].items():
        for kind, measured in kinds.items():
            speed = measured["rows_per_cpu_second"]
            ratio = times(measured["speedup"]["cpu"])
            lines.append(f"| {tokenizer} | {kind} | {speed['prefopt']:.0f} | {speed['trl']:.0f} | {ratio} |")
    return "\n".join(lines) + "\n"


def startup_table(result: dict[str, Any]) -> str:
    lines = [
        f"Seconds of the processor to start, on {spaced(result['hardware'])}:",
        "",
        "| until | prefopt | TRL | |",
        "|---|---|---|---|",
    ]
    for case, measured in result["cases"].items():
        own, other = (measured["cpu_seconds"][side] for side in ("prefopt", "trl"))
        lines.append(f"| {case} | {own:.1f} | {other:.1f} | {measured['ratio']['cpu']:.2f}x |")
    return "\n".join(lines) + "\n"


def spaced(hardware: str) -> str:
    return hardware.replace("-", " ")


def hardwares(prefix: str) -> list[str]:
    names = {
        result["hardware"] for path in RESULTS.glob(f"*-{prefix}-*.json") if is_steps(result := read(path), prefix)
    }
    return sorted(names)


def is_steps(result: dict[str, Any], prefix: str) -> bool:
    return result["name"].removeprefix(f"{prefix}-") in WORKLOAD_NAMES


def steps_table(hardware: str, prefix: str) -> str:
    """One line a workload: pairs per second, and how many times TRL's."""
    lines = [
        f"Training steps on {spaced(hardware)}:",
        "",
        "| workload | median tokens: prompt, completions | pairs/s | TRL plain | TRL tuned | memory, of TRL plain |",
        "|---|---|---|---|---|---|",
    ]
    for workload, label in WORKLOAD_NAMES.items():
        for result in (r for r in latest(f"{prefix}-{workload}") if r["hardware"] == hardware):
            lines += [
                steps_row(label + suffix, side, result)
                for side, suffix in (
                    ("prefopt", ""),
                    ("prefopt cached", ", reference cached"),
                    ("prefopt second epoch", ", second epoch"),
                )
                if side in result["pairs_per_second"]
            ]
    return "\n".join(lines) + "\n"


def steps_row(label: str, side: str, result: dict[str, Any]) -> str:
    lengths = ", ".join(f"{part['median']:.0f}" for part in result["lengths"].values())
    speedup, memory = result["speedup"], result["memory_ratio"]
    tuned = "trl tuned, cached" if side == "prefopt cached" else "trl tuned"
    cells = [
        label,
        lengths,
        f"{result['pairs_per_second'][side]:.2f}",
        times(speedup.get(f"{side} / trl plain")),
        times(speedup.get(f"{side} / {tuned}")),
        times(memory.get(f"{side} / trl plain"), 2),
    ]
    return f"| {' | '.join(cells)} |"


def times(ratio: float | None, digits: int = 1) -> str:
    return "" if ratio is None else f"{ratio:.{digits}f}x"


if __name__ == "__main__":
    main()
