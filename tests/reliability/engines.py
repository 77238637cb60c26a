"""The same runs by one process, by two ranks that share the pairs (DDP), and by two that share the model (FSDP2)."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "distributed"))

import torch
from sharded import is_sharded, shard_on_cpu, whole
from short_runs import log_rows
from worlds import start_world

ENGINES = {"alone": 1, "ddp": 2, "fsdp": 2}
"""Ranks of each."""
Results = dict[str, dict[str, Any]]


def on_all(folder: Path, runs: Callable[[Path, str], Results], limit: float) -> Results:
    """What ``runs(folder, engine)`` gives on each engine; one process and two ranks run at the same time.

    Args:
        folder: for files.
        runs: a function at the top of a module of the tests.
        limit: seconds, after which a rank is taken to wait for ever.
    """
    worlds = [start_world(ranks, folder, on_these, folder, runs) for ranks in (1, 2)]
    try:
        for world in worlds:
            world.finish(limit)
    finally:
        for world in worlds:
            world.kill()
    return json.loads((folder / f"{runs.__name__}-1.json").read_text()) | json.loads(
        (folder / f"{runs.__name__}-2.json").read_text()
    )


def on_these(folder: Path, runs: Callable[[Path, str], Results]) -> None:
    """In each process: the engines of this many ranks."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    shard_on_cpu()
    results: Results = {}
    for engine in (name for name, size in ENGINES.items() if size == ranks):
        results |= runs(folder, engine)
    if os.environ.get("RANK", "0") == "0":
        (folder / f"{runs.__name__}-{ranks}.json").write_text(json.dumps(results))


def engine_options(engine: str, **config: Any) -> dict[str, Any]:
    """Of a trainer on the CPU; ``config`` as ``fsdp_config``."""
    sharded = {"fsdp": True, "fsdp_config": config} if engine == "fsdp" else {}
    return {"use_cpu": True, **sharded}


def finished(run: Any, engine: str, **train: Any) -> dict[str, Any]:
    """Weights and log of a run, which is trained here."""
    run.train(**train)
    assert is_sharded(run.model) == (engine == "fsdp")
    moving = whole(run.moving_reference.weights().values()) if run.moving_reference else []
    return {"weights": whole(run.model.parameters()), "moving": moving, "log": log_rows(run)}


def difference(ours: dict[str, Any], expected: dict[str, Any], model: str = "weights") -> float:
    """Of the weights, relative to their norm."""
    found, wanted = (torch.tensor(result[model], dtype=torch.float64) for result in (ours, expected))
    assert found.shape == wanted.shape
    return float((found - wanted).norm() / wanted.norm()) if len(wanted) else 0.0
