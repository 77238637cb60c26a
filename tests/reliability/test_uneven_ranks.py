"""Any number of rows on two ranks, fewer than ranks too: nobody waits for ever, and all is as with one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from engines import ENGINES, Results, difference, engine_options, finished, on_all
from scale import LONG
from short_runs import dataset, trainer

TOLERANCE = 1e-6
"""Relative norm of the weights in float32 after two epochs of SGD: only the order of summation differs."""
COUNTS = range(1, 21) if LONG else (1, 2, 3, 5, 7)
LIMIT_SECONDS = 600 if LONG else 200
METHODS = ("dpo", "cpo", "tpo")
RUN = {"max_steps": -1, "num_train_epochs": 2, "optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant"}
TIMES = ("runtime", "per_second")


def runs_of(folder: Path, engine: str) -> Results:
    """Two epochs of training, with an evaluation after each; steps of four pairs, evaluation in batches of two."""
    results = {}
    for number, count in enumerate(COUNTS):
        run = trainer(
            folder / f"{count}-{engine}",
            METHODS[number % len(METHODS)],
            count=count,
            eval_dataset={"odd": dataset(count, seed=5), "other": dataset(2 * count, seed=6)},
            eval_strategy="epoch",
            per_device_train_batch_size=4 // ENGINES[engine],
            per_device_eval_batch_size=2,
            **RUN,
            **engine_options(engine),
        )
        results[f"{count}-{engine}"] = finished(run, engine)
        metrics = run.evaluate()
        results[f"{count}-{engine}"]["metrics"] = {k: v for k, v in metrics.items() if not any(t in k for t in TIMES)}
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return on_all(tmp_path_factory.mktemp("uneven"), runs_of, LIMIT_SECONDS)


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize("count", COUNTS)
def test_weights_and_metrics_are_those_of_one_process(
    count: int, engine: str, results: Results, figure: Callable[[str, str], None]
) -> None:
    ours, alone = results[f"{count}-{engine}"], results[f"{count}-alone"]
    assert difference(ours, alone) <= TOLERANCE
    assert len(alone["log"]) >= 2 * 3  # of each epoch a row of training and one for each evaluation set
    for row, expected in zip([*ours["log"], ours["metrics"]], [*alone["log"], alone["metrics"]], strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)
    figure("uneven ranks", f"{engine}, {count} rows: weights within {difference(ours, alone):.0e}, metrics equal")
