"""A run that is asked to stop saves and stops wherever it is, and goes on as if nobody had asked."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "distributed"))

import pytest
import torch
from processes import start
from runs import dataset, log_rows, trainer, weights
from scale import scaled
from tiny_models import save_tiny, tiny_model
from transformers import EarlyStoppingCallback, TrainerCallback
from worlds import start_world

from prefopt import files
from prefopt.checkpoints.manifest import faults
from prefopt.cli.main import main
from prefopt.reference import ModelReference
from prefopt.trainer.ending import signals as signals_module
from prefopt.trainer.ending.record import METRICS, read_rows
from prefopt.trainer.ending.signals import InterruptedRun, Signals, TerminatedRun

STOPPED = (InterruptedRun, TerminatedRun)
MOMENTS = scaled(6, 100)
PLANNED = 10
"""Steps of the runs that are stopped at random."""
START_SECONDS = 300
"""A limit that tells a run that hangs from a machine that is busy."""


class At(TrainerCallback):
    """Sends a signal to this process at the ``count``-th time that an event comes."""

    def __init__(self, event: str, count: int, number: int) -> None:
        self.left = count
        setattr(self, event, self.maybe)
        self.number = number

    def maybe(self, *args: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)


def made(folder: Path, *callbacks: Any, **options: Any) -> Any:
    """A run with dropout, whose evaluation and order use random numbers, and that crosses an epoch's end."""
    options = {
        "model": tiny_model(seed=1, attention_dropout=0.3),
        "disable_dropout": False,
        "count": 16,
        "max_steps": 7,
        "eval_dataset": dataset(10, seed=3),
        "per_device_eval_batch_size": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        **options,
    }
    if options.pop("callbacks", None):
        callbacks = (*callbacks, EarlyStoppingCallback(early_stopping_patience=2))
    return trainer(folder, callbacks=list(callbacks), **options)


def rows_on_disk(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run without times."""
    return [
        {name: value for name, value in row.items() if name != "time" and not name.endswith(("runtime", "per_second"))}
        for row in read_rows(folder / METRICS)
    ]


def assert_same(run: Any, expected: Any) -> None:
    assert torch.equal(weights(run.model), weights(expected.model))
    assert log_rows(run) == log_rows(expected)
    assert rows_on_disk(Path(run.args.output_dir)) == rows_on_disk(Path(expected.args.output_dir))


WHOLE: dict[str, Any] = {}
"""Options -> the run that was not interrupted."""


def whole(root: Path, **options: Any) -> Any:
    key = repr(sorted(options)) + repr([value for _, value in sorted(options.items()) if isinstance(value, str | int)])
    if key not in WHOLE:
        WHOLE[key] = made(root / "whole", **options)
        WHOLE[key].train()
    return WHOLE[key]


def resumed(folder: Path, **options: Any) -> Any:
    run = made(folder, **options)
    run.train(resume_from_checkpoint=True)
    return run


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


# -- several ranks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["step", "evaluation"])
def test_one_rank_that_is_asked_is_enough(tmp_path: Path, place: str) -> None:
    world = start_world(2, tmp_path, on_two_ranks, tmp_path, place)
    world.finish(START_SECONDS)
    told = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert told[0] == told[1]
    assert told[0]["code"] == 143
    assert not faults(tmp_path / "run" / f"checkpoint-{told[0]['step']}")
    assert torch.tensor(told[0]["weights"]).allclose(torch.tensor(told[0]["whole"]), rtol=0, atol=0)


def on_two_ranks(folder: Path, place: str) -> None:
    """Rank 1 alone is sent the signal; then both go on, and a run that was not stopped is made beside."""
    rank = int(os.environ["RANK"])
    event = {"step": "on_step_begin", "evaluation": "on_prediction_step"}[place]
    options = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "use_cpu": True}
    sent = [At(event, 2, signal.SIGTERM)] if rank == 1 else []
    with pytest.raises(TerminatedRun) as raised:
        made(folder / "run", *sent, **options).train()
    run, expected = resumed(folder / "run", **options), made(folder / "whole", **options)
    expected.train()
    told = {
        "code": raised.value.code,
        "step": raised.value.step,
        "weights": weights(run.model).tolist(),
        "whole": weights(expected.model).tolist(),
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(told))


# -- the second signal -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["evaluation", "save"])
def test_a_second_signal_stops_at_once(tmp_path: Path, place: str) -> None:
    process = start(stubborn, tmp_path, place)
    process.join()
    assert process.exitcode == -signal.SIGINT
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ([] if place == "save" else ["checkpoint-1"])


def stubborn(folder: Path, place: str) -> None:
    signals_module.SAME_REQUEST = 0.2

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    def observer(operation: str, path: Path) -> None:
        if place == "save" and path.name == "manifest.json":
            twice()

    class InEvaluation(TrainerCallback):
        def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
            if place == "evaluation":
                twice()

    with files.observed(observer):
        made(folder, InEvaluation(), save_steps=1).train()


# -- handlers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def kept_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("kept_handlers")
def test_handlers_are_those_of_before_and_the_users_are_called() -> None:
    called: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: called.append(number))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    run = Signals()
    with run.handled():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert run.request == signals_module.Request.NOTHING
        os.kill(os.getpid(), signal.SIGTERM)
        assert run.request == signals_module.Request.STOP
    assert called == [signal.SIGTERM]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
    with run.handled():
        assert run.request == signals_module.Request.NOTHING


def test_another_thread_trains_without_handlers(tmp_path: Path) -> None:
    before, failed = signal.getsignal(signal.SIGTERM), []

    class Look(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            failed.append(signal.getsignal(signal.SIGTERM) != before)

    thread = threading.Thread(target=made(tmp_path, Look(), eval_strategy="no", max_steps=2).train)
    thread.start()
    thread.join()
    assert failed == [False, False]


@pytest.mark.usefixtures("kept_handlers")
def test_the_handler_of_transformers_gives_way(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run = made(tmp_path, At("on_step_begin", 2, signal.SIGTERM), enable_jit_checkpoint=True)
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(TerminatedRun):
        run.train()
    assert signal.getsignal(signal.SIGTERM) == before
    assert not faults(tmp_path / "checkpoint-2")


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
        if code == 0:  # it had ended
            continue
        assert code == 128 + number, (moment, code)
        record = json.loads((folder / "run.json").read_text())
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
