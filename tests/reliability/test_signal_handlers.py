"""The second signal, handlers of others, ranks: who is told, and what it does."""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "distributed"))

import pytest
import torch
from processes import start
from short_runs import weights
from signal_runs import START_SECONDS, At, made, resumed
from transformers import TrainerCallback
from worlds import start_world

from prefopt import files
from prefopt.checkpoints.manifest import faults
from prefopt.trainer.ending import signals as signals_module
from prefopt.trainer.ending.record import RUN
from prefopt.trainer.ending.signals import InterruptedRun, Interruption, Signals, TerminatedRun

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
    run = made(folder / "run", *sent, **options)
    with pytest.raises(TerminatedRun) as raised:
        run.train()
    if place == "step":
        run.train(resume_from_checkpoint=True)  # the request of the first run is not one of the second
    else:
        run = resumed(folder / "run", **options)
    expected = made(folder / "whole", **options)
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


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_when_all_is_done_is_not_lost(tmp_path: Path, which: signal.Signals) -> None:
    process = start(signalled_at_the_last_word, tmp_path, which)
    process.join()
    assert process.exitcode == (-signal.SIGTERM if which == signal.SIGTERM else 130)
    assert json.loads((tmp_path / RUN).read_text())["status"] == "finished"
    assert not (tmp_path / "went-on").exists()


def signalled_at_the_last_word(folder: Path, which: signal.Signals) -> None:
    run = made(folder, eval_strategy="no", save_strategy="no", max_steps=1)

    def observer(operation: str, path: Path) -> None:
        if RUN in path.name and run.state.global_step == 1 and operation == "write":
            os.kill(os.getpid(), which)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with files.observed(observer):
            run.train()
        (folder / "went-on").touch()
    except KeyboardInterrupt:
        os._exit(130)


@pytest.mark.parametrize("kind", [InterruptedRun, TerminatedRun])
def test_what_ends_a_run_comes_through_a_pickle(kind: type[Interruption]) -> None:
    stopped = kind(3, "out/checkpoint-3", "All steps were done.")
    again = pickle.loads(pickle.dumps(stopped))
    assert (type(again), str(again), vars(again)) == (kind, str(stopped), vars(stopped))
    assert getattr(again, "code", None) == getattr(stopped, "code", None)


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
