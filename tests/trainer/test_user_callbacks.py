"""Callbacks that users attach: transformers' own, those that steer the run, and TRL's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import TRAINERS, dataset, trainer, weights
from transformers import (
    DefaultFlowCallback,
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)

from prefopt.trainer.progress.showing import ProgressDisplay

EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]


class Recorder(TrainerCallback):
    """Keeps the order of events, and what comes with each."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.given: dict[str, set[str]] = {}
        self.seen: dict[str, Any] = {}


def recording(event: str) -> Any:
    def method(self: Recorder, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(event)
        self.given[event] = {name for name, value in kwargs.items() if value is not None}
        self.seen |= kwargs

    return method


for name in EVENTS:
    setattr(Recorder, name, recording(name))

STEP = ["on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_log"]
ALWAYS = {"model", "processing_class", "optimizer", "lr_scheduler", "train_dataloader"}


@pytest.mark.parametrize("method", TRAINERS)
def test_events_come_in_their_order_with_their_arguments(method: str, tmp_path: Path) -> None:
    """An accumulation of 2 is one step here: it has no sub-steps of the loop."""
    recorder = Recorder()
    options = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps"}
    run = trainer(tmp_path, method, eval_dataset=dataset(5), max_steps=2, save_steps=2, callbacks=[recorder], **options)
    run.train()
    evaluation = ["on_prediction_step", "on_log", "on_evaluate", "on_save"]
    begin, end = ["on_init_end", "on_train_begin", "on_epoch_begin"], ["on_epoch_end", "on_log", "on_train_end"]
    assert recorder.events == [*begin, *STEP, *STEP, *evaluation, *end]
    assert all(recorder.given[event] >= ALWAYS for event in (*STEP, "on_evaluate", "on_save", "on_train_end"))
    assert recorder.seen["model"] is run.model
    assert recorder.seen["processing_class"] is run.processing_class
    assert len(recorder.seen["train_dataloader"]) == 5  # steps of eight pairs in forty
    assert len(recorder.seen["eval_dataloader"]) == 1
    assert recorder.seen["metrics"]["eval_rewards/accuracies"] >= 0


class Steering(TrainerCallback):
    """Sets a flag of the control after one step."""

    def __init__(self, flag: str, step: int) -> None:
        self.flag, self.step = flag, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == self.step:
            setattr(control, self.flag, True)
        return control


@pytest.mark.parametrize("method", TRAINERS)
def test_a_callback_steers_the_run(method: str, tmp_path: Path) -> None:
    flags = [Steering("should_evaluate", 2), Steering("should_save", 3), Steering("should_training_stop", 4)]
    flags.append(Steering("should_log", 3))
    run = trainer(tmp_path, method, eval_dataset=dataset(5), logging_strategy="no", callbacks=flags)
    run.train()
    assert run.state.global_step == 4
    assert [row["step"] for row in run.state.log_history if "eval_loss" in row] == [2]
    assert [row["step"] for row in run.state.log_history if "loss" in row] == [3]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


@pytest.mark.parametrize("method", TRAINERS)
def test_early_stopping_watches_any_metric(method: str, tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        method,
        eval_dataset=dataset(5, seed=5),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        learning_rate=0.0,
        load_best_model_at_end=True,
        metric_for_best_model="eval_rewards/accuracies",
        greater_is_better=True,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    run.train()
    assert run.state.global_step == 3  # the first is the best, and two more are not better
    assert run.state.best_global_step == 1


@pytest.mark.parametrize("shown", [ProgressDisplay, PrinterCallback])
def test_progress_is_shown(shown: type, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """By the display of the run in lines of its own, or as transformers prints rows where bars are switched off."""
    options = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    run = trainer(tmp_path, eval_dataset=dataset(5), max_steps=2, disable_tqdm=shown is PrinterCallback, **options)
    kinds = {type(callback) for callback in run.callback_handler.callbacks}
    assert {shown, DefaultFlowCallback} <= kinds
    assert ProgressCallback not in kinds
    run.train()
    printed = capsys.readouterr()
    assert ("rewards/margins" in printed.out) == (shown is PrinterCallback)
    assert ("step 2/2" in printed.out) == (shown is ProgressDisplay)


def test_callbacks_are_added_and_removed(tmp_path: Path) -> None:
    """Instances and classes, before and after; a callback that is taken out is heard no more."""
    run = trainer(tmp_path, max_steps=1, callbacks=[Recorder])
    late = Recorder()
    run.add_callback(late)
    taken = run.pop_callback(Recorder)
    assert taken is not late
    run.train()
    assert "on_step_end" in late.events
    assert taken.events == ["on_init_end"]


class ChangesWeights(TrainerCallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)


def test_weights_that_a_callback_changes_are_trained(tmp_path: Path) -> None:
    run = trainer(tmp_path, "cpo", max_steps=1, learning_rate=0.0, callbacks=[ChangesWeights()])
    before = run.model.lm_head.weight.detach().clone()
    run.train()
    assert torch.equal(run.model.lm_head.weight, 1.5 * before)


def test_a_config_can_be_written_as_json(tmp_path: Path) -> None:
    """What trackers are given; and the state that callbacks read."""
    for method in TRAINERS:
        run = trainer(tmp_path, method, max_steps=1, model_init_kwargs={"dtype": torch.bfloat16})
        values = json.loads(json.dumps(run.args.to_dict()))
        assert values["model_init_kwargs"] == {"dtype": "bfloat16"}
        sanitised = run.args.to_sanitized_dict()
        assert all(isinstance(value, bool | int | float | str) for value in sanitised.values())


# -- TRL's ---------------------------------------------------------------------------------------------------------


def trl_callback(name: str) -> Any:
    return getattr(pytest.importorskip("trl"), name)


@pytest.mark.trl
@pytest.mark.parametrize("method", TRAINERS)
def test_trls_progress_bar(method: str, tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    run = trainer(
        tmp_path, method, eval_dataset=dataset(5), callbacks=[trl_callback("RichProgressCallback")()], **options
    )
    run.train()
    assert run.state.global_step == 2


@pytest.mark.trl
def test_trls_tr_dpo_callback(tmp_path: Path) -> None:
    """Attached by hand to a run whose reference is a model of its own: after a whole update the two are equal."""
    run = trainer(tmp_path, max_steps=2)
    run.args.ref_model_sync_steps, run.args.ref_model_mixup_alpha = 2, 1.0
    run.add_callback(trl_callback("SyncRefModelCallback")(run.ref_model, run.accelerator))
    run.train()
    assert torch.equal(weights(run.ref_model), weights(run.model))


@pytest.mark.trl
def test_trls_bema_callback(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=3, callbacks=[trl_callback("BEMACallback")(update_freq=1)])
    run.train()
    assert (tmp_path / "bema" / "model.safetensors").is_file()


@pytest.mark.trl
@pytest.mark.parametrize("method", TRAINERS)
def test_trls_log_of_completions(method: str, tmp_path: Path) -> None:
    """It reads the column `prompt`, which the trainer's own evaluation set has no more: it is given the rows again."""
    run = trainer(tmp_path, method, eval_dataset=dataset(5), max_steps=2)
    callback = trl_callback("LogCompletionsCallback")(run, freq=1)
    callback.eval_dataset = dataset(3)
    run.add_callback(callback)
    run.train()
    assert [row[0] for row in callback.table] == ["1"] * 3 + ["2"] * 3
    assert [row[1] for row in callback.table[:3]] == dataset(3)["prompt"]
    assert [row[2] for row in callback.table[:3]] != [row[2] for row in callback.table[3:]]
