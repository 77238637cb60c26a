"""What reaches the model: collators of the user's, padding, precision, the log's layout line."""

from __future__ import annotations

import logging
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import dataset, log_rows, relative_difference, trainer, weights
from tiny_models import tiny_model, word_tokenizer

from prefopt import DataCollatorForPreference, DPOConfig, DPOTrainer


class OnTheLeft(DataCollatorForPreference):
    """The same rows, padded in front."""

    def torch_call(self, examples):
        batch = super().torch_call(examples)
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            for key in ("input_ids", "attention_mask", "completion_mask"):
                batch[key][row] = batch[key][row].roll(batch[key].shape[1] - length)
        return batch


def with_collator(folder: Path, collator) -> DPOTrainer:
    options = {"max_steps": 4, "learning_rate": 0.05, "optim": "sgd", "logging_steps": 1, "report_to": "none"}
    args = DPOConfig(str(folder), per_device_train_batch_size=4, save_strategy="no", disable_tqdm=True, **options)
    return DPOTrainer(
        tiny_model(seed=1),
        args=args,
        data_collator=collator,
        train_dataset=dataset(21),
        processing_class=word_tokenizer(),
    )


@pytest.mark.parametrize("collator", [DataCollatorForPreference(0), OnTheLeft(0, pad_to_multiple_of=7)], ids=repr)
def test_a_given_collator_gives_the_same_run(collator, tmp_path: Path) -> None:
    """Also one that pads on the left."""
    expected, run = with_collator(tmp_path, None), with_collator(tmp_path, collator)
    expected.train()
    run.train()
    assert run.layout.layout == "padded"
    assert relative_difference(weights(run.model), weights(expected.model)) < 1e-5
    for row, expected_row in zip(log_rows(run), log_rows(expected), strict=True):
        assert row == pytest.approx(expected_row, rel=1e-3, abs=1e-4)


def test_a_collator_that_returns_something_else_is_refused(tmp_path: Path) -> None:
    run = with_collator(tmp_path, lambda rows: {"input_ids": torch.zeros(2, 3, dtype=torch.int64)})
    with pytest.raises(ValueError, match="lacks attention_mask, completion_mask"):
        run.train()


def test_a_collator_of_too_few_rows_is_refused(tmp_path: Path) -> None:
    whole = DataCollatorForPreference(0)
    run = with_collator(tmp_path, lambda rows: whole(rows[:1]))
    with pytest.raises(ValueError, match="made 2 rows of 4 pairs"):
        run.train()


def test_pad_to_multiple_of_has_an_effect_in_the_padded_layout(tmp_path: Path) -> None:
    run = trainer(tmp_path, layout="padded", pad_to_multiple_of=16)
    widths = {step.micro_batches[0].model_inputs["input_ids"].shape[1] for step in run.get_train_dataloader()}
    assert all(width % 16 == 0 for width in widths)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prompt"])
def test_bfloat16_on_a_cpu(layout: str, tmp_path: Path) -> None:
    """Autocast is in force for policy and reference alike: the first loss is ln 2."""
    run = trainer(tmp_path, layout=layout, bf16=True, max_steps=3)
    run.train()
    assert run.accelerator.mixed_precision == "bf16"
    rows = [row for row in run.state.log_history if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert rows[2]["loss"] != pytest.approx(rows[0]["loss"], abs=1e-3)


def test_the_layout_is_said_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="prefopt"):
        trainer(tmp_path)
        trainer(tmp_path, "cpo", model=tiny_model("lfm2"))
    lines = [record for record in caplog.records if "batch layout" in record.message]
    assert [record.levelname for record in lines] == ["INFO", "WARNING"]
    assert lines[0].message == "batch layout: shared_prompt"
    assert "batch layout: padded (Lfm2ForCausalLM" in lines[1].message


def test_a_max_length_above_the_context_is_capped_with_one_line(tmp_path: Path, caplog) -> None:
    with caplog.at_level(logging.WARNING, logger="prefopt"):
        run = trainer(tmp_path, max_length=10_000)
    assert run.prepare_options.max_length == 256
    assert sum("above the model's context" in record.message for record in caplog.records) == 1


def test_padding_asked_for_where_nothing_is_padded_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="prefopt"):
        trainer(tmp_path, pad_to_multiple_of=16)
    assert any("pad_to_multiple_of=16 has no effect" in record.message for record in caplog.records)


def test_options_of_the_loader_and_the_cache_reach_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cleared = []
    monkeypatch.setattr("prefopt.trainer.steps.clear_device_cache", lambda: cleared.append(1))
    options = {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "fork", "dataloader_in_order": False}
    run = trainer(tmp_path, torch_empty_cache_steps=2, max_steps=4, **options)
    loader = run.get_train_dataloader()
    assert loader.in_order is False
    assert loader.multiprocessing_context.get_start_method() == "fork"
    run.train()
    assert len(cleared) == 2


@pytest.mark.parametrize("stream", [False, True], ids=["rows", "stream"])
@pytest.mark.parametrize("options", [{}, {"layout": "padded"}, {"data_collator": "given"}], ids=str)
def test_workers_may_be_started_anew(options: dict[str, Any], stream: bool, tmp_path: Path) -> None:
    """Where processes are not forked (macOS, Windows, Python 3.14), what a worker computes reaches it as a pickle."""
    if options.get("data_collator"):
        options = {"data_collator": DataCollatorForPreference(pad_token_id=2)}
    rows = dataset(8)
    run = trainer(tmp_path, rows=rows.to_iterable_dataset() if stream else rows, **options)
    steps = run.get_train_dataloader().dataset
    sent = pickle.loads(pickle.dumps(steps))
    ours, theirs = (next(iter(s)) if stream else s.__getitems__([0, 1, 2, 3]) for s in (steps, sent))
    for name, column in ours.micro_batches[0].model_inputs.items():
        assert torch.equal(column, theirs.micro_batches[0].model_inputs[name])
