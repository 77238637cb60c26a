"""One optimizer step, however it is cut: into micro-batches, layouts, with a smaller last step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from short_runs import dataset, log_rows, relative_difference, trainer, weights
from tiny_models import tiny_model
from transformers import Trainer, TrainingArguments

from prefopt.trainer import steps

WEIGHTS_TOLERANCE = 1e-6
"""Relative norm after ten steps in float32: only the order of summation differs."""

SPLITS = [(8, 1), (4, 2), (2, 4), (1, 8)]
LOSSES = [
    ("dpo", {"loss_type": "sigmoid"}),
    ("dpo", {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}),
    ("dpo", {"loss_type": "ipo", "ld_alpha": 0.5, "use_weighting": True}),
    ("dpo", {"loss_type": ["aot", "sigmoid"], "loss_weights": [2.0, 0.5], "label_smoothing": 0.1}),
    ("dpo", {"loss_type": ["aot_unpaired", "sft"], "use_weighting": True}),
    ("dpo", {"loss_type": ["bco_pair", "aot"], "bco_shift": True, "beta": 0.3}),
    ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.5}),
    ("tpo", {"loss_type": "tpo-l", "beta": 0.5}),
]
SGD = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 10, "lr_scheduler_type": "constant"}
"""Adam divides by gradients that are close to zero, which makes rounding visible; SGD keeps the scale."""


@pytest.mark.parametrize(("method", "options"), LOSSES, ids=lambda value: str(value)[:40])
def test_every_split_gives_the_same_weights(method: str, options: dict, tmp_path: Path) -> None:
    """21 rows and 8 pairs a step: the last step of an epoch has 5, so that the token means are not of equal size."""
    found = {}
    for per_device, accumulation in SPLITS:
        run = trainer(
            tmp_path,
            method,
            count=21,
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=accumulation,
            **{**SGD, **options},
        )
        start = weights(run.model)
        run.train()
        found[per_device] = weights(run.model), log_rows(run)
        assert relative_difference(found[per_device][0], start) > 1e-3  # it has moved, so that the test says something
    for per_device, (moved, rows) in found.items():
        assert relative_difference(moved, found[8][0]) < WEIGHTS_TOLERANCE, per_device
        for row, expected in zip(rows, found[8][1], strict=True):
            assert row == pytest.approx(expected, rel=1e-4, abs=1e-6), per_device


def test_losses_that_sort_are_scored_with_the_dropout_of_the_gradient(tmp_path: Path, monkeypatch) -> None:
    """The first run of each micro-batch of a step and the second one give the same log-probs."""
    sums: list[torch.Tensor] = []
    original = steps.preference_step

    def recorded(*args, **kwargs):
        result = original(*args, **kwargs)
        sums.append(result.policy["chosen"].sum_logps.detach())
        return result

    monkeypatch.setattr(steps, "preference_step", recorded)
    model = tiny_model(seed=1, attention_dropout=0.5)
    accumulating = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1, "count": 4}
    trainer(tmp_path, model=model, loss_type="aot", disable_dropout=False, layout="padded", **accumulating).train()
    first, second = torch.cat(sums[:2]), torch.cat(sums[2:])
    assert len(sums) == 4
    torch.testing.assert_close(first, second)
    model.eval()
    without = trainer(tmp_path, model=model, loss_type="aot", eval_dataset=dataset(4)).evaluate()
    assert without["eval_logps/chosen"] != pytest.approx(first.mean().item(), rel=1e-3)


@pytest.mark.parametrize("method", ["dpo", "cpo", "tpo"])
def test_every_layout_gives_the_same_weights_and_log(method: str, tmp_path: Path) -> None:
    found = {}
    for layout in ("padded", "packed", "shared_prompt"):
        run = trainer(tmp_path, method, count=21, layout=layout, **SGD)
        assert run.layout.layout == layout
        run.train()
        found[layout] = weights(run.model), log_rows(run)
    for layout in ("packed", "shared_prompt"):
        assert relative_difference(found[layout][0], found["padded"][0]) < 1e-5
        for row, expected in zip(found[layout][1], found["padded"][1], strict=True):
            assert row == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_the_accumulation_that_the_user_set_is_what_the_user_sees(tmp_path: Path) -> None:
    """Inside the loop a step is one item; outside, and in what is saved, nothing of that shows."""
    run = trainer(tmp_path, gradient_accumulation_steps=3, max_steps=2, save_strategy="steps", save_steps=1)
    run.train()
    assert run.args.gradient_accumulation_steps == 3
    assert (
        json.loads((tmp_path / "checkpoint-1" / "training_args.json").read_text())["gradient_accumulation_steps"] == 3
    )
    assert run.state.log_history[0]["epoch"] == pytest.approx(1 / 4)  # 40 rows, 12 pairs a step


def test_epochs_have_a_smaller_last_step_and_drop_last_leaves_it_out(tmp_path: Path) -> None:
    options = {"max_steps": -1, "num_train_epochs": 2, "count": 10, "per_device_train_batch_size": 4}
    assert trainer(tmp_path, **options).train().global_step == 6
    assert trainer(tmp_path, dataloader_drop_last=True, **options).train().global_step == 4


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("data_seed", [None, 3])
def test_rows_come_in_the_order_of_transformers(workers: int, data_seed: int | None, tmp_path: Path) -> None:
    """Over two epochs, against the loader of transformers' own trainer with the same seeds."""
    options = {"per_device_train_batch_size": 4, "data_seed": data_seed, "report_to": "none"}
    plain = Trainer(
        tiny_model(),
        TrainingArguments(str(tmp_path), **options),
        train_dataset=Dataset.from_dict({"input_ids": [[row] for row in range(40)]}),
    )
    expected, loader = [], plain.get_train_dataloader()
    for epoch in range(2):
        loader.set_epoch(epoch)
        expected += [row for batch in loader for row in batch["input_ids"][:, 0].tolist()]
    run = trainer(tmp_path, max_steps=20, dataloader_num_workers=workers, **options)
    seen: list[int] = []
    original = run.training_step

    def watched(model, step, *rest):
        seen.extend(row for batch in step.micro_batches for row in batch.rows)
        return original(model, step, *rest)

    run.training_step = watched
    run.train()
    assert seen == expected


def test_length_grouping_sees_every_row_once_and_groups(tmp_path: Path) -> None:
    spreads = {}
    for strategy in ("group_by_length", "random"):
        run = trainer(tmp_path, count=400, train_sampling_strategy=strategy)
        batches = [step.micro_batches[0].rows for step in run.get_train_dataloader()]
        assert sorted(row for rows in batches for row in rows) == list(range(400))
        columns = ("prompt_ids", "chosen_ids", "rejected_ids")
        lengths = [[sum(len(run.train_dataset[row][c]) for c in columns) for row in rows] for rows in batches]
        spreads[strategy] = sum(max(batch) - min(batch) for batch in lengths)
    assert spreads["group_by_length"] < 0.5 * spreads["random"]
