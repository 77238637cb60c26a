"""The Triton kernels against the definitions in float64: in Triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_cases import CASES, Case

TOLERANCE = 3e-6
"""Of a value, at least 1: float32 rounds logits of up to 80 to 4e-6, and the sums have 9,001 terms."""
GRADIENT_TOLERANCE = 5e-7
"""Of lse, at least 1, beyond one rounding to the dtype of the logits: a probability inherits the rounding of lse."""

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (it has no wheel for this platform)"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def run(mode: str, cache: Path) -> dict[str, Any]:
    """What `triton_cases` prints, run in a process of its own."""
    environment = os.environ | {"TRITON_INTERPRET": str(int(mode == "cpu")), "TRITON_CACHE_DIR": str(cache)}
    script = str(Path(__file__).with_name("triton_cases.py"))
    ran = subprocess.run([sys.executable, script, mode], env=environment, capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    return run("cpu", tmp_path_factory.mktemp("triton"))


def assert_equals_the_definitions(case: Case, differences: dict[str, float]) -> None:
    always = {"lse", "target_logit", "gradients", "written", "written_beside"}
    assert set(differences) == always | set(case.statistics)
    tolerances = {"gradients": GRADIENT_TOLERANCE, "is_top1": 0.0, "written": 0.0, "written_beside": 0.0}
    too_far = {name: value for name, value in differences.items() if value > tolerances.get(name, TOLERANCE)}
    assert not too_far


@needs_triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_equal_the_definitions(case: Case, interpreted: dict[str, dict[str, float]]) -> None:
    assert_equals_the_definitions(case, interpreted[str(case)])


@needs_triton
@needs_gpu
def test_kernels_equal_the_definitions_on_a_gpu(tmp_path: Path) -> None:
    on_gpu = run("cuda", tmp_path)
    for case in CASES:
        assert_equals_the_definitions(case, on_gpu[str(case)])


@needs_triton
def test_kernels_compile_for_cuda(tmp_path: Path) -> None:
    """The interpreter takes what the compiler does not; and what is not asked for is not in the code."""
    sizes = run("compile", tmp_path)
    assert sizes["row_stats_kernel-least"] < sizes["row_stats_kernel-all"]
    assert 0 < sizes["logit_gradients_kernel-least"] < sizes["logit_gradients_kernel-all"]


def test_the_head_needs_no_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import prefopt.scoring.head.rows as r; r.row_functions('cpu')"
    subprocess.run([sys.executable, "-c", code], check=True)
