"""A run that one process saves, or two ranks (DDP), or two that divide the model (FSDP2), goes on as any of these."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from elastic import CASES, LAST, SAVED, on_two_nodes, resumed, saved, ways
from engines import ENGINES, Results, difference, on_all
from safetensors.torch import load_file
from worlds import start_world

TOLERANCE = 1e-6
"""Relative norm of the weights in float32 after five steps: sums are taken in another order."""
LIMIT_SECONDS = 300
RESUMED = [(name, before, after) for name in CASES for before, after in ways(name)]


class Runs(NamedTuple):
    folder: Path
    saved: Results
    resumed: Results


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("elastic")
    return Runs(folder, on_all(folder, saved, LIMIT_SECONDS), on_all(folder, resumed, LIMIT_SECONDS))


def check_equal(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    for model in ("weights", "moving"):
        assert difference(ours, expected, model) <= TOLERANCE, model
    for row, wanted in zip(ours["log"], expected["log"], strict=True):
        assert row == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "before", "after"), RESUMED, ids=["-".join(case) for case in RESUMED])
def test_the_result_is_that_of_one_process_that_was_not_interrupted(
    name: str, before: str, after: str, runs: Runs, figure: Callable[[str, str], None]
) -> None:
    alone, ours = runs.saved[f"{name}/alone"], runs.resumed[f"{name}/{before}/{after}"]
    check_equal(runs.saved[f"{name}/{before}"], alone)
    check_equal(ours, alone)
    assert alone["log"][-1]["step"] == LAST
    if before == after:
        for model in ("weights", "moving"):  # bit for bit; the sums of a log row over ranks are added in another order
            assert ours[model] == runs.saved[f"{name}/{before}"][model]
    figure(f"elastic restart: {name}", f"{before} to {after}: weights within {difference(ours, alone):.0e}")


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_is_that_of_one_process(name: str, engine: str, runs: Runs) -> None:
    """The same files but for the ranks' random numbers, without a pickle, and in them tensors of the same shapes."""
    ours, alone = (runs.folder / of / name / f"checkpoint-{SAVED}" for of in (engine, "alone"))
    names, expected = ({path.relative_to(top).as_posix() for path in top.rglob("*")} for top in (ours, alone))
    assert {name for name in names if "rng" not in name} == {name for name in expected if "rng" not in name}
    assert {path.suffix for path in ours.rglob("*") if path.is_file()} <= {".safetensors", ".json", ".jinja", ".md"}
    for path in (path for path in alone.glob("*.safetensors") if "rng" not in path.name):
        ours_shapes, shapes = (
            {key: tensor.shape for key, tensor in load_file(top / path.name).items()} for top in (ours, alone)
        )
        assert ours_shapes == shapes


@pytest.mark.distributed
def test_each_node_has_a_whole_checkpoint(tmp_path: Path) -> None:
    """With `save_on_each_node` and FSDP2 the first rank of every machine writes the weights, and all resume."""
    start_world(2, tmp_path, on_two_nodes, tmp_path).finish(LIMIT_SECONDS)
    first, second = (load_file(tmp_path / rank / f"checkpoint-{SAVED}" / "model.safetensors") for rank in "01")
    assert first.keys() == second.keys()
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
