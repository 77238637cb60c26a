"""Result files: dated, with the hardware in their name; and what a fair comparison needs."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "alternate", "hardware", "latest", "ratio", "run_side", "timed", "write_result"]

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("prefopt", "trl", "torch", "transformers", "accelerate", "peft")


def hardware() -> str:
    """A short name of what computes: the GPU, else the number of processors and their kind."""
    try:
        import torch

        if torch.cuda.is_available():
            return slug(f"{torch.cuda.device_count()}x {torch.cuda.get_device_name(0)}")
    except ImportError:
        pass
    return slug(f"{len(os.sched_getaffinity(0))} cores {processor()}")


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.*)$", info.read_text(), re.MULTILINE) if info.is_file() else []
    return re.sub(r"\(R\)|\(TM\)|CPU|Processor|@.*", "", names[0]) if names else platform.machine()


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def write_result(name: str, payload: dict[str, Any]) -> Path:
    """Write ``results/<date>-<name>-<hardware>.json`` with the versions that were measured; its path."""
    RESULTS.mkdir(exist_ok=True)
    date = datetime.date.today().isoformat()
    path = RESULTS / f"{date}-{name}-{hardware()}.json"
    result = {"name": name, "date": date, "hardware": hardware(), "versions": versions(), **payload}
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")
    return path


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def latest(name: str) -> list[dict[str, Any]]:
    """The newest result of that name for each hardware."""
    newest = {
        result["hardware"]: result for path in sorted(RESULTS.glob("*.json")) if is_of(result := read(path), name)
    }
    return list(newest.values())


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def is_of(result: Mapping[str, Any], name: str) -> bool:
    return result["name"] == name


def run_side(settings: Mapping[str, Any], *, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """`side.py` in a process of its own; what it measured."""
    script = Path(__file__).with_name("side.py")
    command = [sys.executable, str(script), json.dumps(settings)]
    with tempfile.TemporaryDirectory() as cache:  # nothing is known from an earlier run
        environment = {**os.environ, "PREFOPT_CACHE": cache, "HF_DATASETS_CACHE": cache, **(environment or {})}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise RuntimeError(f"{settings} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def alternate(sides: Mapping[str, Mapping[str, Any]], repeats: int) -> dict[str, list[dict[str, Any]]]:
    """Each side's runs, taken in turn so that a slow spell of the machine meets all of them."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, settings in sides.items():
            runs[name].append(run_side(settings))
    return runs


def timed(run: Callable[[], Any], device: str) -> float:
    """Seconds of ``run()``: of the processor on a CPU, which other work does not lengthen, else of the clock."""
    import torch

    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the ratios run by run."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
