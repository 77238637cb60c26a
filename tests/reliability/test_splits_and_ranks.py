"""One optimizer step, however it is cut: into micro-batches, over ranks, with a model that ranks divide."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from engines import ENGINES, Results, difference, engine_options, finished, on_all
from scale import LONG
from short_runs import trainer

from prefopt.objective.tables import LOSSES, TOKEN_LOSSES

TOLERANCE = 1e-6
"""Relative norm of the weights in float32 after some steps of SGD: only the order of summation differs."""
GLOBAL_BATCH, ROWS = 8, 21
"""The last step of an epoch has 5 pairs, so that the means of ranks and micro-batches are not of equal size."""
LIMIT_SECONDS = 3000 if LONG else 300
RUN = {
    "count": ROWS,
    "max_steps": 10 if LONG else 4,
    "optim": "sgd",
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
}
SPLITS = [
    (engine, GLOBAL_BATCH // ranks // accumulation, accumulation)
    for engine, ranks in ENGINES.items()
    for accumulation in (1, 2, 4, 8)
    if accumulation * ranks <= GLOBAL_BATCH
]
"""Engine, pairs of a micro-batch, micro-batches of a rank; all are compared with the first, a single micro-batch."""


def batched(items: tuple[str, ...], size: int) -> list[tuple[str, ...]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


LOSSES_OF_A_RUN = 1 if LONG else 4
CASES = [
    (method, losses)
    for method, table in LOSSES.items()
    for losses in batched((*table, *TOKEN_LOSSES[method]), LOSSES_OF_A_RUN)
]
"""Every loss of every trainer; in the short form several are summed."""
SMOOTHED = ("exo_pair", "robust")
"""Losses that want smoothed labels."""


def splits_of(number: int) -> list[tuple[str, int, int]]:
    """Of a case: all, or one on each engine, another one in the next case."""
    if LONG:
        return SPLITS
    later = [[split for split in SPLITS[1:] if split[0] == engine] for engine in ENGINES]
    return [SPLITS[0], *(of_engine[number % len(of_engine)] for of_engine in later)]


def named(method: str, losses: tuple[str, ...], engine: str, per_device: int, accumulation: int) -> str:
    return f"{method}-{'-'.join(losses)}-{engine}-{per_device}x{accumulation}"


RUNS = [(*case, *split) for number, case in enumerate(CASES) for split in splits_of(number)]


def runs_of(folder: Path, engine: str) -> Results:
    results = {}
    for method, losses, of, per_device, accumulation in RUNS:
        if of == engine:
            name = named(method, losses, engine, per_device, accumulation)
            options = {**RUN, **engine_options(engine), "label_smoothing": 0.1 if {*losses} & {*SMOOTHED} else 0.0}
            size = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation}
            run = trainer(folder / name, method, loss_type=list(losses), **size, **options)
            results[name] = finished(run, engine)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return on_all(tmp_path_factory.mktemp("splits"), runs_of, LIMIT_SECONDS)


@pytest.mark.distributed
@pytest.mark.parametrize(("method", "losses"), CASES, ids=["-".join((method, *losses)) for method, losses in CASES])
def test_every_split_gives_the_same_weights(
    method: str, losses: tuple[str, ...], results: Results, figure: Callable[[str, str], None]
) -> None:
    whole = results[named(method, losses, *SPLITS[0])]
    ours = [run for run in RUNS if run[:2] == (method, losses)]
    differences = {}
    for run in ours:
        found = results[named(*run)]
        differences[run] = difference(found, whole)
        for row, expected in itertools.zip_longest(found["log"], whole["log"], fillvalue={}):
            assert row == pytest.approx(expected, rel=1e-4, abs=1e-6), run
    assert {run: found for run, found in differences.items() if found > TOLERANCE} == {}
    figure(
        "splits", f"{method} {' + '.join(losses)}: {len(ours)} splits, weights within {max(differences.values()):.0e}"
    )
