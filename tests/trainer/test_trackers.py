"""Trackers, offline: each gets the metrics of the log under their names, the config without secrets, the samples, and
word of a run that fails; and nothing goes over the network."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from short_runs import TRAINERS, dataset, trainer
from transformers import TrainerCallback

from prefopt.trainer.trackers import MLFLOW_TELEMETRY

METRICS = {"train/loss", "train/rewards/margins", "eval/loss", "eval/rewards/accuracies", "train/logps/chosen"}
COLUMNS = ["step", "prompt", "chosen", "rejected", "policy"]
SECRET = "hf_abcdefghijklmnopqrst"
LOCAL = ("localhost", "127.0.0.1", "::1", None)

asked: list[tuple[Any, ...]] = []
"""What this process has asked of the network."""


@sys.addaudithook
def watch(event: str, args: tuple[Any, ...]) -> None:
    if event == "socket.getaddrinfo" and args[0] not in LOCAL:
        asked.append((event, *args[:2]))
    if event == "socket.connect" and isinstance(args[1], tuple) and args[1][0] not in LOCAL:
        asked.append((event, args[1]))


@pytest.fixture(autouse=True)
def nothing_goes_out_and_no_secret_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv(MLFLOW_TELEMETRY, raising=False)
    asked.clear()
    yield
    assert asked == []
    files = [path for path in tmp_path.rglob("*") if path.is_file()]  # none of a test that was skipped
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def run_with(tracker: str, folder: Path, method: str) -> Any:
    run = trainer(
        folder,
        method,
        eval_dataset=dataset(5),
        max_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        report_to=[tracker],
        run_name=f"run-{method}",
        generate_during_eval=True,
        eval_sample_tokens=3,
        hub_token=SECRET,
    )
    run.train()
    return run


def columns(method: str) -> list[str]:
    return [*COLUMNS, "reference"] if method == "dpo" else COLUMNS


def logged(owner: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the function ``log`` of a module or class is called with; it is called all the same."""
    calls: list[dict[str, Any]] = []
    original: Callable[..., Any] = owner.log

    def log(*args: Any) -> None:
        calls.append(dict(args[-1]))
        original(*args)

    monkeypatch.setattr(owner, "log", log)
    return calls


def check_calls(calls: list[dict[str, Any]]) -> list[Any]:
    """The metrics are there; the tables of samples, of step 0 and step 2."""
    assert {name for call in calls for name in call} >= METRICS
    assert [call["train/global_step"] for call in calls if "eval/samples" in call] == [0, 2]
    return [call["eval/samples"] for call in calls if "eval/samples" in call]


@pytest.mark.parametrize("method", TRAINERS)
def test_tensorboard(method: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = run_with("tensorboard", tmp_path, method)
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    assert set(events.Tags()["scalars"]) >= METRICS
    for row in run.state.log_history:
        for name, value in row.items():
            if name == "loss" or name.startswith("rewards/"):
                shown = {event.step: event.value for event in events.Scalars(f"train/{name}")}
                assert shown[row["step"]] == pytest.approx(value)
    shown = events.Tensors("eval/samples/text_summary")
    assert [event.step for event in shown] == [0, 2]
    header = shown[0].tensor_proto.string_val[0].decode().splitlines()[0]
    assert header == "| " + " | ".join(columns(method)) + " |"
    (arguments,) = events.Tensors("args/text_summary")
    assert json.loads(arguments.tensor_proto.string_val[0])["generate_during_eval"] is True


@pytest.mark.parametrize("method", TRAINERS)
def test_wandb(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    calls = logged(wandb.Run, monkeypatch)
    try:
        run_with("wandb", tmp_path, method)
        assert wandb.config["num_eval_samples"] == 4
        assert SECRET not in str(dict(wandb.config))
    finally:
        wandb.finish()
    tables = check_calls(calls)
    assert [table.columns for table in tables] == [columns(method)] * 2
    assert len(tables[0].data) == 4


@pytest.mark.parametrize("method", TRAINERS)
def test_trackio(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackio = pytest.importorskip("trackio")
    calls = logged(trackio, monkeypatch)
    run_with("trackio", tmp_path, method)
    assert all(isinstance(table, trackio.Table) for table in check_calls(calls))


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MLFLOW_TELEMETRY, "true")  # this test imports it before the trainer does
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/runs.db")
    run_with("mlflow", tmp_path, "dpo")
    client = mlflow.MlflowClient()
    (kept,) = client.search_runs(["0"])
    assert set(kept.data.metrics) >= {name.replace("train/", "") for name in METRICS if name.startswith("train/")}
    assert kept.data.params["generate_during_eval"] == "True"
    path = client.download_artifacts(kept.info.run_id, "eval/samples.json", str(tmp_path))
    table = json.loads(Path(path).read_text())
    assert table["columns"] == columns("dpo")
    assert [row[0] for row in table["data"]] == [0] * 4 + [2] * 4


def test_mlflow_tells_its_makers_nothing_unless_the_user_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefopt.trainer.trackers import without_telemetry

    without_telemetry(["tensorboard"])
    assert MLFLOW_TELEMETRY not in os.environ
    without_telemetry(["tensorboard", "mlflow"])
    assert os.environ.pop(MLFLOW_TELEMETRY) == "true"
    monkeypatch.setenv(MLFLOW_TELEMETRY, "false")
    without_telemetry(["mlflow"])
    assert os.environ[MLFLOW_TELEMETRY] == "false"


# -- a run that fails --------------------------------------------------------------------------------------------------


class FailsAfterTwoSteps(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2 and not hasattr(self, "failed"):
            self.failed = True
            raise RuntimeError("as planned")


def fails_and_is_done_again(tracker: str, folder: Path, looked_at: Callable[[], Any]) -> Any:
    """What ``looked_at`` gives after a run has failed; then the same trainer trains to its end."""
    run = trainer(folder / "run", max_steps=3, report_to=[tracker], run_name="fails", callbacks=[FailsAfterTwoSteps()])
    with pytest.raises(RuntimeError, match="as planned"):
        run.train()
    seen = looked_at()
    run.train()
    return seen


def test_tensorboard_has_the_rows_of_a_run_that_failed(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def steps() -> list[int]:
        (file,) = tmp_path.rglob("events.out.tfevents.*")
        return [event.step for event in EventAccumulator(str(file)).Reload().Scalars("train/loss")]

    assert fails_and_is_done_again("tensorboard", tmp_path, steps) == [1, 2]


def test_trackio_has_the_rows_of_a_run_that_failed(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    import sqlite3

    from trackio.utils import TRACKIO_DIR

    def rows() -> list[str]:
        (file,) = Path(TRACKIO_DIR).glob("*.db")
        found = sqlite3.connect(file).execute("select metrics from metrics where run_name = 'fails'").fetchall()
        return [text for (text,) in found if "train/loss" in str(text)]

    assert len(fails_and_is_done_again("trackio", tmp_path, rows)) == 2
    (file,) = Path(TRACKIO_DIR).glob("*.db")
    assert SECRET.encode() not in file.read_bytes()


def test_wandb_calls_a_run_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    ends: list[int | None] = []
    original = wandb.Run.finish

    def finish(self: Any, exit_code: int | None = None, *args: Any, **kwargs: Any) -> None:
        ends.append(exit_code)
        original(self, exit_code, *args, **kwargs)

    monkeypatch.setattr(wandb.Run, "finish", finish)
    try:
        assert fails_and_is_done_again("wandb", tmp_path, lambda: (ends[:], wandb.run)) == ([1], None)
        assert wandb.run is not None
    finally:
        wandb.finish()


def test_mlflow_calls_a_run_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MLFLOW_TELEMETRY, "true")
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/failed.db")
    client = mlflow.MlflowClient()

    def statuses() -> list[str]:
        return sorted(run.info.status for run in client.search_runs(["0"]))

    assert fails_and_is_done_again("mlflow", tmp_path, statuses) == ["FAILED"]
    assert statuses() == ["FAILED", "FINISHED"]
