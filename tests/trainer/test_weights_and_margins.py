"""Runs on rows with the columns ``weight`` and ``margin``."""

from __future__ import annotations

import logging
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from short_runs import dataset, log_rows, relative_difference, trainer, weights

from prefopt import DataCollatorForPreference
from prefopt.reference import row_keys

WEIGHTS_TOLERANCE = 1e-6
"""Relative norm after a few steps in float32: only the order of summation differs."""
SGD = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_steps": 3}
LOSSES = [
    ("dpo", {"loss_type": ["sigmoid", "sft"], "use_weighting": True}),
    ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.5}),
    ("tpo", {"loss_type": "tpo-l", "beta": 0.5}),
]
TIMED = ("runtime", "per_second")


def with_numbers(rows: Dataset, seed: int = 0) -> Dataset:
    """Weights from 0 to 3, some of them 0, and margins of either sign."""
    rng = random.Random(seed)
    weight = [rng.choice([0.0, 0.5, 1.0, 3.0]) for _ in rows]
    return rows.add_column("weight", weight).add_column("margin", [rng.uniform(-1, 2) for _ in rows])  # type: ignore[call-arg]


def numbered(count: int, seed: int = 0) -> Dataset:
    return with_numbers(dataset(count, seed=seed), seed)


def trained(folder: Path, method: str, rows: Any, **options: Any) -> Any:
    run = trainer(folder, method, rows=rows, **{**SGD, **options})
    start = weights(run.model)
    run.train()
    assert relative_difference(weights(run.model), start) > 1e-3  # it has moved, so that a comparison says something
    return run


# -- what a weight is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "options"), LOSSES, ids=lambda value: str(value)[:40])
def test_a_row_of_weight_two_is_the_row_twice_and_one_of_zero_is_left_out(
    method: str, options: dict, tmp_path: Path
) -> None:
    """One step an epoch, of 6 rows with weights, or of the 8 that these mean."""
    counts = [2, 1, 0, 1, 3, 1]
    rows = dataset(6)
    copies = rows.select([row for row, count in enumerate(counts) for _ in range(count)])
    found = {}
    for name, given in (("weights", rows.add_column("weight", counts)), ("copies", copies), ("plain", rows)):
        run = trained(tmp_path, method, given, per_device_train_batch_size=len(given), **options)
        found[name] = weights(run.model), [row["loss"] for row in log_rows(run) if "loss" in row]
    assert relative_difference(found["weights"][0], found["copies"][0]) < WEIGHTS_TOLERANCE
    assert found["weights"][1] == pytest.approx(found["copies"][1], rel=1e-5)
    assert relative_difference(found["plain"][0], found["copies"][0]) > 1e3 * WEIGHTS_TOLERANCE


def test_only_proportions_of_weights_matter(tmp_path: Path) -> None:
    rows = dataset(12)
    found = [
        trained(tmp_path, "dpo", given, gradient_accumulation_steps=2, per_device_train_batch_size=2)
        for given in (rows, rows.add_column("weight", [0.01] * 12))  # type: ignore[call-arg]
    ]
    assert relative_difference(weights(found[1].model), weights(found[0].model)) < WEIGHTS_TOLERANCE
    for row, expected in zip(log_rows(found[1]), log_rows(found[0]), strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)


# -- every way to run ----------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "micro-batches of 1": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "a budget of tokens": {"tokens_per_batch": 120},
    "padded": {"layout": "padded"},
    "packed": {"layout": "packed"},
    "a pair a micro-batch": {"tokens_per_batch": 1},
    "precomputed": {"precompute_ref_log_probs": True},
    "a collator of the user's": {"data_collator": DataCollatorForPreference(0)},
}


@pytest.fixture(scope="module")
def whole_steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Method -> weights and log of steps in one micro-batch."""
    folder = tmp_path_factory.mktemp("whole")
    runs = {m: trained(folder, m, numbered(13), per_device_train_batch_size=8, **options) for m, options in LOSSES}
    return {method: (weights(run.model), log_rows(run)) for method, run in runs.items()}


@pytest.mark.filterwarnings("ignore:.*is below max_length:UserWarning")
@pytest.mark.parametrize(
    ("method", "way"),
    [("dpo", way) for way in WAYS] + [(method, way) for method in ("cpo", "tpo") for way in list(WAYS)[:4]],
)
def test_every_way_gives_the_same_weights_and_log(
    method: str, way: str, whole_steps: dict[str, Any], tmp_path: Path
) -> None:
    """13 rows and 8 pairs a step: the last of an epoch has 5, with another sum of weights."""
    options = {"per_device_train_batch_size": 8, **dict(LOSSES)[method], **WAYS[way]}
    run = trained(tmp_path, method, numbered(13), **options)
    expected, rows = whole_steps[method]
    assert relative_difference(weights(run.model), expected) < WEIGHTS_TOLERANCE
    for row, expected_row in zip(log_rows(run), rows, strict=True):
        assert row == pytest.approx(expected_row, rel=1e-4, abs=1e-6)


def test_a_stream_gives_what_the_set_in_order_gives(tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2}
    streamed = trained(tmp_path, "dpo", numbered(16).to_iterable_dataset(), **options)
    ordered = trained(tmp_path, "dpo", numbered(16), train_sampling_strategy="sequential", **options)
    assert relative_difference(weights(streamed.model), weights(ordered.model)) < WEIGHTS_TOLERANCE


def test_a_resumed_run_is_the_run(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2}
    whole = trained(tmp_path / "whole", "dpo", numbered(12), **options)
    resumed = trainer(tmp_path / "resumed", rows=numbered(12), **{**SGD, **options})
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert log_rows(resumed) == log_rows(whole)


# -- evaluation ----------------------------------------------------------------------------------------------------


def evaluated(folder: Path, rows: Any, method: str = "dpo", **options: Any) -> dict[str, float]:
    run = trainer(folder, method, rows=dataset(4), eval_dataset=rows, **options)
    return {k: v for k, v in run.evaluate().items() if not any(word in k for word in TIMED)}


@pytest.mark.parametrize("size", [1, 2, 9])
def test_the_loss_of_an_evaluation_is_weighted_and_nothing_else(size: int, tmp_path: Path) -> None:
    """Against the loss of each row, evaluated alone. The model that makes the rewards is not the reference."""
    from tiny_models import tiny_model

    rows = numbered(9).remove_columns("margin")
    options: dict[str, Any] = {"method": "cpo", "loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0}
    options["model"] = tiny_model(seed=4)
    single = [evaluated(tmp_path, rows.select([row]).remove_columns("weight"), **options) for row in range(9)]
    weight = rows["weight"]
    expected = sum(w * metrics["eval_loss"] for w, metrics in zip(weight, single, strict=True)) / sum(weight)
    plain = evaluated(tmp_path, rows.remove_columns("weight"), per_device_eval_batch_size=size, **options)
    found = evaluated(tmp_path, rows, per_device_eval_batch_size=size, **options)
    assert found.pop("eval_loss") == pytest.approx(expected, rel=1e-5)
    assert plain.pop("eval_loss") != pytest.approx(expected, rel=1e-3)
    assert found == pytest.approx(plain, rel=1e-5)


def test_margins_at_the_first_step_by_hand(tmp_path: Path) -> None:
    """Policy and reference agree: -log sigmoid(0 - gamma) = log(1 + e^gamma), and rewards know no margin."""
    gammas = [0.0, 1.0, -2.0, 0.5]
    found = evaluated(tmp_path, dataset(4).add_column("margin", gammas))  # type: ignore[call-arg]
    assert found["eval_loss"] == pytest.approx(sum(math.log(1 + math.exp(gamma)) for gamma in gammas) / 4, rel=1e-5)
    assert found["eval_rewards/margins"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("method", "name", "option"), [("cpo", "simpo", "simpo_gamma"), ("tpo", "tpo-l", "tpo_l_gamma")]
)
def test_one_margin_for_all_rows_is_gamma(method: str, name: str, option: str, tmp_path: Path) -> None:
    rows = dataset(5)
    by_column = evaluated(tmp_path, rows.add_column("margin", [0.7] * 5), method, loss_type=name, **{option: 0.2})  # type: ignore[call-arg]
    by_option = evaluated(tmp_path, rows, method, loss_type=name, **{option: 0.9})
    assert by_column == pytest.approx(by_option, rel=1e-5)


# -- what is said --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize(
    ("column", "options", "reason"),
    [
        ("weight", {"loss_type": ["sigmoid", "aot"]}, "'aot' matches the sorted values of a step one to one"),
        ("weight", {"loss_type": "bco_pair", "bco_shift": True}, "'bco_pair' shifts rewards by a running mean"),
        ("margin", {"loss_type": "nca_pair"}, "'nca_pair' has a term of one completion alone"),
        ("margin", {"loss_type": ["sft", "aot"]}, "'sft' is the likelihood of one.*'aot' compares quantiles"),
    ],
)
def test_columns_that_a_loss_cannot_take_are_refused(
    column: str, options: dict, reason: str, stream: bool, tmp_path: Path
) -> None:
    rows: Any = dataset(4).add_column(column, [1.0] * 4)  # type: ignore[call-arg]
    rows = rows.to_iterable_dataset() if stream else rows
    with pytest.raises(ValueError, match=f"train data, column '{column}': .*{reason}.*Drop or rename the column"):
        trainer(tmp_path, rows=rows, **options)
    run = trainer(tmp_path, **options)
    with pytest.raises(ValueError, match=f"eval data, column '{column}'"):
        run.evaluate(rows)


def test_where_they_act_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "prefopt.trainer"):
        trainer(tmp_path, rows=numbered(4), loss_type=["sigmoid", "bco_pair"])
    said = [record.getMessage() for record in caplog.records if "column" in record.getMessage()]
    assert said == [
        "train data: the column 'weight' acts in sigmoid, bco_pair.",
        "train data: the column 'margin' acts in sigmoid.",
    ]


def test_the_reference_remembers_a_row_whatever_its_numbers(tmp_path: Path) -> None:
    plain, numbers = (trainer(tmp_path, rows=rows).train_dataset for rows in (dataset(5), numbered(5)))
    assert {"weight", "margin"} <= set(numbers.column_names)
    assert row_keys(numbers) == row_keys(plain)
