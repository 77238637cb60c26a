"""A script run by one process and by two ranks at the same time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

LAUNCHERS = {"1": [], "2": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]}
LIMIT_SECONDS = 400
"""A rank that waits for one that does not come would wait for ever."""


def results_of(script: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """World size -> what rank 0 wrote to ``results-<world size>.json`` in ``folder``, the script's one argument."""
    running = {
        world: subprocess.Popen(
            [sys.executable, *launcher, str(script), str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for world, launcher in LAUNCHERS.items()
    }
    for world, process in running.items():
        output, _ = process.communicate(timeout=LIMIT_SECONDS)
        assert process.returncode == 0, f"world {world}:\n{output[-4000:]}"
    return {world: json.loads((folder / f"results-{world}.json").read_text()) for world in running}
