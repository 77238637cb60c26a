"""A run that is asked to stop saves and stops wherever it is, and goes on as if nobody had asked."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import start
from short_runs import dataset
from signal_runs import MOMENTS, PLANNED, START_SECONDS, STOPPED, At, assert_same, made, resumed, whole
from tiny_models import save_tiny
from transformers import TrainerCallback

from prefopt import files
from prefopt.checkpoints.manifest import faults
from prefopt.cli.main import main
from prefopt.reference import ModelReference
from prefopt.trainer.ending.record import METRICS, read_rows
from prefopt.trainer.ending.signals import InterruptedRun, TerminatedRun

SAMPLES = {"generate_during_eval": True, "eval_sample_tokens": 3}
IMPATIENT = {
    "callbacks": "early stopping",
    "restore_callback_states_from_checkpoint": True,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_one_rewards/margins",
    "greater_is_better": False,
    "save_steps": 2,
}
"""The margin grows, so that the best is the first."""
TWO_SETS = {"eval_dataset": {"one": dataset(6, seed=3), "two": dataset(6, seed=4)}}
BY_EPOCH = {"eval_strategy": "epoch", "logging_strategy": "epoch", "save_strategy": "epoch"}
BEST = {"load_best_model_at_end": True, "save_steps": 2, "metric_for_best_model": "loss"}
PLATEAU = {
    "lr_scheduler_type": "reduce_lr_on_plateau",
    "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5},
    "metric_for_best_model": "loss",
}
PLACES: dict[str, tuple[str, int, dict[str, Any], int]] = {
    "step": ("on_step_begin", 3, {}, 3),
    "update": ("on_pre_optimizer_step", 5, {}, 5),
    "step of an evaluation": ("on_step_begin", 2, {}, 2),
    "first step": ("on_step_begin", 1, {}, 1),
    "evaluation": ("on_prediction_step", 2, {}, 2),
    "evaluation, best model": ("on_prediction_step", 5, BEST, 4),
    "evaluation, plateau": ("on_prediction_step", 5, PLATEAU, 4),
    "last evaluation": ("on_prediction_step", 1, {"eval_steps": 7}, 7),
    "second set": ("on_prediction_step", 3, {**TWO_SETS, **SAMPLES}, 2),
    "second set, early stopping": ("on_evaluate", 3, {**TWO_SETS, **IMPATIENT}, 4),
    "evaluation that ends the run": ("on_evaluate", 5, {**TWO_SETS, **IMPATIENT}, 6),
    "last step of an epoch": ("on_step_begin", 4, BY_EPOCH, 4),
    "evaluation of an epoch": ("on_prediction_step", 2, BY_EPOCH, 4),
    "last step": ("on_step_begin", 7, BY_EPOCH, 7),
    "between log and evaluation": ("on_log", 2, {}, 2),
    "samples": ("on_evaluate", 1, SAMPLES, 2),
    "no checkpoints": ("on_step_begin", 3, {"save_strategy": "no"}, 3),
}
"""Place -> event, how many of it, options, and the step after which the run ends."""


@pytest.mark.parametrize("place", PLACES)
def test_wherever_a_run_is_stopped_it_goes_on_as_if_it_was_not(tmp_path: Path, place: str) -> None:
    event, count, options, step = PLACES[place]
    number, ending = ((signal.SIGTERM, TerminatedRun), (signal.SIGINT, InterruptedRun))[list(PLACES).index(place) % 2]
    expected = whole(tmp_path, **options)
    folder = tmp_path / "stopped"
    sent = At(event, count, number)
    stopped = made(folder, sent, **options)
    with pytest.raises(ending) as raised:
        stopped.train()
    assert (raised.value.step, raised.value.checkpoint) == (step, str(folder / f"checkpoint-{step}"))
    assert not faults(folder / f"checkpoint-{step}")
    assert not stopped.is_in_train
    assert event != "on_prediction_step" or sent.left == 0  # no further batch was evaluated
    run = resumed(folder, **options)
    assert_same(run, expected)
    if run.sampling is not None:
        assert (folder / "samples.jsonl").read_text() == Path(expected.args.output_dir, "samples.jsonl").read_text()


def test_in_a_save_the_checkpoint_is_finished_and_not_saved_twice(tmp_path: Path) -> None:
    expected = whole(tmp_path)
    folder, saved = tmp_path / "stopped", []

    def observer(operation: str, path: Path) -> None:
        if path.name == "manifest.json" and operation == "write":
            saved.append(path.parent.name)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # passed on by a launcher: the same request

    with files.observed(observer), pytest.raises(TerminatedRun) as raised:
        made(folder).train()
    assert raised.value.step == 3
    assert len(saved) == 1
    assert [path.name for path in folder.glob("*checkpoint-*")] == ["checkpoint-3"]
    assert_same(resumed(folder), expected)


def test_a_checkpoint_is_asked_for_and_the_run_goes_on(tmp_path: Path) -> None:
    options = {"save_strategy": "no"}
    expected = whole(tmp_path, **options)
    for place, event, count, step in (("step", "on_step_begin", 5, 5), ("evaluation", "on_prediction_step", 2, 2)):
        folder = tmp_path / place
        run = made(folder, At(event, count, signal.SIGUSR1), **options)
        run.train()
        assert [path.name for path in folder.glob("checkpoint-*")] == [f"checkpoint-{step}"]
        assert_same(run, expected)
        assert_same(resumed(folder, **options), expected)


def test_what_the_reference_has_scored_before_training_is_kept(tmp_path: Path, monkeypatch, reference_cache) -> None:
    asked: list[tuple[int, ...]] = []
    original = ModelReference.__call__

    def counted(self: Any, batch: Any) -> Any:
        asked.append(batch.rows)
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    monkeypatch.setattr(ModelReference, "__call__", counted)
    options = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 4}
    with pytest.raises(TerminatedRun) as raised:
        made(tmp_path / "run", **options).train()
    assert (raised.value.step, raised.value.checkpoint, len(asked)) == (0, None, 2)
    scored = {row for rows in asked for row in rows}
    made(tmp_path / "run", eval_strategy="no", **options).train(resume_from_checkpoint=True)
    assert not scored & {row for rows in asked[2:] for row in rows}
    assert len(asked) == 4


def test_code_after_training_does_not_run_on_half_a_run(tmp_path: Path) -> None:
    process = start(script, tmp_path)
    process.join()
    assert process.exitcode == 143
    assert not (tmp_path / "published").exists()


def script(folder: Path) -> None:
    with contextlib.suppress(Exception):
        made(folder, At("on_step_begin", 2, signal.SIGTERM)).train()
    (folder / "published").touch()


def test_a_signal_to_the_whole_group_leaves_the_workers_at_work(tmp_path: Path) -> None:
    process = start(whole_group, tmp_path)
    process.join(START_SECONDS)
    assert process.exitcode == 143
    assert not faults(tmp_path / "checkpoint-3")


def whole_group(folder: Path) -> None:
    os.setpgrp()

    class ToAll(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                os.killpg(0, signal.SIGTERM)
                time.sleep(0.3)

    made(folder, ToAll(), dataloader_num_workers=2).train()


def test_the_command_line_says_it_without_a_traceback(tmp_path: Path, caplog, capfd) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in dataset(8)))
    options = {
        "model_name_or_path": save_tiny(tmp_path / "model"),
        "dataset_name": str(data),
        "output_dir": str(tmp_path / "run"),
        "max_steps": "5",
        "report_to": "none",
        "per_device_train_batch_size": "2",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]

    def observer(operation: str, path: Path) -> None:
        if path.name == METRICS:
            os.kill(os.getpid(), signal.SIGINT)

    with files.observed(observer):
        code = main(["dpo", *arguments, "--use_cpu", "--logging_steps", "1"])
    assert code == 130
    assert "SIGINT was received: stopped after step 1." in caplog.text
    assert "Traceback" not in capfd.readouterr().err
    assert not faults(tmp_path / "run" / "checkpoint-1")
    assert not (tmp_path / "run" / "model.safetensors").exists()


# -- random moments ----------------------------------------------------------------------------------------------------


def long_run(folder: Path, ready: Any, **options: Any) -> None:
    """A run that is busy with everything in turn; it ends as the command line's does."""
    os.environ["PREFOPT_CACHE"] = str(folder / "cache")
    torch.set_num_threads(1)
    run = random_run(folder)
    ready.set()
    try:
        run.train()
    except STOPPED as stopped:
        sys.exit(128 + stopped.signal)


def random_run(folder: Path) -> Any:
    options = {"max_steps": PLANNED, "eval_steps": 1, "save_steps": 2, "save_total_limit": 2}
    return made(folder, count=24, precompute_ref_log_probs=True, precompute_ref_batch_size=2, **options)


def test_at_random_moments(tmp_path: Path, figure: Callable[[str, str], None], monkeypatch) -> None:
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    expected = random_run(tmp_path / "whole")
    began = time.monotonic()
    expected.train()
    lasted, chance = time.monotonic() - began, random.Random(5)
    good, late, moment = 0, 0, 0
    while good < MOMENTS:
        moment += 1
        assert moment <= 3 * MOMENTS, "most runs had ended before their signal"
        folder = tmp_path / f"run-{moment}"
        number = (signal.SIGTERM, signal.SIGINT)[moment % 2]
        step, code = stopped_after(folder, chance.uniform(0, lasted * 0.9), number)
        record = json.loads((folder / "run.json").read_text())
        if record["status"] == "finished":  # a signal while its report is drawn does what it always does
            continue
        assert code == 128 + number, (moment, code)
        assert (record["status"], record["reason"]["signal"]) == ("interrupted", number.name)
        late += record["steps"] > step + 2  # the row of a step is logged at its end, and another may have begun
        assert record["steps"] == 0 or not faults(folder / f"checkpoint-{record['steps']}")
        run = random_run(folder)
        run.train(resume_from_checkpoint=True)
        assert_same(run, expected)
        good += 1
    figure("signals", f"{good} of {MOMENTS} valid checkpoints that go on exactly, {late} later than the next step")
    assert late == 0


def stopped_after(folder: Path, seconds: float, number: int) -> tuple[int, int]:
    """The last step that was logged when the signal was sent, and the exit status."""
    ready = multiprocessing.get_context("forkserver").Event()
    process = start(long_run, folder, ready)
    assert ready.wait(START_SECONDS), "the process did not start"
    time.sleep(seconds)
    steps = [row["step"] for row in read_rows(folder / METRICS)]
    if process.is_alive():
        os.kill(process.pid, number)  # type: ignore[arg-type]
    process.join(START_SECONDS)
    assert process.exitcode is not None, "the run did not stop"
    return max(steps, default=0), process.exitcode
