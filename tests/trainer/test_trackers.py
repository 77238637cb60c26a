"""Trackers, offline: each gets the metrics of training and evaluation under its names, the config, and the samples."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from short_runs import TRAINERS, dataset, trainer

METRICS = {"train/loss", "train/rewards/margins", "eval/loss", "eval/rewards/accuracies", "train/logps/chosen"}
COLUMNS = ["step", "prompt", "chosen", "rejected", "policy"]


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

    run_with("tensorboard", tmp_path, method)
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    assert set(events.Tags()["scalars"]) >= METRICS
    shown = events.Tensors("eval/samples/text_summary")
    assert [event.step for event in shown] == [0, 2]
    header = shown[0].tensor_proto.string_val[0].decode().splitlines()[0]
    assert header == "| " + " | ".join(columns(method)) + " |"
    (arguments,) = events.Tensors("args/text_summary")
    assert json.loads(arguments.tensor_proto.string_val[0])["generate_during_eval"] is True


@pytest.mark.parametrize("method", TRAINERS)
def test_wandb(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    calls = logged(wandb.Run, monkeypatch)
    try:
        run_with("wandb", tmp_path, method)
        assert wandb.config["num_eval_samples"] == 4
    finally:
        wandb.finish()
    tables = check_calls(calls)
    assert [table.columns for table in tables] == [columns(method)] * 2
    assert len(tables[0].data) == 4


@pytest.mark.parametrize("method", TRAINERS)
def test_trackio(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    trackio = pytest.importorskip("trackio")
    calls = logged(trackio, monkeypatch)
    run_with("trackio", tmp_path, method)
    assert all(isinstance(table, trackio.Table) for table in check_calls(calls))


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
