"""Functions that are run by several ranks, each a process forked from one that has everything imported."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from uuid import uuid4

sys.path.append(str(Path(__file__).resolve().parents[1] / "reliability"))
from processes import start

LIMIT_SECONDS = 400
"""A rank that waits for one that does not come would wait for ever."""


@dataclass(frozen=True)
class World:
    """Ranks that run, and the files of what they print."""

    ranks: list[BaseProcess]
    outputs: list[Path]

    def finish(self, limit: float = LIMIT_SECONDS) -> None:
        """Wait for all ranks; where one fails, or the limit is over, the others are ended too.

        Raises:
            AssertionError: one failed or was late, with the end of what it printed.
        """
        until = time.monotonic() + limit
        running = {rank.sentinel: rank for rank in self.ranks}
        while running and (left := until - time.monotonic()) > 0:
            for sentinel in wait(list(running), timeout=left):
                if running.pop(sentinel).exitcode:  # type: ignore[arg-type]
                    left = 0
            if not left:
                break
        codes = [rank.exitcode for rank in self.ranks]
        self.kill()
        said = "".join(f"\nrank {n}:\n{path.read_text()[-4000:]}" for n, path in enumerate(self.outputs))
        assert codes == [0] * len(codes), f"exit statuses {codes}; None is one that had not ended{said}"

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.join()


def start_world(size: int, folder: Path, target: Callable[..., Any], *args: Any, **env: str) -> World:
    """``target(*args)`` on ``size`` ranks of gloo, or in one process without ranks.

    Args:
        size: number of ranks.
        folder: for what the ranks print and where they meet.
        target: a function at the top of a module of the tests.
        args: of it.
        env: environment variables in addition.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = uuid4().hex[:8]
    outputs = [folder / f"{name}-rank-{rank}.txt" for rank in range(size)]
    ranks = []
    for rank, output in enumerate(outputs):
        output.touch()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
        if size > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            environment |= {key: str(value) for key, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
        ranks.append(start(run_rank, environment, output, folder / f"{name}-store", target, args))
    return World(ranks, outputs)


def run_rank(
    environment: Mapping[str, str], output: Path, store: Path, target: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """In the process of one rank. The ranks meet in a file: a free port may be taken before they open it."""
    import torch
    import torch.distributed as dist

    os.environ.clear()
    os.environ.update(environment)
    printed = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    torch.set_num_threads(1)
    if "RANK" in environment:
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    target(*args)
    if dist.is_initialized():
        dist.destroy_process_group()


def results_of(main: Callable[[Path], None], folder: Path) -> dict[str, dict[str, Any]]:
    """World size -> what rank 0 wrote to ``results-<world size>.json`` in ``folder``, the one argument of ``main``.

    One process and two ranks run at the same time.
    """
    worlds = {str(size): start_world(size, folder, main, folder) for size in (1, 2)}
    try:
        for world in worlds.values():
            world.finish()
    finally:
        for world in worlds.values():
            world.kill()
    return {size: json.loads((folder / f"results-{size}.json").read_text()) for size in worlds}
