"""The head under FSDP2, on two gloo ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOLERANCE = 1e-7
"""Gradients of up to 1 in float32: the sum of two ranks rounds as that of two backward passes does."""
FORWARDS = 4
"""Of a case: two steps sharded, and one for each rank's batch without."""


@pytest.mark.distributed
def test_gradients_are_those_without_sharding() -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, str(Path(__file__).with_name("sharded_head.py"))]
    ran = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280, check=False
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    (line,) = [line for line in ran.stdout.splitlines() if "RESULT " in line]
    result = json.loads(line.partition("RESULT ")[2])
    assert {name: value for name, value in result["differences"].items() if value > TOLERANCE} == {}
    assert result["taken"] == FORWARDS * result["cases"]
