"""Two gloo ranks show the samples that one process shows, and none waits for the other for ever."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from sampling import CASES, main
from worlds import results_of


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """World size -> case -> result; both worlds run at the same time."""
    return results_of(main, tmp_path_factory.mktemp("sampling"))


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_samples_are_those_of_one_process(name: str, results: dict[str, dict]) -> None:
    ours, alone = results["2"][name], results["1"][name]
    count = CASES[name].get("num_eval_samples", 3)
    steps = [line["step"] for line in alone if line["set"] == "eval"]
    assert steps == [step for step in (0, 2, 3) for _ in range(count)]
    assert ours == alone
    assert alone[0]["policy"] == alone[0]["reference"]
