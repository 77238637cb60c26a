"""The reference is asked once for each pair: in later epochs, evaluations and runs it costs nothing."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from short_runs import dataset, log_rows, trainer, weights
from tiny_models import tiny_model, word_tokenizer
from transformers import TrainerCallback

from prefopt import DPOConfig, DPOTrainer
from prefopt.batching import DataCollatorForPreference
from prefopt.reference.policy import ModelReference
from prefopt.trainer.callbacks import BEMACallback
from prefopt.trainer.remembering import RememberingTrainer

SAME_RUN = {"rel": 1e-4, "abs": 1e-5}
"""In later epochs a pair stands in another micro-batch, whose sums are rounded otherwise."""
STEPS = 3
EPOCHS = {"count": 4 * STEPS, "max_steps": -1, "num_train_epochs": 3}
"""Three epochs of three steps of four pairs."""
KINDS: dict[str, dict[str, Any]] = {
    "copy": {},
    "adapter off": {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])},
    "ipo of means": {"loss_type": ["ipo", "sigmoid_norm"]},
    "padded": {"layout": "padded"},
    "ld_alpha": {"ld_alpha": 0.3},
    "workers": {"dataloader_num_workers": 1},
    "tokens_per_batch": {"tokens_per_batch": 10_000},
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, reference_cache: Path) -> list[tuple[int, ...]]:
    """The rows of every micro-batch that a reference's model scores, in a test with a cache of its own."""
    calls: list[tuple[int, ...]] = []
    original = ModelReference.__call__
    monkeypatch.setattr(
        ModelReference, "__call__", lambda self, batch: calls.append(batch.rows) or original(self, batch)
    )
    return calls


def run(folder: Path, **options: Any) -> Any:
    torch.manual_seed(3)  # of a new adapter
    made = trainer(folder, **{**EPOCHS, **options})
    made.train()
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_later_epochs_ask_nothing_and_train_the_same(
    kind: str, tmp_path: Path, asked: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    remembering = run(tmp_path, **KINDS[kind])
    assert sorted(row for rows in asked for row in rows) == list(range(4 * STEPS))
    asked.clear()
    with monkeypatch.context() as patch:
        patch.setattr(RememberingTrainer, "looked_up", None)
        online = run(tmp_path, **KINDS[kind])
    assert len(asked) == 3 * STEPS
    for row, expected in zip(log_rows(remembering), log_rows(online), strict=True):
        assert row == pytest.approx(expected, **SAME_RUN)
    if kind == "copy":
        assert abs(log_rows(online)[-2]["rewards/margins"]) > 0.1, "the comparison would see a wrong reference"


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_run_asks_nothing(kind: str, tmp_path: Path, asked: list) -> None:
    first = run(tmp_path, **KINDS[kind])
    assert len(asked) == STEPS
    asked.clear()
    second = run(tmp_path, beta=0.3, learning_rate=1e-3, per_device_train_batch_size=3, **KINDS[kind])
    assert not asked
    assert not torch.equal(weights(first.model), weights(second.model))


def test_a_run_with_the_same_options_has_the_same_weights(tmp_path: Path, reference_cache: Path) -> None:
    first, second = run(tmp_path), run(tmp_path)
    assert torch.equal(weights(first.model), weights(second.model))
    assert log_rows(first) == log_rows(second)


@pytest.mark.parametrize(
    "change",
    [{"ld_alpha": 0.5}, {"max_length": 9}, {"model": lambda: tiny_model(seed=2)}],
    ids=["ld_alpha", "max_length", "model"],
)
def test_what_changes_the_log_probs_is_computed(
    change: dict, tmp_path: Path, asked: list, reference_cache: Path
) -> None:
    run(tmp_path)
    asked.clear()
    run(tmp_path, **{name: value() if callable(value) else value for name, value in change.items()})
    assert asked


def test_an_evaluation_set_is_asked_for_once(tmp_path: Path, asked: list) -> None:
    options = {"eval_dataset": dataset(5, seed=9), "eval_strategy": "steps", "eval_steps": 2}
    evaluated = run(tmp_path, **options)
    assert len(asked) == STEPS + 1
    asked.clear()
    metrics = evaluated.evaluate()
    assert evaluated.predict(dataset(5, seed=9)).metrics["test_loss"] == pytest.approx(metrics["eval_loss"])
    assert not asked
    other = trainer(tmp_path, eval_dataset=dataset(7, seed=9))
    other.evaluate()
    assert [len(rows) for rows in asked] == [7], "two of its rows are new, and they stand in one micro-batch"


@pytest.mark.parametrize("precompute", [False, True])
def test_streams(precompute: bool, tmp_path: Path, asked: list) -> None:
    """Epochs of a stream are not seen by the trainer; what makes a row known is its content."""
    for expected in (STEPS, 0):
        rows = dataset(4 * STEPS).to_iterable_dataset()
        run(tmp_path, rows=rows, max_steps=3 * STEPS, precompute_ref_log_probs=precompute)
        assert len(asked) == expected
        asked.clear()
    run(tmp_path, precompute_ref_log_probs=True)  # a pass before training finds the same
    assert not asked


def test_two_runs_of_one_trainer(tmp_path: Path, asked: list) -> None:
    made = run(tmp_path)
    made.train()
    assert len(asked) == STEPS
    with torch.no_grad():
        made.ref_model.lm_head.weight.mul_(1.1)
    made.train()
    assert len(asked) == 2 * STEPS, "another reference has other log-probs"


def test_trials_with_a_new_model_each(tmp_path: Path, asked: list) -> None:
    args = DPOConfig(str(tmp_path), max_steps=2, report_to="none", save_strategy="no", learning_rate=1e-2)
    made = DPOTrainer(
        args=args, train_dataset=dataset(), processing_class=word_tokenizer(), model_init=lambda: tiny_model(seed=1)
    )
    for expected in (2, 0):
        made.train()
        assert len(asked) == expected
        asked.clear()


def bema_later(made: Any) -> None:
    made.add_callback(BEMACallback(update_freq=1, update_ref_model=True, ref_model_update_freq=2))


@pytest.mark.parametrize("change", [bema_later, lambda made: None], ids=["BEMA", "TR-DPO"])
def test_a_moving_reference_is_asked_every_time(
    change: Callable[[Any], None], tmp_path: Path, asked: list, reference_cache: Path
) -> None:
    made = trainer(tmp_path, **EPOCHS, sync_ref_model=change is not bema_later, ref_model_sync_steps=2)
    change(made)
    made.train()
    assert len(asked) == 3 * STEPS
    assert not reference_cache.exists()


def test_a_reference_that_was_moved_by_hand_is_not_remembered(tmp_path: Path, reference_cache: Path) -> None:
    """Nothing of what it gave may reach the disk, where later runs would take it for what it was at the start."""

    class Moving(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            for parameter in made.ref_model.parameters():
                parameter.data.mul_(1.01)

    made = trainer(tmp_path, **EPOCHS, callbacks=[Moving()])
    with pytest.raises(ValueError, match="weights have changed during the run"):
        made.train()
    assert not reference_cache.exists()


def test_off(tmp_path: Path, asked: list, reference_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFOPT_CACHE", "off")
    run(tmp_path)
    assert len(asked) == 3 * STEPS
    asked.clear()
    run(tmp_path, precompute_ref_log_probs=True)
    assert sum(map(len, asked)) == 4 * STEPS
    assert not any(reference_cache.parent.rglob("*reference_logps*"))


def test_a_collator_of_the_users_may_make_other_batches_of_a_row(tmp_path: Path, asked: list) -> None:
    made = DPOTrainer(
        tiny_model(seed=1),
        args=DPOConfig(
            str(tmp_path), num_train_epochs=2, per_device_train_batch_size=4, report_to="none", save_strategy="no"
        ),
        data_collator=DataCollatorForPreference(pad_token_id=0),
        train_dataset=dataset(4 * STEPS),
        processing_class=word_tokenizer(),
    )
    made.train()
    assert len(asked) == 2 * STEPS


def test_what_a_collator_of_the_users_made_is_no_other_runs(tmp_path: Path, asked: list) -> None:
    """One that cuts rows has other log-probs for the same rows, which must neither be left to others nor come back."""
    cut = DataCollatorForPreference(pad_token_id=0, max_length=6)
    options = {"precompute_ref_log_probs": True, "max_steps": 1, "num_train_epochs": 1}
    run(tmp_path, data_collator=cut, **options)
    whole = run(tmp_path, **options)
    assert len(asked) == 4, "two batches of eight rows each"
    again = run(tmp_path, data_collator=cut, **options)
    assert len(asked) == 6
    for made in (whole, again):
        assert log_rows(made)[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"data_collator": DataCollatorForPreference(pad_token_id=0)}, "a data collator of your own"), ({}, "is off")],
)
def test_a_stream_that_cannot_be_looked_up_says_so(
    options: dict, reason: str, tmp_path: Path, asked: list, caplog: pytest.LogCaptureFixture, monkeypatch
) -> None:
    if not options:
        monkeypatch.setenv("PREFOPT_CACHE", "off")
    rows = dataset(4).to_iterable_dataset()
    run(tmp_path, rows=rows, precompute_ref_log_probs=True, max_steps=2, **options)
    assert len(asked) == 2
    assert re.search(f"a stream is scored whenever a row comes .*{reason}", caplog.text)


def test_weights_that_an_evaluation_turns_to_half_precision(tmp_path: Path, asked: list) -> None:
    """The base under an adapter is the reference's too; a copy of its own stays as it was."""
    for kind, expected in (("adapter off", 3), ("copy", 1)):
        made = trainer(tmp_path, bf16_full_eval=True, eval_dataset=dataset(4), **KINDS[kind])
        for _ in range(3):
            made.evaluate()
        assert len(asked) == expected
        asked.clear()


def test_a_policy_that_was_changed_is_refused_also_by_what_was_read(tmp_path: Path, reference_cache: Path) -> None:
    run(tmp_path)
    made = trainer(tmp_path, **EPOCHS)
    with torch.no_grad():
        made.model.lm_head.weight.mul_(1.5)
    with pytest.raises(ValueError, match="differ before the first step"):
        made.train()


def test_a_reference_that_is_not_finite_is_named(
    tmp_path: Path, reference_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(**options: Any) -> Any:
        made = trainer(tmp_path, eval_dataset=dataset(3), **options)
        with torch.no_grad():
            made.ref_model.lm_head.weight.fill_(float("nan"))
        return made

    with pytest.raises(ValueError, match=r"gives row 0 the log-probs \(nan, nan\)"):
        broken().evaluate()
    with caplog.at_level(logging.WARNING):
        broken(on_nonfinite="skip").evaluate()
    assert "gives row 0 the log-probs (nan, nan)" in caplog.text


def test_rows_without_a_key_are_computed_every_time(
    tmp_path: Path, asked: list, caplog: pytest.LogCaptureFixture
) -> None:
    """Prepared rows may have columns of any kind, and one more might change what is scored."""
    rows = [
        {"prompt_ids": [5, 6], "when": datetime(2026, 1, 1)}
        | {f"{branch}_ids": ids for branch, ids in (("chosen", [7, number]), ("rejected", [8, 9, number]))}
        | {"chosen_mask": [True] * 2, "rejected_mask": [True] * 3, "row": number}
        for number in range(4 * STEPS)
    ]
    with caplog.at_level(logging.WARNING):
        run(tmp_path, rows=Dataset.from_list(rows))
    assert len(asked) == 3 * STEPS
    assert len(re.findall(r"in every epoch. Column 'when' of row \d+ holds datetime", caplog.text)) == 1
